"""Atoms: how the decoder (and, where it is tied, the encoder) is parametrised."""

from saekit.registry import Registry

ATOMS = Registry(
    "atoms",
    {
        "free": "saekit.dictionaries.atoms.free:Free",
        "unit_norm": "saekit.dictionaries.atoms.unit_norm:UnitNorm",
        "random": "saekit.dictionaries.atoms.random:Random",
    },
)
