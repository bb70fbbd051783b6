"""Other tools' files of explanations: one file per format.

Of a format that is in ``READERS``, ``read(path, name)`` gives explanations with what is known of their scores; of one
in ``WRITERS``, ``write(explanations, path, name)`` writes them. ``name`` says of which dictionary: a hook point to
delphi, ``model/source`` to Neuronpedia.
"""

from saekit.registry import Registry

READERS = Registry(
    "format of explanations",
    {
        "delphi": "saekit.autointerp.formats.delphi:read_explanations",
        "neuronpedia": "saekit.autointerp.formats.neuronpedia:read_explanations",
    },
)
WRITERS = Registry(
    "format of explanations",
    {
        "delphi": "saekit.autointerp.formats.delphi:write_explanations",
        "neuronpedia": "saekit.autointerp.formats.neuronpedia:write_explanations",
    },
)
