"""Random unit-norm atoms that are never trained, tied to the encoder: the control of every table."""

from saekit.dictionaries.atoms.frozen import Frozen


class Random(Frozen):
    """Frozen directions; the encoder reads what the decoder writes, and no bias is trained."""

    tied = True
    trained = False
