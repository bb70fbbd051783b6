// One feature, opened.

function tokenNode(context, at, largest) {
  const token = text[context.tokens[at]];
  const value = context.activations[at];
  const node = make("span", { className: "token" }, ...glyphs(token));
  if (value) {
    const strength = Math.min(1, Math.abs(value) / largest);
    node.style.setProperty("--strength", (0.08 + 0.77 * strength).toFixed(3));
    node.classList.add("active");
    node.classList.toggle("negative", value < 0);
    node.dataset.value = short(value);
  }
  if (value === null) node.classList.add("masked");
  if (at === context.peak) node.classList.add("peak");
  if (context.foreign.has(at)) node.classList.add("foreign");
  const adds = context.looked?.[at] ?? 0;
  const most = context.strongest ? Math.abs(context.strongest[2]) || 1 : 1;
  if (Math.abs(adds) > 0.05 * most) {
    node.classList.add("looked");
    node.style.setProperty("--looked", Math.min(1, Math.abs(adds) / most).toFixed(3));
  }
  const says = value === null ? "masked: not counted" : value ? `activation ${value}` : "does not fire";
  const looked = context.looked && at <= context.peak ? `\nadds ${short(adds)} at the outlined token` : "";
  node.dataset.tip = `${quoted(token)}\n${says}${looked}${context.foreign.has(at) ? "\nanother document" : ""}`;
  return node;
}

function contextRow(context, largest) {
  const nodes = context.tokens.map((_, at) => tokenNode(context, at, largest));
  const looks = context.strongest ? lookedAt(context.strongest) : null;
  return make(
    "li",
    { className: "context" },
    make("span", { className: "amount", title: context.source }, short(context.activations[context.peak])),
    make(
      "p",
      { className: "words", dir: "ltr" },
      make("span", { className: "before" }, make("span", {}, ...nodes.slice(0, context.peak))),
      make("span", { className: "after" }, ...nodes.slice(context.peak)),
      make("cite", {}, context.source),
    ),
    looks,
  );
}

// the token that adds most to the activation at the peak, which may lie outside the window
function lookedAt([back, token, adds]) {
  const where = back ? `${back} back` : "itself";
  return make(
    "span",
    { className: "source", title: "the token that adds most to the activation at the outlined one" },
    "← ",
    make("span", { className: "token" }, ...glyphs(text[token])),
    ` ${where}, +${short(adds)}`,
  );
}

// ---- what is said of it ----

const METHODS = {
  statistics: ["statistics", "made by counting what it fires on; no language model was asked"],
  llm: ["language model", "written by a language model"],
  human: ["person", "written by a person"],
  imported: ["imported", "from another tool's file"],
};
const exact = (value) => (value === null ? "none" : String(+value.toPrecision(3)));

function explanation({ text: said, method, scores }) {
  const [label, tip] = METHODS[method] ?? [method, ""];
  return make(
    "section",
    { className: "explanation" },
    make("p", {}, make("span", { className: "method", "data-tip": tip }, label), " ", ...glyphs(said)),
    ...scores.map(scored),
  );
}

function scored(score) {
  const note = (name, ...words) => make("span", { className: name }, ...words);
  const controls = Object.entries(score.controls);
  const failed = Object.entries(score.failures).filter(([, n]) => n);
  const n = failed.reduce((sum, [, count]) => sum + count, 0);
  const interval = score.low !== null && score.high !== null;
  return make(
    "div",
    { className: "score" },
    note("scorer", score.scorer, make("small", {}, score.metric)),
    note("figure", make("b", {}, score.value === null ? "not scored" : exact(score.value)), interval ? make("small", {}, `${exact(score.low)} to ${exact(score.high)}`) : ""),
    score.value === null ? note("nothing") : strip(score, controls),
    make(
      "p",
      {},
      note("fact", `n ${score.n.toLocaleString("en")}`),
      listed("controls: ", controls),
      n ? note("fact doubtful", `${n} failed: ${failed.map(([kind, count]) => `${kind} ${count}`).join(", ")}`) : null,
      n && score.wrong !== null ? note("fact", "failures as wrong ", make("b", {}, exact(score.wrong))) : null,
      score.auc === null ? null : note("fact", "AUC ", make("b", {}, exact(score.auc))),
      score.corrected === null ? null : note("fact", "without the judge's own errors ", make("b", {}, exact(score.corrected))),
      listed("by kind: ", Object.entries(score.strata)),
      ...score.notes.map((one) => note("fact", one)),
    ),
  );
}

function listed(title, pairs) {
  if (!pairs.length) return null;
  const words = pairs.flatMap(([name, value], at) => [at ? ", " : title, `${name} `, make("b", {}, exact(value))]);
  return make("span", { className: "fact" }, ...words);
}

// value, interval and controls on one line from 0 (or the lowest) to 1 (or the highest)
function strip({ scorer, value, low, high }, controls) {
  const numbers = [value, low, high, ...controls.map(([, control]) => control)].filter((one) => one !== null);
  const least = Math.min(0, ...numbers);
  const most = Math.max(1, ...numbers);
  const at = (one) => (100 * (one - least)) / (most - least);
  const svg = draw("svg", { viewBox: "-6 0 112 16", role: "img", class: "strip" });
  svg.setAttribute("aria-label", `${scorer}: value and controls on one line`);
  svg.append(draw("path", { class: "axis", d: "M0 8H100" }));
  if (low !== null && high !== null) svg.append(draw("path", { class: "interval", d: `M${at(low)} 8H${at(high)}` }));
  for (const [name, control] of controls) {
    if (control === null) continue;
    const tick = draw("path", { class: "control", d: `M${at(control)} 3V13` });
    tick.dataset.tip = `${name} ${exact(control)}`;
    svg.append(tick);
  }
  svg.append(draw("circle", { class: "value", cx: at(value), cy: 8, r: 4 }));
  return svg;
}

// ---- what is like it ----

function neighbours(title, note, pairs) {
  const rows = pairs.map(([number, alike]) => {
    const other = features.get(number);
    const link = make(other ? "a" : "span", { className: "number" }, String(number));
    if (other) link.href = `#f=${number}`;
    const said = other ? other.label : data.elsewhere[number];
    const words = said ? glyphs(said) : other ? peaksOf(other) : [make("em", {}, "not on this page")];
    return make(
      "li",
      { "--share": Math.max(0, alike) },
      link,
      make("span", { className: "meaning" }, ...words),
      make("span", { className: "amount" }, alike.toFixed(2)),
    );
  });
  return make("section", { className: "near" }, make("h4", {}, title, make("small", {}, note)), make("ol", {}, ...rows));
}

function logits(title, pairs) {
  const largest = Math.max(...pairs.map(([, logit]) => Math.abs(logit)));
  const rows = pairs.map(([token, logit]) =>
    make(
      "li",
      { "--share": Math.abs(logit) / (largest || 1) },
      make("span", { className: "token", "data-tip": quoted(text[token]) }, ...glyphs(text[token])),
      make("span", { className: "amount" }, `${logit > 0 ? "+" : ""}${+logit.toPrecision(3)}`),
    ),
  );
  return make("section", { className: "logits" }, make("h4", {}, title), make("ol", {}, ...rows));
}

function histogram(feature) {
  const { counts, edges } = feature;
  const svg = draw("svg", { viewBox: `0 0 ${counts.length} 40`, preserveAspectRatio: "none", role: "img" });
  svg.setAttribute("aria-label", "Histogram of the nonzero activations, counts on a log scale");
  const highest = Math.log1p(Math.max(...counts));
  counts.forEach((count, at) => {
    const height = count && Math.max(1, (40 * Math.log1p(count)) / highest);
    const bar = draw("rect", { x: at + 0.06, y: 40 - height, width: 0.88, height, class: "bar" });
    const target = draw("rect", { x: at, y: 0, width: 1, height: 40, class: "target" });
    target.dataset.tip = `${short(edges[at])} to ${short(edges[at + 1])}\n${count.toLocaleString("en")} tokens`;
    svg.append(bar, target);
  });
  const ends = [edges[0], edges[edges.length - 1]].map((edge) => make("span", {}, short(edge)));
  return make(
    "section",
    { className: "histogram" },
    make("h4", {}, "Nonzero activations ", make("small", {}, "log count")),
    svg,
    make("div", { className: "ends" }, ...ends),
  );
}

function legend(feature, largest) {
  const signed = feature.edges[0] < 0;
  return make(
    "p",
    { className: "legend" },
    signed ? make("span", {}, `−${short(largest)}`) : null,
    signed ? make("span", { className: "ramp negative" }) : null,
    make("span", {}, "0"),
    make("span", { className: "ramp" }),
    make("span", {}, short(largest)),
    make("span", { className: "note" }, "activation; the outlined token is the one the context was chosen for"),
    feature.top[0]?.looked ? make("span", { className: "note" }, "underlined: what it looks at") : null,
  );
}

function contextLists(feature, largest) {
  const group = (name, note, contexts) =>
    make(
      "section",
      { className: "band" },
      make("h5", {}, name, make("small", {}, note)),
      make("ol", {}, ...contexts.map((context) => contextRow(context, largest))),
    );
  const bands = feature.bands.map(({ lower, upper, low, high, windows }) =>
    group(`${Math.round(100 * lower)}–${Math.round(100 * upper)} %`, `${short(low)} to ${short(high)}`, windows),
  );
  return [
    make("h4", {}, "Contexts ", make("small", {}, "the highest peaks, then draws from quantile bands of its activations")),
    group(`Top ${feature.top.length}`, "one per row", feature.top),
    ...bands,
  ];
}

function detail(feature) {
  const heading = make("h3", { id: "detail-title" }, `Feature ${feature.index}`);
  const top = make("div", { className: "heading" }, heading);
  const said = feature.explanations.map(explanation);
  if (!feature.density) {
    const empty = `Dead: it fired on none of the ${feature.n.toLocaleString("en")} tokens read.`;
    return [top, ...said, make("p", { className: "empty" }, empty), sides(feature, false)];
  }
  const largest = Math.abs(feature.max) || 1;
  const fact = (label, value) => make("div", {}, make("dt", {}, label), make("dd", {}, value));
  top.append(
    make(
      "dl",
      {},
      fact("density", percent(feature.density)),
      fact("one in", `${Math.round(1 / feature.density).toLocaleString("en")} tokens`),
      fact("max activation", short(feature.max)),
      fact("tokens read", feature.n.toLocaleString("en")),
    ),
  );
  return [top, ...said, sides(feature, true), alike(feature), legend(feature, largest), ...contextLists(feature, largest)];
}

function alike(feature) {
  return make(
    "div",
    { className: "sides" },
    feature.nearest.length ? neighbours("Writes alike ", "cosine of decoder rows", feature.nearest) : null,
    feature.together.length ? neighbours("Fires together ", "Jaccard index of tokens", feature.together) : null,
  );
}

function sides(feature, fires) {
  return make(
    "div",
    { className: "sides" },
    fires && feature.counts.length ? histogram(feature) : null,
    feature.promoted.length ? logits("Promotes", feature.promoted) : null,
    feature.suppressed.length ? logits("Suppresses", feature.suppressed) : null,
  );
}
