// The page: what is asked for, what is selected, and the charts.

// ---- what is shown ----

const usual = { f: null, q: "", sort: "index", view: "aligned", values: false };
const state = { ...usual };

const size = { index: (one) => one.index, density: (one) => one.density, max: (one) => Math.abs(one.max) };

function order() {
  const key = state.sort.replace(/^-/, "");
  const sign = state.sort[0] === "-" ? -1 : 1;
  const scorer = scorerOf(key);
  const value = scorer === undefined ? size[key] : (one) => one.scores[scorer];
  // a dead feature is neither the rarest nor the weakest, nor one without a score the worst: they come last
  const absent = scorer === undefined ? (one) => key !== "index" && !one.density : (one) => value(one) == null;
  return (left, right) => {
    const last = absent(left) - absent(right);
    if (last || absent(left)) return last || left.index - right.index;
    return sign * (value(left) - value(right)) || left.index - right.index;
  };
}

function offerScores() {
  const scorers = new Set(data.features.flatMap((feature) => Object.keys(feature.scores)));
  for (const scorer of [...scorers].sort()) {
    byId("sort").append(
      make("option", { value: `-score:${scorer}` }, `best ${scorer} score first`),
      make("option", { value: `score:${scorer}` }, `worst ${scorer} score first`),
    );
  }
}

function select(number, { focus = false, scroll = true } = {}) {
  state.f = number;
  reveal(number, { focus, scroll });
  const feature = features.get(number);
  const none = number === null ? "No feature matches." : `Feature ${number} is not in this report.`;
  const content = feature ? detail(cardOf(feature)) : [make("p", { id: "detail-title", className: "empty" }, none)];
  byId("detail").replaceChildren(...content.filter((node) => node !== null));
}

function list() {
  const query = state.q.trim() && state.q.toLowerCase();
  const found = query ? data.features.filter((one) => (one.relevance = relevance(one, query))) : [...data.features];
  const usually = order();
  fill(found.sort(query ? (left, right) => right.relevance - left.relevance || usually(left, right) : usually));
  const graded = data.features.some((one) => Object.keys(one.scores).length) ? "; left of an explanation, its score" : "";
  const total = `${data.features.length.toLocaleString("en")} features`;
  byId("status").textContent = query ? `${shown.length.toLocaleString("en")} of ${total}, closest first` : total + graded;
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
  const at = placeOf(state.f);
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
      reveal(state.f, { focus: true, scroll: true });
    }
  });
  byId("list").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    select(Number(link.dataset.index), { focus: true, scroll: false });
    remember();
  });
  byId("list").addEventListener("scroll", paint, { passive: true });
  addEventListener("resize", () => fill(shown));
  byId("detail").addEventListener("click", (event) => {
    const link = event.target.closest("a");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    select(Number(link.textContent));
    remember();
    byId("detail").focus({ preventScroll: true });
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
  byId("list").classList.toggle("explained", explained);
  offerScores();
  listen();
  tips();
  const asked = recall();
  show();
  prepare(0);
  if (asked) addEventListener("DOMContentLoaded", () => byId("features").scrollIntoView());
}
// plotly is the last script of the page
addEventListener("DOMContentLoaded", () => {
  plot();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", plot);
});
