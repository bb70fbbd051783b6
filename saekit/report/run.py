"""The report of a run: gathers what lies in its folder, and the contexts of its features."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from saekit.activations import Store
from saekit.dictionaries import Dictionary
from saekit.dictionaries.sequences import Sequences
from saekit.evaluate import read_report
from saekit.harvest import check_writable, harvest
from saekit.hub import native
from saekit.models import Model, load_model
from saekit.report.contexts import ContextCollector, Looks
from saekit.report.page import FeatureCard, Metric, RunReport, feature_card, write
from saekit.tokens import documents
from saekit.trainers import read_config
from saekit.trainers.log import read as read_log
from saekit.types import ActivationBatch, SaekitError

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
    n_features: int = 100,
    tokens: int = 200_000,
    device: "str | torch.device | None" = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Path:
    """Write the report of a finished run (or of any saved dictionary) as one HTML file; returns its path.

    ``n_features`` features, spread evenly over the firing densities, are shown with contexts from
    ``tokens`` tokens: those of the store it was trained on, where that is still there, else
    harvested anew. The metric table is there once ``saekit eval`` has written eval.json.
    """
    folder = Path(run)
    dictionary = native.load(folder, device=device)
    card = native.read_card(folder)
    data = card.get("data", {})
    own_model, own_text = native.origin(card)
    view = load_model(model or own_model, device=device)
    # the store it was trained on shows the same data, unless another text or model is asked for
    own = text is None and view.identity() == data.get("model")
    split = data.get("text", {}).get("split", "train") if text is None else "train"
    target = Path(out) if out is not None else folder / "report.html"
    text = text if text is not None else own_text
    if not dictionary.reads:
        raise SaekitError(
            f"dictionary {str(folder)!r} names no hook point, so there is no model to show it on"
        )
    evaluation = read_report(folder / "eval.json") if (folder / "eval.json").is_file() else {}
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    if out is not None and Path(out).is_dir():
        raise SaekitError(f"out {str(out)!r} is a folder; name the HTML file to write")
    check_writable(target.parent)
    acts = config.get("source", {}).get("acts") if own else None
    density, source = _density_and_source(dictionary, acts, view, text, split, tokens, evaluation)
    chosen = _spread(density, n_features)
    collector: ContextCollector | None = None
    done = 0
    for batch in source():
        collector = collector or ContextCollector(
            dictionary.n_features, chosen, seq_len=batch.mask.shape[1], seed=seed,
            looks_back=isinstance(dictionary, Sequences),
        )  # fmt: skip
        if batch.tokens is None or view.tokenizer is None:
            raise SaekitError(
                f"model {view.name!r} reads no tokens, and the report shows features on their tokens; evaluate it instead"
            )
        collector.add(
            batch.tokens, batch.documents, batch.mask, codes_of(dictionary, batch), _looks(dictionary, batch)
        )
        done += batch.mask.numel()
        if on_batch is not None:
            on_batch(done, tokens)
    if collector is None:
        raise SaekitError("the text gives no tokens to show; give more text")
    cards = _cards(collector, dictionary, view, text, split)
    write(_page(config, read_log(folder), dictionary, card, evaluation, density, cards), target)
    return target


@torch.no_grad()
def codes_of(dictionary: Dictionary, batch: ActivationBatch) -> Any:
    """Codes of all positions of a batch, masked ones too; raises where activations aren't finite."""
    x = torch.cat([batch.activations[point] for point in dictionary.reads], -1)
    if not torch.isfinite(x[batch.mask]).all():
        raise SaekitError(
            f"activations at {dictionary.reads[0]!r} hold NaN or Inf; find what makes the model overflow"
        )
    return dictionary.encode(x.to(dictionary.device))


def _looks(dictionary: Dictionary, batch: ActivationBatch) -> Looks | None:
    """What positions add to a feature's activation, of a dictionary whose features look back."""
    if not isinstance(dictionary, Sequences):
        return None
    lookup = dictionary.looking(torch.cat([batch.activations[point] for point in dictionary.reads], -1))

    def looks(features: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return lookup(*map(torch.from_numpy, (features, rows, queries))).float().cpu().numpy()

    return looks


def _density_and_source(
    dictionary: Dictionary,
    acts: str | None,
    view: Model,
    text: Any,
    split: str,
    tokens: int,
    evaluation: dict[str, Any],
) -> tuple[Tensor, Callable[[], Iterator[ActivationBatch]]]:
    """How often each feature fires, and where to read contexts from."""

    def source() -> Iterator[ActivationBatch]:
        if acts is None or not (Path(acts) / "manifest.json").is_file():
            if text is None:
                raise SaekitError(
                    "this dictionary was trained on text given in Python, and its store is gone; name a text with text= (--text)"
                )
            yield from harvest(
                view, text, dictionary.reads, tokens=tokens, split=split, context=dictionary.context
            )
            return
        seen = 0
        for batch in Store(acts, verify_seconds=0).sequences():
            if seen >= tokens:
                return
            seen += batch.mask.numel()
            yield batch

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
        return torch.tensor(measured["value"], dtype=torch.float64), source
    counts, n = torch.zeros(dictionary.n_features, dtype=torch.float64), 0
    for batch in islice(source(), 16):
        codes = dictionary.codes_of(batch)
        n += codes.rows
        counts += codes.firing_counts().cpu()
    return counts / max(n, 1), source


def _spread(density: Tensor, n: int) -> list[int]:
    """Features at evenly spaced ranks of density, so that rare and common ones are all seen."""
    order = density.argsort(descending=True, stable=True)
    alive = order[: int((density > 0).sum())]
    pool = alive if len(alive) >= n else order
    at = torch.linspace(0, len(pool) - 1, min(n, len(pool))).round().long()
    return sorted(pool[at].tolist())


def _cards(
    collector: ContextCollector, dictionary: Dictionary, view: Model, text: Any, split: str
) -> list[FeatureCard]:
    found = collector.result()
    promoted = _promoted(dictionary, view, [f.index for f in found])
    names = _document_names(found, text, split)

    def token_text(token: int) -> str:
        return view.tokenizer.decode([token])

    def document_name(document: int) -> str:
        return names.get(document, f"document {document}")

    cards = []
    for i, feature in enumerate(found):
        up, down = [], []
        if promoted is not None:
            values, order = promoted[i].sort(descending=True)
            up = [(token_text(int(t)), float(v)) for t, v in zip(order[:10], values[:10], strict=True)]
            down = [
                (token_text(int(t)), float(v))
                for t, v in zip(order[-10:].flip(0), values[-10:].flip(0), strict=True)
            ]
        cards.append(feature_card(feature, token_text, up, down, document_name))
    return cards


def _document_names(found: Any, text: Any, split: str) -> dict[int, str]:
    """Names of the documents that the contexts come from, where the text has names."""
    wanted = {
        c.documents[c.peak]
        for f in found
        for c in (*f.top, *(c for b in f.bands for c in b.contexts))
        if c.documents
    }
    if not isinstance(text, str) or not wanted:
        return {}
    return {
        i: d.name
        for i, d in enumerate(islice(documents(text, split), max(wanted) + 1))
        if i in wanted and hasattr(d, "name")
    }


@torch.no_grad()
def _promoted(dictionary: Dictionary, view: Model, features: list[int]) -> Tensor | None:
    """Direct effect of each feature's direction on the logits, [features, vocabulary], about their mean.

    The final norm's gain is applied and its division left out: a direction has no norm to divide by.
    """
    head = getattr(view.module, "get_output_embeddings", lambda: None)()
    maps = dictionary.wiring.kind == "transforms"  # which write no one direction
    if head is None or head.weight.shape[1] != dictionary.d_out or maps:
        return None
    norms = [
        m
        for name, m in view.module.named_modules()
        if name.rsplit(".", 1)[-1] in ("ln_f", "norm", "final_layer_norm")
    ]
    gain = norms[-1].weight if norms and norms[-1].weight.shape == (dictionary.d_out,) else 1.0
    written = dictionary.norm_out.directions(dictionary.W_dec[features])
    if norms and isinstance(norms[-1], torch.nn.LayerNorm):  # an RMS norm does not centre
        written = written - written.mean(-1, keepdim=True)
    logits = (written.to(head.weight.dtype) * gain) @ head.weight.T
    return (logits - logits.mean(-1, keepdim=True)).float().cpu()


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
