"use strict";
// Search, sliders, keys and pointer, the address, and what a change redraws.

// ---- search ----

function relevance(at, query) {
  const { id, number, kind, position } = nodes[at];
  const label = labelOf(at).toLowerCase();
  if (id.toLowerCase() === query || (kind === "feature" && String(number) === query)) return 4;
  if (label.startsWith(query)) return 3;
  if (label.includes(query)) return 2;
  if (position !== null && tokens[position].toLowerCase().includes(query)) return kind === "token" ? 2 : 1;
  return Number(id.toLowerCase().includes(query));
}

const MOST = 60;
let pointed = 0; // which of the hits Enter takes

function find() {
  const query = state.query.trim().toLowerCase();
  const found = query ? nodes.map((_, at) => [at, relevance(at, query)]).filter(([, score]) => score) : [];
  found.sort((a, b) => b[1] - a[1] || (nodes[a[0]].influence ?? 0) - (nodes[b[0]].influence ?? 0));
  view.found = new Set(found.map(([at]) => at));
  return found.map(([at]) => at);
}

function drawHits(open) {
  const found = find();
  const hits = byId("hits");
  pointed = Math.max(0, Math.min(pointed, found.length - 1, MOST - 1));
  const rows = found.slice(0, MOST).map((at, index) => {
    const row = make("div", { id: `hit-${index}`, role: "option", "aria-selected": index === pointed }, emblem(at), make("span", { className: "label" }, targetName(at)), make("span", { className: "where" }, whereOf(at)));
    row.dataset.of = at;
    return row;
  });
  const said = found.length ? `${count(found.length)} found${found.length > MOST ? `, the first ${MOST} listed` : ""}` : "no node has it";
  hits.replaceChildren(make("p", { role: "presentation" }, said), ...rows);
  hits.hidden = !(open && state.query.trim());
  put(byId("query"), { "aria-expanded": !hits.hidden, "aria-activedescendant": rows.length ? `hit-${pointed}` : "" });
  rows[pointed]?.scrollIntoView?.({ block: "nearest" });
}

function listenToSearch() {
  const query = byId("query");
  byId("search").addEventListener("submit", (event) => event.preventDefault());
  query.addEventListener("input", () => {
    pointed = 0;
    change({ query: query.value });
    drawHits(true);
  });
  query.addEventListener("focus", () => drawHits(true));
  query.addEventListener("blur", () => drawHits(false));
  query.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by) {
      event.preventDefault();
      pointed += by;
      drawHits(true);
    }
    if (event.key === "Enter") {
      const hit = byId(`hit-${pointed}`);
      if (hit) select(Number(hit.dataset.of));
      figure.focus();
    }
  });
  byId("hits").addEventListener("pointerdown", (event) => {
    const hit = event.target.closest("[data-of]");
    event.preventDefault();
    if (!hit) return;
    select(Number(hit.dataset.of));
    query.blur();
  });
}

// ---- sliders ----

// the slider for links counts them on a log scale, the state holds their share of the targets
const countAt = (place) => Math.round((byStrength.length + 1) ** (place / 1000)) - 1;
const leastOf = (n) => (n ? flow[byStrength[n - 1]] : Infinity);
const strongest = () => byStrength.findLastIndex((link) => flow[link] >= state.least) + 1;
const reachAt = (place) => (place >= 1000 ? reaches[1] : reaches[0] + (place / 1000) * (reaches[1] - reaches[0]));

function drawSliders(moved) {
  const [low, high] = reaches;
  byId("reach-slide").hidden = !(high > low);
  if (moved !== "reach") byId("reach").value = 1000 * ((state.reach - low) / (high - low || 1));
  if (moved !== "weight") byId("weight").value = (1000 * Math.log(strongest() + 1)) / Math.log(byStrength.length + 1);
  const reach = Number.isFinite(high) ? `top ${percent(state.reach)} of influence` : "";
  byId("reach-said").textContent = `${count(view.visible.length)} of ${count(nodes.length)}`;
  byId("reach-slide").title = `nodes up to the ${reach}`;
  const least = Number.isFinite(state.least) ? `≥ ${precise(state.least)}` : "none";
  byId("weight-said").textContent = `${least}: ${count(view.drawn)} of ${count(byStrength.length)}`;
}

// ---- the address holds the whole state, so that a link shows what its sender saw ----

const inHash = {
  node: (one) => (one.node === null ? [] : [nodes[one.node].id]),
  group: (one) => (one.group === null ? [] : [one.group]),
  trail: (one) => one.trail.map((at) => nodes[at].id),
  pins: (one) => one.pins.map((at) => nodes[at].id),
  groups: (one) => one.groups.map(({ name, members }) => JSON.stringify([name, ...members.map((at) => nodes[at].id)])),
  labels: (one) => [...one.labels].map((pair) => JSON.stringify(pair)),
  reach: (one) => [String(one.reach)],
  least: (one) => [String(one.least)],
  effect: (one) => [String(one.effect)],
  query: (one) => (one.query ? [one.query] : []),
  larger: (one) => (one.larger ? ["1"] : []),
};

function remember() {
  const hash = new URLSearchParams();
  for (const [key, write] of Object.entries(inHash)) {
    const now = write(state);
    if (now.join("\n") === write(usual).join("\n")) continue;
    for (const value of now.length ? now : [""]) hash.append(key, value);
  }
  try {
    history.replaceState(null, "", `#${hash}`);
  } catch {
    // inside a frame without an address of its own there is no link to keep
  }
}

function listsIn(values) {
  return values.flatMap((text) => {
    try {
      const list = JSON.parse(text);
      return Array.isArray(list) && list.every((one) => typeof one === "string") ? [list] : [];
    } catch {
      return [];
    }
  });
}

// what an address doesn't say stays as usual; what it names and this graph doesn't have is left out
function recall() {
  const hash = new URLSearchParams(location.hash.slice(1));
  const known = (values) => [...new Set(values)].flatMap((id) => numberOf.get(id) ?? []);
  const next = copy(usual);
  const read = {
    node: ([id]) => numberOf.get(id) ?? null,
    trail: (ids) => ids.flatMap((id) => numberOf.get(id) ?? []),
    pins: known,
    groups: (values) => listsIn(values).map(([name, ...ids]) => ({ name, members: known(ids).filter((at) => next.pins.includes(at)) })).filter(({ members }) => members.length),
    group: ([name]) => (next.groups.some((group) => group.name === name) ? name : null),
    labels: (values) => new Map(listsIn(values)),
    reach: ([text]) => (Number.isFinite(parseFloat(text)) ? parseFloat(text) : usual.reach),
    least: ([text]) => (text === "" || Number.isNaN(Number(text)) ? usual.least : Number(text)),
    effect: ([text]) => (targets[text] === undefined ? 0 : Number(text)),
    query: ([text]) => text,
    larger: ([text]) => text === "1",
  };
  for (const [key, parse] of Object.entries(read)) {
    if (hash.has(key)) next[key] = parse(hash.getAll(key));
  }
  if (next.group !== null) next.node = null;
  Object.assign(state, next);
}

// ---- changes ----

function present(moved) {
  find();
  redraw();
  drawLegend();
  drawSliders(moved);
}

let remembering = 0;

function change(part, moved) {
  Object.assign(state, part);
  drawBoard();
  present(moved);
  if (!moved && part.query === undefined) drawDetail();
  // browsers refuse an address that changes with each step of a slider
  clearTimeout(remembering);
  if (moved) remembering = setTimeout(remember, 200);
  else remember();
}

const KEPT = 40; // steps of the way that are kept

const wayOn = () => (state.node === null ? state.trail : [...state.trail, state.node].slice(-KEPT));

function select(at) {
  if (at !== state.node || state.group !== null) change({ node: at, group: null, trail: wayOn() });
}

function selectGroup(name) {
  change({ group: name, node: null, trail: wayOn() });
}

function goBack() {
  if (!state.trail.length) return;
  change({ node: state.trail.at(-1), group: null, trail: state.trail.slice(0, -1) });
}

function clear() {
  byId("query").value = "";
  byId("hits").hidden = true;
  change({ node: null, group: null, trail: [], ...(state.query ? { query: "" } : {}) });
  drawDetail();
}

// ---- keys, pointer, tips ----

const WALK = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function pressed(event) {
  const typing = event.target.closest?.("input, select, textarea, dialog");
  if (event.key === "Escape" && !byId("exported").open) {
    document.activeElement?.closest("header")?.querySelector(":focus")?.blur();
    clear();
    return;
  }
  if (typing || event.metaKey || event.ctrlKey || event.altKey) return;
  const act = {
    "/": () => byId("query").focus(),
    p: () => state.node !== null && pin(state.node),
    Backspace: goBack,
  }[event.key];
  const inside = event.target === figure || event.target === document.body;
  if (act) act();
  else if (WALK[event.key] && inside) {
    const start = state.node ?? view.visible.find((at) => nodes[at].kind === "target") ?? view.visible[0];
    if (state.node === null) select(start);
    else walk(neighbour(start, WALK[event.key]));
  } else return;
  event.preventDefault();
}

// a walk by keys is no way along links: it leaves the trail as it is
function walk(at) {
  if (at !== null) change({ node: at, group: null });
}

function showTip(text, left, top, above) {
  const tip = byId("tip");
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  tip.style.left = `${Math.max(8, Math.min(left, document.documentElement.clientWidth - tip.offsetWidth - 8))}px`;
  const over = top - tip.offsetHeight - 12;
  tip.style.top = `${over < 0 ? above : over}px`;
}

function nodeTip(at) {
  const { activation, kind } = nodes[at];
  const lines = [labelOf(at), [kind, whereOf(at), activation === null ? "" : short(activation)].filter(Boolean).join(" · ")];
  for (const one of members().size === 1 ? members() : []) {
    const [gives, takes] = [between(at, one), between(one, at)];
    if (gives) lines.push(`adds ${signed(gives)} to ${targetName(one)}`);
    if (takes) lines.push(`gets ${signed(takes)} from ${targetName(one)}`);
  }
  const effect = nodes[at].effects[state.effect];
  if (effect && kind !== "target") lines.push(`total effect ${signed(effect)} on ${targetName(targets[state.effect])}`);
  return lines.join("\n");
}

function listen() {
  figure.addEventListener("pointermove", (event) => {
    const at = under(event);
    hover(at);
    if (at === null) return showTip("");
    const box = figure.getBoundingClientRect();
    showTip(nodeTip(at), box.left + places[at].x + 8, box.top + places[at].y, box.top + places[at].y + 14);
  });
  figure.addEventListener("pointerleave", () => {
    hover(null);
    showTip("");
  });
  figure.addEventListener("click", (event) => {
    const at = under(event);
    if (event.shiftKey && at !== null) pin(at);
    else select(at);
  });
  document.addEventListener("pointerover", (event) => {
    if (figure.contains(event.target)) return;
    const spot = event.target.closest?.("[data-tip]");
    if (!spot) return showTip("");
    const { bottom } = spot.getBoundingClientRect();
    showTip(spot.dataset.tip, event.clientX + 8, event.clientY, Math.max(bottom + 6, event.clientY + 14));
  });
  document.addEventListener("keydown", pressed);
  byId("reach").addEventListener("input", (event) => change({ reach: reachAt(Number(event.target.value)) }, "reach"));
  byId("weight").addEventListener("input", (event) => change({ least: leastOf(countAt(Number(event.target.value))) }, "weight"));
  addEventListener("hashchange", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readPalette();
    present();
  });
  let size = ""; // an observer calls once at first
  const resized = new ResizeObserver(() => {
    const now = [figure, board].map((one) => `${one.clientWidth} ${one.clientHeight}`).join();
    if (size && now !== size) {
      drawBoard();
      present();
    }
    size = now;
  });
  resized.observe(figure);
  resized.observe(board);
}

function show() {
  recall();
  byId("query").value = state.query;
  drawDetail();
  drawBoard();
  present();
}

readPalette();
listenToBoard();
listenToSearch();
listen();
show();
