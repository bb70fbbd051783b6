"""Objectives: the terms whose sum is minimised. One file and one line each.

A term is a module made from its frozen ``Config``; called with a :class:`~saekit.dictionaries.training.Forward`
it gives its weighted value, a mean over rows of a sum over dimensions. The first term of an objective ``fit``s
the data and sets the forward pass's ``squared`` and ``error``. ``needs`` names what a selection has to offer.
A term may have ``picks(d_out)``, how many dead features per row it wants; ``observe(codes, state)``, after
each step; and buffers, which checkpoints keep.
"""

from saekit.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "reconstruction": "saekit.dictionaries.objective.reconstruction:Reconstruction",
        "matryoshka": "saekit.dictionaries.objective.matryoshka:Matryoshka",
        "hierarchical": "saekit.dictionaries.objective.hierarchical:Hierarchical",
        "auxk": "saekit.dictionaries.objective.auxk:AuxK",
        "l1": "saekit.dictionaries.objective.l1:L1",
        "p_annealed": "saekit.dictionaries.objective.p_annealed:PAnnealed",
        "l0": "saekit.dictionaries.objective.l0:L0",
        "l0_target": "saekit.dictionaries.objective.l0_target:L0Target",
        "tanh": "saekit.dictionaries.objective.tanh:Tanh",
        "gate": "saekit.dictionaries.objective.gate:Gate",
        "load_balance": "saekit.dictionaries.objective.load_balance:LoadBalance",
        "orthogonality": "saekit.dictionaries.objective.orthogonality:Orthogonality",
        "mutual": "saekit.dictionaries.objective.mutual:Mutual",
        "end_to_end": "saekit.dictionaries.objective.end_to_end:EndToEnd",
    },
)
