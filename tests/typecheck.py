"""The checker that pytest's jaxtyping hook runs over saekit: beartype, with an int allowed for a float."""

from beartype import BeartypeConf
from beartype import beartype as _beartype

check = _beartype(conf=BeartypeConf(is_pep484_tower=True))
