// Search: a number, words of an explanation, text that overlaps a token on which the feature fires, a token it promotes.

const lowered = text.map((token) => token.toLowerCase());
const index = []; // by line: what is searched of a feature, made once

function indexed(feature) {
  return (index[feature.line] ??= entry(feature));
}

function entry(feature) {
  const card = JSON.parse(lines[feature.line]);
  const named = [...card.promoted, ...card.suppressed].map(([token]) => lowered[token]);
  return {
    contexts: card.top.map(haystack),
    named: named.join("\n\n"),
    said: feature.said.map((one) => one.toLowerCase()),
  };
}

// the context as one string, and where in it the peak and the other active tokens lie
function haystack({ tokens, active, peak }) {
  const starts = [0];
  for (const token of tokens) starts.push(starts.at(-1) + lowered[token].length);
  const spans = [];
  for (let i = 0; i < active.length; i += 2) {
    const [from, to] = [starts[active[i]], starts[active[i] + 1]];
    if (spans.at(-1)?.[1] === from) spans.at(-1)[1] = to;
    else spans.push([from, to]);
  }
  return { whole: tokens.map((token) => lowered[token]).join(""), peak: [starts[peak], starts[peak + 1]], spans };
}

// whether the query occurs where it overlaps a span
function overlaps(whole, query, [from, to]) {
  const at = whole.indexOf(query, Math.max(0, from - query.length + 1));
  return at >= 0 && at < to;
}

// how well a feature answers a query: 0 not at all, 5 by its number
function relevance(feature, query) {
  const number = String(feature.index);
  const asked = query.replace(/^#/, "");
  if (number === asked) return 5;
  if (query[0] === "#" && /^\d*$/.test(asked)) return number.startsWith(asked) ? 2 : 0;
  const { contexts, named, said } = indexed(feature);
  if (said.some((one) => one.includes(query))) return 4;
  if (contexts.some(({ whole, peak }) => overlaps(whole, query, peak))) return 3;
  if (number.startsWith(query)) return 2;
  if (contexts.some(({ whole, spans }) => spans.some((span) => overlaps(whole, query, span)))) return 2;
  return Number(named.includes(query));
}

const idly = globalThis.requestIdleCallback ?? ((work) => setTimeout(work, 20, { timeRemaining: () => 0 }));

// made while nothing else happens, so that the first search need not wait
function prepare(from) {
  idly((deadline) => {
    let at = from;
    do indexed(data.features[at++]);
    while (at < data.features.length && deadline.timeRemaining() > 2);
    if (at < data.features.length) prepare(at);
  });
}
