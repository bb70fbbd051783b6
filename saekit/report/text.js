// What the other parts are made with: the data of the page, elements, and text of tokens. Text from the corpus enters
// the document as text nodes and attribute values only; nothing here parses HTML.

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const text = data.vocabulary;
const features = new Map(data.features.map((feature) => [feature.index, feature]));
const SVG = "http://www.w3.org/2000/svg";

// A card is a line of JSON, read when it is asked for.
const lines = byId("cards").textContent.split("\n");
data.features.forEach((feature, at) => (feature.line = at));

function cardOf(feature) {
  const card = JSON.parse(lines[feature.line]);
  const bands = card.bands.map((band) => ({ ...band, windows: band.windows.map(unpacked) }));
  return { ...feature, ...card, top: card.top.map(unpacked), bands };
}

// zeros are left out of a window's activations: `active` holds places and values in turn
function unpacked(window) {
  const activations = new Array(window.tokens.length).fill(0);
  for (let i = 0; i < window.active.length; i += 2) activations[window.active[i]] = window.active[i + 1];
  for (const at of window.masked ?? []) activations[at] = null;
  return { ...window, activations, foreign: new Set(window.foreign) };
}

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
