"use strict";
// What the page knows: the nodes, their links by either end, what is chosen; and how text and numbers are written.
// Text from the corpus enters the document as text nodes and attribute values only; nothing here parses HTML.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const { nodes, tokens, source, target, weight } = data;
const KINDS = ["feature", "error", "token", "position", "bias", "pruned", "target"];

// ---- elements ----

function put(node, properties) {
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name in node && !(node instanceof SVGElement)) node[name] = value;
    else node.setAttribute(name, value);
  }
  return node;
}

function make(tag, properties = {}, ...children) {
  const node = put(document.createElement(tag), properties);
  node.append(...children.flat(2).filter((child) => child !== null && child !== ""));
  return node;
}

function draw(tag, attributes, ...children) {
  const node = put(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes);
  node.append(...children);
  return node;
}

// ---- numbers ----

function digits(value) {
  const size = Math.abs(value);
  if (size && size < 1e-2) return value.toExponential(1);
  return size < 1000 ? value.toPrecision(3) : String(Math.round(value));
}

const minus = (text) => text.replaceAll("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + minus(digits(value)); // as many digits each: for columns
const short = (value) => value === 0 ? "0" : minus(Math.abs(value) < 1e-2 ? digits(value) : String(+digits(value)));
const count = (value) => value.toLocaleString("en");
const precise = (share) => `${+(100 * share).toPrecision(2)} %`;
const percent = (share) => (share < 1e-3 ? "< 0.1 %" : share < 0.0995 ? `${(100 * share).toPrecision(2)} %` : `${Math.round(100 * share)} %`);

// ---- text of tokens: whitespace and control characters made visible ----

// newlines, tabs, controls, invisible and bidirectional marks, lone surrogates
const SPECIAL =
  /[\0-\x1f\x7f-\x9f\u00a0\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;

function sign(character) {
  const code = character.charCodeAt(0).toString(16);
  const known = { "\n": "↵", "\t": "⇥", "\r": "\\r" }[character];
  return known ?? (code.length < 3 ? `\\x${code.padStart(2, "0")}` : `\\u${code.padStart(4, "0")}`);
}

// pieces of a text, those that stand for what can't be seen apart: [[piece, stands for], ...]
function pieces(text) {
  if (text === "") return [["∅", true]];
  const blank = /^ +/.exec(text)?.[0].length ?? 0;
  const parts = [["·".repeat(blank), true]];
  let last = blank;
  for (const match of text.matchAll(SPECIAL)) {
    parts.push([text.slice(last, match.index), false], [sign(match[0]), true]);
    last = match.index + 1;
  }
  parts.push([text.slice(last), false]);
  return parts.filter(([piece]) => piece !== "");
}

const glyphs = (text) => pieces(text).map(([piece, apart]) => (apart ? make("i", {}, piece) : piece));
const plain = (text) => text.replace(SPECIAL, sign);
const quoted = (text) => `“${plain(text)}”`;
const cut = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);

// the first pieces of a text, as parts of an SVG text
function spans(text, most) {
  const parts = [];
  for (const [piece, apart] of pieces(text)) {
    parts.push(draw("tspan", apart ? { class: "apart" } : {}, cut(piece, Math.max(2, most))));
    most -= [...piece].length;
    if (most <= 0) break;
  }
  return parts;
}

// ---- nodes and links ----

const entering = nodes.map(() => []);
const leaving = nodes.map(() => []);
const taken = new Float64Array(nodes.length); // sum of a node's absolute inputs
source.forEach((from, link) => {
  leaving[from].push(link);
  entering[target[link]].push(link);
  taken[target[link]] += Math.abs(weight[link]);
});
// what was pruned adds to nearly everything: its links are drawn where it is selected, and listed
const drawable = source.map((_, link) => link).filter((link) => nodes[source[link]].kind !== "pruned");
// how much of the targets comes through each node: of its share in what it adds to, theirs
const mass = new Float64Array(nodes.length).fill(NaN);
const share = (link) => Math.abs(weight[link]) / (taken[target[link]] || 1);
function through(at) {
  if (Number.isNaN(mass[at])) {
    mass[at] = 0; // a foreign file may hold a circle
    const own = nodes[at].kind === "target" ? 1 / targets.length : 0;
    mass[at] = leaving[at].reduce((sum, link) => sum + share(link) * through(target[link]), own);
  }
  return mass[at];
}
const numberOf = new Map(nodes.map((node, at) => [node.id, at]));
const targets = nodes.map((_, at) => at).filter((at) => nodes[at].kind === "target");
const flow = Float64Array.from(source, (_, link) => share(link) * through(target[link])); // of the targets, through each link
const byStrength = drawable.toSorted((a, b) => flow[b] - flow[a]);
const influences = nodes.map((node) => node.influence).filter((one) => one !== null);
const reaches = [Math.min(...influences), Math.max(...influences)];

// what each node outside of some adds to them (or, forward, gets from them), strongest first: [[node, weight], ...]
function linked(members, forward) {
  const sums = new Map();
  for (const at of members) {
    for (const link of (forward ? leaving : entering)[at]) {
      const other = (forward ? target : source)[link];
      if (!members.has(other)) sums.set(other, (sums.get(other) ?? 0) + weight[link]);
    }
  }
  return [...sums].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
}

const between = (from, to) => leaving[from].filter((link) => target[link] === to).reduce((sum, link) => sum + weight[link], 0);

// ---- what is chosen; the address holds all of it but what is hovered or ticked ----

const usual = {
  node: data.q.clickedId ? (numberOf.get(data.q.clickedId) ?? null) : null,
  group: null, // the name of a supernode
  trail: [], // nodes that were selected before
  pins: (data.q.pinnedIds ?? []).map((id) => numberOf.get(id)),
  groups: (data.q.supernodes ?? []).map(([name, ...ids]) => ({ name, members: ids.map((id) => numberOf.get(id)) })),
  labels: new Map(JSON.parse(data.q.clerps || "[]").map(([feature, label]) => [String(feature), label])),
  reach: data.q.pruningThreshold ?? reaches[1], // of influence, cumulative: nodes beyond it are hidden
  least: flow[byStrength[20 + Math.round(0.2 * nodes.length)] ?? byStrength.at(-1)] ?? 0, // share of the targets that drawn links carry
  effect: 0, // the target whose total effects colour the drawing
  query: "",
  larger: false,
};
for (const { members } of usual.groups) usual.pins.push(...members.filter((at) => !usual.pins.includes(at)));
const copy = (one) => ({
  ...one,
  trail: [...one.trail],
  pins: [...one.pins],
  groups: one.groups.map((group) => ({ ...group, members: [...group.members] })),
  labels: new Map(one.labels),
});
const state = copy(usual);

const groupNamed = (name) => state.groups.find((group) => group.name === name);
const members = () => new Set(state.group !== null ? groupNamed(state.group).members : state.node === null ? [] : [state.node]);
const isVisible = (at) => {
  const { influence } = nodes[at];
  return influence === null || influence <= state.reach || at === state.node || state.pins.includes(at);
};

// ---- names ----

function labelOf(at) {
  const { kind, label, feature, number, type, position } = nodes[at];
  const given = kind === "feature" ? state.labels.get(String(feature)) : undefined;
  if (kind === "token" && position !== null) return quoted(tokens[position]);
  if (given || label.trim()) return plain(given || label);
  if (kind === "feature") return `feature ${number}`;
  return kind === "target" ? "target" : type;
}

// Output "tok" (p=0.123) without what all targets have in common
const targetName = (at) => labelOf(at).replace(/^Output "(.*)" \(p=(.*)\)$/s, "“$1”");
const rowName = (at) => (nodes[at].kind === "target" ? "out" : nodes[at].layer === null ? "" : `L${nodes[at].layer}`);
const placeName = ({ position }) => (position === null ? "" : `@${position} ${cut(plain(tokens[position]).trim() || quoted(tokens[position]), 14)}`);
const whereOf = (at) => [rowName(at), placeName(nodes[at])].filter(Boolean).join(" ");
const spoken = (at) => `${labelOf(at)}, ${nodes[at].kind}, ${whereOf(at)}`;
