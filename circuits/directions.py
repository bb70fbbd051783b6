"""Where a head looks, in the singular directions of its scores: sparse attention decomposition (Franco & Crovella 2024, 2410.00340).

With a 1 behind every input, ``x~ = [x; 1]``, a score is bilinear, ``x~_i Omega x~_j``, of rank d_qk at most, and so a sum
``sum_k sigma_k (x~_i u_k)(x~_j v_k)`` over the singular directions of Omega. A head that attends to a token for one
reason does so by few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.attention import Patterns
from saekit.circuits.frozen import Frozen
from saekit.circuits.weights import Norm, run_block
from saekit.types import SaekitError

FIRING, KEPT = (
    0.5,
    0.7,
)  # attention of a firing, and the share of what heads add that is followed up (Franco & Crovella)
SIDES = ("query", "source")
Change = tuple[int, Tensor]  # a position, and what is added to the stream there [d]
EXACT = 1e-6  # of the score: by so much a sum over all directions may miss it in fp64, of fp32 weights


@dataclass(frozen=True)
class Directions:
    """``sigma`` falls; the last column of ``u`` (read from queries) and ``v`` (from sources) is for the 1 of x~."""

    sigma: Float[Tensor, " k"]
    u: Float[Tensor, "k d_in_and_one"]
    v: Float[Tensor, "k d_in_and_one"]

    def terms(
        self, query: Float[Tensor, "*shape d_in"], source: Float[Tensor, "*shape d_in"]
    ) -> Float[Tensor, "*shape k"]:
        """What every direction adds to the score of inputs of the layer (behind its norm)."""
        return self.sigma * _read(query, self.u) * _read(source, self.v)


def directions(patterns: Patterns, head: int, offset: int = 0) -> Directions:
    """The singular directions of a head's scores, in fp64, with biases and scale.

    Rotary positions make them depend on ``offset``, how far the source lies back. Of heads with QK norms these are
    the directions before the two are divided by their sizes.
    """
    if not 0 <= head < len(patterns.W_Q):
        raise SaekitError(f"head = {head} is not one of the layer's {len(patterns.W_Q)}; count from 0")
    kv = head * len(patterns.W_K) // len(patterns.W_Q)
    q, k = (
        torch.cat([w[at], b[at, :, None]], 1).double() * (1.0 if norm is None else norm.double()[:, None])
        for w, b, at, norm in (
            (patterns.W_Q, patterns.b_Q, head, patterns.norm_q),
            (patterns.W_K, patterns.b_K, kv, patterns.norm_k),
        )
    )
    turns = patterns.turns(offset + 1).double()
    middle = turns[offset].T @ turns[0] * patterns.scale
    (q_basis, q_inside), (k_basis, k_inside) = torch.linalg.qr(q.T), torch.linalg.qr(k.T)
    left, sigma, right = torch.linalg.svd(q_inside @ middle @ k_inside.T)
    return Directions(sigma, (q_basis @ left).T, right @ k_basis.T)


def smallest(terms: Float[Tensor, " k"]) -> Int[Tensor, " kept"]:
    """The fewest directions whose terms add up to the whole score; fewer than all since some terms are negative."""
    order = terms.argsort(descending=True)
    enough = terms[order].cumsum(0) >= terms.sum() * (1 - EXACT)
    return order[: int(enough.int().argmax()) + 1]


@dataclass(frozen=True)
class Firing:
    """A head's query at one position that looks at a source: ``gain sum_k terms`` is its score.

    ``gain`` is 1, or one over the sizes of QK norms. ``kept`` are the directions that make up the score.
    """

    frozen: Frozen
    layer: int
    head: int
    query: int
    source: int

    @cached_property
    def directions(self) -> Directions:
        """Of the head, at this offset."""
        patterns = self.frozen.weights.blocks[self.layer].attention.patterns
        return directions(patterns, self.head, self.query - self.source)

    @cached_property
    def gain(self) -> float:
        """What the terms are multiplied by."""
        made = self.frozen.queries[self.layer]
        out = 1.0
        for size, norm, head, at in (
            (made.q_size, made.patterns.norm_q, self.head, self.query),
            (made.k_size, made.patterns.norm_k, made.of_head(self.head), self.source),
        ):
            if norm is not None:
                dim = int(norm.abs().argmax())
                out *= float(size[head, at, dim] / norm[dim])
        return out

    @cached_property
    def terms(self) -> Float[Tensor, " k"]:
        """What every direction adds to the score."""
        return self.gain * self.directions.terms(self._read("query"), self._read("source"))

    @cached_property
    def kept(self) -> Int[Tensor, " kept"]:
        """See :func:`smallest`."""
        return smallest(self.terms)

    def position(self, side: str) -> int:
        """Where a side stands."""
        return self.query if side == "query" else self.source

    def _read(self, side: str) -> Float[Tensor, " d_in"]:
        return self.frozen.seen[self.layer]["attn_in"][self.position(side)].double()

    def covector(
        self, side: str, some: "Int[Tensor, ' kept'] | None" = None
    ) -> tuple[Float[Tensor, " d"], float]:
        """What ``some`` directions (None: ``kept``) read of the stream on one side, with the other side as it is.

        ``c`` and ``b`` with ``c resid_pre + b = sum of their terms``: unlike the paper's, which takes the square root
        of every sigma with the other side's sign, it adds up to a score. The norm before the layer has its size frozen.
        """
        some = self.kept if some is None else some
        d = self.directions
        mine, theirs = (d.u, d.v) if side == "query" else (d.v, d.u)
        other = SIDES[1 - SIDES.index(side)]
        weight = self.gain * d.sigma[some] * _read(self._read(other), theirs[some])
        whole = weight @ mine[some]
        norm = self._norm
        if norm is None:
            return whole[:-1], float(whole[-1])
        size = norm.size(self._stream(side)).double()
        return _back(norm, whole[:-1], size), float(whole[-1] + whole[:-1] @ norm.bias.double())

    def span(self, side: str, some: "Int[Tensor, ' kept'] | None" = None) -> Float[Tensor, "basis d"]:
        """An orthonormal basis of what ``some`` directions (None: ``kept``) read of the stream on one side."""
        rows = (self.directions.u if side == "query" else self.directions.v)[
            self.kept if some is None else some, :-1
        ]
        if self._norm is not None:
            rows = _back(self._norm, rows, rows.new_ones(1))
        _, s, vectors = torch.linalg.svd(rows, full_matrices=False)
        return vectors[s > EXACT * s[:1]]

    @property
    def _norm(self) -> Norm | None:
        return self.frozen.weights.blocks[self.layer].before_attention

    def _stream(self, side: str) -> Float[Tensor, " d"]:
        return self.frozen.seen[self.layer]["resid_pre"][self.position(side)]


def _read(x: Tensor, rows: Tensor) -> Tensor:
    """``x~`` times rows."""
    return x.to(rows) @ rows[:, :-1].T + rows[:, -1]


def _back(norm: Norm, rows: Tensor, size: Tensor) -> Tensor:
    rows = rows * norm.weight.double() / size
    return rows - rows.mean(-1, keepdim=True) if norm.centred else rows


def firings(frozen: Frozen, layer: int, head: int, least: float = FIRING) -> list[Firing]:
    """Where a head gives ``least`` of its attention or more to one source, by a score above 0; not to the first token."""
    at = frozen.seen[layer]["patterns"][head] >= least
    at &= frozen.queries[layer].scores[head] > 0
    at[:, 0] = False
    return [Firing(frozen, layer, head, int(i), int(j)) for i, j in at.nonzero()]


@dataclass(frozen=True)
class Writer:
    """Something that writes to the stream: ``kind`` is token, position, head, bias or mlp."""

    kind: str
    layer: int = -1
    head: int = -1


@torch.no_grad()
def writers(frozen: Frozen, layer: int) -> tuple[list[Writer], Float[Tensor, "writer seq d"]]:
    """All that was written to the stream before a layer, and by whom; it adds up to the stream."""
    w, names = frozen.weights, [Writer("token")]
    out = [w.W_E[frozen.tokens]]
    if w.W_pos is not None:
        names.append(Writer("position"))
        out.append(w.W_pos[: len(frozen.tokens)])
    for i, (block, at) in enumerate(zip(w.blocks[:layer], frozen.seen, strict=False)):
        a = block.attention
        each = torch.einsum("shv,hov->hso", at["z"].unflatten(-1, (len(a.W_O), -1)), a.W_O)
        fixed = a.b_O.expand_as(at["attn_out"])
        norm = block.after_attention
        if norm is not None:  # frozen, so that heads add up
            size = frozen.sizes[i]["after_attention"]
            each, fixed = (
                (x - x.mean(-1, keepdim=True) if norm.centred else x) / size * norm.weight
                for x in (each, fixed)
            )
            fixed = fixed + norm.bias
        names += [Writer("head", i, h) for h in range(len(each))]
        names.append(Writer("bias", i))
        out += [*each, fixed]
        if block.mlp is not None:
            names.append(Writer("mlp", i))
            out.append(at["mlp_add"])
    return names, torch.stack(out)


def upstream(firing: Firing, side: str, some: "Int[Tensor, ' kept'] | None" = None) -> dict[Writer, float]:
    """What everything that was written to one side's position adds to the score by ``some`` directions (None: ``kept``).

    With the covector's own bias, which the norm's and the head's biases make, it adds up to their terms.
    """
    names, written = writers(firing.frozen, firing.layer)
    covector, _ = firing.covector(side, some)
    shares = written[:, firing.position(side)].double() @ covector
    return dict(zip(names, shares.tolist(), strict=True))


@dataclass(frozen=True)
class Step:
    """``share`` of what heads add to one side of a firing comes from this head, at that side's position."""

    of: tuple[int, int, int, int]  # layer, head, query and source of the firing
    side: str
    layer: int
    head: int
    share: float


def follow(firing: Firing, kept: float = KEPT, least: float = FIRING) -> list[Step]:
    """The heads behind a firing, those behind their own firings, and so on down to the first layer.

    On each side of a firing the strongest heads are kept that make up the share ``kept`` of what heads add there.
    Where one of them looks by a firing of its own from that position, the same is asked of it.
    """
    steps, waiting, done = [], [firing], set()
    while waiting:
        now = waiting.pop()
        of = (now.layer, now.head, now.query, now.source)
        if of in done:
            continue
        done.add(of)
        for side in SIDES:
            heads = {w: s for w, s in upstream(now, side).items() if w.kind == "head" and s > 0}
            total, so_far = sum(heads.values()), 0.0
            for writer, share in sorted(heads.items(), key=lambda item: -item[1]):
                if so_far >= kept * total:
                    break
                so_far += share
                steps.append(Step(of, side, writer.layer, writer.head, share / total))
                own = firings(now.frozen, writer.layer, writer.head, least)
                waiting += [one for one in own if one.query == now.position(side)]
    return steps


@torch.no_grad()
def attention_with(firing: Firing, changes: Sequence[Change]) -> float:
    """The firing's attention if the stream at some positions were changed, before this head alone (sizes follow)."""
    block = firing.frozen.weights.blocks[firing.layer]
    stream = firing.frozen.seen[firing.layer]["resid_pre"].clone()
    for position, change in changes:
        stream[position] += change.to(stream)
    read = stream if block.before_attention is None else block.before_attention(stream)
    return float(block.attention.patterns(read[None])[0, firing.head, firing.query, firing.source])


@torch.no_grad()
def logits_with(firing: Firing, changes: Sequence[Change]) -> Float[Tensor, "seq vocabulary"]:
    """The model's logits if the stream before the firing's layer were changed, for all that comes behind it."""
    w = firing.frozen.weights
    x = firing.frozen.seen[firing.layer]["resid_pre"].clone()
    for position, change in changes:
        x[position] += change.to(x)
    for block in w.blocks[firing.layer :]:
        x = run_block(block, x[None], lambda _, value: value)[0]
    return (x if w.norm is None else w.norm(x)) @ w.W_U.T + w.b_U


def scaled(
    firing: Firing,
    side: str,
    of: Float[Tensor, " d"],
    factor: float,
    some: "Int[Tensor, ' kept'] | None" = None,
) -> Change:
    """The change of one side's stream that scales what ``some`` directions (None: ``kept``) read of ``of``.

    ``of`` is something that was written there, or the whole stream; a ``factor`` of 0 removes, one above 1 boosts.
    """
    basis = firing.span(side, some)
    return firing.position(side), (factor - 1) * (basis @ of.double()) @ basis
