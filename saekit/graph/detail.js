"use strict";
// Beside and below the drawing: the selected node or supernode with its links, and the legend.

const detail = byId("detail");

function emblem(at, value = 0, largest = 1) {
  const { kind } = nodes[at];
  const mark = draw("path", { d: outline(kind, 5), class: `node ${kind}${value < 0 ? " negative" : ""}` });
  mark.style.setProperty("--tint", Math.min(1, Math.abs(value) / largest) ** 0.5);
  return draw("svg", { class: "emblem", viewBox: "-7 -7 14 14", "aria-hidden": "true" }, mark);
}

const action = (label, act, properties = {}) => {
  const button = make("button", { type: "button", ...properties }, label);
  button.addEventListener("click", act);
  return button;
};

// ---- the selected node ----

function facts(at) {
  const { activation, influence, prob, kind, type, layer, position, number } = nodes[at];
  const fact = (label, value, title = "") => (value === null || value === undefined ? null : make("div", { title }, make("dt", {}, label), make("dd", {}, value)));
  return make(
    "dl",
    { className: "facts" },
    fact("kind", type === kind || kind !== "feature" ? kind : `${kind} (${type})`),
    fact("layer", layer === null || kind === "target" ? null : String(layer)),
    fact("position", position === null ? null : [`${position} `, make("span", { className: "token" }, glyphs(tokens[position]))]),
    fact("number", kind === "feature" ? String(number) : null),
    fact(kind === "target" ? "value" : "activation", activation === null ? null : short(activation)),
    fact("probability", prob ? percent(prob) : null),
    fact("influence", influence === null ? null : `within ${percent(influence)}`, "it is among the nodes that, from the most influential on, make up this share of all influence"),
  );
}

function bar(value, largest) {
  return make("span", { className: value < 0 ? "bar negative" : "bar", "--share": Math.abs(value) / (largest || 1) });
}

function effects(some) {
  const totals = targets.map((_, index) => [...some].reduce((sum, at) => sum + (nodes[at].effects[index] ?? 0), 0));
  if (!totals.some(Boolean)) return null;
  const largest = Math.max(...totals.map(Math.abs));
  const rows = targets.map((at, index) => make("li", {}, make("span", { className: "to" }, targetName(at)), bar(totals[index], largest), make("span", { className: "amount" }, signed(totals[index]))));
  return make("section", { className: "effects" }, make("h3", {}, "Total effect ", make("small", {}, "on each target, over all paths")), shortList("ul", rows, 5));
}

function contextRow(one, largest) {
  const words = one.tokens.map((text, at) => {
    const value = one.values[at];
    const word = make("span", { className: "token" }, glyphs(data.texts[text]));
    if (value) put(word, { className: value < 0 ? "token active negative" : "token active", "--strength": (0.1 + 0.75 * Math.min(1, Math.abs(value) / largest)).toFixed(3) });
    if (at === one.at) word.classList.add("peak");
    word.dataset.tip = `${quoted(data.texts[text])}\n${value ? short(value) : "not active"}`;
    return word;
  });
  return make("li", {}, make("span", { className: "amount" }, short(one.values[one.at] ?? 0)), make("p", { dir: "ltr" }, make("span", { className: "before" }, make("span", {}, words.slice(0, one.at))), make("span", { className: "after" }, words.slice(one.at))));
}

function contexts(at) {
  const windows = data.windows[data.contexts[at]];
  if (!windows?.length) return null;
  const largest = Math.max(...windows.flatMap((one) => one.values.map((value) => Math.abs(value ?? 0)))) || 1;
  return make("section", { className: "contexts" }, make("h3", {}, "Top contexts ", make("small", {}, "where it is most active, at the outlined token")), make("ul", {}, windows.map((one) => contextRow(one, largest))));
}

const SOME = 12;

// the first rows, and a button for the rest
function shortList(tag, rows, most) {
  const list = make(tag, {}, rows.slice(0, most));
  if (rows.length <= most + 1) list.append(...rows.slice(most));
  else {
    const more = make("li", { className: "rest" }, action(`${count(rows.length - most)} more`, () => more.replaceWith(...rows.slice(most)), { className: "more" }));
    list.append(more);
  }
  return list;
}

function nodeRow(at, value, largest, share) {
  const told = value === undefined ? [] : [make("span", { className: "amount" }, signed(value))];
  if (share !== undefined) told.push(make("span", { className: "share" }, percent(share)));
  const row = action([emblem(at, value, largest), make("span", { className: "label" }, targetName(at)), make("span", { className: "where" }, whereOf(at)), ...told], () => select(at), { className: value < 0 ? "row negative" : "row", "--share": value === undefined ? 0 : Math.abs(value) / largest });
  row.dataset.of = at;
  row.classList.toggle("unseen", !isVisible(at));
  row.setAttribute("aria-label", [spoken(at), ...told.map((one) => one.textContent)].join(", "));
  row.addEventListener("pointerenter", () => hover(isVisible(at) ? at : null, true));
  row.addEventListener("pointerleave", () => hover(null));
  return make("li", {}, row);
}

// the links of one side, strongest first; a share is of all absolute inputs of the node that the link ends in
function linkList(title, some, forward) {
  const found = linked(some, forward);
  if (!found.length) return null;
  const sum = found.reduce((total, [, value]) => total + value, 0);
  const size = found.reduce((total, [, value]) => total + Math.abs(value), 0);
  const rows = found.map(([at, value]) => nodeRow(at, value, Math.abs(found[0][1]), Math.abs(value) / (forward ? taken[at] : size)));
  const said = forward ? `${count(found.length)}; share of the other's inputs` : `${count(found.length)}, sum ${signed(sum)}; share of all`;
  return make("section", { className: forward ? "list outputs" : "list inputs" }, make("h3", {}, `${title} `, make("small", {}, said)), shortList("ol", rows, SOME));
}

function trail() {
  if (!state.trail.length) return null;
  const shown = state.trail.slice(-3);
  const crumbs = shown.map((at, index) => action(cut(targetName(at), 18), () => change({ node: at, group: null, trail: state.trail.slice(0, state.trail.length - shown.length + index) }), { title: spoken(at) }));
  const back = action("← Back", goBack, { id: "back", title: "Backspace" });
  return make("nav", { className: "trail", "aria-label": "The way here" }, back, state.trail.length > 3 ? make("span", {}, "…") : null, crumbs.map((crumb) => [crumb, make("span", {}, "›")]));
}

function heading(at) {
  const pinned = state.pins.includes(at);
  const title = make("h2", {}, emblem(at), make("span", { id: "detail-title" }, labelOf(at)));
  const rename = nodes[at].kind === "feature" ? action("Label", () => relabel(at, title), { title: "give this feature a label" }) : null;
  return make("div", { className: "heading" }, title, rename, action(pinned ? "Unpin" : "Pin", () => pin(at), { id: "pin", "aria-pressed": pinned, title: "p" }));
}

function relabel(at, title) {
  const input = make("input", { type: "text", value: labelOf(at), "aria-label": "Label of the feature" });
  const form = make("form", { className: "label-form" }, input, make("button", {}, "Set"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const labels = new Map(state.labels);
    if (input.value.trim()) labels.set(String(nodes[at].feature), input.value.trim());
    else labels.delete(String(nodes[at].feature));
    change({ labels });
  });
  title.replaceChildren(form);
  input.select();
}

function nodeDetail(at) {
  const some = new Set([at]);
  return [trail(), heading(at), facts(at), make("p", { className: "id" }, make("code", {}, plain(nodes[at].id))), effects(some), contexts(at), linkList("Inputs", some, false), linkList("Outputs", some, true)];
}

function flows(title, found, other) {
  if (!found.length) return null;
  const largest = Math.abs(found[0].sum);
  const rows = found.map((one) => make("li", {}, make("span", { className: "to" }, other(one).name), bar(one.sum, largest), make("span", { className: "amount" }, signed(one.sum))));
  return make("section", { className: "effects flows" }, make("h3", {}, `${title} `, make("small", {}, "summed over links")), make("ul", {}, rows));
}

function groupDetail({ name, members: inside }) {
  const some = new Set(inside);
  const found = sums(boxes());
  const own = (box) => box.group === name;
  return [
    trail(),
    make("div", { className: "heading" }, make("h2", {}, make("span", { id: "detail-title" }, plain(name))), action("Ungroup", () => ungroup(name))),
    make("section", { className: "list members" }, make("h3", {}, "Supernode ", make("small", {}, `of ${inside.length} ${inside.length === 1 ? "node" : "nodes"}`)), make("ol", {}, inside.map((at) => nodeRow(at)))),
    effects(some),
    flows("From what is pinned", found.filter(({ to }) => own(to)), ({ from }) => from),
    flows("To what is pinned", found.filter(({ from }) => own(from)), ({ to }) => to),
    linkList("Inputs", some, false),
    linkList("Outputs", some, true),
  ];
}

// with nothing selected: what there is, and where to start
function overview() {
  const kinds = KINDS.map((kind) => [kind, nodes.filter((node) => node.kind === kind).length]).filter(([, n]) => n);
  const on = targets[state.effect];
  const ranked = nodes.map((node, at) => [at, node.effects[state.effect] ?? 0]).filter(([at, value]) => value && nodes[at].kind !== "target").sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, SOME);
  const written = Object.entries(data.facts).map(([key, value]) => make("div", {}, make("dt", {}, key.replaceAll("_", " ")), make("dd", {}, typeof value === "number" ? short(value) : plain(String(value)))));
  return [
    trail(),
    make("section", { className: "list" }, make("h3", {}, "Targets"), shortList("ol", targets.map((at) => nodeRow(at, undefined, 1, nodes[at].prob || undefined)), SOME)),
    ranked.length ? make("section", { className: "list" }, make("h3", {}, "Largest total effects ", make("small", {}, `on ${targetName(on)}`)), make("ol", {}, ranked.map(([at, value]) => nodeRow(at, value, Math.abs(ranked[0][1]))))) : null,
    make("section", {}, make("h3", {}, "Graph"), make("dl", { className: "facts" }, kinds.map(([kind, n]) => make("div", {}, make("dt", {}, kind), make("dd", {}, count(n)))), make("div", {}, make("dt", {}, "links"), make("dd", {}, count(source.length)))), make("dl", { className: "facts wide" }, written)),
    make("section", { className: "keys" }, make("h3", {}, "Keys"), make("ul", {}, [["arrows", "walk the drawing"], ["p", "pin"], ["Backspace", "back"], ["/", "find"], ["Escape", "clear"]].map(([key, does]) => make("li", {}, make("kbd", {}, key), ` ${does}`)))),
  ];
}

function drawDetail() {
  const parts = state.group !== null ? groupDetail(groupNamed(state.group)) : state.node === null ? overview() : nodeDetail(state.node);
  if (detail.firstChild) detail.scrollTop = 0;
  detail.replaceChildren(...parts.filter(Boolean));
  byId("said").textContent = state.group !== null ? `supernode ${state.group}` : state.node === null ? "" : spoken(state.node);
}

// ---- legend ----

function drawLegend() {
  const present = KINDS.filter((kind) => nodes.some((node) => node.kind === kind));
  const kinds = present.map((kind) => make("span", { className: "kind" }, emblem(nodes.findIndex((node) => node.kind === kind)), kind));
  const withEffects = nodes.some((node) => node.effects.length);
  const select = make("select", { id: "effect", "aria-label": "Target whose total effects colour the nodes" }, targets.map((at, index) => make("option", { value: index, selected: index === state.effect }, cut(targetName(at), 30))));
  select.addEventListener("change", () => change({ effect: Number(select.value) }));
  const what = members().size ? ["link with the selected"] : withEffects ? ["total effect on ", select] : ["sign of a link"];
  byId("legend").replaceChildren(...kinds, make("span", { className: "ramp" }, make("span", {}, "−"), make("i", {}), make("span", {}, "+")), make("span", { className: "colour" }, what));
}

