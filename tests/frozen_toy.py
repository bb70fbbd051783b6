"""An oracle for graphs: a toy's own modules, run with everything that a graph freezes cut from autograd.

Every node's contribution is multiplied by a share, which is 1, so that what a node adds to a value is the derivative of
the value by the node's share. Nothing of :mod:`saekit.circuits` runs here but the placing of dictionaries.
"""

from typing import Any

import torch
from torch import Tensor, nn

from saekit.circuits.frozen import Site
from saekit.circuits.rows import Own, Trace
from saekit.circuits.targets import Target


class FrozenToy:
    """A pass of ``module`` (a :class:`saekit.testbed.transformer.Transformer`) over the prompt of ``run``."""

    def __init__(self, module: Any, run: Trace):
        self.run = run
        self.share = torch.ones(run.columns.n, dtype=run.frozen.last.dtype, requires_grad=True)
        self.seen: dict[tuple[Site, bool], Tensor] = {}
        self.scores: list[Tensor] = []  # of each layer, [head, query, source]
        self.features: dict[int, Tensor] = {}  # by the number of the part
        tokens = run.frozen.tokens
        x = self._of(run.tokens) * module.embed_tokens.weight[tokens]
        if run.positions is not None:
            x = x + self._of(run.positions) * module.embed_positions.weight[: len(tokens)]
        x = self._at((0, "resid_pre"), x)
        for i, layer in enumerate(module.layers):
            x = self._layer(i, layer, x)
        self.last = self._norm(module.norm, x, self._of(run.final))

    def values(self, targets: list[Target]) -> Tensor:
        """Of all features in the order of their nodes, then of the targets."""
        features = [self.features[i] for i in range(len(self.run.parts))]
        final = self.share[self.run.final][0]
        return torch.cat(
            [*features, *((self.last[t.position] @ t.direction + t.bias * final)[None] for t in targets)]
        )

    def rows(self, targets: list[Target]) -> Tensor:
        """What every node adds to each of the values, [value, node]."""
        values = self.values(targets)
        eye = torch.eye(len(values), dtype=values.dtype)
        return torch.autograd.grad(values, self.share, eye, is_grads_batched=True)[0]

    def _of(self, nodes: slice) -> Tensor:
        return self.share[nodes][:, None]

    def _layer(self, i: int, layer: Any, x: Tensor) -> Tensor:
        attn, post = self._of(self.run.halves[i, "attn"]), layer.post_norms
        read = self._at((i, "attn_in"), self._norm(layer.input_layernorm, x, attn))
        out = self._at((i, "attn_out"), self._attention(i, layer.self_attn, read, attn))
        added = self._norm(layer.post_attention_layernorm, out, attn) if post else out
        middle = self._at((i, "resid_mid"), x + self._at((i, "attn_add"), added))
        if layer.mlp is None:
            return self._at((i, "resid_post"), middle)
        mlp = self._of(self.run.halves[i, "mlp"])
        before = layer.pre_feedforward_layernorm if post else layer.post_attention_layernorm
        read = self._norm(before, x if layer.use_parallel_residual else middle, mlp)
        out = self._at((i, "mlp_out"), self._mlp(layer.mlp, self._at((i, "mlp_in"), read), mlp))
        added = self._norm(layer.post_feedforward_layernorm, out, mlp) if post else out
        return self._at((i, "resid_post"), middle + self._at((i, "mlp_add"), added))

    def _norm(self, norm: nn.Module, x: Tensor, share: Tensor) -> Tensor:
        if isinstance(norm, nn.Identity):
            return x
        whole: Any = norm
        x = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        size = (x.square().mean(-1, keepdim=True) + whole.eps).sqrt().detach()
        bias = getattr(norm, "bias", None)
        return x / size * whole.weight + (0 if bias is None else share * bias)

    def _attention(self, i: int, a: Any, x: Tensor, share: Tensor) -> Tensor:
        def linear(part: Any, value: Tensor) -> Tensor:
            return value @ part.weight.T + (0 if part.bias is None else share * part.bias)

        q, k, v = (
            linear(p, x).unflatten(-1, (-1, a.head_dim)).transpose(0, 1)
            for p in (a.q_proj, a.k_proj, a.v_proj)
        )
        q, k = (a.q_norm(q), a.k_norm(k)) if hasattr(a, "q_norm") else (q, k)
        q, k = (q, k) if a.rotary is None else (a.rotary(q), a.rotary(k))
        k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        later = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        self.scores.append((q @ k.transpose(1, 2) * a.scaling).masked_fill(later, float("-inf")).detach())
        z = (self.scores[-1].softmax(-1) @ v).transpose(0, 1).flatten(1)
        return linear(a.o_proj, self._at((i, "z"), z))

    def _mlp(self, mlp: Any, x: Tensor, share: Tensor) -> Tensor:
        def linear(part: Any, value: Tensor) -> Tensor:
            return value @ part.weight.T + (0 if part.bias is None else share * part.bias)

        u = linear(mlp.up_proj, x)
        slope = mlp.act_fn(u) / u if mlp.gate_proj is None else mlp.act_fn(mlp.gate_proj(x))
        return linear(mlp.down_proj, slope.detach() * u)

    def _at(self, site: Site, x: Tensor) -> Tensor:
        """What goes on from a site: where dictionaries write, what they, their errors and their biases say."""
        self._read(site, True, x)
        written = self.run.cuts.get(site)
        if written is not None:
            constant, error = self.run.fixed[site]
            x = self._of(constant) * written.constant
            if error is not None and written.error is not None:
                x = x + self._of(error) * written.error
            for own in self.run.parts:
                for where, vectors in zip(own.writes, own.part.written, strict=True):
                    if where == site:
                        x = x.index_add(0, own.part.positions, self._of(own.nodes) * vectors)
            if written.skip is not None:
                read, matrix = written.skip
                x = x + self.seen[read, read == site] @ matrix.T
        self._read(site, False, x)
        return x

    def _read(self, site: Site, before: bool, x: Tensor) -> None:
        self.seen[site, before] = x
        for i, own in enumerate(self.run.parts):
            if (own.read, own.read in own.writes) == (site, before):
                self.features[i] = self._features(own, x)

    def _features(self, own: Own, x: Tensor) -> Tensor:
        part = own.part
        if part.patterns is not None and part.heads is not None:
            gathered = torch.einsum("es,sd->ed", part.patterns[part.heads, part.positions], x)
        else:
            gathered = x[part.positions]
        return (gathered * part.w).sum(-1) + part.b * self.share[own.bias]
