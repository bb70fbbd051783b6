"""Scorers: how well an explanation foretells where its feature fires. One file and one line each.

A scorer is a class, made without arguments or with what it needs to compute, that has

- ``name``, ``metric`` (the unit of its value) and ``by``: who guesses, a "judge" (a language model that is asked, or the
  explanation's rule), the "rule" only, or a "model" that computes it here;
- ``trials(windows, feature, side, n, seed)``: what it tries on a feature, from one side's documents, with ``truth``;
- ``execute(trials, rule)``: what an executable explanation guesses, [n], NaN for no guess;
- by a judge, ``requests(trials, text, unit, reader)`` and ``read(trials, values)``, which makes guesses of the answers'
  values (None for one that failed); by a model, ``compute(trials, text, reader)``;
- ``measure(trials, guesses, seed)``: the :class:`~saekit.autointerp.explanation.Score`, without its controls;
- ``blind(learnt, trials)``: the same measure for judges that look at no explanation, by name; ``learnt`` are trials of the
  other side.
"""

from saekit.registry import Registry

SCORERS = Registry(
    "scorer",
    {
        "detection": "saekit.autointerp.scorers.detection:Detection",
        "fuzzing": "saekit.autointerp.scorers.fuzzing:Fuzzing",
        "rule": "saekit.autointerp.scorers.rule:Rule",
        "simulation": "saekit.autointerp.scorers.simulation:Simulation",
        "intruder": "saekit.autointerp.scorers.intruder:Intruder",
        "surprisal": "saekit.autointerp.scorers.surprisal:Surprisal",
        "embedding": "saekit.autointerp.scorers.embedding:Embedding",
        "intervention": "saekit.autointerp.scorers.intervention:Intervention",
    },
)
