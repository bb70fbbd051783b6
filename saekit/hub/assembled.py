"""Dictionaries of several places, from others that are folded already: what readers of foreign files end with."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.dictionaries import Config, Dictionary, build
from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.wiring import WIRINGS


def _config(n_features: int, wiring: tuple[str, Any], selection: tuple[str, Any]) -> Config:
    fit = ("reconstruction", OBJECTIVES["reconstruction"].Config())
    return Config(n_features, wiring, selection, ("free", ATOMS["free"].Config()), (fit,))


def rewired(rows: Dictionary, wiring: str, **options: Any) -> Dictionary:
    """The same encoder, biases, selection and (but for a molt's) atoms in another wiring, of raw activations."""
    chosen = (wiring, WIRINGS[wiring].Config(normalise="none", **options))
    out = build(_config(rows.n_features, chosen, rows.config.selection))
    own = ("encoder", "b_enc", "b_dec", "selection.", *(() if wiring == "molt" else ("atoms.weight",)))
    state = {name: value for name, value in rows.state_dict().items() if name.startswith(own)}
    out.load_state_dict(state, strict=False)
    out.prepared.fill_(True)
    out.card = rows.card
    return out.eval()


def cross_layer(
    parts: Sequence[Rows], b_dec: Float[Tensor, " d_out"], reach: int | None = None
) -> Dictionary:
    """A cross-layer transcoder of parts, one for each layer, of equal selections and numbers of features.

    Part l reads layer l and writes ``reach`` layers from l on side by side (None: all that are left); ``b_dec`` is the
    bias of all layers. The card is that of the first.
    """
    first, layers = parts[0], len(parts)
    name, chosen = first.config.selection
    settings = {**vars(chosen), **({"k": chosen.k * layers} if hasattr(chosen, "k") else {})}
    d_in, d_out = first.d_in, len(b_dec) // layers
    wiring = WIRINGS["cross_layer"].Config(
        d_in=d_in, n_layers=layers, d_out=d_out, reach=reach, normalise="none"
    )
    out: Any = build(
        _config(first.n_features * layers, ("cross_layer", wiring), (name, type(chosen)(**settings)))
    )
    with torch.no_grad():
        for mine, part in zip(out.parts, parts, strict=True):
            mine.load_state_dict(part.state_dict())
            mine.b_dec.zero_()  # a bias is written once, by the whole
        out.b_dec.copy_(b_dec)
    out.prepared.fill_(True)
    out.card = first.card
    return out.eval()
