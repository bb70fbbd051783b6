"""Wirings: what a dictionary reads and what it writes. One file and one line each.

A wiring is a module made from its frozen ``Config``. ``d_in`` and ``d_out`` are the widths of what is
encoded and of what is decoded; a row of training data is the columns of ``points(reads, writes)`` side by
side, ``columns`` of them, and ``split(rows)`` gives what is encoded and the target. ``sites(hook_points)``
says which hook points are read and which are written. ``same_space`` is true where both are one space, so
that encoder and decoder may share directions. ``skip`` is a linear map [d_out, d_in] from input to output
beside the features, or None.
"""

from saekit.registry import Registry

WIRINGS = Registry(
    "wiring",
    {
        "autoencoder": "saekit.dictionaries.wiring.autoencoder:Autoencoder",
        "transcoder": "saekit.dictionaries.wiring.transcoder:Transcoder",
    },
)
