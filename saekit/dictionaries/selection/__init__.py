"""Selections: how pre-activations become codes. One file and one line each.

A selection is a module made from its frozen ``Config`` (whose ``check(n_features)`` refuses what is
impossible), the dictionary's width and the width that it reads. All it gets is rows ``x [rows, d_in]``
in normalised space, the encoder ``W_enc [n_features, d_in]`` and ``b_enc [n_features]``:

* ``forward(x, W_enc, b_enc) -> Codes`` is the rule at inference, each row by itself;
* ``train_codes(x, W_enc, b_enc, state, k_aux) -> Selected`` is the rule in training;
* ``offers`` names what terms of the objective may ask for: ``dead``, ``on``, ``gate`` and ``routes``
  are fields of ``Selected``; ``values`` means that codes carry gradients; ``ranked`` that a row holds
  k entries by falling importance; ``free_l0`` that the number of active features is left to a penalty;
* ``affine``: whether codes depend on x through ``W_enc x + b_enc`` (then normalisation folds away).

It may also have ``prepare(x, W_enc, b_enc)``, called once with rows of the data before training;
``observe(codes, state)``, after each step; ``thresholds(W_enc, b_enc)``, its rule at inference as that of
a JumpReLU ``(W_enc, b_enc, threshold)``; ``fold(weight)`` where it reads x by weights of its own;
``reset(dead)``, for features that are resampled; ``begin(b_enc, threshold)``, which takes over what another dictionary ended with; ``elementwise`` (true
where at inference each feature decides by itself); ``unit_encoder`` (true where it needs encoder rows of norm 1, and no biases); ``tied_only`` (true where it
sends the encoder no gradient); ``biased`` (false where ``b_enc`` is not used); ``mask(n_features, d_in)``, the columns that each feature has;
``read_by(codes, W_enc)`` or, where it takes the rows to say, ``tangent(codes, x, W_enc)``: what each code reads, ``value = w x + b``; and ``requires``, the term without which a part of it isn't trained.
"""

from saekit.registry import Registry

SELECTIONS = Registry(
    "selection",
    {
        "relu": "saekit.dictionaries.selection.relu:ReLU",
        "topk": "saekit.dictionaries.selection.topk:TopK",
        "abstopk": "saekit.dictionaries.selection.abstopk:AbsTopK",
        "groupmax": "saekit.dictionaries.selection.groupmax:GroupMax",
        "batchtopk": "saekit.dictionaries.selection.batchtopk:BatchTopK",
        "jumprelu": "saekit.dictionaries.selection.jumprelu:JumpReLU",
        "gated": "saekit.dictionaries.selection.gated:Gated",
        "pursuit": "saekit.dictionaries.selection.pursuit:Pursuit",
        "omp": "saekit.dictionaries.selection.omp:OMP",
        "iterative": "saekit.dictionaries.selection.iterative:Iterative",
        "unrolled": "saekit.dictionaries.selection.unrolled:Unrolled",
        "codebook": "saekit.dictionaries.selection.codebook:Codebook",
        "switch": "saekit.dictionaries.selection.switch:Switch",
    },
)
