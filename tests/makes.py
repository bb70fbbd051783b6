"""Models of every make and dictionaries of every kind, as tables, and a covering array of them; graphs side by side."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from test_circuits import OPTIONS, POINTS

import saekit
from saekit.circuits.places import Heads, Neurons, Stand
from saekit.graph import KINDS, Graph
from saekit.hooks import capture
from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import ActivationBatch

# widths that no two axes of a tensor share, so that an axis of the residual stream is known by its length
WIDE, SIZES = 28, {"vocabulary": 50, "d_model": 28, "d_head": 6, "d_mlp": 20}
TOKENS = torch.randint(50, (12,), generator=torch.Generator().manual_seed(0))
NORMS: dict[str, dict[str, Any]] = {"layer": {}, "rms": {"norm": "rms"}, "none": {"norm": "none"}, "pre and post": {"post_norms": True}}  # fmt: skip
POSITIONS, ACTIVATIONS = ("learned", "rotary"), ("relu", "gelu", "swiglu", "silu")
HEADS = {"MHA": None, "GQA": 2}
# kinds that stand beside each other
GROUPS = (
    ("topk", "heads", "transcoder", "lorsa"), ("jumprelu", "clt", "switch"),
    ("omp", "molt", "skip_transcoder"), ("abstopk", "codebook", "matching_pursuit", "neurons"),
)  # fmt: skip
BUILT_IN: dict[str, Stand] = {"neurons": Neurons("layers.0.mlp"), "heads": Heads("layers.0.self_attn")}


class Make(NamedTuple):
    """What a model is made of."""

    norm: str
    positions: str
    activation: str
    heads: str


MAKES = [Make(*one) for one in itertools.product(NORMS, POSITIONS, ACTIVATIONS, HEADS)]
OTHERS = {
    "parallel, norms of queries": {"parallel": True, "qk_norm": True, "positions": "rotary"},
    "attention alone": {"d_mlp": 0, "positions": "none"},
}


def covering() -> "list[tuple[Make, tuple[str, ...], bool]]":
    """Make, kinds and precision: the orthogonal array of 4 x 4 over the field of four elements."""
    times = (0, 2, 3, 1)  # by its generator
    out = []
    for i, j in itertools.product(range(4), repeat=2):
        positions, heads = divmod(i ^ times[j], 2)
        make = Make(list(NORMS)[i], POSITIONS[positions], ACTIVATIONS[j], list(HEADS)[heads])
        out.append((make, GROUPS[i ^ j], bool((i ^ times[times[j]]) & 1)))
    return out


def model(make: "Make | str", double: bool = False) -> Model:
    """A toy of this make whose biases and norms are not those that it was born with."""
    options = OTHERS[make] if isinstance(make, str) else {
        **NORMS[make.norm], "positions": make.positions, "activation": make.activation, "n_kv": HEADS[make.heads],
    }  # fmt: skip
    module = Transformer(TransformerConfig(**{**SIZES, **options}))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    if double:
        module.double()
        if module.rotary_emb is not None:
            module.rotary_emb.float()  # angles are fp32 everywhere
    return load_model(module, name="toy")


def stand(name: str, m: Model) -> Stand:
    """A dictionary fitted to what the model has at its places, with biases."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    wide = 24 if name == "jumprelu" else WIDE
    d = saekit.create(name, d_in=wide, n_features=96, seed=1, **{"k": 4, **OPTIONS.get(name, {})})
    d.reads, d.writes = d.wiring.sites(list(POINTS[name]))
    tokens = torch.randint(50, (20, 12), generator=torch.Generator().manual_seed(1))
    seen = capture(lambda: m.module(tokens), {p: m.site(p) for p in d.points}, stop=False)
    d.to(m.module.lm_head.weight.dtype)
    seen = {point: value.detach() for point, value in seen.items()}
    d.prepare(d.gather([ActivationBatch(seen, torch.ones(20, 12, dtype=torch.bool), tokens)]))
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for bias in (d.b_dec, getattr(d, "b_enc", None)):
            if bias is not None:
                bias.add_(0.1 * torch.randn(bias.shape, generator=g))
    return d


FEW = [covering()[4 * i + j] for i, j in enumerate((0, 2, 3, 1))]  # every norm, activation and group once


def merged(g: Graph, name: Callable[[int, int, int], Any]) -> "tuple[dict[Any, int], np.ndarray]":
    """Rows with features named by ``name(stand, layer, place)`` and position; biases are one, and so are features that
    are named alike. A feature's row has the sign of its value, so that one of a negative value is its mirror image.
    """
    columns = (g.nodes.kind, g.nodes.stand, g.nodes.layer, g.nodes.position, g.nodes.place)
    keys: list[Any] = []
    for kind, s, layer, position, place in zip(*(column.tolist() for column in columns), strict=True):
        match KINDS[kind]:
            case "feature":
                keys.append((kind, position, name(s, layer, place)))
            case "target":
                keys.append((kind, position, (place,)))
            case "bias":
                keys.append((kind,))
            case _:
                keys.append((kind, position))
    names = {key: i for i, key in enumerate(sorted(set(keys)))}
    at = np.array([names[key] for key in keys])
    out = np.zeros((len(names), len(names)))
    signs = np.where(g.of_kind("target"), 1, np.sign(g.nodes.value))[g.of]
    np.add.at(out, (at[g.of][:, None], at), g.rows.toarray() * signs[:, None])
    return names, out
