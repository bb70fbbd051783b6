"""Objectives: the terms whose sum is minimised."""

from saekit.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "reconstruction": "saekit.dictionaries.objective.reconstruction:Reconstruction",
        "auxk": "saekit.dictionaries.objective.auxk:AuxK",
    },
)
