"""Wirings: what a dictionary reads and what it writes. One file and one line each.

A wiring is a module made from its frozen ``Config``. ``parts_in`` and ``parts_out`` are the widths of the
hook points that are encoded and decoded, each normalised by itself, and ``d_in`` and ``d_out`` their sums. A
row of training data is the columns of ``points(reads, writes)`` side by side, ``columns`` of them (``stated``
says so in words), and ``split(rows)`` gives what is encoded and the target. ``sites(hook_points)`` says which
hook points are read and which are written, and ``shape(reads, writes)`` gives the config's widths for theirs.
``takes`` says what one dictionary takes of the hook points that a glob matches: "each" by itself, each
"module", "all" together, or all "modules". ``same_space`` is true where both sides are one space, so that encoder and
decoder may share directions. ``skip`` is a linear map [d_out, d_in] from input to output beside the features,
or None. ``kind`` names the class that is built for it, in :mod:`saekit.dictionaries.kinds`. ``mask(n_features)`` says which columns each feature may read and write, None for all.
"""

from saekit.registry import Registry

WIRINGS = Registry(
    "wiring",
    {
        "autoencoder": "saekit.dictionaries.wiring.autoencoder:Autoencoder",
        "cross_layer": "saekit.dictionaries.wiring.cross_layer:CrossLayerWiring",
        "crosscoder": "saekit.dictionaries.wiring.crosscoder:Crosscoder",
        "lorsa": "saekit.dictionaries.wiring.lorsa:Lorsa",
        "molt": "saekit.dictionaries.wiring.molt:Molt",
        "transcoder": "saekit.dictionaries.wiring.transcoder:Transcoder",
    },
)
