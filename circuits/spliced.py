"""A transformer on a batch of prompts in which places are written as features and what they leave over.

Where dictionaries write there stands ``x = sum_i f_i v_i + b + error`` (Marks et al. 2025, 2403.19647, section 2): the
model's own value, to the bit, with the model's own gradient, until features or errors are set to something else.
What comes behind responds: later features read what the changed model gives them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.circuits.frozen import Site, depth
from saekit.circuits.places import Heads, Neurons, Placeable, Stand, layer_of, site_of, sites_of, stands_of
from saekit.circuits.weights import Mlp, Weights, run_block, weights
from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.models import Model, load_model
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class Group:
    """Nodes that go together, ``n`` at each position: features that read one site, or the one error of a place.

    ``at`` counts the sites that the stand reads, or those that it writes; ``first`` is the number in the dictionary of
    the first of the features; ``writes`` are the sites that each of the nodes writes.
    """

    stand: int
    kind: str  # "feature" or "error"
    at: int
    n: int
    first: int
    writes: tuple[Site, ...]


@dataclass(frozen=True)
class Changes:
    """What a pass does differently: by group, what becomes of features' codes and of errors [prompt, seq, d].

    A function gets the pass's own, with which gradients go through as if nothing stood there; a value is set.
    ``added`` is added at sites, [prompt, seq, d] or what broadcasts to it.
    """

    features: "Mapping[int, Codes | Callable[[Codes], Codes]]" = field(default_factory=dict)
    errors: "Mapping[int, Tensor | Callable[[Tensor], Tensor]]" = field(default_factory=dict)
    added: Mapping[Site, Tensor] = field(default_factory=dict)


class Spliced:
    """A model with stands in place (dictionaries or their paths, :class:`Neurons`, :class:`Heads`); :meth:`run` passes through it.

    :attr:`groups` are all nodes. ``readout``: the hook point that metrics read, [prompt, seq, d]; None: the logits.
    """

    def __init__(
        self, model: "Model | str | nn.Module", stands: "Placeable | Sequence[Placeable]", readout: str | None = None
    ):  # fmt: skip
        self.model = load_model(model)
        self.weights: Weights = weights(self.model)
        self.stands = [self._placed(stand) for stand in stands_of(stands)]
        self.readout = None if readout is None else site_of(self.weights, self.model, readout)
        self.written: dict[
            Site, tuple[int, int]
        ] = {}  # by site: the stand that writes, and which of its places
        for i, stand in enumerate(self.stands):
            for at, site in enumerate(stand.writes):
                if site in self.written:
                    raise SaekitError(
                        f"{site[1]} of layer {site[0]} is written by two dictionaries; leave one of them out"
                    )
                if self.readout is not None and depth(site) > depth(self.readout):
                    raise SaekitError(
                        f"{site} is written behind {readout!r}, which metrics read; leave it out"
                    )
                self.written[site] = (i, at)
        self.groups: list[Group] = []
        self.units: list[tuple[int, ...]] = []  # groups that integrated gradients move together: one site's
        self.features: dict[tuple[int, int], int] = {}  # by stand and reader: the group
        self.errors: dict[Site, int] = {}
        for i in range(len(self.stands)):
            self._count(i)

    def _count(self, i: int) -> None:
        """The groups of a stand; of errors, each is moved with the first features that write there."""
        stand, first, taken = self.stands[i], 0, 0
        for reader, n in enumerate(stand.sizes):
            reach = stand.reaches(reader)
            self.features[i, reader] = len(self.groups)
            unit = [len(self.groups)]
            self.groups.append(Group(i, "feature", reader, n, first, tuple(stand.writes[w] for w in reach)))
            own = range(taken, len(stand.writes) if reader == len(stand.sizes) - 1 else reach.start + 1)
            for at in own if stand.left_over else ():
                self.errors[stand.writes[at]] = len(self.groups)
                unit.append(len(self.groups))
                self.groups.append(Group(i, "error", at, 1, 0, (stand.writes[at],)))
            self.units.append(tuple(unit))
            first, taken = first + n, own.stop

    def run(
        self, tokens: "Sequence[Sequence[int]] | Tensor", changes: Changes | None = None, cut: bool = False
    ) -> "Pass":
        """One pass over token ids, [prompt, seq]; differentiable. ``cut``: what is written at places is a leaf each."""
        changes = changes or Changes()
        for kind, which in (("feature", changes.features), ("error", changes.errors)):
            wrong = next(
                (g for g in which if not 0 <= g < len(self.groups) or self.groups[g].kind != kind), None
            )
            if wrong is not None:
                raise SaekitError(f"group {wrong} is not one of {kind}s; see groups for what there is")
        wrong_site = next((site for site in changes.added if site not in self.written), None)
        if wrong_site is not None:
            raise SaekitError(
                f"nothing writes {wrong_site}; add to one of {', '.join(map(str, self.written))}"
            )
        return Pass(self, self._tokens(tokens), changes, cut)

    def _tokens(self, tokens: Any) -> Tensor:
        try:
            ids = torch.as_tensor(tokens, device=self.weights.W_E.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SaekitError(
                f"tokens are no prompts of one length ({error}); give ids, [prompt, seq]"
            ) from error
        if ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            raise SaekitError(
                f"tokens have shape {tuple(ids.shape)}; give ids of prompts of one length, [prompt, seq]"
            )
        context = self.weights.context
        if context is not None and ids.shape[1] > context:
            raise SaekitError(
                f"prompts have {ids.shape[1]} tokens and model {self.model.name!r} reads {context}; give fewer"
            )
        wrong = ids[(ids < 0) | (ids >= len(self.weights.W_E))]
        if len(wrong):
            raise SaekitError(
                f"token {int(wrong[0])} is none; the model has 0 to {len(self.weights.W_E) - 1}"
            )
        return ids.long()

    def _placed(self, stand: Stand) -> "_Rows | _Layers | _Units":
        if isinstance(stand, Neurons | Heads):
            return _units(self.weights, stand, layer_of(self.weights, self.model, stand))
        reads, writes = sites_of(self.weights, self.model, stand)
        return _Layers(stand, reads, writes) if isinstance(stand, CrossLayer) else _Rows(stand, reads, writes)


class Pass:
    """A pass over ``tokens``: :attr:`out` is what metrics read, :attr:`at` what stands at the written sites.

    With ``cut`` these are leaves, so that gradients reach each only from what it writes to directly.
    """

    def __init__(self, spliced: Spliced, tokens: Int[Tensor, "prompt seq"], changes: Changes, cut: bool):
        self.spliced, self.tokens, self.changes, self.cut = spliced, tokens, changes, cut
        self.at: dict[Site, Tensor] = {}
        self.before: dict[Site, Tensor] = {}  # the model's own value where a stand writes
        self.read: dict[tuple[int, int], Tensor] = {}  # by stand and reader
        self._live: dict[int, Codes] = {}
        self._out: Tensor | None = None
        w = spliced.weights
        x = w.W_E[tokens] if w.W_pos is None else w.W_E[tokens] + w.W_pos[: tokens.shape[1]]
        if torch.is_grad_enabled():
            x.requires_grad_()
        x = self._site((0, "resid_pre"), x)
        for layer, block in enumerate(w.blocks):
            if self._out is None:  # behind what is read nothing matters
                x = run_block(block, x, partial(self._at, layer))
        if self._out is None:
            self._out = (x if w.norm is None else w.norm(x)) @ w.W_U.T + w.b_U
        self.out: Float[Tensor, "prompt seq read"] = self._out

    def codes(self, group: int) -> Codes:
        """A group of features as the pass has it, before changes; [prompt, seq]."""
        if group not in self._live:
            g = self.spliced.groups[group]
            self._live[group] = self.spliced.stands[g.stand].encode(g.at, self.read[g.stand, g.at])
        return self._live[group]

    def error(self, site: Site) -> Float[Tensor, "prompt seq d"]:
        """What the features leave over at a site, before changes."""
        return self.before[site] - self.hat(site, {})

    def hat(self, site: Site, changed: "Mapping[int, Codes]") -> Float[Tensor, "prompt seq d"]:
        """What a stand writes at a site, where some groups' codes are ``changed``."""
        i, at = self.spliced.written[site]
        stand = self.spliced.stands[i]
        readers = range(sum(stand.reaches(r).start <= at for r in range(len(stand.sizes))))
        groups = [self.spliced.features[i, r] for r in readers]
        codes = [changed[g] if g in changed else self.codes(g) for g in groups]
        return stand.hat(at, codes, [self.read[i, r] for r in readers]).to(self.before[site])

    def written_by(self, group: int, site: Site) -> Float[Tensor, "prompt seq d"]:
        """What the nodes of a group write at a site together."""
        if self.spliced.groups[group].kind == "error":
            return self.error(site)
        silent = self.codes(group).with_values(torch.zeros_like(self.codes(group).values))
        return self.hat(site, {}) - self.hat(site, {group: silent})

    def entries(self, group: int) -> tuple[Int[Tensor, " entry"], Int[Tensor, " entry"]]:
        """Where a group's nodes are active: rows, counted through prompts and positions, and units."""
        if self.spliced.groups[group].kind == "feature":
            return self.codes(group).active()
        rows = torch.arange(self.tokens.numel(), device=self.tokens.device)
        return rows, torch.zeros_like(rows)

    def vectors(self, group: int, some: Int[Tensor, " some"], each: bool = False) -> tuple[Tensor, ...]:
        """What some entries write at each of the group's sites, [some, d]; ``each``: for each 1 of their code."""
        g = self.spliced.groups[group]
        if g.kind == "error":
            return (self.error(g.writes[0]).flatten(0, 1)[some],)
        codes = self.codes(group)
        on = (codes.values != 0).nonzero()[:, 0][some]
        values = torch.ones_like(codes.values[on]) if each else codes.values[on].detach()
        single = Codes.from_rectangular(codes.indices[on][:, None], values[:, None], codes.n_features)
        x = self.read[g.stand, g.at].detach().flatten(0, 1)[codes.row_ids()[on]]
        made = self.spliced.stands[g.stand].vectors(g.at, single, x)
        return tuple(part.to(self.before[site]) for part, site in zip(made, g.writes, strict=True))

    def _at(self, layer: int, name: str, value: Tensor) -> Tensor:
        return self._site((layer, name), value)

    def _site(self, site: Site, value: Tensor) -> Tensor:
        """What goes on from a site; a stand that also writes there reads it as it was before."""
        own = self.spliced.written.get(site)
        self._read(site, value, lambda i: own is not None and own[0] == i)
        if own is not None:
            self.before[site] = value
            value = self._written(site, value)
            self.at[site] = value
        self._read(site, value, lambda i: own is None or own[0] != i)
        if site == self.spliced.readout:
            self._out = value
        return value

    def _read(self, site: Site, value: Tensor, who: Callable[[int], bool]) -> None:
        for i, stand in enumerate(self.spliced.stands):
            for reader, read in enumerate(stand.reads):
                if read == site and who(i):
                    self.read[i, reader] = value

    def _written(self, site: Site, value: Tensor) -> Tensor:
        """What stands at a place behind the changes: nothing is computed where there are none."""
        c, groups = self.changes, self.spliced.groups
        here = {g: codes for g, codes in c.features.items() if site in groups[g].writes}
        out = value
        if here:
            changed = {g: self._changed(g, new) for g, new in here.items()}
            out = out + (self.hat(site, changed) - self.hat(site, {}))
        error = self.spliced.errors.get(site)
        if error is not None and error in c.errors:
            own, new = self.error(site), c.errors[error]
            out = out + ((new(own) if callable(new) else new) - own)
        if site in c.added:
            out = out + c.added[site]
        return out.detach().requires_grad_() if self.cut else out

    def _changed(self, group: int, new: "Codes | Callable[[Codes], Codes]") -> Codes:
        own = self.codes(group)
        codes = new(own) if callable(new) else new
        if (codes.n_features, tuple(codes.shape)) != (own.n_features, tuple(own.shape)):
            raise SaekitError(
                f"group {group} is set to codes of {codes.n_features} features on {tuple(codes.shape)}; it has {own.n_features} on {tuple(own.shape)}"
            )
        return codes


class _Rows:
    """A dictionary that reads one site, with what it leaves over wherever it writes."""

    left_over = True

    def __init__(self, d: Dictionary, reads: tuple[Site, ...], writes: tuple[Site, ...]):
        self.d, self.reads, self.writes = d, reads, writes
        self.sizes: tuple[int, ...] = (d.n_features,)

    def reaches(self, reader: int) -> range:
        """The places that a reader's features write."""
        return range(len(self.writes))

    def encode(self, reader: int, x: Tensor) -> Codes:
        """Codes of a reader's features."""
        x = x.to(self.d.dtype)
        return _linked(self.d, self.d.encode(x), x)

    def hat(self, at: int, codes: Sequence[Codes], xs: Sequence[Tensor]) -> Tensor:
        """What is written in a place."""
        return self.d.decode(codes[0], xs[0].to(self.d.dtype)).split(self.d.wiring.parts_out, -1)[at]

    def vectors(self, reader: int, codes: Codes, x: Float[Tensor, "entry d_in"]) -> Sequence[Tensor]:
        """What each code, one a row, writes in each place of its reach."""
        return self.d.written_by(codes, x.to(self.d.dtype)).split(self.d.wiring.parts_out, -1)


class _Layers:
    """A cross-layer transcoder: a reader for each layer, which writes to that and later ones."""

    left_over = True

    def __init__(self, d: CrossLayer, reads: tuple[Site, ...], writes: tuple[Site, ...]):
        self.d, self.reads, self.writes = d, reads, writes
        self.sizes = (d.n_features // d.layers,) * d.layers

    def reaches(self, reader: int) -> range:
        """The places that a reader's features write."""
        return range(*self.d.wiring.written(reader))

    def encode(self, reader: int, x: Tensor) -> Codes:
        """Codes of a reader's features."""
        return self.d.encode_layer(reader, x)

    def hat(self, at: int, codes: Sequence[Codes], xs: Sequence[Tensor]) -> Tensor:
        """What is written in a place."""
        return self.d.decode_layer(at, codes)

    def vectors(self, reader: int, codes: Codes, x: Float[Tensor, "entry d_in"]) -> Sequence[Tensor]:
        """What each code, one a row, writes in each place of its reach."""
        first, stop = self.d.wiring.written(reader)
        read = self.d.norm_in.some(reader, reader + 1)(x.to(self.d.dtype).clone())
        written = self.d.norm_out.some(first, stop).directions(self.d.parts[reader].written_by(codes, read))
        return written.split(self.d.wiring.parts_out[first:stop], -1)


@dataclass(frozen=True)
class _Units:
    """Units of the model itself, which leave nothing over: an MLP's neurons, or the dimensions of heads."""

    reads: tuple[Site, ...]
    writes: tuple[Site, ...]
    act: Callable[[Tensor], Tensor]
    W: Float[Tensor, "unit d"]
    b: Float[Tensor, " d"]
    left_over = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """One reader, of all units."""
        return (len(self.W),)

    def reaches(self, reader: int) -> range:
        """The one place."""
        return range(1)

    def encode(self, reader: int, x: Tensor) -> Codes:
        """Codes of the units."""
        return Codes.from_dense(self.act(x))

    def hat(self, at: int, codes: Sequence[Codes], xs: Sequence[Tensor]) -> Tensor:
        """What is written."""
        return codes[0].to_dense() @ self.W + self.b

    def vectors(self, reader: int, codes: Codes, x: Float[Tensor, "entry d_in"]) -> Sequence[Tensor]:
        """What each code, one a row, writes."""
        return (self.W[codes.indices.long()] * codes.values[:, None],)


def _units(w: Weights, stand: Neurons | Heads, layer: int) -> _Units:
    block = w.blocks[layer]
    if isinstance(stand, Heads):
        a = block.attention
        rows = a.W_O.transpose(1, 2).flatten(0, 1)
        return _Units(((layer, "z"),), ((layer, "attn_out"),), lambda z: z, rows, a.b_O)
    mlp = block.mlp
    assert mlp is not None
    return _Units(
        ((layer, "mlp_in"),), ((layer, "mlp_out"),), lambda x: _neurons(mlp, x), mlp.W_out.T, mlp.b_out
    )


def _neurons(mlp: Mlp, x: Tensor) -> Tensor:
    u = x @ mlp.W_in.T + mlp.b_in
    return mlp.act(u) if mlp.gate is None else mlp.act(x @ mlp.gate[0].T + mlp.gate[1]) * u


def _linked(d: Dictionary, codes: Codes, x: Tensor) -> Codes:
    """Codes that pass gradients on to what was read, with the selection as it is, where encoding does not."""
    if codes.values.requires_grad or not (torch.is_grad_enabled() and x.requires_grad):
        return codes
    weight, _ = d.read_by(codes, x.detach())
    moved = x - x.detach()
    return dataclasses.replace(
        codes, values=codes.values + (weight * moved.flatten(0, -2)[codes.row_ids()]).sum(1)
    )
