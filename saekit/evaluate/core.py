"""The core suite: reconstruction, sparsity, and what the model loses when the dictionary stands in.

Everything is measured on held-out documents, in one pass over them; per-document sums are kept, so
that every ratio is a ratio of sums and every interval is over documents.
"""

import copy
import dataclasses
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics, records
from saekit.activations import write_atomic
from saekit.dictionaries import Dictionary, create
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.evaluate.measure import Measure, Resampler
from saekit.harvest import HarvestConfig, Stream
from saekit.hooks import Site, intervene, spliced
from saekit.hub import dictionary_of
from saekit.models import load_model
from saekit.pages import finite
from saekit.replacement import Replacement
from saekit.types import ActivationBatch, Codes, SaekitError

Sum = np.ndarray | np.floating  # a total over documents, or one per resample
MAX_DOCUMENTS = 4096  # later documents share the sums of earlier ones: bounds memory
UNITS = {
    "l0": "features per token", "fvu": "1", "explained_variance": "1", "cosine": "1", "norm_ratio": "1",
    "ce_original": "nats per token", "ce_spliced": "nats per token", "ce_ablated": "nats per token",
    "ce_recovered": "1", "kl": "nats per token", "dead_share": "share of features", "density": "share of tokens",
}  # fmt: skip


class Report(Mapping[str, Measure]):
    """The measures of one evaluation by key, and what they were measured on."""

    def __init__(self, measures: dict[str, Measure], about: dict[str, Any]):
        self.measures, self.about = measures, about

    def __getitem__(self, key: str) -> Measure:
        return self.measures[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    def to_json(self) -> dict[str, Any]:
        """Plain data: the measures and what they were measured on."""
        return {"about": self.about, "measures": {key: vars(m) for key, m in self.measures.items()}}

    def save(self, folder: "str | Path") -> Path:
        """Write ``eval.json`` into a run's folder, where its page and its model card look for it; ``eval_SUITE.json`` of others."""
        suite = self.about.get("suite", "core")
        file = Path(folder) / ("eval.json" if suite == "core" else f"eval_{suite}.json")
        write_atomic(file, json.dumps(finite(self.to_json()), indent=1).encode())
        return file

    def __repr__(self) -> str:
        lines = []
        for key, m in self.measures.items():
            if not isinstance(m.value, list):
                span = f" [{m.interval[0]:.4f}, {m.interval[1]:.4f}]" if m.interval else ""
                controls = "".join(f"  {name} {value:.4f}" for name, value in m.control.items())
                lines.append(f"{key:20} {m.value:.4f}{span} {m.unit}, n {m.n}{controls}")
        return "\n".join(lines)


REPORT = {
    "about": {
        "tokens": int, "documents": int, "split": str, "text": {"name": str}, "model": {"name": str}, "hook_point": str, "ablation": str
    },
    "measures": {
        "*": {"value": float | list | None, "n": int, "unit": str, "interval": list | None, "control": {"*": float | None}}
    },
}  # fmt: skip


def read_report(file: Path) -> dict[str, Any]:
    """An eval.json as plain data; a missing or misshapen field raises by name."""
    return records.read(file, "an evaluation", REPORT, "run `saekit eval` again")


class _Sums:
    """Per-document sums of one dictionary; columns are added by name."""

    def __init__(self):
        self.columns: dict[str, np.ndarray] = {}

    def add(self, name: str, documents: np.ndarray, values: "np.ndarray | Tensor") -> None:
        values = np.asarray(values, dtype=np.float64)
        have = self.columns.get(name)
        if have is None or len(have) <= documents.max(initial=-1):
            grown = np.zeros((int(documents.max(initial=0)) + 1, *values.shape[1:]))
            if have is not None:
                grown[: len(have)] = have
            have = self.columns[name] = grown
        np.add.at(have, documents, values)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]


class _Evaluation:
    """One dictionary (or control) under evaluation on a shared stream of batches."""

    def __init__(self, dictionary: Dictionary):
        self.dictionary, self.sums = dictionary, _Sums()
        self.counts = torch.zeros(dictionary.n_features, dtype=torch.int64)

    def observe(self, codes: Codes, x: Tensor, y: Tensor, documents: np.ndarray, shift: Tensor) -> Tensor:
        """Add a batch of unmasked rows; returns what is made of them. ``shift`` steadies the variance."""
        y_hat = self.dictionary.decode(codes, x)
        target, hat = y.double(), y_hat.double()
        error, centred = target - hat, target - shift
        for name, values in {
            "n": np.ones(len(x)),
            "error": error.square().sum(-1),
            "square": centred.square().sum(-1),
            "sum": centred,
            "cosine": torch.nn.functional.cosine_similarity(target, hat, dim=-1),
            "norm": target.norm(dim=-1),
            "norm_hat": hat.norm(dim=-1),
            "l0": codes.l0().double(),
        }.items():
            self.sums.add(name, documents, values.cpu() if isinstance(values, Tensor) else values)
        self.counts += codes.firing_counts().cpu()
        return y_hat

    def reconstruction(self, resampler: Resampler) -> dict[str, Measure]:
        """The measures that need no model."""
        s = self.sums

        def fvu(error: Sum, square: Sum, total: Sum, n: Sum) -> Sum:
            return error / (square - (total**2).sum(-1) / n)

        def ratio(a: Sum, b: Sum) -> Sum:
            return a / b

        spread = (fvu, s["error"], s["square"], s["sum"], s["n"])
        statistics: dict[str, tuple] = {
            "l0": (ratio, s["l0"], s["n"]),
            "fvu": spread,
            "explained_variance": (lambda *sums: 1 - fvu(*sums), *spread[1:]),
            "cosine": (ratio, s["cosine"], s["n"]),
            "norm_ratio": (ratio, s["norm_hat"], s["norm"]),
        }
        n = int(s["n"].sum())
        density = self.counts.double() / n
        return {
            **{key: _measure(key, n, resampler, *parts) for key, parts in statistics.items()},
            "dead_share": Measure(metrics.dead_share(density), n, UNITS["dead_share"]),
            "density": Measure(density.tolist(), n, UNITS["density"]),
        }


def _measure(key: str, n: int, resampler: Resampler, statistic: Callable, *sums: np.ndarray) -> Measure:
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*(s.sum(0) for s in sums)))
        interval = resampler.interval(statistic, *sums)
    return Measure(value, n, UNITS[key], interval)


def controls_for(dictionary: Dictionary, codes: Codes, seed: int = 0) -> dict[str, Dictionary]:
    """Random dictionaries of the same width and L0, with the same normalisation: what to beat.

    L0 is the selection's k (of all its groups), or where it has none that of ``codes`` of the dictionary, rounded
    to what the layers of a cross-layer transcoder can share out.
    """
    choice = dictionary.config.selection[1]
    k = getattr(choice, "k", None)
    if k is None:
        each = len(dictionary.wiring.parts_in) if isinstance(dictionary, CrossLayer) else 1
        k = min(dictionary.n_features, each * max(1, round(metrics.l0(codes) / each)))
    k *= getattr(choice, "groups", 1)
    wiring, settings = dictionary.config.wiring
    shape = {
        "wiring": wiring, "n_features": dictionary.n_features, "k": k, "seed": seed, **dataclasses.asdict(settings)
    }  # fmt: skip
    # where two spaces are mapped there are no atoms to read by: a fresh dictionary is as random
    same = dictionary.wiring.same_space
    presets = {"random": "random", "random_omp": "random_omp"} if same else {"random": "topk"}
    out = {name: create(preset, **shape) for name, preset in presets.items()}
    for control in out.values():
        control.to(dictionary.device)
        control.norm_in, control.norm_out = dictionary.norm_in, dictionary.norm_out
    return out


@torch.no_grad()
def evaluate(
    dictionary: "Dictionary | str | os.PathLike | Iterable[Dictionary | str | os.PathLike]",
    model: Any = "code-lm",
    text: Any = "stdlib",
    *,
    tokens: int = 65536,
    hook_point: str | None = None,
    split: str = "held_out",
    controls: "bool | Mapping[str, Dictionary]" = True,
    ablation: str = "zero",
    batch_rows: int = 8,
    context: int | None = None,
    device: "str | torch.device | None" = None,
    seed: int = 0,
    on_batch: Callable[[int, int], None] | None = None,
) -> Report:
    """Evaluate a dictionary, or the one in a folder, in a model on held-out documents.

    Gives l0, fvu, explained_variance, cosine, norm_ratio, dead_share and density; for a causal
    language model also ce_original / spliced / ablated / recovered and kl. Masked positions
    (special tokens, padding, outliers in norm) are neither measured nor replaced. ``controls`` are
    random dictionaries; others by name are measured beside them, as that of a run's folder ``control``.
    ``context`` is by default that of the training, for a dictionary of sequences, else the harvest's default.

    Several dictionaries stand in for their modules all at once: see :func:`saekit.evaluate.together.evaluate_together`,
    which knows no ``hook_point``.
    """
    if isinstance(dictionary, Iterable) and not isinstance(dictionary, str):
        from saekit.evaluate.together import evaluate_together

        _check_together(hook_point, controls)
        return evaluate_together(
            dictionary, model, text, tokens=tokens, split=split, controls=bool(controls), ablation=ablation, batch_rows=batch_rows,
            context=context, device=device, seed=seed, on_batch=on_batch,
        )  # fmt: skip
    check_ablation(ablation)
    dictionary = dictionary_of(dictionary)
    view = load_model(model, device=device)
    stream, reads, writes = opened(
        dictionary, view, text, hook_point, tokens=tokens, batch_rows=batch_rows, split=split,
        context=dictionary.context if context is None else context,
    )  # fmt: skip
    warn_of_training_text(dictionary, stream)
    dictionary = dictionary.to(view.device)
    runs = {"": _Evaluation(dictionary)}
    shift: Tensor | None = None
    done = rows = 0
    index: dict[int, int] = defaultdict(lambda: len(index) % MAX_DOCUMENTS)
    for batch, logits, given in stream.with_logits(view.predicts_tokens):
        x, y = (_side(batch, points, view.name) for points in (reads, writes))
        if len(x) == 0:
            continue
        codes = dictionary.codes_of(batch, reads)
        if shift is None:
            shift = y.double().mean(0)
            given_controls = controls if isinstance(controls, Mapping) else {}
            beside = {**(controls_for(dictionary, codes, seed) if controls else {}), **given_controls}
            runs |= {name: _Evaluation(c.to(view.device)) for name, c in beside.items()}
        owners = _owners(batch, index, rows)
        rows += len(batch.mask)
        hats = {
            name: run.observe(run.dictionary.codes_of(batch, reads) if name else codes, x, y, owners, shift)
            for name, run in runs.items()
        }
        if logits is not None:
            inside = _replaced(view, stream, batch, runs, hats, (reads, writes), ablation)
            _language(view, batch, given, logits, inside, runs, index)
        done += batch.mask.numel()
        if on_batch:
            on_batch(done, tokens)
    if shift is None:
        raise SaekitError(
            f"the text gives no unmasked token on the {split!r} side of its split; give more text, or split='all' (--split all)"
        )
    measures = _report(runs, Resampler(min(len(index), MAX_DOCUMENTS), seed))
    about = {
        "model": view.identity(), "text": stream.text_identity(), "hook_point": ", ".join(writes), "documents": len(index),
        "tokens": done, "ablation": ablation, "context": getattr(stream, "context", None), "seed": seed, "split": split if stream.named else "all",
    }  # fmt: skip
    return Report(measures, about)


def check_ablation(ablation: str) -> None:
    """Raise unless it names what ablated activations are set to."""
    if ablation not in ("zero", "mean"):
        raise SaekitError(f"ablation {ablation!r} is not one of 'zero', 'mean'")


def _side(batch: ActivationBatch, points: Sequence[str], model: str) -> Tensor:
    """The unmasked rows of some hook points, side by side."""
    rows = torch.cat([batch.rows(point) for point in points], -1)
    if not torch.isfinite(rows).all():
        raise SaekitError(
            f"activations at {', '.join(points)!r} of model {model!r} hold NaN or Inf; find what makes the model overflow"
        )
    return rows


def _check_together(hook_point: str | None, controls: Any) -> None:
    if hook_point is not None or not isinstance(controls, bool):
        raise SaekitError(
            "hook_point and controls by name belong to one dictionary, and several are given; leave them out"
        )


def opened(
    dictionary: Dictionary, view: Any, text: Any, hook_point: str | None, **options: Any
) -> tuple[Stream, tuple[str, ...], tuple[str, ...]]:
    """The stream of what the dictionary reads and writes, and the hook points of both."""
    reads, writes = dictionary.reads, dictionary.writes
    if hook_point is not None:
        reads, writes = dictionary.wiring.sites([hook_point])
    if not reads:
        raise SaekitError("hook_point is not given and the dictionary doesn't name one; give hook_point=")
    if len(reads) > 1 and all("/" in point for point in reads):
        raise SaekitError(
            f"hook points {', '.join(reads)} are of several models, and an evaluation replaces activations of one; compare what they share with `saekit diff`"
        )
    points = tuple(dict.fromkeys((*reads, *writes)))
    stream = Stream(view, text, HarvestConfig(points, **options))
    if len(stream.hook_points) > len(points):
        raise SaekitError(
            f"hook_point {points[0]!r} means {len(stream.hook_points)} of them; name one, for example {stream.hook_points[0]!r}"
        )
    # the mask is the one of the harvest: its limits on norms, where the dictionary came from a store
    known = dictionary.card.get("data", {}).get("norm_limits", {})
    if set(stream.hook_points) <= set(known):
        stream.norm_limits = {p: known[p] for p in stream.hook_points}
    found = tuple(stream.hook_points)
    return stream, found[: len(reads)], found[-len(writes) :]


def _owners(batch: ActivationBatch, index: Mapping[int, int], before: int) -> np.ndarray:
    """Which sum each unmasked position belongs to: its document's, or where there are none its row's, of which ``before`` came before."""
    owner = batch.documents
    if owner is None:
        owner = before + torch.arange(len(batch.mask))[:, None].expand(batch.mask.shape)
    return np.array([index[int(d)] for d in owner[batch.mask]])


def warn_of_training_text(dictionary: Dictionary, stream: Stream) -> None:
    """Say so when a dictionary is about to be measured on what it was trained on."""
    trained, mine = dictionary.card.get("data", {}).get("text", {}), stream.text_identity()
    if (
        stream.named
        and trained.get("name") == mine["name"]
        and (trained.get("split") == mine["split"] or "all" in (trained.get("split"), mine["split"]))
    ):
        warnings.warn(
            f"a dictionary was trained on the {trained['split']!r} side of {mine['name']!r}, and is measured on {mine['split']!r}: these documents are not held out from it",
            stacklevel=3,
        )


def _replaced(
    view: Any, stream: Stream, batch: ActivationBatch, runs: Mapping[str, _Evaluation], hats: Mapping[str, Tensor],
    points: tuple[tuple[str, ...], tuple[str, ...]], ablation: str,
) -> dict[str, AbstractContextManager[None]]:  # fmt: skip
    """The model with what each dictionary makes of the batch in the places it writes, and with these ablated."""
    main, some = runs[""].dictionary, next(iter(hats.values()))
    baseline = mean_written(main).to(some).expand_as(some) if ablation == "mean" else torch.zeros_like(some)
    sites = [stream.sites[point] for point in points[1]]
    inside: dict[str, AbstractContextManager[None]] = {}
    for name, rows in {**hats, "ablated": baseline}.items():
        if name in runs and isinstance(runs[name].dictionary, CrossLayer):
            # what a layer of it reads depends on what it has written to the ones before
            moved = _at(runs[name].dictionary, *points)
            inside[name] = Replacement(view, [moved]).spliced(batch.mask)
        else:
            inside[name] = _spliced(sites, batch.mask, rows.float().split(main.wiring.parts_out, -1))
    return inside


def mean_written(d: Dictionary) -> Float[Tensor, " d_out"]:
    """The mean of what a dictionary stands in for, by its training data."""
    if not d.norm_out.mean.any():
        raise SaekitError(
            "ablation = 'mean' needs a dictionary that knows the mean of what it writes, and this one was trained with normalise = 'none'; choose ablation = 'zero'"
        )
    return d.norm_out.mean


def _spliced(sites: Sequence[Site], mask: Tensor, parts: Sequence[Tensor]) -> AbstractContextManager[None]:
    """The model with rows for every site put in at the unmasked positions."""
    changes: list[tuple[Site, Callable[[Tensor], Tensor | None]]] = []
    for site, rows in zip(sites, parts, strict=True):
        full = torch.zeros(*mask.shape, rows.shape[-1], device=rows.device)
        full[mask.to(rows.device)] = rows
        changes.append((site, spliced(mask, full)))
    return intervene(changes)


def _at(dictionary: Dictionary, reads: tuple[str, ...], writes: tuple[str, ...]) -> Dictionary:
    """The same dictionary at these hook points."""
    if (dictionary.reads, dictionary.writes) == (reads, writes):
        return dictionary
    moved = copy.copy(dictionary)
    moved.reads, moved.writes = reads, writes
    return moved


def _language(
    view: Any, batch: ActivationBatch, given: Any, logits: Tensor,
    replacements: Mapping[str, AbstractContextManager[None]], runs: Mapping[str, _Evaluation], index: Mapping[int, int],
) -> None:  # fmt: skip
    """Add the losses of the model within each replacement."""
    mask = batch.mask
    assert batch.tokens is not None and batch.documents is not None  # a language model reads tokens
    # a position counts when its activation was replaced and the token it predicts is text
    counted = mask[:, :-1] & (batch.documents[:, 1:] >= 0)
    owners = np.array([index[int(d)] for d in batch.documents[:, :-1][counted]], dtype=np.int64)
    targets = batch.tokens[:, 1:][counted].to(logits.device)
    own = logits[:, :-1][counted.to(logits.device)]
    main = runs[""].sums
    main.add("ce_n", owners, np.ones(len(owners)))
    main.add("ce_original", owners, metrics.cross_entropy(own, targets).cpu())
    for name, inside in replacements.items():
        with inside:
            changed = view.logits(given)[:, :-1][counted.to(logits.device)]
        ce = metrics.cross_entropy(changed, targets).cpu()
        if name == "ablated":
            main.add("ce_ablated", owners, ce)
        else:
            runs[name].sums.add("ce_spliced", owners, ce)
            runs[name].sums.add("kl", owners, metrics.kl(own, changed).cpu())


def _report(runs: Mapping[str, _Evaluation], resampler: Resampler) -> dict[str, Measure]:
    def of(run: _Evaluation) -> dict[str, Measure]:
        out = run.reconstruction(resampler)
        if "ce_original" not in runs[""].sums.columns:
            return out
        main, s = runs[""].sums, run.sums
        size = resampler.n
        columns = {
            "ce_original": main["ce_original"], "ce_ablated": main["ce_ablated"], "n": main["ce_n"],
            "ce_spliced": s["ce_spliced"], "kl": s["kl"],
        }  # fmt: skip
        c = {key: np.pad(column, (0, size - len(column))) for key, column in columns.items()}
        n = int(c["n"].sum())

        def mean(a: Sum, b: Sum) -> Sum:
            return a / b

        def recovered(original: Sum, spliced: Sum, ablated: Sum) -> Sum:
            return (ablated - spliced) / (ablated - original)

        for key in ("ce_original", "ce_spliced", "ce_ablated", "kl"):
            out[key] = _measure(key, n, resampler, mean, c[key], c["n"])
        out["ce_recovered"] = _measure(
            "ce_recovered", n, resampler, recovered, c["ce_original"], c["ce_spliced"], c["ce_ablated"]
        )
        return out

    main = of(runs[""])
    others = {name: of(run) for name, run in runs.items() if name}
    order = [key for key in UNITS if key in main]
    return {
        key: Measure(
            main[key].value, main[key].n, main[key].unit, main[key].interval,
            {} if key in ("density", "ce_original", "ce_ablated") else {name: float(o[key]) for name, o in others.items()},
        )
        for key in order
    }  # fmt: skip
