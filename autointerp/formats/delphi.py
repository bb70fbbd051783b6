"""delphi's explanations and scores (eai-delphi 0.1.x): what it holds, to ours and back; its caches are in delphi_cache.

A run's folder has ``explanations/<hookpoint>_latent<i>.txt``, each a JSON string, and for each scorer
``scores/<scorer>/<hookpoint>_latent<i>.txt``, where the hook point's ``/`` are ``--``. Of detection and fuzz these hold
a list of windows (:class:`Judged`), of simulation a list of groups of windows (:class:`Simulated`): one per quantile,
and one of all where silent windows were shown. What is computed from these lists is computed anew, never read.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saekit import records
from saekit.activations import write_atomic
from saekit.autointerp.explanation import Explanation, Score
from saekit.autointerp.formats.delphi_cache import read_cache as read_cache
from saekit.autointerp.formats.delphi_cache import write_cache as write_cache
from saekit.autointerp.formats.strict import inside, numbered, read_json
from saekit.autointerp.stats import auc, balanced_accuracy, pearson
from saekit.types import SaekitError

JUDGES = ("detection", "fuzz")
SCORERS = {"detection": "detection", "fuzz": "fuzzing", "simulation": "simulation"}  # delphi's name, and ours
FIX = "write it again with delphi"
STAND_INS = ("Explanation could not be parsed.", "No explanation found")
UNKNOWN = "imported: what wrote the text is what the run's settings claim"
NO_REPLY = "delphi's own text where there was no explanation; it was scored like one"
BARE = "delphi's files hold no interval and no control that doesn't know the explanation"
SHARED = "delphi draws the windows that it explains from and scores on from one list: some are in both"
MARKS = "marks of delphi's silent windows stand at the same positions: without the explanation they tell 0.90 to 0.96"
SCALE = "simulated_normalized_activations"


@dataclass(frozen=True)
class Judged:
    """A window and what a judge said of it: ``prediction`` is None where the reply couldn't be read.

    ``activations`` [token] are the feature's, in its own unit; of a neighbour's windows, the neighbour's. ``distance``
    is the quantile where the feature fires, 0 the strongest; else minus a neighbour's similarity, or -1.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    distance: float
    activating: bool
    prediction: bool | None
    probability: float | None = None


@dataclass(frozen=True)
class Simulated:
    """A window with a feature's strength at each token, 0 to 10, and what a simulator foretold; quantile -1 is silent."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    predicted: tuple[float, ...]
    quantile: int


Windows = Sequence[Judged] | Sequence[Simulated]
JUDGED = {
    "str_tokens": [str], "activations": [float], "distance": float, "activating": bool,
    "prediction": bool | int | None, "probability?": float | None,
}  # fmt: skip
SIMULATED = {
    "distance": int,
    "scored_sequence_simulations": [{
        "distance": int, "true_activations": [float], "simulation": {"tokens": [str], "expected_activations": [float]},
    }],
}  # fmt: skip


def write_explanations(explanations: Iterable[Explanation], path: "str | Path", name: str) -> Path:
    """Write texts into a run's folder, for the hook point ``name``; delphi keeps one for each feature, and no more of it."""
    folder = Path(path) / "explanations"
    texts: dict[int, bytes] = {}
    for one in explanations:
        if one.feature in texts:
            raise SaekitError(
                f"feature {one.feature} has two explanations and delphi keeps one; choose between them"
            )
        texts[one.feature] = json.dumps(one.text).encode()
    return _write(folder, inside(name, "hookpoint"), texts)


def read_explanations(path: "str | Path", name: str) -> list[Explanation]:
    """Explanations of the hook point ``name`` in a run's folder, by rising feature, with the scores that are there.

    Their method is ``imported``; ``about`` holds the model that the run's settings claim.
    """
    files = _files(Path(path) / "explanations", inside(name, "hookpoint"))
    if not files:
        raise SaekitError(
            f"run {str(path)!r} holds no explanations of hookpoint {name!r}; name a folder of delphi's results and a hook point of it"
        )
    scores, settings = read_scores(path, name), Path(path) / "run_config.json"
    about: dict[str, Any] = {"format": "delphi", "hookpoint": name, "note": UNKNOWN}
    if settings.is_file():
        claims = read_json(settings, FIX)
        records.check(claims, {"explainer_model?": str}, f"settings {str(settings)!r}", FIX)
        about["claims"] = {"model": claims.get("explainer_model")}
    out = []
    for feature, file in files.items():
        text = read_json(file, FIX)
        if not isinstance(text, str):
            raise SaekitError(
                f"file {str(file)!r} holds {type(text).__name__}, no text of an explanation; {FIX}"
            )
        own = {**about, "failed": NO_REPLY} if text in STAND_INS else about
        out.append(Explanation(feature, text, "imported", None, own, scores.get(feature, ())))
    return out


def write_scores(scored: Mapping[int, Windows], path: "str | Path", hookpoint: str, scorer: str) -> Path:
    """Write what one scorer's windows were judged to be, by feature, into a run's folder."""
    texts = {}
    for feature, windows in scored.items():
        kind = Judged if _known(scorer) in JUDGES else Simulated
        if not all(isinstance(one, kind) for one in windows):
            raise SaekitError(
                f"scorer {scorer!r} has windows of {kind.__name__}; feature {feature} has others"
            )
        for one in windows:
            _check(one, f"feature {feature}", "give a number for each token")
        listed = _judged_json(windows) if kind is Judged else _groups(windows)
        texts[feature] = json.dumps(listed).encode()
    return _write(
        Path(path) / "scores" / _known(scorer), inside(hookpoint, "hookpoint").replace("/", "--"), texts
    )


def read_windows(path: "str | Path", hookpoint: str, scorer: str) -> dict[int, Windows]:
    """What one scorer's windows were judged to be, by rising feature; none where it wasn't run."""
    folder = Path(path) / "scores" / _known(scorer)
    files = _files(folder, inside(hookpoint, "hookpoint").replace("/", "--"))
    return {feature: _windows(file, scorer) for feature, file in files.items()}


def read_scores(path: "str | Path", hookpoint: str) -> dict[int, tuple[Score, ...]]:
    """Scores of a hook point by feature, under our scorers' names, computed from the windows."""
    out: dict[int, tuple[Score, ...]] = {}
    for scorer in SCORERS:
        for feature, windows in read_windows(path, hookpoint, scorer).items():
            out[feature] = (*out.get(feature, ()), score_of(scorer, windows))
    return out


def score_of(scorer: str, windows: Windows) -> Score:
    """The score that the windows of one of delphi's scorers amount to.

    Of detection and fuzz that is the balanced accuracy, None where there are only firing or only silent windows.
    Replies that couldn't be read are left out of it, and wrong in ``wrong``; ``auc`` is there if every window that was
    read has a probability. Of simulation it is Pearson's r over the tokens of all windows together.
    """
    if _known(scorer) == "simulation":
        return _simulation([one for one in windows if isinstance(one, Simulated)])
    judged = [one for one in windows if isinstance(one, Judged)]
    read = [one for one in judged if one.prediction is not None]
    strata: dict[str, list[bool]] = {}
    for one in read:
        kind = f"quantile {one.distance:g}" if one.activating else "random" if one.distance == -1 else "neighbour"  # fmt: skip
        strata.setdefault(kind, []).append(one.prediction == one.activating)
    failed, chances = len(judged) - len(read), [one.probability for one in read]
    return Score(
        SCORERS[scorer], "balanced accuracy", _balanced(read), None, None, len(read), wrong=_balanced(judged),
        strata={kind: sum(right) / len(right) for kind, right in sorted(strata.items())},
        failures={"invalid_reply": failed} if failed else {},
        auc=None if None in chances else auc(np.array([one.activating for one in read], bool), np.array(chances, float)),
        notes=(BARE, SHARED, MARKS) if scorer == "fuzz" else (BARE, SHARED),
    )  # fmt: skip


def _simulation(simulated: Sequence[Simulated]) -> Score:
    notes, zero = [BARE, SHARED], sum(not any(one.predicted) for one in simulated)
    if not any(one.quantile == -1 for one in simulated):
        notes.append("no silent window was simulated")
    if zero:
        notes.append(
            f"{zero} of {len(simulated)} predictions are 0 throughout, as delphi writes where a reply failed"
        )
    value = _correlation(simulated)
    return Score("simulation", "correlation", value, None, None, len(simulated), notes=tuple(notes))


def _balanced(judged: Sequence[Judged]) -> float | None:
    truth = np.array([one.activating for one in judged], bool)
    # a reply that couldn't be read is the wrong one
    said = np.array([not one.activating if one.prediction is None else one.prediction for one in judged], bool)  # fmt: skip
    return balanced_accuracy(truth, said)


def _correlation(simulated: Sequence[Simulated]) -> float | None:
    true, said = (
        np.array([value for row in rows for value in row], np.float64)
        for rows in ([one.activations for one in simulated], [one.predicted for one in simulated])
    )
    return pearson(true, said) if len(true) else None


def _known(scorer: str) -> str:
    if scorer not in SCORERS:
        raise SaekitError(f"scorer {scorer!r} is not one of delphi's {', '.join(SCORERS)}")
    return scorer


def _files(folder: Path, stem: str) -> dict[int, Path]:
    # the whole name counts: layers.1 is the beginning of layers.10
    *above, last = stem.split("/")
    return numbered(folder.joinpath(*above), f"{last}_latent", ".txt")


def _write(folder: Path, stem: str, texts: Mapping[int, bytes]) -> Path:
    there = _files(folder, stem)
    if there:
        raise SaekitError(
            f"folder {str(folder)!r} holds files of {stem!r} already, as of feature {min(there)}; name another run"
        )
    try:
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        for feature, text in sorted(texts.items()):
            write_atomic(folder / f"{stem}_latent{feature}.txt", text)
    except OSError as error:
        raise SaekitError(
            f"out {str(folder)!r} can't be written: {error.strerror}; choose another folder"
        ) from None
    return folder


def _check(window: Judged | Simulated, where: str, fix: str) -> None:
    rows = [window.activations, *([window.predicted] if isinstance(window, Simulated) else [])]
    if any(len(row) != len(window.tokens) for row in rows):
        raise SaekitError(
            f"{where} has a window of {len(window.tokens)} tokens and {', '.join(str(len(row)) for row in rows)} values; {fix}"
        )
    numbers = [*(one for row in rows for one in row)]
    if isinstance(window, Judged):
        numbers += [window.distance, window.probability or 0.0]
        if not 0 <= (window.probability or 0.0) <= 1:
            raise SaekitError(f"{where} has a probability of {window.probability}; {fix}")
    if not all(math.isfinite(one) for one in numbers):
        raise SaekitError(f"{where} has a value that is NaN or infinite; {fix}")


def _judged_json(windows: Windows) -> list[dict[str, Any]]:
    return [
        {
            "str_tokens": list(one.tokens), "activations": list(one.activations), "distance": one.distance,
            "activating": one.activating, "prediction": one.prediction, "probability": one.probability,
            "correct": None if one.prediction is None else one.prediction == one.activating,
        }
        for one in windows if isinstance(one, Judged)
    ]  # fmt: skip


def _groups(windows: Windows) -> list[dict[str, Any]]:
    simulated = [one for one in windows if isinstance(one, Simulated)]
    quantiles = dict.fromkeys(one.quantile for one in simulated if one.quantile >= 0)
    groups = [(q + 1, [one for one in simulated if one.quantile == q]) for q in quantiles]
    if any(one.quantile < 0 for one in simulated):
        groups.append((0, simulated))
    return [
        {
            "distance": distance,
            "scored_sequence_simulations": [_simulated_json(one) for one in group],
            **_correlations(group),
        }
        for distance, group in groups
    ]


def _simulated_json(one: Simulated) -> dict[str, Any]:
    simulation = {
        "tokens": list(one.tokens), "expected_activations": list(one.predicted), "activation_scale": SCALE,
        "distribution_values": [], "distribution_probabilities": [], "uncalibrated_simulation": None,
    }  # fmt: skip
    return {
        "distance": one.quantile,
        "simulation": simulation,
        "true_activations": list(one.activations),
        **_correlations([one]),
    }


def _correlations(group: Sequence[Simulated]) -> dict[str, Any]:
    found = _correlation(group)
    return {
        "ev_correlation_score": "nan" if found is None else found, "rsquared_score": 0,
        "absolute_dev_explained_score": 0,
    }  # fmt: skip


def _windows(file: Path, scorer: str) -> Windows:
    where, data = f"scores {str(file)!r}", read_json(file, FIX)
    records.check(data, [JUDGED if scorer in JUDGES else SIMULATED], where, FIX)
    if scorer in JUDGES:
        return tuple(_judged(entry, where) for entry in data)
    # the group of all holds those of the quantiles again
    chosen = [group for group in data if group["distance"] == 0] or data
    simulated = tuple(
        Simulated(
            tuple(one["simulation"]["tokens"]), tuple(one["true_activations"]),
            tuple(one["simulation"]["expected_activations"]), one["distance"],
        )
        for group in chosen for one in group["scored_sequence_simulations"]
    )  # fmt: skip
    for one in simulated:
        _check(one, where, FIX)
    return simulated


def _judged(entry: Mapping[str, Any], where: str) -> Judged:
    said = entry["prediction"]
    if said not in (0, 1, None):
        raise SaekitError(f"{where} has the prediction {str(said)[:20]}; expected true, false or null, {FIX}")
    one = Judged(
        tuple(entry["str_tokens"]), tuple(entry["activations"]), entry["distance"], entry["activating"],
        None if said is None else bool(said), entry.get("probability"),
    )  # fmt: skip
    _check(one, where, FIX)
    return one
