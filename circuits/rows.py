"""A prompt with dictionaries in place: its nodes, and what each of them adds to anything that reads the stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.circuits.descent import descend, descends
from saekit.circuits.frozen import Frozen, Site, add, canonical, depth
from saekit.circuits.places import Placed, in_order
from saekit.circuits.queries import Queries
from saekit.circuits.targets import Feature, Target, value
from saekit.dictionaries.parts import Part
from saekit.graph import KINDS, Nodes
from saekit.types import SaekitError

Catch = Callable[[Site, Tensor], None]
CELLS = 1 << 24  # of entries' gradients at a time


@dataclass
class Columns:
    """The nodes of a graph while they are counted out."""

    entries: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    n: int = 0

    def add(self, kind: str, layer: int, position: Tensor, stand: int = -1, place: Tensor | int = -1,
            value: Tensor | None = None) -> slice:  # fmt: skip
        """Columns for nodes, one for each position."""
        n = len(position)
        places = place.numpy() if isinstance(place, Tensor) else np.full(n, place)
        values = np.full(n, np.nan) if value is None else value.double().numpy()
        whole = (
            np.full(n, KINDS.index(kind)),
            np.full(n, layer),
            position.numpy(),
            np.full(n, stand),
            places,
        )
        self.entries.append((*(column.astype(np.int64) for column in whole), values))
        self.n += n
        return slice(self.n - n, self.n)

    def table(self) -> Nodes:
        """The nodes' table."""
        return Nodes(*(np.concatenate(column) for column in zip(*self.entries, strict=True)))


@dataclass(frozen=True)
class Own:
    """A part in its place: the sites that it reads and writes, its features' nodes and its encoder bias's."""

    stand: int
    part: Part
    read: Site
    writes: tuple[Site, ...]
    bias: slice
    nodes: slice
    ends: tuple[int, ...]  # of each position, where its entries end

    def spans(self, seq: int) -> list[tuple[int, int]]:
        """The entries of each of the first positions, from and to."""
        return list(zip((0, *self.ends[: seq - 1]), self.ends[:seq], strict=True))

    @property
    def before(self) -> bool:
        """Whether it reads its site as it was before dictionaries wrote there."""
        return self.read in self.writes


class Trace:
    """A prompt with dictionaries in place: :meth:`rows` gives what all nodes add to any covectors."""

    def __init__(self, frozen: Frozen, placed: Sequence[Placed]):
        self.frozen, self.placed = frozen, placed
        self.seq = len(frozen.tokens)
        self.columns = Columns()
        self.biases: list[str] = []
        everywhere, n_layers = torch.arange(self.seq), len(frozen.weights.blocks)
        add_nodes = self.columns.add
        self.tokens = add_nodes("token", -1, everywhere, place=frozen.tokens.cpu())
        learned = frozen.weights.W_pos is not None
        self.positions = add_nodes("position", -1, everywhere) if learned else None
        self.halves = {
            (layer, half): add_nodes("bias", layer, everywhere, place=self._bias(f"{half} of layer {layer}"))
            for layer, block in enumerate(frozen.weights.blocks)
            for half in ("attn", "mlp")
            if half == "attn" or block.mlp is not None
        }
        last = self._bias("final norm and unembedding")
        self.final = add_nodes("bias", n_layers, torch.tensor([-1]), place=last)
        self.fixed: dict[Site, tuple[slice, slice | None]] = {}
        self.parts: list[Own] = []
        self._place()
        self.pruned = add_nodes("pruned", -1, torch.tensor([-1]))
        self.cuts = {written.site: written for one in placed for written in one.written}
        self.readers: dict[tuple[Site, bool], list[Own]] = {}
        for own in self.parts:
            self.readers.setdefault((own.read, own.before), []).append(own)

    def _bias(self, name: str) -> int:
        self.biases.append(name)
        return len(self.biases) - 1

    def _place(self) -> None:
        everywhere, one_place, add_nodes = torch.arange(self.seq), torch.tensor([-1]), self.columns.add
        for i, one in enumerate(self.placed):
            for written in one.written:
                layer = written.site[0]
                if written.site in self.fixed:
                    raise SaekitError(
                        f"{written.site[1]} of layer {layer} is written twice, by {one.name} too; leave one of them out"
                    )
                constant = add_nodes("bias", layer, everywhere, i, self._bias(f"decoder of {one.name}"))
                error = None if written.error is None else add_nodes("error", layer, everywhere, i)
                self.fixed[written.site] = (constant, error)
        order = [(i, *entry) for i, one in enumerate(self.placed) for entry in one.parts]
        order.sort(key=lambda entry: (depth(entry[2]), entry[2] not in entry[3]))
        for i, part, read, writes in order:
            own = add_nodes("bias", read[0], one_place, i, self._bias(f"encoder of {self.placed[i].name}"))
            part = in_order(part)
            ends = (part.positions.cpu(), i, part.features.cpu(), part.values.cpu())
            nodes, at = add_nodes("feature", read[0], *ends), part.positions.contiguous()
            stops = torch.searchsorted(at, torch.arange(self.seq, device=at.device), right=True).tolist()
            self.parts.append(Own(i, part, read, writes, own, nodes, tuple(stops)))
        self.writers: dict[Site, list[tuple[Own, Tensor]]] = {}
        for one_part in self.parts:
            for site, vectors in zip(one_part.writes, one_part.part.written, strict=True):
                self.writers.setdefault(site, []).append((one_part, vectors))

    @torch.no_grad()
    def rows(
        self, site: Site, covectors: Float[Tensor, "seq batch d"], before: bool = False, through: bool = False,
        free: str | None = None, catch: "Catch | None" = None, nodes: int | None = None,
    ) -> Float[Tensor, "batch node"]:  # fmt: skip
        """What every node adds to ``sum covectors x`` at a site; positions behind the covectors' are left out.

        ``before``: before a dictionary writes there, as its own features read it. ``through``: over all paths, also
        those that go through other features. ``free``: also through where attention looks, as a "whole", or by
        "slope" and then through what norms divide by too. ``catch`` gets what comes down to what heads gather, which then goes no further. ``nodes``: how many there can be, if not all.
        """
        out = covectors.new_zeros(covectors.shape[1], nodes or self.columns.n)
        self._walk(site, {(site, before): covectors}, out, through, free, catch)
        return out

    def _walk(
        self, start: Site, waiting: dict[tuple[Site, bool], Tensor], out: Tensor, through: bool = False,
        free: str | None = None, catch: "Catch | None" = None,
    ) -> None:  # fmt: skip
        """Walk down from a site; ``waiting`` are gradients that come in where they stand, before a dictionary or behind it."""
        seq = len(next(iter(waiting.values())))

        def visit(at: Site, gradient: Tensor | None) -> Tensor | None:
            for own in self.readers.get((at, False), ()) if through else ():
                gradient = add(gradient, self._features(own, out, seq, free))
            gradient = add(gradient, waiting.pop((at, False), None))
            if gradient is not None and at in self.cuts:
                self._collect(at, gradient, out, waiting)
                gradient = None
            gradient = add(gradient, waiting.pop((at, True), None))
            for own in self.readers.get((at, True), ()) if through else ():
                gradient = add(gradient, self._features(own, out, seq, free))
            if catch is not None and at[1] == "z" and gradient is not None:
                catch(at, gradient)
                return None
            if at == (0, "resid_pre") and gradient is not None:
                self._leaves(gradient, out)
            return gradient

        def bias(layer: int, half: str, share: Tensor) -> None:
            out[:, self.halves[layer, half]][:, : len(share)] += share.T

        self.frozen.back(start, visit, bias, free)

    def _collect(
        self, at: Site, gradient: Tensor, out: Tensor, waiting: dict[tuple[Site, bool], Tensor]
    ) -> None:
        """What a dictionary's features, error and bias add at a place that it writes."""
        seq = len(gradient)
        written, (constant, error) = self.cuts[at], self.fixed[at]
        out[:, constant][:, :seq] += (gradient @ written.constant.to(gradient)).T
        if error is not None and written.error is not None:
            out[:, error][:, :seq] += gained(gradient, written.error[:seq])
        for own, vectors in self.writers.get(at, ()):
            columns, vectors = out[:, own.nodes], vectors.to(gradient)
            for p, (first, stop) in enumerate(own.spans(seq)):
                if stop > first and len(own.writes) == 1:  # nothing is there yet
                    torch.mm(gradient[p], vectors[first:stop].T, out=columns[:, first:stop])
                elif stop > first:
                    columns[:, first:stop] += gradient[p] @ vectors[first:stop].T
        if written.skip is not None:
            read, matrix = written.skip
            passed = gradient @ matrix.to(gradient)
            key = (read, read == at)
            waiting[key] = passed if key not in waiting else waiting[key] + passed

    def _leaves(self, gradient: Tensor, out: Tensor) -> None:
        w, seq = self.frozen.weights, len(gradient)
        vectors = w.W_E[self.frozen.tokens[:seq]]
        out[:, self.tokens][:, :seq] += gained(gradient, vectors)
        if w.W_pos is not None and self.positions is not None:
            out[:, self.positions][:, :seq] += gained(gradient, w.W_pos[:seq])

    def _features(self, own: Own, out: Tensor, seq: int, free: str | None) -> Tensor | None:
        """What targets gain per unit of a site through the features that read it, [seq, batch, d]."""
        part = own.part
        stop = int(torch.searchsorted(part.positions.contiguous(), seq))
        if stop == 0:
            return None
        values = part.values[:stop].to(out)
        share = out[:, own.nodes][:, :stop] / values
        out[:, own.bias] += (share @ part.b[:stop].to(out))[:, None]
        w = part.w[:stop].to(out)
        passed = out.new_zeros(seq, len(out), w.shape[1])
        if part.patterns is None or part.heads is None:
            for p, (first, last) in enumerate(own.spans(seq)):
                torch.mm(share[:, first:last], w[first:last], out=passed[p])
            return passed
        for some in torch.arange(stop, device=w.device).split(max(1, CELLS // passed[0].numel())):
            weighted = share.T[some, :, None] * w[some, None]  # [entry, batch, d]
            looks = part.patterns[part.heads[some], part.positions[some], :seq].to(out)
            passed += torch.einsum("es,ebd->sbd", looks, weighted)
        if free is not None and part.attending is not None:
            passed = passed + self._looks(own, share, stop, seq, out, free)
        return passed

    def _looks(self, own: Own, share: Tensor, stop: int, seq: int, out: Tensor, of: str) -> Tensor:
        """The same through where the features look."""
        part, attending = own.part, own.part.attending
        assert attending is not None and part.heads is not None and part.patterns is not None
        read = self.frozen.at(own.read)[:seq].to(out)
        gained = part.w[:stop].to(out) @ read.T  # [entry, source]
        looked = out.new_zeros(len(part.patterns), seq, len(out), seq)
        index = (part.heads[:stop], part.positions[:stop])
        looked.index_put_(index, share.T[:, :, None] * gained[:, None], accumulate=True)
        passed, bias = Queries(attending.module, attending.x).back(looked.to(attending.x), of)
        if attending.norm is not None:
            flat, shift = attending.norm.fold(passed.flatten(0, 1))
            passed, bias = flat.view_as(passed), bias + shift.view_as(bias)
        out[:, own.bias] += bias.sum(0)[:, None].to(out)
        return passed.to(out)

    def covectors(self, own: Own, some: Int[Tensor, " batch"]) -> Float[Tensor, "seq batch d"]:
        """What some of a part's entries, in order, read."""
        part = own.part
        at = part.positions[some]
        seq, batch = int(at[-1]) + 1, len(some)
        w = part.w[some].to(self.frozen.last)
        if part.patterns is None or part.heads is None:
            out = w.new_zeros(seq, batch, w.shape[1])
            out[at, torch.arange(batch, device=at.device)] = w
            return out
        looks = part.patterns[part.heads[some], at, :seq].to(w)
        return looks.T[:, :, None] * w

    def features(
        self, own: Own, some: Int[Tensor, " batch"], nodes: int | None = None
    ) -> Float[Tensor, "batch node"]:
        """Rows of some of a part's entries, in order; the first ``nodes`` of them: those from the part's own on add nothing."""
        part = own.part
        if part.patterns is None and descends(self.frozen, own.read, own.before, self.cuts):
            out = self._descended(own.read, part.w[some].to(self.frozen.last), part.positions[some], nodes)
        else:
            out = self.rows(own.read, self.covectors(own, some), own.before, nodes=nodes)
        out[:, own.bias] += part.b[some, None].to(out)
        return out

    def _descended(self, read: Site, vectors: Tensor, at: Tensor, nodes: int | None) -> Tensor:
        out = vectors.new_zeros(len(at), nodes or self.columns.n)
        down = descend(self.frozen, read, vectors, at)
        for half, share in (("attn", down.attn), ("mlp", down.mlp)):
            out[:, self.halves[read[0], half]][:, : len(share)] += share.T
        before, above = (read[0], "attn_in"), canonical((read[0], "resid_pre"))
        self._walk(before, {(before, False): down.read, (above, False): down.passed}, out)
        return out

    @torch.no_grad()
    def targets(
        self,
        targets: Sequence[Target | Feature],
        through: bool = False,
        free: str | None = None,
        catch: "Catch | None" = None,
    ) -> Float[Tensor, "target node"]:
        """The rows of targets; with ``through`` their total effects."""
        plain = [t for t in targets if isinstance(t, Target)]
        found = iter(self._directions(plain, through, free, catch) if plain else ())
        return torch.stack([
            next(found) if isinstance(t, Target) else self._feature(t, through, free, catch) for t in targets
        ])  # fmt: skip

    def _directions(self, targets: Sequence[Target], through: bool, free: str | None, *how: Any) -> Tensor:
        w, last = self.frozen.weights, self.frozen.last
        at = torch.tensor([t.position % self.seq for t in targets], device=last.device)
        back = torch.stack([t.direction.to(last) for t in targets])
        bias = back.new_tensor([t.bias for t in targets])
        if w.norm is not None:
            bias += back @ w.norm.bias
            back = w.norm.back(back, w.norm.size(last[at]), last[at] if free == "slope" else None)
        covectors = back.new_zeros(int(at.max()) + 1, *back.shape)
        covectors[at, torch.arange(len(at), device=at.device)] = back
        out = self.rows((len(w.blocks) - 1, "resid_post"), covectors, False, through, free, *how)
        out[:, self.final] += bias[:, None]
        return out

    def _feature(self, target: Feature, through: bool, free: str | None, *how: Any) -> Tensor:
        own, at = self.feature(target)
        some = torch.tensor([at], device=own.part.positions.device)
        covectors = self.covectors(own, some)
        fixed = covectors.new_zeros(1, self.columns.n)
        fixed[:, own.bias] += own.part.b[at].to(fixed)
        if free is not None and own.part.attending is not None:
            share = fixed.new_zeros(1, at + 1)  # of the entries up to the target's, all of its own
            share[0, at] = 1
            covectors = covectors + self._looks(own, share, at + 1, len(covectors), fixed, free)
        return (self.rows(own.read, covectors, own.before, through, free, *how) + fixed)[0]

    def value(self, target: Target | Feature) -> Tensor:
        """A target's value in the model's own pass."""
        if isinstance(target, Feature):
            own, at = self.feature(target)
            return own.part.values[at]
        return value(self.frozen, target)

    def feature(self, target: Feature) -> tuple[Own, int]:
        """The part and entry of an active feature."""
        position = target.position % self.seq
        for own in self.parts:
            if own.stand == target.stand:
                part = own.part
                found = ((part.features == target.feature) & (part.positions == position)).nonzero()
                if len(found):
                    return own, int(found[0])
        raise SaekitError(
            f"target feature {target.feature} of dictionary {target.stand} is not active at position {position}; choose one that is"
        )


def gained(gradient: Float[Tensor, "seq batch d"], x: Float[Tensor, "seq d"]) -> Float[Tensor, "batch seq"]:
    """What targets gain from a vector at each position."""
    return torch.linalg.vecdot(gradient, x[:, None].to(gradient)).T
