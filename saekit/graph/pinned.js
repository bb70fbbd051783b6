"use strict";
// The board of what is pinned: boxes for nodes and supernodes, inputs left and outputs right, and between two boxes
// the sum of the links from one's nodes to the other's.

const board = byId("board");
const ticked = new Set(); // boxes to be grouped next, by key
const BOX = { width: 178, height: 38, gap: 8, between: 44 };

function boxes() {
  const grouped = new Set(state.groups.flatMap((group) => group.members));
  const mean = (list) => list.reduce((sum, one) => sum + one, 0) / list.length;
  const some = [
    ...state.groups.map(({ name, members }) => ({ key: `group ${name}`, group: name, members, name })),
    ...state.pins.filter((at) => !grouped.has(at)).map((at) => ({ key: `node ${at}`, at, members: [at], name: targetName(at) })),
  ];
  for (const box of some) {
    box.depth = mean(box.members.map((at) => rowAt[at]));
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

// columns by the longest way that leads to a box, fewer where there is no room for so many
function placeBoxes(some, found) {
  const depths = new Map();
  for (const box of some) {
    const before = found.filter(({ from, to }) => to === box && depths.has(from)).map(({ from }) => depths.get(from));
    depths.set(box, Math.max(-1, ...before) + 1);
  }
  // what nothing leads to stands right before where it leads, but for tokens
  for (const box of some) {
    const after = found.filter(({ from }) => from === box).map(({ to }) => depths.get(to));
    if (!found.some(({ to }) => to === box) && rowKeys[Math.floor(box.depth)] >= 0 && after.length) depths.set(box, Math.max(0, Math.min(...after) - 1));
  }
  const needed = Math.max(...depths.values()) + 1;
  const fits = Math.max(2, Math.floor((board.clientWidth - 24 + BOX.between) / (BOX.width + BOX.between)));
  const n = Math.min(needed, fits);
  const columns = Array.from({ length: n }, () => []);
  for (const [box, depth] of depths) columns[Math.floor((depth * n) / needed)].push(box);
  const tall = Math.max(...columns.map((column) => column.length));
  const height = Math.max(board.clientHeight - 4, tall * (BOX.height + BOX.gap) + BOX.gap);
  const pitch = Math.max(BOX.width + BOX.between, Math.min(270, (board.clientWidth - BOX.width - 24) / Math.max(1, n - 1)));
  columns.forEach((column, at) => {
    const step = Math.min(BOX.height + 26, (height - BOX.gap) / column.length);
    column.sort((a, b) => a.along - b.along);
    column.forEach((box, index) => Object.assign(box, { column: at, x: 12 + at * pitch, y: height / 2 + (index - (column.length - 1) / 2) * step }));
  });
  return { width: 24 + BOX.width + (n - 1) * pitch, height };
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

const around = ({ x, y }) => ({ left: x - 25, right: x + 25, top: y - 7, bottom: y + 7 });

// a point of the curve that leaves and arrives level
function along(t, x0, x1, x2, x3, y0, y3) {
  const [u, v, w, z] = [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t ** 3];
  return { x: u * x0 + v * x1 + w * x2 + z * x3, y: (u + v) * y0 + (w + z) * y3 };
}

function linkElements({ from, to, sum, links }, largest, room) {
  const share = Math.abs(sum) / largest;
  const same = from.column === to.column; // then around the right, from one of a column to another
  const back = same ? -1 : 1;
  const [a, b] = [{ x: from.x + BOX.width, y: from.y }, { x: same ? to.x + BOX.width : to.x, y: to.y }];
  const tip = b.x - 6 * back;
  const bend = same ? 34 : Math.max(30, 0.45 * Math.abs(b.x - a.x));
  const d = `M${a.x} ${a.y}C${a.x + bend} ${a.y} ${tip - bend * back} ${b.y} ${tip} ${b.y}`;
  const sort = sum < 0 ? " negative" : "";
  const line = draw("g", { class: `flow${sort}`, "--share": share.toFixed(3) }, draw("path", { d }), draw("path", { class: "tip", d: `M${b.x} ${b.y}L${tip - 2 * back} ${b.y - 4}V${b.y + 4}z` }));
  const wide = draw("path", { d, class: "reach" });
  const said = `${from.name} → ${to.name}\n${signed(sum)}${links > 1 ? `, sum of ${links} links` : ""}`;
  wide.dataset.tip = said;
  const elements = [line, wide];
  const spot = [0.35, 0.5, 0.65, 0.2, 0.8].map((t) => along(t, a.x, a.x + bend, tip - bend * back, tip, a.y, b.y)).find((at) => room.every((one) => !overlap(one, around(at))));
  if (share > 0.03 && spot) {
    room.push(around(spot));
    elements.push(draw("text", { ...spot, class: "sum" }, signed(sum)));
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
  const found = sums(some);
  const { width, height } = placeBoxes(some, found);
  const largest = Math.abs(found[0]?.sum ?? 1);
  const room = some.map(({ x, y }) => ({ left: x, right: x + BOX.width, top: y - BOX.height / 2, bottom: y + BOX.height / 2 }));
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
