"""Selections: how pre-activations become codes. One file and one line each."""

from saekit.registry import Registry

SELECTIONS = Registry(
    "selection",
    {
        "topk": "saekit.dictionaries.selection.topk:TopK",
        "omp": "saekit.dictionaries.selection.omp:OMP",
    },
)
