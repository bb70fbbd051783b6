"use strict";
// The page's script: draws the features from the JSON block, on demand, and the charts. Text from the
// corpus enters the document as text nodes and attribute values only; nothing here parses HTML.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const text = data.vocabulary;
  const features = new Map(data.features.map((feature) => [feature.index, feature]));
  const SVG = "http://www.w3.org/2000/svg";

  function make(tag, properties = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
      if (name in node && name !== "style") node[name] = value;
      else if (name.startsWith("--")) node.style.setProperty(name, value);
      else node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function draw(tag, attributes) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  const short = (value) => (Number.isInteger(value) ? value.toLocaleString("en") : String(+value.toPrecision(3)));
  const percent = (share) => `${+(100 * share).toPrecision(3)} %`;

  // ---- text of tokens: whitespace and control characters made visible ----

  // newline, carriage return, tab, runs of spaces, controls, invisible and bidirectional marks, lone surrogates
  const SPECIAL =
    /\n|\r|\t| {2,}|[\0-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
  const mark = (sign, kind = "space") => make("i", { className: kind }, sign);

  function visible(piece) {
    if (piece === "\n") return [mark("↵"), make("span", { className: "break" }, "\n"), make("wbr")];
    if (piece === "\t") return [mark("⇥"), make("span", { className: "break" }, "\t")];
    if (piece[0] === " ") return [mark("·".repeat(piece.length), "dots"), make("wbr")];
    const code = piece.charCodeAt(0).toString(16);
    if (piece === "\r") return [mark("\\r", "control")];
    return [mark(code.length < 3 ? `\\x${code.padStart(2, "0")}` : `U+${code.toUpperCase()}`, "control")];
  }

  function glyphs(token) {
    if (token === "") return [mark("∅", "control")];
    if (token === " ") return [mark("·", "dots"), make("wbr")];
    const parts = [];
    let last = 0;
    for (const match of token.matchAll(SPECIAL)) {
      parts.push(token.slice(last, match.index), ...visible(match[0]));
      last = match.index + match[0].length;
    }
    parts.push(token.slice(last));
    return parts.filter((part) => part !== "");
  }

  const quoted = (token) =>
    JSON.stringify(token).replace(SPECIAL, (c) =>
      c[0] === " " ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
    );

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
    if (context.foreign[at]) node.classList.add("foreign");
    const adds = context.looked?.[at] ?? 0;
    const most = context.strongest ? Math.abs(context.strongest[2]) || 1 : 1;
    if (Math.abs(adds) > 0.05 * most) {
      node.classList.add("looked");
      node.style.setProperty("--looked", Math.min(1, Math.abs(adds) / most).toFixed(3));
    }
    const says = value === null ? "masked: not counted" : value ? `activation ${value}` : "does not fire";
    const looked = context.looked && at <= context.peak ? `\nadds ${short(adds)} at the outlined token` : "";
    node.dataset.tip = `${quoted(token)}\n${says}${looked}${context.foreign[at] ? "\nanother document" : ""}`;
    return node;
  }

  // ---- search: an index, or text that overlaps a token on which the feature fires ----

  const contextsOf = (feature) => [...feature.top, ...feature.bands.flatMap((band) => band.windows)];

  // 2 where the text overlaps the peak, 1 where it overlaps another active token, else 0
  function firesOn(context, query) {
    const tokens = context.tokens.map((token) => text[token].toLowerCase());
    const whole = tokens.join("");
    const ends = [];
    tokens.reduce((end, token, at) => (ends[at] = end + token.length), 0);
    let found = 0;
    for (let from = whole.indexOf(query); from >= 0; from = whole.indexOf(query, from + 1)) {
      const covers = (at) => ends[at] > from && ends[at] - tokens[at].length < from + query.length;
      if (covers(context.peak)) return 2;
      if (!found && tokens.some((_, at) => context.activations[at] && covers(at))) found = 1;
    }
    return found;
  }

  // how well a feature answers a query: 0 not at all, 4 by its index
  function relevance(feature, query) {
    if (String(feature.index) === query) return 4;
    if (feature.top.some((context) => firesOn(context, query) === 2)) return 3;
    const named = [...feature.promoted, ...feature.suppressed];
    if (String(feature.index).startsWith(query) || contextsOf(feature).some((one) => firesOn(one, query))) return 2;
    return Number(named.some(([token]) => text[token].toLowerCase().includes(query)));
  }

  // ---- one feature ----

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
    if (!feature.density) {
      const said = `Dead: it fired on none of the ${feature.n.toLocaleString("en")} tokens read.`;
      const named = feature.promoted.length || feature.suppressed.length;
      return [top, make("p", { className: "empty" }, said), named ? sides(feature, false) : null];
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
    return [top, sides(feature, true), legend(feature, largest), ...contextLists(feature, largest)];
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

  // ---- the list, and what is selected ----

  const usual = { f: null, q: "", sort: "index", view: "aligned", values: false };
  const state = { ...usual };
  let shown = [];
  const items = new Map();

  function item(feature) {
    const peaks = new Set(feature.top.map((context) => text[context.tokens[context.peak]]).map((token) => token.trim() || token));
    const words = [...peaks].slice(0, 4).map((token) => make("span", { className: "token" }, ...glyphs(token)));
    const link = make(
      "a",
      { href: `#f=${feature.index}` },
      make("span", { className: "number" }, String(feature.index)),
      make("span", { className: "peaks" }, ...(feature.density ? words : [make("em", {}, "dead")])),
      make("span", { className: "often" }, feature.density ? percent(feature.density) : ""),
    );
    link.dataset.index = feature.index;
    return make("li", {}, link);
  }

  function order(left, right) {
    const key = state.sort.replace("-", "");
    const sign = state.sort[0] === "-" ? -1 : 1;
    const size = (feature) => (key === "max" ? Math.abs(feature.max) : feature[key]);
    // a dead feature is neither the rarest nor the weakest: it comes last
    const dead = key === "index" ? 0 : !left.density - !right.density;
    return dead || sign * (size(left) - size(right)) || left.index - right.index;
  }

  function select(index, { focus = false, scroll = true } = {}) {
    state.f = index;
    const feature = features.get(index);
    for (const link of byId("list").querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
    const link = items.get(index)?.firstChild;
    if (link?.isConnected) {
      link.setAttribute("aria-current", "true");
      if (scroll) byId("list").scrollTop += centre(link);
      if (focus) link.focus({ preventScroll: true });
    }
    const none = index === null ? "No feature matches." : `Feature ${index} is not in this report.`;
    const content = feature ? detail(feature) : [make("p", { id: "detail-title", className: "empty" }, none)];
    byId("detail").replaceChildren(...content.filter((node) => node !== null));
  }

  function centre(link) {
    const list = byId("list").getBoundingClientRect();
    const own = link.getBoundingClientRect();
    const outside = own.top < list.top || own.bottom > list.bottom;
    return outside ? own.top - list.top - (list.height - own.height) / 2 : 0;
  }

  function list() {
    const query = state.q.trim() && state.q.toLowerCase();
    const score = new Map(data.features.map((one) => [one.index, query ? relevance(one, query) : 1]));
    shown = data.features
      .filter((one) => score.get(one.index))
      .sort((left, right) => score.get(right.index) - score.get(left.index) || order(left, right));
    byId("list").replaceChildren(...shown.map((feature) => items.get(feature.index)));
    const total = `${data.features.length.toLocaleString("en")} features`;
    byId("status").textContent = query ? `${shown.length.toLocaleString("en")} of ${total}, closest first` : total;
  }

  // what was selected stays selected while it is in the list
  function pick() {
    if (shown.some((feature) => feature.index === state.f)) return state.f;
    return shown.length ? shown[0].index : null;
  }

  // the address holds the whole state, so that a link shows what its sender saw
  function remember() {
    const changed = Object.entries(state).filter(([name, value]) => value !== usual[name]);
    try {
      history.replaceState(null, "", `#${new URLSearchParams(changed)}`);
    } catch {
      // inside a frame without an address of its own there is no link to keep
    }
  }

  function recall() {
    const hash = new URLSearchParams(location.hash.slice(1));
    if (!Object.keys(usual).some((name) => hash.has(name))) return false;
    const option = (name) => {
      const value = hash.get(name);
      return [...byId(name).options].some((one) => one.value === value) ? value : usual[name];
    };
    state.f = /^\d+$/.test(hash.get("f") ?? "") ? Number(hash.get("f")) : null;
    state.q = hash.get("q") ?? "";
    state.sort = option("sort");
    state.view = option("view");
    state.values = hash.get("values") === "true";
    return true;
  }

  function present() {
    byId("query").value = state.q;
    byId("sort").value = state.sort;
    byId("view").value = state.view;
    byId("values").checked = state.values;
    byId("detail").dataset.view = state.view;
    byId("detail").classList.toggle("valued", state.values);
  }

  function change(part) {
    Object.assign(state, part);
    list();
    present();
    const best = part.q && shown.length ? shown[0].index : pick();
    select(best);
    remember();
  }

  function step(by, focus) {
    const at = shown.findIndex((feature) => feature.index === state.f);
    const next = shown[Math.max(0, Math.min(shown.length - 1, at + by))];
    if (!next) return;
    select(next.index, { focus });
    remember();
  }

  function listen() {
    byId("tools").addEventListener("submit", (event) => event.preventDefault());
    byId("query").addEventListener("input", (event) => change({ q: event.target.value }));
    byId("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
    byId("view").addEventListener("change", (event) => change({ view: event.target.value }));
    byId("values").addEventListener("change", (event) => change({ values: event.target.checked }));
    byId("query").addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === "ArrowDown") {
        event.preventDefault();
        items.get(state.f)?.firstChild.focus();
      }
    });
    byId("list").addEventListener("click", (event) => {
      const link = event.target.closest("a");
      if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      select(Number(link.dataset.index), { focus: true, scroll: false });
      remember();
    });
    byId("list").addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity }[event.key];
      if (!by) return;
      event.preventDefault();
      step(by, true);
    });
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input, select, textarea");
      if (typing || event.metaKey || event.ctrlKey || event.altKey) return;
      if (event.key === "/") {
        event.preventDefault();
        byId("query").focus();
      }
      if (event.key === "j" || event.key === "k") {
        step(event.key === "j" ? 1 : -1, byId("list").contains(document.activeElement));
      }
    });
    addEventListener("hashchange", () => recall() && show());
  }

  function show() {
    list();
    present();
    select(state.f ?? pick());
  }

  // ---- exact values on hover ----

  function tips() {
    const tip = byId("tip");
    document.addEventListener("pointerover", (event) => {
      const target = event.target.closest?.("[data-tip]");
      tip.hidden = !target;
      if (!target) return;
      tip.textContent = target.dataset.tip;
      const at = target.getClientRects()[0];
      const left = Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
      const above = at.top - tip.offsetHeight - 6;
      tip.style.left = `${Math.max(8, left)}px`;
      tip.style.top = `${above < 0 ? at.bottom + 6 : above}px`;
    });
    addEventListener("scroll", () => (tip.hidden = true), { passive: true, capture: true });
  }

  // ---- charts, in the page's own colours ----

  function themed({ data: traces, layout }) {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const rule = colour("--rule");
    const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true };
    const theme = {
      paper_bgcolor: "transparent",
      plot_bgcolor: "transparent",
      colorway: ["--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--series-6"].map(colour),
      font: { family: style.fontFamily, size: 12, color: colour("--soft") },
      margin: { l: 8, r: 12, t: 8, b: 8 },
      hoverlabel: { bgcolor: colour("--raised"), bordercolor: rule, font: { color: colour("--ink") } },
      modebar: { bgcolor: "transparent", color: colour("--soft"), activecolor: colour("--ink") },
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      bargap: 0.06,
      height: 230,
    };
    const axes = { xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, exponentformat: "power", ...layout.yaxis } };
    return [traces, { ...layout, ...theme, ...axes }];
  }

  function plot() {
    const config = { responsive: true, displaylogo: false, modeBarButtons: [["toImage"]] };
    for (const [id, figure] of Object.entries(data.figures)) Plotly.react(id, ...themed(figure), config);
  }

  if (features.size) {
    for (const feature of data.features) items.set(feature.index, item(feature));
    listen();
    tips();
    const asked = recall();
    show();
    if (asked) addEventListener("DOMContentLoaded", () => byId("features").scrollIntoView());
  }
  // plotly is the last script of the page
  addEventListener("DOMContentLoaded", () => {
    plot();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot);
  });
})();
