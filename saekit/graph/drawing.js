"use strict";
// The drawing: rows are layers, from the bottom, columns positions. Nodes are SVG; links lie on two canvases under
// them, the strongest on one, on the other those of what is selected, hovered or pinned.

const figure = byId("figure");
const canvases = { links: byId("links"), lit: byId("lit") };
const axes = draw("g", { class: "axes" });
figure.prepend(draw("svg", { "aria-hidden": "true" }, axes));
const svg = figure.appendChild(draw("svg", { role: "group", "aria-label": "Nodes" }));
const places = nodes.map(() => ({ x: 0, y: 0 }));
const view = { width: 0, height: 0, radius: 5, hovered: null, alone: false, found: new Set(), visible: [] };
const SIZE = { feature: 1, error: 1.12, token: 0.88, position: 0.62, bias: 0.72, pruned: 0.72, target: 1.25 };

function outline(kind, unit) {
  const r = unit * SIZE[kind];
  if (kind === "feature" || kind === "pruned") return `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`;
  if (kind === "error") return `M0 ${-r}L${r} 0L0 ${r}L${-r} 0z`;
  if (kind === "bias") return `M0 ${-r}L${r} ${0.8 * r}H${-r}z`;
  if (kind === "target") return `M0 ${-r}L${0.95 * r} ${-0.3 * r}L${0.6 * r} ${0.85 * r}H${-0.6 * r}L${-0.95 * r} ${-0.3 * r}z`;
  return `M${-r} ${-r}H${r}V${r}H${-r}z`;
}

// ---- where the nodes are ----

// attention comes before the MLP of its layer
const attends = ({ type, id }) => /lorsa|attn|attention|head/.test(type + id);
const rowOf = nodes.map((node) => (node.kind === "target" ? Infinity : node.layer === null ? -Infinity : node.layer + (attends(node) ? 0 : 0.5)));
const rowKeys = [...new Set(rowOf)].sort((a, b) => a - b);
const rowAt = rowOf.map((key) => rowKeys.indexOf(key));
const loose = nodes.some((node) => node.position === null); // nodes of no position get a column at the left
const columnAt = nodes.map(({ position }) => (position === null ? 0 : position + Number(loose)));
const nColumns = tokens.length + Number(loose);
const rowTitle = (key) => {
  if (!Number.isFinite(key)) return key > 0 ? "out" : "embed";
  const twice = rowKeys.includes(Math.floor(key)) && rowKeys.includes(Math.floor(key) + 0.5);
  return `${Math.floor(key)}${twice ? (key % 1 ? "" : " attn") : ""}`;
};

// how many lines each row and columns each position gets, so that the nodes can be as far apart as they can
function grid(counts, width, height) {
  const lines = rowKeys.map(() => 1);
  const across = (trial) =>
    Array.from({ length: nColumns }, (_, column) => Math.max(0.6, ...counts.map((row, at) => Math.ceil(row[column] / trial[at]))));
  const sum = (list) => list.reduce((total, one) => total + one, 0);
  let best = { pitch: -Infinity };
  for (let step = 0; step < 300; step++) {
    const wide = across(lines);
    const [x, y] = [width / sum(wide), height / sum(lines)];
    if (Math.min(x, y) > best.pitch) best = { pitch: Math.min(x, y), lines: [...lines], wide };
    if (x >= y) break;
    const gains = lines.map((_, at) => sum(across(lines.map((one, other) => one + Number(other === at)))));
    const fullest = counts.map((row, at) => Math.max(...row) / lines[at]);
    const least = Math.min(...gains);
    const rivals = gains.map((gain, at) => (gain === least ? fullest[at] : -1));
    lines[rivals.indexOf(Math.max(...rivals))] += 1;
  }
  return best;
}

const columnName = (column) => (column < Number(loose) ? "anywhere" : tokens[column - Number(loose)]);

// half of what a column's label takes, lying flat
const half = (column) => (cut(plain(columnName(column)), 14).length * 7 + 8) / 2;

function layOut(width, height, flat = true) {
  view.visible = nodes.map((_, at) => at).filter(isVisible);
  const counts = rowKeys.map(() => new Array(nColumns).fill(0));
  const cells = new Map();
  for (const at of view.visible) {
    counts[rowAt[at]][columnAt[at]] += 1;
    const key = rowAt[at] * nColumns + columnAt[at];
    cells.set(key, [...(cells.get(key) ?? []), at]);
  }
  const margin = { left: 62, right: 18, top: 12 };
  margin.bottom = flat ? 30 : 84;
  const gap = { x: Math.min(8, (0.25 * width) / nColumns), y: 12 };
  const inner = { width: width - margin.left - margin.right - gap.x * nColumns, height: height - margin.top - margin.bottom - gap.y * rowKeys.length };
  const { pitch, lines, wide } = grid(counts, inner.width, inner.height);
  const step = Math.max(1, Math.min(pitch, 30));
  Object.assign(view, { width, height, radius: Math.max(2, Math.min(8, 0.38 * step)), flat });
  const total = (list) => list.reduce((sum, one) => sum + one, 0);
  const [perColumn, perLine] = [inner.width / total(wide), inner.height / total(lines)];
  let edge = margin.left;
  view.columns = wide.map((w) => {
    const size = w * perColumn + gap.x;
    edge += size;
    return { left: edge - size, size };
  });
  // labels lie flat where all of them have room, else they slant
  const middles = view.columns.map(({ left, size }) => left + size / 2);
  if (flat && middles.some((x, column) => column && x - middles[column - 1] < half(column) + half(column - 1))) {
    layOut(width, height, false);
    return;
  }
  edge = height - margin.bottom;
  view.rows = lines.map((n) => {
    const size = n * perLine + gap.y;
    edge -= size;
    return { top: edge, size };
  });
  for (const [key, list] of cells) {
    const [row, column] = [Math.floor(key / nColumns), key % nColumns];
    const { left, size } = view.columns[column];
    const n = Math.min(lines[row], list.length);
    const across = Math.ceil(list.length / n);
    const down = Math.min(step, perLine);
    const along = Math.min(step, (size - gap.x) / Math.max(1, across));
    // what matters most stands first, what is no feature last
    const rank = (at) => (nodes[at].kind === "feature" ? (nodes[at].influence ?? 0) : 2);
    list.sort((a, b) => rank(a) - rank(b) || a - b);
    list.forEach((at, index) => {
      const line = Math.floor(index / across);
      const here = Math.min(across, list.length - line * across);
      places[at] = {
        x: left + size / 2 + ((index % across) - (here - 1) / 2) * along,
        y: view.rows[row].top + view.rows[row].size / 2 + ((n - 1) / 2 - line) * down,
      };
    });
  }
}

// ---- nodes ----

const marks = nodes.map((node, at) => svg.appendChild(draw("path", { id: `node-${at}`, class: `node ${node.kind}`, role: "img" })));
const names = svg.appendChild(draw("g", { class: "names" }));

function drawAxes() {
  axes.replaceChildren();
  const { left: start } = view.columns[0];
  view.rows.forEach(({ top, size }, row) => {
    axes.append(
      draw("path", { class: "rule", d: `M${start} ${top}H${view.width - 18}` }),
      draw("text", { x: start - 10, y: top + size / 2, class: "layer" }, rowTitle(rowKeys[row])),
    );
  });
  const bottom = view.rows[0].top + view.rows[0].size;
  axes.append(draw("path", { class: "rule", d: `M${start} ${bottom}H${view.width - 18}` }));
  const chosen = state.node === null ? null : nodes[state.node].position;
  const busy = new Set(view.visible.map((at) => columnAt[at]));
  let right = -Infinity;
  // where not every token has room, those with nodes go first
  const fits = view.columns.map(({ left, size }, column) => {
    const middle = left + size / 2;
    if (middle - right < 11 || (!busy.has(column) && size < 11)) return false;
    right = middle;
    return true;
  });
  view.columns.forEach(({ left, size }, column) => {
    const position = column - Number(loose);
    if (position === chosen && position >= 0) axes.prepend(draw("rect", { class: "chosen", x: left, y: 6, width: size, height: bottom - 6 }));
    if (!fits[column]) return;
    const x = left + size / 2;
    const text = columnName(column);
    const turn = view.flat ? "" : ` rotate(-50)`;
    const label = draw("text", { class: "position", transform: `translate(${x} ${bottom + (view.flat ? 18 : 12)})${turn}` }, ...spans(text, 14));
    if (view.flat) label.classList.add("flat");
    label.append(draw("title", {}, position < 0 ? "nodes of no one position" : `position ${position}: ${text}`));
    axes.append(label);
  });
}

function placeNodes() {
  const shown = new Set(view.visible);
  marks.forEach((mark, at) => {
    mark.toggleAttribute("hidden", !shown.has(at));
    if (!shown.has(at)) return;
    put(mark, { d: outline(nodes[at].kind, view.radius), transform: `translate(${places[at].x} ${places[at].y})`, "aria-label": spoken(at) });
  });
}

// what colours the nodes: with a selection its links, else the total effects on one target
function tints() {
  const chosen = members();
  if (chosen.size) return new Map([...linked(chosen, true), ...linked(chosen, false)]);
  return new Map(nodes.map((node, at) => [at, node.effects[state.effect] ?? 0]));
}

function tintNodes() {
  const chosen = members();
  const tinted = tints();
  // the totals of targets and of what was pruned would outshine all others
  const rivals = [...tinted].filter(([at]) => chosen.size || !["target", "pruned"].includes(nodes[at].kind)).map(([, value]) => Math.abs(value));
  const largest = rivals.reduce((most, value) => Math.max(most, value), 0) || 1;
  svg.classList.toggle("selecting", chosen.size > 0);
  const [pins, way] = [new Set(state.pins), new Set(state.trail)];
  for (const at of view.visible) {
    const value = tinted.get(at);
    const is = { linked: value !== undefined, negative: value < 0, selected: chosen.has(at), pinned: pins.has(at), walked: way.has(at), found: view.found.has(at), hovered: at === view.hovered };
    marks[at].setAttribute("class", ["node", nodes[at].kind, ...Object.keys(is).filter((name) => is[name])].join(" "));
    marks[at].style.setProperty("--tint", (Math.min(1, Math.abs(value ?? 0) / largest) ** 0.5).toFixed(3));
  }
}

const overlap = (one, other) => one.left < other.right && other.left < one.right && one.top < other.bottom && other.top < one.bottom;

// names beside the nodes that matter now, where they cover neither each other nor nodes
function nameNodes() {
  names.replaceChildren();
  const chosen = members();
  const most = chosen.size ? [...linked(chosen, false).slice(0, 6), ...linked(chosen, true).slice(0, 4)].map(([at]) => at) : targets;
  const r = view.radius;
  const floor = view.rows[0].top + view.rows[0].size;
  const taken = view.visible.map((at) => ({ left: places[at].x - r, right: places[at].x + r, top: places[at].y - r, bottom: places[at].y + r }));
  for (const at of new Set([...chosen, ...state.pins, ...most])) {
    if (!isVisible(at) || (nodes[at].kind === "token" && !chosen.has(at))) continue;
    const text = cut(targetName(at), 26);
    const { x, y } = places[at];
    const width = text.length * 6.5;
    const room = [[x + r + 4, y - 7], [x - r - 4 - width, y - 7], [x - width / 2, y - r - 17], [x - width / 2, y + r + 3]]
      .map(([left, top]) => ({ left, right: left + width, top, bottom: top + 14 }))
      .filter(({ left, right, top, bottom }) => left > 62 && right < view.width && top > 0 && bottom < floor);
    const free = room.find((box) => !taken.some((one) => overlap(one, box))) ?? (chosen.has(at) ? room[0] : undefined);
    if (!free) continue;
    taken.push(free);
    names.append(draw("text", { x: (free.left + free.right) / 2, y: free.top + 7 }, text));
  }
}

// ---- links ----

const palette = {};

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["fires", "inverse", "line"]) palette[name] = `rgb(${style.getPropertyValue(`--${name}`)})`;
  palette.ink = style.getPropertyValue("--ink");
}

function sheet(canvas) {
  const scale = devicePixelRatio || 1;
  const [width, height] = [Math.round(view.width * scale), Math.round(view.height * scale)];
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, view.width, view.height);
  return pen;
}

function trace(pen, from, to) {
  const [a, b] = [places[from], places[to]];
  const [dx, dy] = [b.x - a.x, a.y - b.y];
  pen.moveTo(a.x, a.y);
  if (Math.abs(dy) < 3 * view.radius && Math.abs(dx) > 4 * view.radius) {
    const lift = Math.min(46, 12 + 0.12 * Math.abs(dx)); // along a row: over the nodes between
    pen.bezierCurveTo(a.x + 0.2 * dx, a.y - lift, b.x - 0.2 * dx, b.y - lift, b.x, b.y);
  } else pen.bezierCurveTo(a.x, a.y - 0.45 * dy, b.x, b.y + 0.45 * dy, b.x, b.y);
}

function stroke(pen, from, to, colour, alpha, width) {
  pen.globalAlpha = alpha;
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.beginPath();
  trace(pen, from, to);
  pen.stroke();
}

const hue = (value) => (value > 0 ? palette.fires : palette.inverse);

// the links at or above the threshold, the strongest last and on top
function drawLinks() {
  const pen = sheet(canvases.links);
  const shown = new Uint8Array(nodes.length);
  for (const at of view.visible) shown[at] = 1;
  const some = [];
  for (const link of byStrength) {
    if (flow[link] < state.least) break;
    if (shown[source[link]] && shown[target[link]]) some.push(link);
  }
  const dense = Math.min(1, 12 / Math.sqrt(some.length));
  some.reverse().forEach((link, index) => {
    const rank = (index + 1) / some.length;
    stroke(pen, source[link], target[link], hue(weight[link]), (0.1 + 0.5 * rank ** 2) * (0.12 + 0.88 * dense), 0.7 + rank ** 3);
  });
  view.drawn = some.length;
}

function drawFan(pen, some, strength) {
  for (const forward of [false, true]) {
    const found = linked(some, forward).filter(([at]) => isVisible(at));
    const largest = Math.abs(found[0]?.[1] ?? 1);
    for (const [at, value] of found.reverse()) {
      const share = Math.abs(value) / largest;
      for (const one of some) {
        const [from, to] = forward ? [one, at] : [at, one];
        if (some.size > 1 && !leaving[from].some((link) => target[link] === to)) continue;
        stroke(pen, from, to, hue(value), strength * (0.06 + 0.84 * share ** 0.8), 0.7 + 2.2 * share);
      }
    }
  }
}

// the links of what is selected or hovered, those between pinned nodes, and the way walked so far
function drawLit() {
  const pen = sheet(canvases.lit);
  const chosen = members();
  const hovering = view.hovered !== null && !chosen.has(view.hovered);
  const pins = new Set(state.pins);
  for (const from of pins) {
    for (const link of leaving[from]) {
      if (pins.has(target[link])) stroke(pen, from, target[link], palette.ink, 0.35, 1);
    }
  }
  drawFan(pen, chosen, hovering ? 0.3 : 1);
  if (hovering && !view.alone) drawFan(pen, new Set([view.hovered]), 0.8);
  for (const one of hovering ? chosen : []) {
    for (const ends of [[one, view.hovered], [view.hovered, one]]) {
      const value = between(...ends);
      if (value) stroke(pen, ...ends, hue(value), 1, 3.2);
    }
  }
  pen.setLineDash([5, 4]);
  [...state.trail, state.node].forEach((at, index, way) => {
    const next = way[index + 1];
    if (at === null || next === null || next === undefined || !isVisible(at)) return;
    const link = [[at, next], [next, at]].find(([from, to]) => leaving[from].some((one) => target[one] === to));
    if (link) stroke(pen, ...link, palette.ink, 0.8, 1.5);
  });
  pen.setLineDash([]);
  canvases.links.classList.toggle("faint", chosen.size > 0 || hovering);
}

const drawn = { places: "", links: "" }; // what stands on the drawing now

function redraw() {
  const { width, height } = figure.getBoundingClientRect();
  const now = [width, height, ...nodes.map((_, at) => Number(isVisible(at)))].join("");
  const links = `${now} ${state.least} ${palette.ink}`;
  if (now !== drawn.places) {
    layOut(width, height);
    placeNodes();
  }
  drawAxes();
  tintNodes();
  nameNodes();
  if (links !== drawn.links) drawLinks();
  drawLit();
  put(figure, { "aria-activedescendant": state.node === null ? "" : `node-${state.node}` });
  Object.assign(drawn, { places: now, links });
}

// ---- pointing ----

function nearest(x, y, reach) {
  let [best, least] = [null, reach ** 2];
  for (const at of view.visible) {
    const distance = (places[at].x - x) ** 2 + (places[at].y - y) ** 2;
    if (distance < least) [best, least] = [at, distance];
  }
  return best;
}

function under(event) {
  const box = figure.getBoundingClientRect();
  return nearest(event.clientX - box.left, event.clientY - box.top, Math.max(10, 1.8 * view.radius));
}

// a node pointed at in the drawing shows its links, one in a list its link with what is selected
function hover(at, alone = false) {
  if (at === view.hovered) return;
  view.alone = alone;
  if (view.hovered !== null) marks[view.hovered].classList.remove("hovered");
  view.hovered = at;
  if (at !== null) marks[at].classList.add("hovered");
  figure.classList.toggle("pointing", at !== null);
  drawLit();
}

// the next visible node in a direction: the nearer the better, and the straighter
function neighbour(at, [dx, dy]) {
  const here = places[at];
  let [best, least] = [null, Infinity];
  for (const other of view.visible) {
    const [x, y] = [places[other].x - here.x, places[other].y - here.y];
    const ahead = x * dx + y * dy;
    const aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (ahead < 1 || other === at) continue;
    const cost = ahead + 2.5 * aside;
    if (cost < least) [best, least] = [other, cost];
  }
  return best;
}
