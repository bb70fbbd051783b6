"use strict";
// The board of what is pinned: boxes for nodes and supernodes, inputs left and outputs right, and between two boxes
// the sum of the links from one's nodes to the other's.

const board = byId("board");
const ticked = new Set(); // boxes to be grouped next, by key
const BOX = { width: 164, height: 38, gap: 10, column: 250 };

function boxes() {
  const grouped = new Set(state.groups.flatMap((group) => group.members));
  const mean = (list) => list.reduce((sum, one) => sum + one, 0) / list.length;
  const some = [
    ...state.groups.map(({ name, members }) => ({ key: `group ${name}`, group: name, members, name })),
    ...state.pins.filter((at) => !grouped.has(at)).map((at) => ({ key: `node ${at}`, at, members: [at], name: targetName(at) })),
  ];
  for (const box of some) {
    box.depth = Math.round(2 * mean(box.members.map((at) => rowAt[at])));
    box.along = mean(box.members.map((at) => columnAt[at]));
  }
  return some.sort((a, b) => a.depth - b.depth || a.along - b.along);
}

// {from, to, sum, links} between boxes, the strongest first
function sums(some) {
  const owner = new Map(some.flatMap((box) => box.members.map((at) => [at, box])));
  const found = new Map();
  for (const [at, from] of owner) {
    for (const link of leaving[at]) {
      const to = owner.get(target[link]);
      if (!to || to === from) continue;
      const key = `${from.key} ${to.key}`;
      if (!found.has(key)) found.set(key, { from, to, sum: 0, links: 0 });
      found.get(key).sum += weight[link];
      found.get(key).links += 1;
    }
  }
  return [...found.values()].sort((a, b) => Math.abs(b.sum) - Math.abs(a.sum));
}

function placeBoxes(some) {
  const columns = [...new Set(some.map((box) => box.depth))];
  const tall = Math.max(...columns.map((depth) => some.filter((box) => box.depth === depth).length));
  const height = Math.max(board.clientHeight - 8, tall * (BOX.height + BOX.gap) + BOX.gap);
  const pitch = Math.max(BOX.width + 70, Math.min(BOX.column, (board.clientWidth - BOX.width - 32) / Math.max(1, columns.length - 1)));
  columns.forEach((depth, column) => {
    const here = some.filter((box) => box.depth === depth);
    const step = Math.min(BOX.height + 26, (height - BOX.gap) / here.length);
    here.forEach((box, index) => Object.assign(box, { x: 12 + column * pitch, y: height / 2 + (index - (here.length - 1) / 2) * step }));
  });
  return { width: 24 + BOX.width + (columns.length - 1) * pitch, height };
}

function boxElement(box) {
  const tick = make("input", { type: "checkbox", checked: ticked.has(box.key), "aria-label": `Tick ${box.name} for grouping` });
  tick.addEventListener("change", () => {
    if (tick.checked) ticked.add(box.key);
    else ticked.delete(box.key);
    sayTicked();
  });
  const isGroup = box.group !== undefined;
  const name = make("button", { type: "button", className: "name", title: box.name }, make("span", {}, isGroup ? plain(box.name) : targetName(box.at)), make("small", {}, isGroup ? `${box.members.length} nodes` : whereOf(box.at)));
  name.addEventListener("click", () => (isGroup ? selectGroup(box.group) : select(box.at)));
  const part = make("button", { type: "button", className: "part", "aria-label": `${isGroup ? "Ungroup" : "Unpin"} ${box.name}`, title: isGroup ? "Ungroup" : "Unpin" }, "×");
  part.addEventListener("click", () => (isGroup ? ungroup(box.group) : pin(box.at)));
  const chosen = isGroup ? state.group === box.group : state.node === box.at;
  const mark = isGroup ? null : emblem(box.at);
  const element = make("div", { className: `box${isGroup ? " super" : ""}${chosen ? " chosen" : ""}`, "--x": `${box.x}px`, "--y": `${box.y - BOX.height / 2}px` }, tick, mark, name, part);
  element.dataset.key = box.key;
  return element;
}

function linkElements({ from, to, sum, links }, largest, room) {
  const share = Math.abs(sum) / largest;
  const [a, b] = [{ x: from.x + BOX.width, y: from.y }, { x: to.x, y: to.y }];
  const same = from.depth === to.depth;
  const bend = Math.max(36, 0.45 * Math.abs(b.x - a.x));
  const d = same
    ? `M${a.x} ${a.y}C${a.x + 46} ${a.y} ${a.x + 46} ${b.y} ${a.x} ${b.y}`
    : `M${a.x} ${a.y}C${a.x + bend} ${a.y} ${b.x - bend} ${b.y} ${b.x} ${b.y}`;
  const line = draw("path", { d, class: sum < 0 ? "flow negative" : "flow", "--share": share.toFixed(3) });
  const wide = draw("path", { d, class: "reach" });
  const said = `${from.name} → ${to.name}\n${signed(sum)}${links > 1 ? `, sum of ${links} links` : ""}`;
  wide.dataset.tip = said;
  const elements = [line, wide];
  // nearer to where it ends, since what ends there is compared
  const at = same ? { x: a.x + 36, y: (a.y + b.y) / 2 } : { x: a.x + 0.6 * (b.x - a.x), y: a.y + 0.648 * (b.y - a.y) };
  const clear = room.every((other) => Math.abs(other.x - at.x) > 44 || Math.abs(other.y - at.y) > 13);
  if (share > 0.04 && clear) {
    room.push(at);
    elements.push(draw("text", { x: at.x, y: at.y, class: "sum" }, signed(sum)));
  }
  return elements;
}

function drawBoard() {
  const some = boxes();
  for (const key of ticked) if (!some.some((box) => box.key === key)) ticked.delete(key);
  byId("pinned").classList.toggle("empty", !some.length);
  byId("pinned").classList.toggle("larger", state.larger);
  put(byId("larger"), { "aria-pressed": state.larger });
  if (!some.length) {
    board.replaceChildren(make("p", { className: "hint" }, "Pin nodes to see what they add to each other; tick some and group them into a supernode."));
    sayTicked();
    return;
  }
  const { width, height } = placeBoxes(some);
  const found = sums(some);
  const largest = Math.abs(found[0]?.sum ?? 1);
  const room = [];
  const lines = draw("svg", { width, height, "aria-hidden": "true" });
  const drawn = found.map((one) => linkElements(one, largest, room));
  for (const layer of [0, 1, 2]) lines.append(...drawn.map((elements) => elements[layer]).filter(Boolean).reverse());
  const scrolled = [board.scrollLeft, board.scrollTop];
  board.replaceChildren(lines, ...some.map(boxElement));
  [board.scrollLeft, board.scrollTop] = scrolled;
  sayTicked();
}

function sayTicked() {
  const n = state.pins.length;
  byId("pinned-said").textContent = n ? `${n} ${n === 1 ? "node" : "nodes"}${ticked.size ? `, ${ticked.size} ticked` : ""}` : "";
  byId("group").disabled = !ticked.size;
}

// ---- changes ----

function pin(at) {
  if (state.pins.includes(at)) {
    for (const group of state.groups) group.members = group.members.filter((one) => one !== at);
    change({ pins: state.pins.filter((one) => one !== at), ...groupsLeft() });
  } else change({ pins: [...state.pins, at] });
}

function groupsLeft() {
  const groups = state.groups.filter((group) => group.members.length);
  return { groups, group: groups.some(({ name }) => name === state.group) ? state.group : null };
}

// the ticked boxes' nodes under one name; supernodes among them are dissolved
function group(given) {
  const some = boxes().filter((box) => ticked.has(box.key));
  const inside = some.flatMap((box) => box.members);
  if (!inside.length) return;
  const kept = state.groups.filter(({ name }) => !some.some((box) => box.group === name));
  let name = given.trim() || targetName(inside[0]);
  while (kept.some((one) => one.name === name)) name += "′";
  ticked.clear();
  change({ groups: [...kept, { name, members: inside }], group: name, node: null });
}

function ungroup(name) {
  state.groups = state.groups.filter((group) => group.name !== name);
  change(groupsLeft());
}

// as the graph's JSON holds it
function pinning() {
  return {
    ...data.q,
    pinnedIds: state.pins.map((at) => nodes[at].id),
    supernodes: state.groups.map(({ name, members }) => [name, ...members.map((at) => nodes[at].id)]),
    clickedId: state.node === null ? "" : nodes[state.node].id,
    clerps: JSON.stringify([...state.labels]),
    pruningThreshold: state.reach === reaches[1] ? null : state.reach,
  };
}

function listenToBoard() {
  byId("grouping").addEventListener("submit", (event) => {
    event.preventDefault();
    group(byId("group-name").value);
    byId("group-name").value = "";
  });
  byId("unpin-all").addEventListener("click", () => change({ pins: [], groups: [], group: null }));
  byId("larger").addEventListener("click", () => change({ larger: !state.larger }));
  byId("export").addEventListener("click", () => {
    byId("exported-text").value = JSON.stringify(pinning(), null, 1);
    byId("copied").textContent = "";
    byId("exported").showModal();
  });
  byId("copy").addEventListener("click", async () => {
    byId("exported-text").select();
    try {
      await navigator.clipboard.writeText(byId("exported-text").value);
      byId("copied").textContent = "Copied.";
    } catch {
      byId("copied").textContent = "Selected: press Ctrl+C.";
    }
  });
  byId("download").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([byId("exported-text").value], { type: "application/json" }));
    make("a", { href: url, download: "qParams.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });
}
