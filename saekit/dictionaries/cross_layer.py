"""A cross-layer transcoder: one transcoder for each layer, which also writes to all later layers.

The error of the sum of all their outputs is what is minimised. Every part is an ordinary dictionary with any
selection, atoms and terms. Held are codes, the decoders, one error of all layers, and the output of one part at a
time; nothing is ever dense in the features. Where errors are nested (matryoshka, hierarchical) or revive dead
features (auxk), every part has one of its own: its gradient is that of the part's error against what the others
have left of the target.
"""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.config import Config
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.training import TrainState
from saekit.dictionaries.wiring import WIRINGS
from saekit.kernels import sparse_decode
from saekit.types import ActivationBatch, Codes, Loss, SaekitError

OWN = ("mutual", "end_to_end")  # terms that look at a whole decoder or a whole output


class _Add(torch.autograd.Function):
    """Add to some columns, in place; the gradient of what was added is a view of that of the sum."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, part: Tensor, at: slice) -> Tensor:
        ctx.at = at
        ctx.mark_dirty(total)
        total[:, at] += part
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return grad, grad[:, ctx.at], None


class CrossLayer(Dictionary):
    """A transcoder for each layer that writes to all later ones too.

    ``parts[l]`` is the transcoder of layer l, in normalised space: it reads layer l and writes the layers l,
    l + 1, ... side by side. Features are counted through, layer by layer. ``b_dec`` is the one bias of the
    output; those of the parts stay 0.
    """

    mask = None
    parts: Any  # a ModuleList of Rows

    def __init__(self, config: Config, seed: int = 0):
        super().__init__(config, seed)
        for name, _ in config.objective:
            if name in OWN:
                raise SaekitError(
                    f"objective {name!r} needs one decoder, and a cross-layer transcoder has one for each layer; leave it out"
                )
        self.layers: int = self.wiring.layers
        parts = [Rows(_part(config, layer), seed + layer) for layer in range(self.layers)]
        self.parts = nn.ModuleList(parts)
        for part in parts:
            part.b_dec.requires_grad_(False)
        self.b_dec = nn.Parameter(torch.zeros(self.d_out), requires_grad=parts[0].b_enc.requires_grad)

    @property
    def atoms(self) -> Any:
        """What kind the parts' atoms are; each part has its own."""
        return self.parts[0].atoms

    @property
    def selection(self) -> Any:
        """What kind the parts' selections are; each part has its own."""
        return self.parts[0].selection

    @property
    def terms(self) -> dict[str, Any]:
        """The terms of all parts, by layer and name."""
        return {f"{i}.{name}": term for i, part in enumerate(self.parts) for name, term in part.terms.items()}

    @property
    def W_dec(self) -> Float[Tensor, "feature d_out"]:
        """Decoder weights in normalised space, dense: zero where an earlier layer is written. For small ones."""
        places = map(self._columns, range(self.layers))
        pairs = zip(self.parts, places, strict=True)
        pad = nn.functional.pad
        return torch.cat([pad(part.W_dec, (at.start, self.d_out - at.stop)) for part, at in pairs])

    @property
    def W_enc(self) -> Float[Tensor, "d_in feature"]:
        """Encoder weights in normalised space, dense: zero where another layer is read. For small ones."""
        return torch.block_diag(*(part.W_enc for part in self.parts))

    def _layers(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.read(x).split(self.wiring.parts_in, 1)

    def _columns(self, layer: int) -> slice:
        """The columns of the output that a layer's part writes to."""
        first, stop = self.wiring.written(layer)
        return slice(self._columns_of(first).start, self._columns_of(stop - 1).stop)

    def _features(self, layer: int) -> tuple[int, int]:
        each = self.n_features // self.layers
        return layer * each, (layer + 1) * each

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Codes:
        """Codes of all layers by the inference rule: each row by itself."""
        inputs = [layer.contiguous() for layer in self._layers(x)]
        codes = Codes.beside([part.encode(y) for part, y in zip(self.parts, inputs, strict=True)])
        return dataclasses.replace(codes, shape=tuple(x.shape[:-1]))

    def decode(
        self, codes: Codes, x: Float[Tensor, "*shape d_in"] | None = None
    ) -> Float[Tensor, "*shape d_out"]:
        """What the codes write to each layer, side by side, in the units of the model."""
        shares = [codes.part(*self._features(layer)) for layer in range(self.layers)]
        y = self._sum(shares) + self.b_dec
        return self.norm_out.invert(y).view(*codes.shape, self.d_out)

    def encode_layer(self, layer: int, x: Float[Tensor, "*shape d_in"]) -> Codes:
        """Codes of one layer's features, counted from 0, from what that layer reads."""
        read = self.norm_in.some(layer, layer + 1)(x.to(self.dtype).flatten(0, -2))
        return dataclasses.replace(self.parts[layer].encode(read), shape=tuple(x.shape[:-1]))

    def decode_layer(self, layer: int, codes: Sequence[Codes]) -> Float[Tensor, "*shape d_out"]:
        """What the codes of the layers up to this one (of :meth:`encode_layer`) write to it, in the units of the model."""
        at = self._columns_of(layer)
        y = self.b_dec.new_zeros(codes[0].rows, at.stop - at.start)
        for source, c in enumerate(codes):
            first, stop = self.wiring.written(source)
            if first <= layer < stop:
                start = self._columns(source).start
                weight = self.parts[source].W_dec[:, at.start - start : at.stop - start].contiguous()
                y = y + sparse_decode(c.offsets, c.indices, c.values, weight)
        y = y + self.b_dec[at]  # last, as decode() has it, so that both round alike
        return self.norm_out.some(layer, layer + 1).invert(y).view(*codes[0].shape, -1)

    def _columns_of(self, layer: int) -> slice:
        """The columns of the output that are a layer's."""
        return slice(sum(self.wiring.parts_out[:layer]), sum(self.wiring.parts_out[: layer + 1]))

    def _sum(self, shares: list[Codes]) -> Tensor:
        """What the layers' codes write together, without the bias."""
        y = self.b_dec.new_zeros(shares[0].rows, self.d_out)
        for layer, (part, c) in enumerate(zip(self.parts, shares, strict=True)):
            y = _Add.apply(y, sparse_decode(c.offsets, c.indices, c.values, part.W_dec), self._columns(layer))
        return y

    def loss(
        self, batch: "Float[Tensor, 'batch columns'] | ActivationBatch", state: TrainState | None = None
    ) -> Loss:
        """The training loss; the value of the term that fits is the squared error of the summed output."""
        read, target = self.wiring.split(self.rows_of(batch))
        state = state or TrainState()
        inputs, y = self._layers(read), self.norm_out(target.to(self.dtype))
        states = [self._state(state, layer) for layer in range(self.layers)]
        pairs = list(zip(self.parts, inputs, states, strict=True))
        chosen = [part.select(x.contiguous(), s) for part, x, s in pairs]
        fit = self.config.objective[0][0]
        shared = fit == "reconstruction"
        with torch.set_grad_enabled(shared):
            error = self._sum([c.codes for c in chosen]) + self.b_dec - y
        if not shared:  # the bias learns here, decoders and codes from the parts below
            error = error + (self.b_dec - self.b_dec.detach())
        terms: dict[str, Tensor] = {fit: error.square().sum(1).mean()}
        error = error.detach()
        for layer, ((part, x, s), selected) in enumerate(zip(pairs, chosen, strict=True)):
            at = self._columns(layer)
            if shared and "gate" not in part.terms:  # no other term reads what is to be written
                mine, _ = part.judge(x, y[:, at], selected, s, error=error[:, at])
            else:
                left = self._left(layer, selected.codes.detach(), error)
                mine, _ = part.judge(x, left, selected, s, error=error[:, at] if shared else None)
            for name, term in mine.items():
                # a part's own error is counted already: it only teaches
                term = term - term.detach() if name == fit else term
                terms[name] = terms[name] + term if name in terms else term
        fvu = error.square().sum() / (y - y.mean(0)).square().sum()
        codes = Codes.beside([c.codes.detach() for c in chosen])
        return Loss(torch.stack(list(terms.values())).sum(), terms, codes, fvu)

    @torch.no_grad()
    def _left(self, layer: int, codes: Codes, error: Tensor) -> Tensor:
        """What the other parts leave of the target for a layer's."""
        left = sparse_decode(codes.offsets, codes.indices, codes.values, self.parts[layer].W_dec)
        return left.sub_(error[:, self._columns(layer)])

    def _state(self, state: TrainState, layer: int) -> TrainState:
        first, stop = self._features(layer)
        return dataclasses.replace(state, dead=None if state.dead is None else state.dead[first:stop])

    def unit_weights(self) -> list[Tensor]:
        """The weights whose rows an optimizer has to keep on the sphere."""
        return [weight for part in self.parts for weight in part.unit_weights()]

    def after_step(self) -> None:
        """Restores the constraints of the weights, after the step of an optimizer that doesn't keep them."""
        for part in self.parts:
            part.after_step()

    def observe(self, codes: Codes, state: TrainState) -> None:
        """After a step: let thresholds and coefficients learn from the codes of the batch."""
        for layer, part in enumerate(self.parts):
            part.observe(codes.part(*self._features(layer)), self._state(state, layer))

    @torch.no_grad()
    def prepare(self, batch: Float[Tensor, "batch columns"]) -> None:
        """What depends on data before the first step, for every part."""
        if not self.normalised:
            self.set_normalisation(batch)
        read, target = self.wiring.split(batch)
        y = self.norm_out(target.to(self.dtype))
        for layer, (part, x) in enumerate(zip(self.parts, self._layers(read), strict=True)):
            part.prepare(torch.cat([x, y[:, self._columns(layer)]], 1))
        self.prepared.fill_(True)

    @torch.no_grad()
    def to_inference(self) -> "CrossLayer":
        """The same function of raw activations, every part folded by itself."""
        parts = [self.whole_part(layer).to_inference() for layer in range(self.layers)]
        if not parts[0].selection.affine:  # a pursuit works in normalised space: nothing is folded
            return copy.deepcopy(self).eval()
        return self.assembled(parts)

    def whole_part(self, layer: int) -> Rows:
        """The transcoder of a layer by itself, in the units of the model."""
        whole: Rows = copy.deepcopy(self.parts[layer])
        whole.norm_in = self.norm_in.some(layer, layer + 1)
        whole.norm_out = self.norm_out.some(*self.wiring.written(layer))
        return whole

    @torch.no_grad()
    def assembled(self, parts: Sequence[Rows]) -> "CrossLayer":
        """A cross-layer transcoder of raw activations, of folded parts in place of this one's."""
        one = parts[0].config
        name, settings = self.config.wiring
        own = one.selection if one.selection[0] != self.config.selection[0] else self.config.selection
        config = Config(
            self.n_features, (name, dataclasses.replace(settings, normalise="none")), own, one.atoms, one.objective
        )  # fmt: skip
        out = CrossLayer(config, self.seed).to(self.device)
        for mine, folded in zip(out.parts, parts, strict=True):
            mine.load_state_dict(folded.state_dict())
            mine.b_dec.zero_()  # the mean is written once, by the whole's bias
        out.norm_out.mean.copy_(self.norm_out.mean)
        out.b_dec.copy_(self.norm_out.invert(self.b_dec.double()[None])[0])
        out.prepared.fill_(True)
        out.reads, out.writes, out.card = self.reads, self.writes, dict(self.card)
        return out.eval()


def _part(config: Config, layer: int) -> Config:
    """The config of one layer's part: its share of the features and of k, writing from its layer on."""
    w = config.wiring[1]
    d_out = (w.d_out or w.d_in) * min(w.reach or w.n_layers, w.n_layers - layer)
    transcoder = WIRINGS["transcoder"].Config(d_in=w.d_in, d_out=d_out, normalise="none")

    def share(choice: tuple[str, Any]) -> tuple[str, Any]:
        name, settings = choice
        changes: dict[str, Any] = {
            key: _share(key, getattr(settings, key), w.n_layers, name in OBJECTIVES)
            for key in ("k", "k_start", "k_aux", "k_inference")
            if getattr(settings, key, None) is not None
        }
        for key in ("prefixes", "budgets"):
            if getattr(settings, key, None) is not None:
                totals = getattr(settings, key)
                changes[key] = tuple(_share(key, total, w.n_layers, False) for total in totals)
        return name, dataclasses.replace(settings, **changes)

    return Config(
        config.n_features // w.n_layers, ("transcoder", transcoder), share(config.selection), config.atoms,
        tuple(share(term) for term in config.objective),
    )  # fmt: skip


def _share(name: str, total: float, layers: int, real: bool) -> float:
    if real and name != "k_aux":  # a penalty's target needn't be whole
        return total / layers
    if total % layers:
        raise SaekitError(
            f"{name} = {total} can't be shared out among {layers} layers; choose a multiple of {layers}"
        )
    return int(total) // layers
