"""The report of a run: gathers what lies in its folder, and the cards of its features."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from saekit.autointerp.explanation import feature_numbers
from saekit.dictionaries import Dictionary
from saekit.dictionaries.sequences import Sequences
from saekit.evaluate import read_report
from saekit.harvest import check_writable
from saekit.hub import native
from saekit.images import image_files
from saekit.report.cards import Reading, cards, density_over, explained, reading, spread
from saekit.report.cards import codes_of as codes_of  # the graph's contexts take it from here
from saekit.report.concepts import of_reading
from saekit.report.page import Explained, FeatureCard, Metric, RunReport, write
from saekit.trainers import read_config
from saekit.trainers.log import read as read_log
from saekit.types import SaekitError

PICTURED = 100  # features of a vision dictionary at most, each with its images
EXPLAIN: dict[str, tuple[Literal["higher", "lower"] | None, str]] = {
    "l0": (None, "active features per token"),
    "fvu": ("lower", "squared error over the variance about the mean, both summed over all tokens; 1 predicts the mean"),
    "explained_variance": ("higher", "1 - FVU"),
    "cosine": ("higher", "mean cosine between activation and reconstruction"),
    "norm_ratio": (None, "length of the reconstructions over that of the activations; below 1 is shrinkage"),
    "ce_original": (None, "next-token loss of the model as it is"),
    "ce_spliced": ("lower", "its loss with the reconstruction in place of the activation"),
    "ce_ablated": (None, "its loss with the activation ablated: set to zero, or to its mean (see the note)"),
    "ce_recovered": ("higher", "(ablated - spliced) / (ablated - original)"),
    "kl": ("lower", "KL(original || spliced) of the next-token predictions"),
    "dead_share": ("lower", "features that fire on none of these tokens"),
}  # fmt: skip


def dashboard(
    run: "str | Path",
    out: "str | Path | None" = None,
    *,
    model: Any = None,
    text: Any = None,
    n_features: int = 1000,
    features: Iterable[Any] | None = None,
    tokens: int = 200_000,
    device: "str | torch.device | None" = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of a finished run (or of any saved dictionary) as one HTML file; returns its path.

    A dictionary of a vision model is shown on images (at most ``PICTURED`` features), any other on text. Shown are
    ``features``, or else all that fire, of which ``n_features`` are taken at even steps of density where
    there are more, those with an explanation first; with contexts from ``tokens`` tokens: those of the store it was trained on, where that is still
    there, else harvested anew. The metric table is there once ``saekit eval`` has written eval.json, explanations
    once explanations.json lies beside the dictionary.
    """
    folder = Path(run)
    dictionary = native.load(folder, device=device)
    card = native.read_card(folder)
    target = Path(out) if out is not None else folder / "report.html"
    evaluation = read_report(folder / "eval.json") if (folder / "eval.json").is_file() else {}
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    said = explained(None, folder, dictionary)
    source = reading(dictionary, model, text, tokens, config, device)
    if out is not None and Path(out).is_dir():
        raise SaekitError(f"out {str(out)!r} is a folder; name the HTML file to write")
    if out is not None and Path(out).suffix.lower() not in (".html", ".htm"):
        raise SaekitError(f"out {str(out)!r} is no name of an HTML file; end it in .html")
    if n_features < 1:
        raise SaekitError(f"n_features = {n_features} must be at least 1")
    named = None if features is None else sorted(set(feature_numbers(features, dictionary.n_features)))
    if named == []:
        raise SaekitError("features is empty; name at least one, or leave it out for those that fire")
    check_writable(target.parent)
    density = _density(dictionary, source, evaluation)
    if source.view.tokenizer is None and isinstance(source.text, str) and image_files(source.text):
        few = min(n_features, PICTURED)
        own = of_reading(source, named, few, said, on_batch=on_batch)
        page = _page(config, read_log(folder), dictionary, card, evaluation, density, [])
        write(replace(page, pictures=tuple(own.figures())), target)
        return target
    chosen = named or spread(density, n_features, said)
    found, counted = cards(source, chosen, seed, said, on_batch)
    page = _page(config, read_log(folder), dictionary, card, evaluation, density, found)
    notes = (*page.notes, *_explained_notes(found), _neighbours_note(counted, dictionary.n_features))
    write(replace(page, notes=notes, elsewhere=_elsewhere(found, said)), target)
    return target


def _density(dictionary: Dictionary, source: Reading, evaluation: dict[str, Any]) -> Tensor:
    """How often each feature fires: as evaluated, else over the first batches."""
    measured = evaluation.get("measures", {}).get("density")
    if measured is not None:
        value = measured["value"]
        if (
            not isinstance(value, list)
            or len(value) != dictionary.n_features
            or not all(isinstance(v, float) for v in value)
        ):
            raise SaekitError(
                "the density in eval.json is not one number for each feature; run `saekit eval` again"
            )
        return torch.tensor(measured["value"], dtype=torch.float64)
    return density_over(dictionary, source)


def _explained_notes(found: Sequence[FeatureCard]) -> list[str]:
    """How many features have an explanation, by which methods, and what their scores are."""
    methods = Counter(one.method for card in found for one in card.explanations)
    if not methods:
        return []
    listed = ", ".join(f"{n:,} by {method}" for method, n in sorted(methods.items()))
    share = sum(bool(card.explanations) for card in found)
    return [
        f'Explanations: {share:,} of the {len(found):,} features shown have one ({listed}). "statistics" is made by counting, '
        "without a language model. Scores are of text that the explanation was not made from, with 95 % intervals, which take "
        "examples as independent, as those of one document hardly are; "
        "controls are the same measure for judges that don't know the explanation."
    ]


def _elsewhere(found: Sequence[FeatureCard], said: Mapping[int, Sequence[Explained]]) -> dict[int, str]:
    """What is said of neighbours that have no card themselves."""
    near = {other for card in found for other, _ in (*card.nearest, *card.together)}
    return {
        other: said[other][0].label or said[other][0].text
        for other in sorted(near - {c.index for c in found})
        if other in said
    }


def _neighbours_note(counted: int, n_features: int) -> str:
    return (
        f'Alike features are sought among all {n_features:,}. "Writes alike" is the cosine of two decoder rows; '
        f'"fires together" is the Jaccard index, the tokens that both fire on over those that either does, of {counted:,} tokens.'
    )


def _page(
    config: dict[str, Any], log: list[dict[str, Any]], dictionary: Dictionary, card: dict[str, Any], evaluation: dict[str, Any], density: Tensor, cards: list[FeatureCard]
) -> RunReport:  # fmt: skip
    data, settings = card.get("data", {}), config.get("train", {})
    selection = dictionary.config.selection
    model, text = data.get("model", {}), data.get("text", {})
    facts = [
        ("dictionary", f"{dictionary.d_in} to {dictionary.n_features:,} features, {selection[0]} " + ", ".join(f"{k} = {v}" for k, v in vars(selection[1]).items())),
        ("reads", ", ".join(dictionary.reads)),
        ("model", f"{model.get('name', 'unknown')} ({model.get('parameters', 0):,} parameters)"),
        ("text", f"{text.get('name', 'unknown')}, {text.get('split', '')} side of the split"),
        ("data", f"{data['rows']:,} rows" if data.get("rows") else data.get("kind", "not stated")),
    ]  # fmt: skip
    if settings:
        why = config.get("reasons", {}).get("lr")
        facts += [
            (
                "training",
                f"{settings['steps']:,} steps of {settings['batch_size']:,} {'sequences' if isinstance(dictionary, Sequences) else 'rows'}, seed {settings['seed']}",
            ),
            ("rate", f"Adam, peak {settings['lr']:.2g}" + (f" = {why}" if why else "")),
            ("dead after", f"{settings['dead_after']:,} rows without firing"),
        ]
    steps = [r["step"] for r in log]
    names = {
        "reconstruction": "loss/reconstruction",
        "auxk": "loss/auxk",
        "fvu": "fvu",
        "l0": "l0",
        "dead_share": "dead share",
        "lr": "learning rate",
    }
    curves = {
        shown: (steps, [r.get(key) for r in log]) for key, shown in names.items() if log and key in log[-1]
    }
    metrics = tuple(
        _metric(key, m)
        for key, m in evaluation.get("measures", {}).items()
        if not isinstance(m["value"], list)
    )
    notes = (
        []
        if metrics
        else ["No metric table: run `saekit eval` on this folder, then `saekit dashboard` again."]
    )
    if evaluation:
        about = evaluation["about"]
        notes.append(
            f"Metrics: at {about['hook_point']} of {about['model']['name']}, {about['tokens']:,} tokens of {about['documents']} documents "
            f"({about['text']['name']}, split {about['split']}), against {about['ablation']} ablation; "
            "intervals are 95 % over resampled documents; the random controls have the same width, k and normalisation."
        )
    return RunReport(
        title=f"{selection[0]} dictionary of {', '.join(dictionary.reads)} in {model.get('name', 'the model')}",
        facts=tuple(facts), curves=curves, density=density.tolist(), metrics=metrics, features=tuple(cards),
        notes=tuple(notes), versions={"saekit": _version(), "torch": card.get("torch", "")},
    )  # fmt: skip


def _version() -> str:
    from importlib.metadata import version

    return version("saekit")


def _metric(key: str, m: dict[str, Any]) -> Metric:
    better, explanation = EXPLAIN.get(key, (None, ""))
    low, high = m["interval"] or (None, None)
    return Metric(key, m["value"], m["n"], m["unit"], low, high, m["control"], better, explanation)
