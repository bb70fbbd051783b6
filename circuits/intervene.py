"""Passes through a frozen model in which some places are changed: what interventions do to everything behind them."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.circuits.frozen import Frozen, Site, canonical
from saekit.circuits.places import Written
from saekit.circuits.weights import Norm

Changes = Mapping[Site, Float[Tensor, "batch seq d"]]


class FrozenPass:
    """A batch of passes with patterns, norms' sizes and neurons' slopes as they were on the prompt.

    ``changes`` is added at sites; (0, "resid_pre") is the embedding. What dictionaries write (``cuts``) stays as it was
    but for the changes there, and for what a skip passes on: features don't react. :attr:`seen` has every site.
    """

    def __init__(self, frozen: Frozen, cuts: Mapping[Site, Written], changes: Changes):
        self.frozen, self.cuts, self.changes = frozen, cuts, changes
        batch = max((len(change) for change in changes.values()), default=1)
        self.seen: list[dict[str, Tensor]] = []
        self.before: dict[Site, Tensor] = {}  # what dictionaries find where they write
        x = frozen.seen[0]["resid_pre"].expand(batch, -1, -1)
        x = self._at((0, "resid_pre"), x)
        for layer in range(len(frozen.seen)):
            self.seen.append({})
            x = self._block(layer, x)
        self.last = x

    def at(self, site: Site, before: bool = False) -> Float[Tensor, "batch seq d"]:
        """What the passes have at a site; ``before`` a dictionary writes there."""
        layer, name = canonical(site)
        return self.before[layer, name] if before else self.seen[layer][name]

    def _at(self, site: Site, value: Tensor) -> Tensor:
        """A site's value after what stands there and the changes."""
        cut = self.cuts.get(site)
        if cut is not None:
            self.before[site] = value
            value = self.frozen.at(site).expand_as(value)
            if cut.skip is not None:
                read, matrix = cut.skip
                value = value + (self.at(read, read == site) - self.frozen.at(read)) @ matrix.T.to(value)
        return value + self.changes[site] if site in self.changes else value

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
        out = self._site(layer, "attn_out", z @ a.W_O.transpose(1, 2).flatten(0, 1) + a.b_O)
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
