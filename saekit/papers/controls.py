"""The two controls of every table: random atoms under a trained encoder, and the same atoms with nothing trained.

The first is the preset ``frozen``, trained beside a paper's own dictionaries on the same rows at the same width
and k. What it leaves of a measure is what the decoder learns; what the second leaves is what any training gives.
"""

from saekit.dictionaries import Dictionary, create

FROZEN, RANDOM = "frozen decoder", "random dictionary"  # their names in every table


def untrained(frozen: Dictionary) -> Dictionary:
    """The random dictionary of a trained frozen one: its atoms, k, data and normalisation, under a tied encoder.

    Nothing scales its codes: where many atoms overlap it writes too much, and its FVU may be above 1.
    """
    k, wiring = frozen.config.selection[1].k, frozen.wiring
    widths = wiring.shape(wiring.parts_in, wiring.parts_out)
    d = create(
        "random",
        wiring=frozen.config.wiring[0],
        **widths,
        n_features=frozen.n_features,
        k=k,
        seed=frozen.seed,
    )
    d.norm_in, d.norm_out = frozen.norm_in, frozen.norm_out
    d.reads, d.writes, d.card = frozen.reads, frozen.writes, {"data": frozen.card["data"]}
    return d
