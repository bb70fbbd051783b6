// The list: only the rows in view are in the document, however many features there are.

const SPARE = 8; // rows drawn beyond either end of the view
let shown = [];
let rowHeight = 0;
const drawn = new Map(); // place in the list -> its row

const explained = data.features.some((feature) => feature.said.length);

const scorerOf = (sort) => sort.match(/^-?score:(.*)$/s)?.[1];

function peaksOf(feature) {
  const trimmed = feature.peaks.map((token) => text[token].trim() || text[token]);
  return [...new Set(trimmed)].slice(0, 4).map((token) => make("span", { className: "token" }, ...glyphs(token)));
}

function rowOf(feature, at) {
  const scorer = scorerOf(state.sort) ?? Object.keys(feature.scores)[0];
  const score = feature.scores[scorer];
  const link = make(
    "a",
    { href: `#f=${feature.index}` },
    make("span", { className: "number" }, String(feature.index)),
    make("span", { className: "peaks" }, ...(feature.density ? peaksOf(feature) : [make("em", {}, "dead")])),
    make("span", { className: "often" }, feature.density ? percent(feature.density) : ""),
    explained ? make("span", { className: "graded", title: scorer ?? "" }, score == null ? "" : score.toFixed(2)) : null,
    explained ? make("span", { className: "meaning" }, ...(feature.label ? glyphs(feature.label) : ["—"])) : null,
  );
  link.dataset.index = feature.index;
  if (feature.index === state.f) link.setAttribute("aria-current", "true");
  const row = make("li", {}, link);
  row.style.top = `${at * rowHeight}px`;
  row.setAttribute("aria-posinset", at + 1);
  row.setAttribute("aria-setsize", shown.length);
  return row;
}

// Draw what has come into view and take away what has left it. Rows that stay are not touched, and the row that has
// the focus stays wherever it is, so that the keyboard never loses its place.
function paint() {
  const box = byId("list");
  const rows = box.firstElementChild;
  const first = Math.max(0, Math.floor(box.scrollTop / rowHeight) - SPARE);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / rowHeight) + SPARE);
  const wanted = new Set();
  for (let at = first; at < last; at++) wanted.add(at);
  for (const [at, row] of drawn) {
    if (wanted.has(at) || row.contains(document.activeElement)) wanted.add(at);
    else {
      row.remove();
      drawn.delete(at);
    }
  }
  let next = rows.firstElementChild;
  for (const at of [...wanted].sort((left, right) => left - right)) {
    const row = drawn.get(at);
    if (row) next = row.nextElementSibling;
    else {
      drawn.set(at, rowOf(shown[at], at));
      rows.insertBefore(drawn.get(at), next);
    }
  }
}

// Show other features, or the same in another order.
function fill(found) {
  shown = found;
  const rows = byId("list").firstElementChild;
  rows.replaceChildren();
  drawn.clear();
  const probe = rows.appendChild(make("li"));
  rowHeight = probe.getBoundingClientRect().height || 1;
  probe.remove();
  rows.style.height = `${shown.length * rowHeight}px`;
  paint();
}

const placeOf = (number) => shown.findIndex((feature) => feature.index === number);

function reveal(number, { focus, scroll }) {
  const box = byId("list");
  for (const link of box.querySelectorAll("[aria-current]")) link.removeAttribute("aria-current");
  const at = placeOf(number);
  if (at < 0) return;
  const top = at * rowHeight;
  const outside = top < box.scrollTop || top + rowHeight > box.scrollTop + box.clientHeight;
  if (scroll && outside) box.scrollTop = top - (box.clientHeight - rowHeight) / 2;
  paint();
  const link = drawn.get(at)?.querySelector("a");
  link?.setAttribute("aria-current", "true");
  if (focus) link?.focus({ preventScroll: true });
}
