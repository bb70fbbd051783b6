"""Attribution graphs: what every feature, error, token and bias adds to features and logits, exactly."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.circuits.frozen import Frozen, Site, add, depth
from saekit.circuits.places import Placed, Stand, in_order, place
from saekit.circuits.weights import weights
from saekit.dictionaries.parts import Part
from saekit.graph import KINDS, Graph, Nodes
from saekit.models import Model, load_model
from saekit.types import SaekitError

BATCH = 256  # targets whose gradients are walked down together
MOST, SHARE = 10, 0.95  # of the default targets: how many, and the probability that they cover together


@dataclass(frozen=True)
class Target:
    """A direction of the final stream (behind the last norm), at a position: ``direction x + bias`` is its value."""

    name: str
    direction: Float[Tensor, " d"]
    bias: float = 0.0
    position: int = -1


@dataclass
class _Columns:
    """The nodes of a graph while they are counted out."""

    kind: list[Tensor] = field(default_factory=list)
    rest: list[tuple[Tensor, ...]] = field(default_factory=list)
    n: int = 0

    def add(
        self,
        kind: str,
        layer: int,
        position: Tensor,
        stand: int,
        place: Tensor | int,
        value: Tensor | None = None,
    ) -> slice:
        """Columns for nodes, one for each position."""
        n = len(position)
        places = place if isinstance(place, Tensor) else torch.full((n,), place)
        values = torch.full((n,), float("nan")) if value is None else value
        self.kind.append(torch.full((n,), KINDS.index(kind)))
        self.rest.append(
            (torch.full((n,), layer), position, torch.full((n,), stand), places, values.double())
        )
        self.n += n
        return slice(self.n - n, self.n)

    def table(self) -> Nodes:
        """The nodes' table."""
        return Nodes(torch.cat(self.kind), *(torch.cat(column) for column in zip(*self.rest, strict=True)))


class Trace:
    """A prompt with dictionaries in place: :meth:`rows` gives what all nodes add to any covectors."""

    def __init__(self, frozen: Frozen, placed: Sequence[Placed]):
        self.frozen, self.placed = frozen, placed
        self.seq = len(frozen.tokens)
        self.columns = _Columns()
        self.biases: list[str] = []
        everywhere = torch.arange(self.seq)
        add_nodes = self.columns.add
        self.tokens = add_nodes("token", -1, everywhere, -1, frozen.tokens.cpu())
        self.positions = (
            add_nodes("position", -1, everywhere, -1, -1) if frozen.weights.W_pos is not None else None
        )
        self.halves = {
            (layer, half): add_nodes("bias", layer, everywhere, -1, self._bias(f"{half} of layer {layer}"))
            for layer, block in enumerate(frozen.weights.blocks)
            for half in ("attn", "mlp")
            if half == "attn" or block.mlp is not None
        }
        self.final = add_nodes(
            "bias",
            len(frozen.weights.blocks),
            torch.tensor([-1]),
            -1,
            self._bias("final norm and unembedding"),
        )
        self.fixed: dict[Site, tuple[slice, slice | None]] = {}
        self.parts: list[tuple[int, Part, Site, tuple[Site, ...], slice, slice]] = []
        self._place()
        self.cuts = {written.site: written for one in placed for written in one.written}

    def _bias(self, name: str) -> int:
        self.biases.append(name)
        return len(self.biases) - 1

    def _place(self) -> None:
        everywhere, add_nodes = torch.arange(self.seq), self.columns.add
        for i, one in enumerate(self.placed):
            for written in one.written:
                if written.site in self.fixed:
                    raise SaekitError(f"{written.site} is written by two dictionaries; leave one of them out")
                constant = add_nodes(
                    "bias", written.site[0], everywhere, i, self._bias(f"decoder of {one.name}")
                )
                error = (
                    None if written.error is None else add_nodes("error", written.site[0], everywhere, i, -1)
                )
                self.fixed[written.site] = (constant, error)
        order = [(i, *entry) for i, one in enumerate(self.placed) for entry in one.parts]
        for i, part, read, writes in sorted(
            order, key=lambda entry: (depth(entry[2]), entry[2] not in entry[3])
        ):
            own = add_nodes(
                "bias", read[0], torch.tensor([-1]), i, self._bias(f"encoder of {self.placed[i].name}")
            )
            part = in_order(part)
            nodes = add_nodes(
                "feature", read[0], part.positions.cpu(), i, part.features.cpu(), part.values.cpu()
            )
            self.parts.append((i, part, read, writes, own, nodes))
        self.writers: dict[Site, list[tuple[Part, Tensor, slice, list[int]]]] = {}
        for _, part, _, writes, _, nodes in self.parts:
            ends = torch.searchsorted(
                part.positions.contiguous(), torch.arange(self.seq, device=part.positions.device), right=True
            )
            for site, vectors in zip(writes, part.written, strict=True):
                self.writers.setdefault(site, []).append((part, vectors, nodes, ends.tolist()))

    @torch.no_grad()
    def rows(
        self, site: Site, covectors: Float[Tensor, "seq batch d"], before: bool = False
    ) -> Float[Tensor, "batch node"]:
        """What every node adds to ``sum covectors x`` at a site; positions behind the covectors' are left out.

        ``before``: before a dictionary writes there, as its own features read it.
        """
        seq, batch, _ = covectors.shape
        out = covectors.new_zeros(batch, self.columns.n)
        waiting = {(site, before): covectors}

        def visit(at: Site, gradient: Tensor | None) -> Tensor | None:
            gradient = add(gradient, waiting.pop((at, False), None))
            if gradient is not None and at in self.cuts:
                self._collect(at, gradient, out, waiting)
                gradient = None
            gradient = add(gradient, waiting.pop((at, True), None))
            if at == (0, "resid_pre") and gradient is not None:
                self._leaves(gradient, out)
            return gradient

        def bias(layer: int, half: str, share: Tensor) -> None:
            out[:, self.halves[layer, half]][:, :seq] += share.T

        self.frozen.back(site, visit, bias)
        return out

    def _collect(
        self, at: Site, gradient: Tensor, out: Tensor, waiting: dict[tuple[Site, bool], Tensor]
    ) -> None:
        """What a dictionary's features, error and bias add at a place that it writes."""
        seq = len(gradient)
        written, (constant, error) = self.cuts[at], self.fixed[at]
        out[:, constant][:, :seq] += (gradient @ written.constant.to(gradient)).T
        if error is not None and written.error is not None:
            out[:, error][:, :seq] += torch.einsum("sbd,sd->bs", gradient, written.error[:seq])
        for _, vectors, nodes, ends in self.writers.get(at, ()):
            columns = out[:, nodes]
            for p, (first, stop) in enumerate(zip((0, *ends[: seq - 1]), ends[:seq], strict=True)):
                if stop > first:
                    columns[:, first:stop] += gradient[p] @ vectors[first:stop].T.to(gradient)
        if written.skip is not None:
            read, matrix = written.skip
            passed = gradient @ matrix.to(gradient)
            key = (read, read == at)
            waiting[key] = passed if key not in waiting else waiting[key] + passed

    def _leaves(self, gradient: Tensor, out: Tensor) -> None:
        w, seq = self.frozen.weights, len(gradient)
        vectors = w.W_E[self.frozen.tokens[:seq]]
        out[:, self.tokens][:, :seq] += torch.einsum("sbd,sd->bs", gradient, vectors)
        if w.W_pos is not None and self.positions is not None:
            out[:, self.positions][:, :seq] += torch.einsum("sbd,sd->bs", gradient, w.W_pos[:seq])

    def features(
        self, part: Part, site: Site, before: bool, own: slice, first: int, stop: int
    ) -> Float[Tensor, "batch node"]:
        """Rows of some of a part's features, whose positions rise."""
        at = part.positions[first:stop]
        seq, batch = int(at[-1]) + 1, stop - first
        w = part.w[first:stop].to(self.frozen.last)
        covectors = w.new_zeros(seq, batch, w.shape[1])
        if part.patterns is None or part.heads is None:
            covectors[at, torch.arange(batch, device=at.device)] = w
        else:
            looks = part.patterns[part.heads[first:stop], at, :seq].to(w)
            covectors += looks.T[:, :, None] * w
        out = self.rows(site, covectors, before)
        out[:, own] = part.b[first:stop, None].to(out)
        return out

    def target(self, targets: Sequence[Target]) -> Float[Tensor, "batch node"]:
        """Rows of targets."""
        w, out = self.frozen.weights, []
        for target in targets:  # each at a position of its own
            p = target.position % self.seq
            direction = target.direction.to(self.frozen.last)
            back, bias = direction, target.bias
            if w.norm is not None:
                bias += float(direction @ w.norm.bias)
                back = w.norm.back(direction, w.norm.size(self.frozen.last[p]))
            covectors = back.new_zeros(p + 1, 1, len(back))
            covectors[p, 0] = back
            row = self.rows((len(w.blocks) - 1, "resid_post"), covectors)
            row[:, self.final] = bias
            out.append(row)
        return torch.cat(out)


def logits(frozen: Frozen, tokens: Sequence[int] | None, position: int = -1) -> list[Target]:
    """Targets of tokens' logits, each less the mean logit; by default of those that the model finds likeliest."""
    w = frozen.weights
    chosen = frozen.logits[position].softmax(-1)
    if tokens is None:
        share, order = chosen.sort(descending=True)
        n = min(MOST, int((share.cumsum(0) < SHARE).sum()) + 1)
        tokens = order[:n].tolist()
    wrong = next((t for t in tokens if not 0 <= t < len(w.W_U)), None)
    if wrong is not None:
        raise SaekitError(f"target {wrong} is no token; the model has 0 to {len(w.W_U) - 1}")
    mean, b = w.W_U.mean(0), float(w.b_U.mean())
    return [Target(str(t), w.W_U[t] - mean, float(w.b_U[t]) - b, position) for t in tokens]


def trace(
    model: "Model | str | nn.Module",
    dictionaries: "Stand | Sequence[Stand]",
    prompt: "str | Sequence[int] | Int[Tensor, ' seq']",
    target: "Sequence[int | Target] | None" = None,
    batch: int = BATCH,
) -> Graph:
    """The attribution graph of a prompt: text, or token ids.

    ``target``: token ids, whose logits less the mean logit are meant, or directions (:class:`Target`); by default the
    likeliest next tokens, up to ten, that cover 95 %.
    """
    if target is not None and len(target) == 0:
        raise SaekitError(
            "target is empty; name a token or a direction, or leave it out for the likeliest tokens"
        )
    model = load_model(model)
    stands = [dictionaries] if not isinstance(dictionaries, Sequence) else list(dictionaries)
    tokens = _tokens(model, prompt)
    frozen = Frozen(weights(model), tokens)
    placed = [place(frozen, model, stand) for stand in stands]
    run = Trace(frozen, placed)
    given = list(target) if target is not None else None
    plain = [t for t in given or () if not isinstance(t, Target)]
    targets = [t for t in given or () if isinstance(t, Target)]
    targets += logits(frozen, plain if given is not None else None) if plain or given is None else []
    rows: list[Tensor] = []
    of: list[Tensor] = []
    blocks: list[int] = []
    for _, part, site, writes, own, nodes in run.parts:
        n = len(part.positions)
        rows += [
            run.features(part, site, site in writes, own, at, min(n, at + batch)) for at in range(0, n, batch)
        ]
        of.append(torch.arange(nodes.start, nodes.stop))
        blocks.append(n + (blocks[-1] if blocks else 0))
    last = run.target(targets)
    rows.append(last)
    values = [float(frozen_value(frozen, t)) for t in targets]
    ends = torch.tensor([t.position % run.seq for t in targets])
    nodes = run.columns.add(
        "target",
        len(frozen.weights.blocks),
        ends,
        -1,
        torch.arange(len(targets)),
        torch.tensor(values, dtype=torch.float64),
    )
    whole = torch.nn.functional.pad(torch.cat(rows), (0, len(targets)))
    of.append(torch.arange(nodes.start, nodes.stop))
    blocks.append(len(whole))
    return Graph(
        run.columns.table(), whole.cpu(), torch.cat(of), tuple(blocks), tuple(tokens.tolist()),
        tuple(one.name for one in placed), tuple(run.biases), tuple(t.name for t in targets),
    )  # fmt: skip


def frozen_value(frozen: Frozen, target: Target) -> Tensor:
    """A target's value in the model's own pass."""
    x = frozen.last[target.position]
    norm = frozen.weights.norm
    return target.direction.to(x) @ (x if norm is None else norm(x)) + target.bias


def _tokens(model: Model, prompt: "str | Sequence[int] | Tensor") -> Tensor:
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise SaekitError(f"prompt is text, and model {model.name!r} has no tokenizer; give token ids")
        ids = model.tokenizer(prompt)["input_ids"]
    else:
        ids = prompt
    tokens = torch.as_tensor(ids, dtype=torch.int64, device=model.device)
    if tokens.ndim != 1 or len(tokens) == 0:
        raise SaekitError(f"prompt has shape {tuple(tokens.shape)}; give one sequence of at least one token")
    if model.context is not None and len(tokens) > model.context:
        raise SaekitError(
            f"prompt has {len(tokens)} tokens and model {model.name!r} reads {model.context}; give fewer"
        )
    return tokens
