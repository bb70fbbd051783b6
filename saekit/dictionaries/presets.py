"""The names that people know, as settings of the four choices."""

from typing import Any

from saekit.dictionaries.dictionary import CHOICES, Config, Dictionary, configure
from saekit.registry import nearest
from saekit.types import SaekitError

PRESETS: dict[str, dict[str, Any]] = {
    "topk": {"selection": "topk", "atoms": "unit_norm", "objective": ("reconstruction", "auxk")},
    "random": {"selection": "topk", "atoms": "random", "objective": ("reconstruction",)},
    "random_omp": {"selection": "omp", "atoms": "random", "objective": ("reconstruction",)},
}


def create(name: str, *, n_features: int, seed: int = 0, **options: Any) -> Dictionary:
    """A fresh dictionary: ``create("topk", d_in=512, n_features=16384, k=32)``.

    ``name`` is a preset; ``options`` are the fields of its four choices (``d_in``, ``k``,
    ``k_aux``, ...), and ``wiring``, ``selection``, ``atoms`` or ``objective`` replace a choice of
    the preset. An option that no choice has is refused.
    """
    if name not in PRESETS:
        raise SaekitError(f"architecture {name!r} is unknown{nearest(name, PRESETS)}")
    chosen = {"wiring": "autoencoder", **PRESETS[name]}
    chosen |= {key: options.pop(key) for key in list(options) if key in CHOICES}
    unused = set(options)
    parts: dict[str, Any] = {}
    for choice, table in CHOICES.items():
        names = (chosen[choice],) if isinstance(chosen[choice], str) else tuple(chosen[choice])
        built = tuple((n, configure(table, n, options, unused)) for n in names)
        parts[choice] = built if choice == "objective" else built[0]
    if unused:
        known = sorted(
            {
                f
                for _, c in (*parts["objective"], *(parts[p] for p in parts if p != "objective"))
                for f in vars(c)
            }
        )
        field = sorted(unused)[0]
        raise SaekitError(f"option {field!r} is not one of {name!r}{nearest(field, known)}")
    return Dictionary(Config(n_features=n_features, **parts), seed=seed)
