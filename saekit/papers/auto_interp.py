"""Explanations of planted features score high, others' explanations score chance, and blind judges win nothing (2410.13928)."""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from saekit.autointerp import stats
from saekit.autointerp.explanation import Explanation
from saekit.autointerp.firings import Writer
from saekit.autointerp.prompts import Reader, reader_of
from saekit.autointerp.scorers import binary
from saekit.autointerp.scorers.binary import Binary
from saekit.autointerp.scorers.fuzzing import Fuzzing
from saekit.autointerp.scoring import score
from saekit.autointerp.statistics import Statistics
from saekit.autointerp.windows import Windows
from saekit.dictionaries import Dictionary, create
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import RANDOM
from saekit.papers.row import Found, Row
from saekit.testbed.concepts import D_MODEL, HOOK_POINT, NAMES, World, world

DOCUMENTS, ROWS = 400, 256
SCORERS = ("detection", "fuzzing", "intruder")
PLAIN = (
    "token",
    "set",
    "case",
    "suffix",
    "substring",
    "bigram",
    "number",
    "not after",
    "dense",
    "parent",
    "child",
)
OTHER = ("topic", "position", "quotes", "copy")  # that no rule of words foretells
TRUE, SHUFFLED, HALF, HARD, BLIND = (
    "own explanation",
    "another's explanation",
    "half of a union",
    "no simple rule",
    "blind",
)
DELPHI, OURS = "delphi's marks", "our marks"


def windows_of(made: World, path: Path, dictionary: "Dictionary | None" = None, seed: int = 0) -> Windows:
    """The windows of a world's own text, for its dictionary or another."""
    d = made.dictionary if dictionary is None else dictionary
    writer = Writer(path, d.n_features)
    with torch.no_grad():
        for rows in torch.arange(len(made.tokens)).split(ROWS):
            codes = d.encode(made.model.module(made.tokens[rows]))
            writer.add(made.tokens[rows], made.documents[rows], made.mask[rows], codes)
    return Windows(writer.close({}), seed=seed, texts=made.tokenizer.texts)


def delphis_marks(trials: Binary) -> Binary:
    """The same examples with marks as delphi draws them by default: of silent windows all alike, the one at three quarters of
    the window among them, and as many as a firing window has tokens that fire at all."""
    on = trials.truth
    n, width = int(np.ceil((trials.examples.values[on] > 0).sum(1).mean())), trials.marks.shape[1]
    last = width - width // 4
    random.seed(22)
    some = random.sample(range(last), min(n, last) - 1) if n > 1 else []
    marks = trials.marks.copy()
    marks[~on] = False
    marks[np.ix_(np.flatnonzero(~on), np.array([*some, last]))] = True
    return Binary(trials.examples, marks)


def _numbers(kinds: Sequence[str], windows: Windows) -> list[int]:
    """Concepts of some kinds that fire often enough to be tried."""
    made = [i for i, name in enumerate(NAMES) if _kind(name) in kinds]
    return [i for i in made if Fuzzing().trials(windows, i, "score", 40, 0) is not None]


def _kind(name: str) -> str:
    from saekit.testbed.concepts import CONCEPTS

    return CONCEPTS[NAMES.index(name)].kind


def _scored(given: Sequence[Explanation], windows: Windows, reader: Reader, seed: int) -> tuple[dict[str, float], dict[str, float]]:  # fmt: skip
    """Mean scores of explanations, and of the same features with another's."""
    out = score(given, windows, reader, SCORERS, seed=seed)
    own, other = {}, {}
    for name in SCORERS:
        found = [one.score(name) for one in out]
        own[name] = float(np.mean([s.value for s in found if s and s.value is not None]))
        values = [s.controls.get("shuffled") for s in found if s]
        other[name] = (
            float(np.mean([v for v in values if v is not None]))
            if any(v is not None for v in values)
            else float("nan")
        )
    return own, other


def measure(seed: int, tell: Tell) -> Found:
    """Statistics' explanations of a world's features, executed; halves of unions; a random dictionary; blind judges."""
    tell(0, 4, "making a world")
    made = world(seed, DOCUMENTS)
    reader = reader_of(made.model)
    with tempfile.TemporaryDirectory() as folder:
        windows = windows_of(made, Path(folder) / "own", seed=seed)
        statistics = Statistics(windows, reader.texts)
        tell(1, 4, "planted features")
        plain, hard = (_numbers(kinds, windows) for kinds in (PLAIN, OTHER))
        given = [statistics.explain(i) for i in plain]
        own, other = _scored([one for one in given if one.rule is not None], windows, reader, seed)
        difficult = [one for one in (statistics.explain(i) for i in hard) if one.rule is not None]
        unions = [
            Explanation(NAMES.index(c.name), part.text, "statistics", part.rule)
            for c in made.concepts if c.kind == "union" for part in [statistics.explain(NAMES.index(c.of[0]))]
        ]  # fmt: skip
        out: Found = {
            TRUE: own, SHUFFLED: other, HALF: _scored(unions, windows, reader, seed)[0], HARD: _scored(difficult, windows, reader, seed)[0],
        }  # fmt: skip
        tell(2, 4, "a random dictionary")
        out[RANDOM] = _random(made, Path(folder) / "random", reader, seed)
        tell(3, 4, "blind judges")
        out[BLIND] = _blind(plain, windows, reader, seed)
    out["explained"] = {"features": len(given), "with a rule": sum(one.rule is not None for one in given)}
    return out


def _random(made: World, path: Path, reader: Reader, seed: int) -> dict[str, float]:
    """As many random directions that fire as often as the concepts do on average."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        x = made.model.module(made.tokens[:ROWS])[made.mask[:ROWS]]
        share = float(made.fires[made.mask].float().mean())
        weights = torch.nn.functional.normalize(torch.randn(len(NAMES), D_MODEL, generator=g), dim=1)
        d = create("jumprelu", d_in=D_MODEL, n_features=len(NAMES), normalise="none", start=1e-3)
        d.W_enc.copy_(weights.T)
        d.W_dec.copy_(weights)
        d.b_enc.copy_(-torch.quantile(x[:20_000] @ weights.T, 1 - share, dim=0))
    d.reads = d.writes = (HOOK_POINT,)
    windows = windows_of(made, path, d, seed)
    statistics = Statistics(windows, reader.texts)
    given = [statistics.explain(i) for i in range(d.n_features)]
    return _scored([one for one in given if one.rule is not None], windows, reader, seed)[0]


def _blind(
    features: Sequence[int], windows: Windows, reader: Reader, seed: int
) -> dict[str, dict[str, float]]:
    """What marks and lengths give away, in trials of ours and with delphi's marks."""
    found: dict[str, dict[str, list[float]]] = {OURS: {}, DELPHI: {}}
    scorer = Fuzzing()
    for feature in features:
        learnt, trials = (scorer.trials(windows, feature, side, 40, seed) for side in ("explain", "score"))
        if learnt is None or trials is None:
            continue
        for name, pair in (
            (OURS, (learnt, trials)),
            (DELPHI, (delphis_marks(learnt), delphis_marks(trials))),
        ):
            judged = binary.blind(*pair, reader.sizes)
            at = [one.marks[:, one.marks.shape[1] - one.marks.shape[1] // 4] for one in pair]
            judged["mark at three quarters"] = stats.balanced_accuracy(pair[1].truth, ~at[1])
            for look, value in judged.items():
                if value is not None:
                    found[name].setdefault(look, []).append(value)
    return {
        name: {look: float(np.mean(values)) for look, values in looks.items()}
        for name, looks in found.items()
    }


def _claims(found: Found) -> list[Claim]:
    paper = "balanced accuracies of 0.6 to 0.8 for LLM explanations of SAE latents, whose truth nobody knows"
    chance = {"detection": 0.5, "fuzzing": 0.5, "intruder": 0.2}
    own, other, half, blind = found[TRUE], found[SHUFFLED], found[HALF], found[BLIND]
    claims = [
        Claim(f"planted features, {name}", paper, own[name], ">=", 0.9, other[name], SHUFFLED)
        for name in SCORERS
    ]
    claims += [
        Claim(
            f"{SHUFFLED}: distance of {name} from chance",
            "0.5 by construction",
            [abs(v - chance[name]) for v in other[name]],
            "<=",
            0.05,
        )
        for name in SCORERS
    ]
    claims += [
        Claim(
            "half of a union, detection: above another's",
            "between, for polysemantic latents",
            [a - b for a, b in zip(half["detection"], other["detection"], strict=True)],
            ">=",
            0.1,
            other["detection"],
            SHUFFLED,
        ),
        Claim(
            "half of a union, detection: below its own",
            "between, for polysemantic latents",
            [a - b for a, b in zip(own["detection"], half["detection"], strict=True)],
            ">=",
            0.1,
            own["detection"],
            TRUE,
        ),
    ]
    for look, control in blind[OURS].items():
        claims.append(
            Claim(
                f"fuzzing won by the {look} alone",
                "not measured",
                control,
                "<=",
                0.53,
                blind[DELPHI].get(look, ()),
                DELPHI,
            )
        )
    return claims


def judge(found: Found) -> Reproduction:
    """Own explanations, others', halves; and what blind judges reach."""
    return Reproduction(
        title="Scores of explanations can be believed",
        source="Paulo, Mallen, Juang & Belrose 2024, arXiv 2410.13928",
        setting=f"a world of {len(NAMES)} planted concepts in {DOCUMENTS} documents (a world a seed), features that are the concepts, explained by statistics from one half of the documents and scored on the other by executing the rules found: 40 firing and 40 silent windows a feature",
        claims=_claims(found),
        figure=bars("Scores of explanations, executed", "score", {name: {s: found[name][s] for s in SCORERS} for name in (TRUE, HALF, HARD, RANDOM, SHUFFLED)}),
        notes=[
            "No language model is asked: statistics explain, and their rules judge. What judges of other skill score is a matter of tests (tests/test_scoring.py), against a server that sees prompts only.",
            f"{DELPHI}: the marks of silent windows as delphi 0.1.1 draws them, all alike and with the token at three quarters of the window among them; who says 'fires' where that token isn't marked has read nothing.",
            f"{HARD}: topics, positions, quotes and copies, for which statistics say that they found no simple rule; the best rule found is scored.",
        ],
        controls={name: {s: found[name][s] for s in SCORERS} for name in (TRUE, HALF, HARD, RANDOM, SHUFFLED)},
    )  # fmt: skip


ROW = Row(measure, judge)
