"""The names that people know, as settings of the four choices."""

import dataclasses
from typing import Any

from saekit.attention import Attention
from saekit.dictionaries.config import CHOICES, Config, configure
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.kinds import build
from saekit.registry import nearest
from saekit.types import SaekitError

TOPK = ("reconstruction", "auxk")

# the four choices, and options that differ from their rows' defaults
PRESETS: dict[str, dict[str, Any]] = {
    "relu": {"selection": "relu", "atoms": "unit_norm", "objective": ("reconstruction", "l1")},
    "topk": {"selection": "topk", "atoms": "unit_norm", "objective": TOPK},
    "k_sparse": {"selection": "topk", "atoms": "tied", "objective": ("reconstruction",), "relu": False, "unit_norm": False},
    "abstopk": {"selection": "abstopk", "atoms": "unit_norm", "objective": TOPK},
    "groupmax": {"selection": "groupmax", "atoms": "unit_norm", "objective": TOPK},
    "batchtopk": {"selection": "batchtopk", "atoms": "unit_norm", "objective": TOPK},
    "jumprelu": {"selection": "jumprelu", "atoms": "unit_norm", "objective": ("reconstruction", "l0", "auxk")},
    "tanh": {"selection": "jumprelu", "atoms": "unit_norm", "objective": ("reconstruction", "tanh", "auxk")},
    "p_annealing": {"selection": "relu", "atoms": "unit_norm", "objective": ("reconstruction", "p_annealed")},
    "gated": {"selection": "gated", "atoms": "unit_norm", "objective": ("reconstruction", "l1", "gate")},
    "matryoshka": {"selection": "batchtopk", "atoms": "unit_norm", "objective": ("matryoshka", "auxk")},
    "hierarchical_topk": {"selection": "topk", "atoms": "unit_norm", "objective": ("hierarchical", "auxk")},
    "matching_pursuit": {"selection": "pursuit", "atoms": "tied", "objective": ("reconstruction",)},
    "omp": {"selection": "omp", "atoms": "tied", "objective": ("reconstruction",)},
    "codebook": {"selection": "codebook", "atoms": "tied", "objective": ("reconstruction",), "unit_norm": False},
    "switch": {"selection": "switch", "atoms": "unit_norm", "objective": ("reconstruction", "load_balance", "auxk")},
    "lorsa": {"wiring": "lorsa", "selection": "topk", "atoms": "unit_norm", "objective": TOPK},
    "molt": {"wiring": "molt", "selection": "topk", "atoms": "unit_norm", "objective": TOPK},
    "clt": {"wiring": "cross_layer", "selection": "topk", "atoms": "unit_norm", "objective": TOPK},
    "crosscoder": {"wiring": "crosscoder", "selection": "batchtopk", "atoms": "unit_norm", "objective": TOPK},
    "transcoder": {"wiring": "transcoder", "selection": "topk", "atoms": "unit_norm", "objective": TOPK},
    "skip_transcoder": {"wiring": "transcoder", "selection": "topk", "atoms": "unit_norm", "objective": TOPK, "skip": True},
    "archetypal": {"selection": "topk", "atoms": "archetypal", "objective": TOPK},
    "relaxed_archetypal": {"selection": "topk", "atoms": "archetypal", "objective": TOPK, "delta": 0.01},
    "frozen": {"selection": "topk", "atoms": "frozen", "objective": ("reconstruction",)},
    "random": {"selection": "topk", "atoms": "random", "objective": ("reconstruction",)},
    "random_omp": {"selection": "omp", "atoms": "random", "objective": ("reconstruction",)},
}  # fmt: skip


def create(name: str, *, n_features: int, seed: int = 0, **options: Any) -> Dictionary:
    """A fresh dictionary: ``create("topk", d_in=512, n_features=16384, k=32)``.

    ``name`` is a preset; ``options`` are the fields of its four choices (``d_in``, ``k``,
    ``k_aux``, ...), and ``wiring``, ``selection``, ``atoms`` or ``objective`` replace a choice of
    the preset. An option goes to the first of wiring, selection, atoms and the terms of the objective
    that has it; ``**{"auxk.coefficient": 0.1}`` names one. An option that no choice has is refused.

    ``create("lorsa", attention=layer, ...)`` begins from an attention layer (:func:`saekit.layers.attention`): with
    its heads, or a multiple ``n_qk`` of them.
    """
    if name not in PRESETS:
        raise SaekitError(f"architecture {name!r} is unknown{nearest(name, PRESETS)}")
    chosen = {"wiring": "autoencoder", **PRESETS[name]}
    attention = options.pop("attention", None)
    if attention is not None:
        options = {**_shape_of(attention, options.get("wiring", chosen["wiring"]), options), **options}
    own = {key: chosen.pop(key) for key in list(chosen) if key not in CHOICES}
    chosen |= {key: options.pop(key) for key in list(options) if key in CHOICES}
    unused, default = set(options), set(own) - set(options)
    left = own | options
    parts: dict[str, Any] = {}
    for choice, table in CHOICES.items():
        names = (chosen[choice],) if isinstance(chosen[choice], str) else tuple(chosen[choice])
        built = []
        for row in names:
            mine = {
                k.removeprefix(f"{row}."): v
                for k, v in left.items()
                if "." not in k or k.startswith(f"{row}.")
            }
            here = set(mine)
            built.append((row, configure(table, row, mine, here)))
            for key in set(mine) - here:  # taken: no later choice gets it
                for given in (key, f"{row}.{key}"):
                    left.pop(given, None)
                    unused.discard(given)
        parts[choice] = tuple(built) if choice == "objective" else built[0]
    unused -= default
    if unused:
        rows = (*parts["objective"], *(parts[p] for p in parts if p != "objective"))
        known = sorted({f for _, c in rows for f in vars(c)})
        field = sorted(unused)[0]
        raise SaekitError(
            f"option {field!r} is not one of {name!r}{nearest(field.rpartition('.')[2], known)}"
        )
    dictionary = build(Config(n_features=n_features, **parts), seed=seed)
    if attention is not None:
        dictionary.begin_from(attention)
    return dictionary


def _shape_of(attention: Any, wiring: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a Lorsa whose heads are those of an attention layer, or a multiple of them."""
    if wiring != "lorsa":
        raise SaekitError(
            f"attention is given, and wiring {wiring!r} has no heads; choose 'lorsa', or leave it out"
        )
    if not isinstance(attention, Attention):
        raise SaekitError(
            f"attention = {attention!r} is no record of a layer; give saekit.layers.attention(model, hook_point)"
        )
    shape = {**dataclasses.asdict(attention.patterns.config), "d_out": len(attention.b_O)}
    if options.get("n_qk", shape["n_qk"]) % shape["n_qk"]:
        raise SaekitError(
            f"n_qk = {options['n_qk']} is no multiple of the layer's {shape['n_qk']} heads; choose one, or leave it out"
        )
    # copies of a head begin with its keys, and then learn their own
    shape["n_kv"] *= options.get("n_qk", shape["n_qk"]) // shape["n_qk"]
    for name in sorted(set(shape) & set(options) - {"n_qk"}):
        if options[name] != shape[name]:
            raise SaekitError(
                f"{name} = {options[name]!r} is not the layer's {shape[name]!r}; leave it out, or leave out attention"
            )
    return shape
