"""The classes that dictionaries are built of, by the kind that their wiring names: one line each."""

from saekit.dictionaries.config import Config
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.wiring import WIRINGS
from saekit.registry import Registry

KINDS = Registry(
    "kind of dictionary",
    {
        "rows": "saekit.dictionaries.rows:Rows",
        "cross_layer": "saekit.dictionaries.cross_layer:CrossLayer",
        "transforms": "saekit.dictionaries.transforms:Transforms",
        "sequences": "saekit.dictionaries.sequences:Sequences",
    },
)


def build(config: Config, seed: int = 0) -> Dictionary:
    """A fresh dictionary of a config; ``seed`` draws its directions."""
    return KINDS[WIRINGS[config.wiring[0]].kind](config, seed)
