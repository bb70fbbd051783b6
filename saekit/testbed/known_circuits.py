"""Circuits of attention heads that are known because they are built: induction, indirect objects, lookup, backup.

Ground truth for attribution (Conmy et al. 2023, 2304.14997, and Gupta et al. 2024, 2407.14494, build theirs with Tracr
or train them in). Token 0 begins every prompt; heads that have nothing to look at look there, and find nothing.
"""

import math
from typing import Any

import torch

from saekit.testbed.handbuilt import SHARP, Builder, Edge, Known, Node, Pair, Prompt

DRAWN = 24  # tokens that prompts are drawn from
NAMES, WORDS = 32, 4
KEYS = 24
SIGNALS = 8
SHARE = 0.25  # of its attention that the backup head gives to the signal while the first head is there
INHIBITION = 0.5  # of what the first head writes


def _draw(n: int, of: int, g: torch.Generator) -> list[int]:
    """Different numbers below ``of``."""
    return torch.randperm(of, generator=g)[:n].tolist()


def _between(low: int, high: int, g: torch.Generator) -> int:
    """A number from ``low`` to ``high``."""
    return int(torch.randint(low, high + 1, (), generator=g))


def _words(g: torch.Generator, most: int, first: int, count: int = WORDS) -> list[int]:
    """Up to so many words, whose tokens begin at ``first``."""
    return (first + torch.randint(count, (_between(0, most, g),), generator=g)).tolist()


def induction(**options: Any) -> Known:
    """In two layers of attention: a token that came before is followed by what followed it then.

    Head 0 of layer 0 copies each position's previous token; head 0 of layer 1 looks at the position whose previous
    token is the query's, and copies its token to the logits (Elhage et al. 2021; Olsson et al. 2022, 2209.11895).
    ``options`` are those of :meth:`Builder.finish`, here and below.
    """
    n, context = DRAWN + 1, 20
    b = Builder({"tok": n, "prev": n, "out": n, "pos": context}, n, context, layers=2)
    tok, prev, out, pos = (b.rows(name) for name in ("tok", "prev", "out", "pos"))
    b.W_E += tok
    b.W_pos += pos
    b.W_U += out
    b.head(0, [(SHARP * pos[1:], pos[:-1])], [(tok, prev)])
    b.head(1, [(SHARP * tok, prev)], [(tok, out)])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        return [_repeated(b, g) for _ in range(count)]

    return b.finish(prompts, range(1, n), **options)


def _repeated(b: Builder, g: torch.Generator) -> Prompt:
    period = _between(5, 10, g)
    drawn = [t + 1 for t in _draw(period, DRAWN, g)]
    again = _between(1, period - 1, g)
    tokens = [0, *drawn, *drawn[:again]]
    q, k = len(tokens) - 1, again + 1  # drawn[again] stands at the position again + 1
    answer = drawn[again]
    first, second = ("head", 0, 0, k), ("head", 1, 0, q)
    edges = (
        Edge(("token", k - 1), first, 1.0),
        Edge(("token", k), second, 1.0),
        Edge(second, ("target", answer), 1.0),
    )
    pairs = (
        Pair(("position", k), ("position", k - 1), first, k - 1, SHARP),
        Pair(("token", q), first, second, k, SHARP),
    )
    path = (("token", k), ("feature", 0, b.spaces["tok"][answer], k), ("feature", 1, b.spaces["out"][answer], q), ("target", answer))  # fmt: skip
    return Prompt(
        torch.tensor(tokens), (answer,), edges, pairs, {(("token", k), ("target", answer)): 1.0}, path
    )


def indirect_object(**options: Any) -> Known:
    """Which of two names came only once, in three layers of attention (Wang et al. 2022, 2211.00593).

    A duplicate-token head marks the second mention of the subject, an S-inhibition head tells the last position which
    name that is, and a name mover looks at names there, but not at that one, and copies its token to the logits.
    """
    begin, end, first_word = 0, 1, 2 + NAMES
    vocabulary, context = first_word + WORDS, 20
    b = Builder(
        {"name": NAMES, "kind": 4, "pos": context, "dup": 1, "subject": NAMES, "out": NAMES}, vocabulary, context, layers=3
    )  # fmt: skip
    name, kind, pos, dup, subject, out = (b.rows(s) for s in ("name", "kind", "pos", "dup", "subject", "out"))
    is_begin, is_end, is_name, is_word = (kind[i : i + 1] for i in range(4))
    names = range(2, 2 + NAMES)
    b.W_E[begin], b.W_E[end], b.W_E[first_word:] = is_begin, is_end, is_word
    b.W_E[2:first_word] = name + is_name
    b.W_U[2:first_word] = out
    b.W_pos += pos
    rest = (SHARP * (is_begin + is_name + is_word), is_begin)
    unless = (SHARP * (is_begin + 0.5 * is_name + is_word + is_end), is_begin)
    b.head(0, [(SHARP * name, name), (-SHARP * pos, pos), unless], [(is_name, dup)])
    b.head(1, [(SHARP * is_end, dup), rest], [(name, subject)])
    b.head(2, [(SHARP * is_end, is_name), (-SHARP * subject, name), rest], [(name, out)])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        return [_sentence(b, names, g, first_word) for _ in range(count)]

    return b.finish(prompts, names, **options)


def _sentence(b: Builder, names: range, g: torch.Generator, word: int) -> Prompt:
    subject, other = (names[i] for i in _draw(2, NAMES, g))
    order = [subject, other] if _between(0, 1, g) else [other, subject]  # BABA, or ABBA
    tokens, at = [0], []
    for token in (*order, subject):
        tokens += [*_words(g, 2, word), token]
        at.append(len(tokens) - 1)
    tokens += [*_words(g, 2, word), 1]
    s1, io, s2, q = at[order.index(subject)], at[order.index(other)], at[2], len(tokens) - 1
    duplicate, inhibition, mover = ("head", 0, 0, s2), ("head", 1, 0, q), ("head", 2, 0, q)
    edges = (
        Edge(("token", s1), duplicate, 1.0),
        Edge(("token", s2), inhibition, 1.0),
        Edge(("token", io), mover, 1.0),
        Edge(mover, ("target", other), 1.0),
    )
    pairs = (
        Pair(("token", s2), ("token", s1), duplicate, s1, SHARP),
        Pair(("token", s2), ("token", s2), duplicate, s2, SHARP),
        Pair(("position", s2), ("position", s2), duplicate, s2, -SHARP),
        Pair(("token", s2), ("token", 0), duplicate, 0, 0.5 * SHARP),
        Pair(("token", q), duplicate, inhibition, s2, SHARP),
        *(Pair(("token", q), ("token", k), mover, k, SHARP) for k in (s1, io, s2)),
        *(Pair(inhibition, ("token", k), mover, k, -SHARP) for k in (s1, s2)),
    )
    n = other - names[0]
    path = (
        ("token", io), *(("feature", layer, b.spaces["name"][n], io) for layer in (0, 1)),
        ("feature", 2, b.spaces["out"][n], q), ("target", other),
    )  # fmt: skip
    totals: dict[tuple[Node, Node], float] = {(("token", io), ("target", other)): 1.0}
    return Prompt(torch.tensor(tokens), (other,), edges, pairs, totals, path)


def lookup(**options: Any) -> Known:
    """Values with keys, as in a docstring: which value stood two before this key (two layers of attention).

    Head 0 of layer 0 copies the value two positions back; head 0 of layer 1 looks at the same key further back, and
    copies what was brought there to the logits: a path of three edges, token, head, head, logit.
    """
    colon, values, keys = 1, range(2, 2 + KEYS), range(2 + KEYS, 2 + 2 * KEYS)
    vocabulary, context = keys[-1] + 1, 20
    b = Builder({"value": KEYS, "key": KEYS, "kind": 1, "pos": context, "brought": KEYS, "out": KEYS}, vocabulary, context, layers=2)  # fmt: skip
    value, key, begin, pos, brought, out = (
        b.rows(s) for s in ("value", "key", "kind", "pos", "brought", "out")
    )
    b.W_E[values[0] : keys[0]], b.W_E[keys[0] :], b.W_E[0] = value, key, begin
    b.W_U[values[0] : keys[0]] = out
    b.W_pos += pos
    b.head(
        0, [(SHARP * pos[2:], pos[:-2]), (SHARP * pos[:2].sum(0, keepdim=True), pos[:1])], [(value, brought)]
    )
    b.head(1, [(SHARP * key, key), (-SHARP * pos, pos)], [(brought, out)])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        return [_docstring(b, values, keys, colon, g) for _ in range(count)]

    return b.finish(prompts, values, **options)


def _docstring(b: Builder, values: range, keys: range, colon: int, g: torch.Generator) -> Prompt:
    count = _between(2, 5, g)
    chosen = list(zip(_draw(count, KEYS, g), _draw(count, KEYS, g), strict=True))
    asked = _between(0, count - 1, g)
    v, k = chosen[asked]
    tokens = [0, *(t for value, key in chosen for t in (values[value], colon, keys[key])), keys[k]]
    q, p = len(tokens) - 1, 3 * asked + 3
    bring, match, target = ("head", 0, 0, p), ("head", 1, 0, q), ("target", values[v])
    edges = (Edge(("token", p - 2), bring, 1.0), Edge(bring, match, 1.0), Edge(match, target, 1.0))
    pairs = (
        Pair(("position", p), ("position", p - 2), bring, p - 2, SHARP),
        Pair(("token", q), ("token", p), match, p, SHARP),
    )
    path = (("token", p - 2), ("feature", 0, b.spaces["brought"][v], p), ("feature", 1, b.spaces["out"][v], q), target)  # fmt: skip
    totals: dict[tuple[Node, Node], float] = {
        (node, target): 1.0 for node in (("token", p - 2), bring, match)
    }
    return Prompt(torch.tensor(tokens), (values[v],), edges, pairs, totals, path)


def backup(**options: Any) -> Known:
    """A head with a backup and an inhibition, on one logit: what ablation shows is not what the head adds.

    Head 0 of layer 0 copies a signal to the logits. Head 0 of layer 1 does so too, with SHARE of its attention while
    the first head has written anything and all of it otherwise; head 1 of layer 1 takes INHIBITION of what the first
    wrote off again (backup and negative heads: McGrath et al. 2023, 2307.15771; McDougall et al. 2023, 2310.04625).
    Without the first head the logit is 1, not the ``1 + SHARE - INHIBITION - (1 - INHIBITION)`` of frozen attention.
    """
    end, first_word, signals = 1, 2, range(2 + WORDS, 2 + WORDS + SIGNALS)
    vocabulary, context = signals[-1] + 1, 16
    b = Builder({"signal": SIGNALS, "kind": 4, "out": SIGNALS}, vocabulary, context, layers=2)
    signal, kind, out = (b.rows(s) for s in ("signal", "kind", "out"))
    is_begin, is_end, is_word, is_signal = (kind[i : i + 1] for i in range(4))
    b.W_E[0], b.W_E[end], b.W_E[first_word : signals[0]] = is_begin, is_end, is_word
    b.W_E[signals[0] :] = signal + is_signal
    b.W_U[signals[0] :] = out
    rest = (SHARP * (is_begin + is_word + is_signal), is_begin)
    written = out.sum(0, keepdim=True)
    gate = SHARP + math.log(
        1 / SHARE - 1
    )  # less attention for the signal, against the first token's score of 0
    b.head(0, [(SHARP * is_end, is_signal), rest], [(signal, out)])
    b.head(
        1,
        [(SHARP * is_end, is_signal - is_word - is_end), (-gate * written, is_signal), rest],
        [(signal, out)],
    )
    b.head(1, [(SHARP * is_end, is_end), rest], [(out, -INHIBITION * out)])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        return [_signal(signals, gate, g) for _ in range(count)]

    return b.finish(prompts, signals, **options)


def _signal(signals: range, gate: float, g: torch.Generator) -> Prompt:
    token = signals[_between(0, SIGNALS - 1, g)]
    before = _words(g, 5, 2)
    tokens = [0, *before, token, *_words(g, 5, 2), 1]
    s, q = 1 + len(before), len(tokens) - 1
    head, spare, against = ("head", 0, 0, q), ("head", 1, 0, q), ("head", 1, 1, q)
    target: Node = ("target", token)
    edges = (
        Edge(("token", s), head, 1.0),
        Edge(("token", s), spare, SHARE),
        Edge(head, against, 1.0),
        Edge(head, target, 1.0),
        Edge(spare, target, SHARE),
        Edge(against, target, -INHIBITION),
    )
    pairs = (
        Pair(("token", q), ("token", s), head, s, SHARP),
        Pair(("token", q), ("token", s), spare, s, SHARP),
        Pair(head, ("token", s), spare, s, -gate),
        Pair(("token", q), ("token", q), against, q, SHARP),
    )
    direct = 1 - INHIBITION
    totals = {head: direct, spare: SHARE, against: -INHIBITION, ("token", s): direct + SHARE}
    return Prompt(torch.tensor(tokens), (token,), edges, pairs, {(n, target): t for n, t in totals.items()})
