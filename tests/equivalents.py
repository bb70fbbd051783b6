"""Dictionaries that are a model's own layers, so that nothing is left over: neurons, outputs and heads."""

from typing import Any

import torch
from torch import Tensor

import saekit
from saekit.circuits.weights import Mlp, weights
from saekit.models import Model

PLAIN: dict[str, Any] = {"normalise": "none", "atoms": "free"}


def _fill(d: Any, encoder: Tensor, b_enc: Tensor, atoms: Tensor, b_dec: "Tensor | None" = None) -> None:
    d.to(encoder.dtype)
    with torch.no_grad():
        d.encoder.copy_(encoder)
        d.b_enc.copy_(b_enc)
        d.atoms.weight.copy_(atoms)
        if b_dec is not None:
            d.b_dec.copy_(b_dec)


def _mlps(m: Model) -> list[Mlp]:
    return [block.mlp for block in weights(m).blocks if block.mlp is not None]


def own_neurons(m: Model) -> list[saekit.Dictionary]:
    """The neurons of every MLP, whose activation is ReLU, as transcoders."""
    out = []
    for i, mlp in enumerate(_mlps(m)):
        d_out, n = mlp.W_out.shape
        d = saekit.create("transcoder", d_in=d_out, n_features=n, selection="relu", **PLAIN)
        d.reads, d.writes = (f"layers.{i}.mlp:in",), (f"layers.{i}.mlp:out",)
        _fill(d, mlp.W_in, mlp.b_in, mlp.W_out.T, mlp.b_out)
        out.append(d)
    return out


def own_cross_layer(m: Model) -> list[saekit.Dictionary]:
    """The same as one cross-layer transcoder, each of whose layers writes to itself alone."""
    mlps = _mlps(m)
    (d_out, n), layers = mlps[0].W_out.shape, range(len(mlps))
    d = saekit.create("clt", d_in=d_out, n_layers=len(mlps), n_features=n * len(mlps), reach=1, selection="relu", **PLAIN)  # fmt: skip
    d.reads, d.writes = (tuple(f"layers.{i}.mlp:{side}" for i in layers) for side in ("in", "out"))
    d.to(mlps[0].W_in.dtype)
    for part, mlp in zip(d.parts, mlps, strict=True):
        _fill(part, mlp.W_in, mlp.b_in, mlp.W_out.T)
    with torch.no_grad():
        d.b_dec.copy_(torch.cat([mlp.b_out for mlp in mlps]))
    return [d]


def own_outputs(m: Model) -> list[saekit.Dictionary]:
    """The same read from what the MLPs write, which is possible where they have fewer neurons than dimensions."""
    out = []
    for i, mlp in enumerate(_mlps(m)):
        d_out, n = mlp.W_out.shape
        least = 1e-10 if mlp.W_in.dtype == torch.float64 else 1e-5  # of a neuron that is not off
        d = saekit.create(
            "jumprelu", d_in=d_out, n_features=n, objective=("reconstruction",), start=least, **PLAIN
        )
        d.reads = d.writes = (f"layers.{i}.mlp:out",)
        inverse = torch.linalg.pinv(mlp.W_out)
        _fill(d, inverse, -inverse @ mlp.b_out, mlp.W_out.T, mlp.b_out)
        out.append(d)
    return out


def own_heads(m: Model) -> list[saekit.Dictionary]:
    """The heads of every layer as a Lorsa with a feature for each sign of each dimension."""
    out = []
    for i, block in enumerate(weights(m).blocks):
        a = block.attention
        heads, _, d_v = a.W_O.shape
        n = 2 * heads * d_v
        d = saekit.create("lorsa", attention=a, n_features=n, k=n, objective=("reconstruction",), **PLAIN)
        d.reads, d.writes = (f"layers.{i}.self_attn:in",), (f"layers.{i}.self_attn:out",)
        d.to(a.W_V.dtype)
        W_V, b_V = (v.repeat_interleave(heads // len(v), 0) for v in (a.W_V, a.b_V))
        signed = torch.cat([W_V, -W_V], 1).flatten(0, 1), torch.cat([b_V, -b_V], 1).flatten()
        _fill(d, *signed, torch.cat([a.W_O, -a.W_O], 2).movedim(2, 1).flatten(0, 1), a.b_O)
        out.append(d)
    return out
