"""Atoms: how the decoder (and, where it is tied, the encoder) is parametrised.

Atoms are a module made from their frozen ``Config`` (whose ``check(d_out)`` refuses what is impossible),
seeded unit ``directions [n_features, d_out]`` and the dictionary's ``generator``. They have ``rows()``, the
decoder ``[n_features, d_out]``; ``unit``, whether the rows of ``weight`` are kept at norm 1 (by the
optimizer, or by ``after_step()``); ``tied``, whether the encoder reads by the same rows; ``trained``, whether
anything of the dictionary is. ``prepare(y)``, where it exists, gets rows of the data before training.
"""

from saekit.registry import Registry

ATOMS = Registry(
    "atoms",
    {
        "free": "saekit.dictionaries.atoms.free:Free",
        "unit_norm": "saekit.dictionaries.atoms.unit_norm:UnitNorm",
        "tied": "saekit.dictionaries.atoms.tied:Tied",
        "archetypal": "saekit.dictionaries.atoms.archetypal:Archetypal",
        "convolutional": "saekit.dictionaries.atoms.convolutional:Convolutional",
        "fourier": "saekit.dictionaries.atoms.fourier:Fourier",
        "frozen": "saekit.dictionaries.atoms.frozen:Frozen",
        "random": "saekit.dictionaries.atoms.random:Random",
    },
)
