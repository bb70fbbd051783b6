"""Passes through a frozen model in which some places are changed: what interventions do to everything behind them."""

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Site, canonical
from saekit.circuits.rows import Own, Trace
from saekit.circuits.weights import Norm, run_block

Changes = Mapping[Site, Float[Tensor, "batch seq d"]]
EMBEDDING: Site = (0, "embedding")  # what tokens and positions write, before a dictionary that stands there


class FrozenPass:
    """A batch of passes with patterns, norms' sizes, neurons' slopes and active features as they were on the prompt.

    ``changes`` is added at sites, and to what is embedded (EMBEDDING). What dictionaries write stays as it was but for the
    changes there, for what a skip passes on and, where features ``react``, for what the active ones make of what they
    read, linearly. :attr:`seen` has every site.
    """

    def __init__(self, run: Trace, changes: Changes, react: bool = False):
        self.run, self.frozen, self.changes, self.react = run, run.frozen, changes, react
        batch = max((len(change) for change in changes.values()), default=1)
        self.seen: list[dict[str, Tensor]] = []
        self.before: dict[Site, Tensor] = {}  # what dictionaries find where they write
        self.moved: dict[Site, Tensor] = {}  # what reacting features write more
        x = self.frozen.seen[0]["resid_pre"].expand(batch, -1, -1)
        x = x + changes[EMBEDDING] if EMBEDDING in changes else x
        x = self._at((0, "resid_pre"), x)
        for layer in range(len(self.frozen.seen)):
            self.seen.append({})
            x = self._block(layer, x)
        self.last = x

    def at(self, site: Site, before: bool = False) -> Float[Tensor, "batch seq d"]:
        """What the passes have at a site; ``before`` a dictionary writes there."""
        layer, name = canonical(site)
        return self.before[layer, name] if before else self.seen[layer][name]

    def change(self, own: Own) -> Float[Tensor, "batch entry"]:
        """By how much each feature of a part changes, if it stays active."""
        return self._change(own, self.at(own.read, own.before))

    def _change(self, own: Own, x: Tensor) -> Tensor:
        part, moved = own.part, x - self.frozen.at(own.read)
        w = part.w.to(moved)
        if part.patterns is None or part.heads is None:
            return torch.einsum("bed,ed->be", moved[:, part.positions], w)
        looks = part.patterns[part.heads, part.positions].to(moved)
        return torch.einsum("es,bse->be", looks, moved @ w.T)

    def _react(self, site: Site, value: Tensor, before: bool) -> None:
        """What features that read a site write more."""
        for own in self.run.readers.get((site, before), ()) if self.react else ():
            share = self._change(own, value) / own.part.values.to(value)
            for written, vectors in zip(own.writes, own.part.written, strict=True):
                moved = self.moved.setdefault(
                    written, torch.zeros_like(self.frozen.at(written)).expand_as(value).clone()
                )
                moved.index_add_(1, own.part.positions, share[:, :, None] * vectors.to(value))

    def _at(self, site: Site, value: Tensor) -> Tensor:
        """A site's value after what stands there and the changes."""
        cut = self.run.cuts.get(site)
        if cut is not None:
            self.before[site] = value
            self._react(site, value, True)
            value = self.frozen.at(site).expand_as(value)
            if site in self.moved:
                value = value + self.moved[site]
            if cut.skip is not None:
                read, matrix = cut.skip
                value = value + (self.at(read, read == site) - self.frozen.at(read)) @ matrix.T.to(value)
        value = value + self.changes[site] if site in self.changes else value
        self._react(site, value, False)
        return value

    def _site(self, layer: int, name: str, value: Tensor) -> Tensor:
        value = self._at((layer, name), value)
        self.seen[layer][name] = value
        return value

    def _norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        norm: Norm | None = getattr(self.frozen.weights.blocks[layer], name)
        if norm is None:
            return x
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        return x / self.frozen.sizes[layer][name] * norm.weight + norm.bias

    def _block(self, layer: int, x: Tensor) -> Tensor:
        block, was = self.frozen.weights.blocks[layer], self.frozen.seen[layer]
        if layer == 0:
            self.seen[0]["resid_pre"] = x
        a = block.attention
        read = self._site(layer, "attn_in", self._norm(layer, "before_attention", x))
        values = torch.einsum("bsi,kvi->bksv", read, a.W_V) + a.b_V[:, None]
        z = was["patterns"] @ values.repeat_interleave(len(a.W_O) // len(a.W_V), 1)
        z = self._site(layer, "z", z.transpose(1, 2).flatten(2))
        out = self._site(layer, "attn_out", a.write(z))
        middle = x + self._site(layer, "attn_add", self._norm(layer, "after_attention", out))
        middle = self._site(layer, "resid_mid", middle)
        if block.mlp is None:
            return self._site(layer, "resid_post", middle)
        mlp = block.mlp
        read = self._site(layer, "mlp_in", self._norm(layer, "before_mlp", x if block.parallel else middle))
        hidden = self.frozen.slopes[layer] * (read @ mlp.W_in.T + mlp.b_in)
        out = self._site(layer, "mlp_out", hidden @ mlp.W_out.T + mlp.b_out)
        added = self._site(layer, "mlp_add", self._norm(layer, "after_mlp", out))
        return self._site(layer, "resid_post", middle + added)


@torch.no_grad()
def free_pass(run: Trace, changes: Changes) -> Float[Tensor, "batch seq d"]:
    """The final stream of a batch of passes with changes, in which everything reacts: norms, neurons and patterns.

    Dictionaries are not in the way: changes are added to what the model itself has at their places.
    """
    batch = max((len(change) for change in changes.values()), default=1)

    def changed(layer: int, name: str, value: Tensor) -> Tensor:
        return value + changes[layer, name] if (layer, name) in changes else value

    x = changed(*EMBEDDING, run.frozen.seen[0]["resid_pre"].expand(batch, -1, -1))
    x = changed(0, "resid_pre", x)
    for layer, block in enumerate(run.frozen.weights.blocks):
        x = run_block(block, x, partial(changed, layer))
    return x
