"""The folder that SAEDashboard 0.8 makes for an upload to Neuronpedia: written from firings, and read back.

``run_settings.json``, ``skipped_indexes.json`` and ``batch-<i>.json`` of 128 features each. A feature's ``activations``
are rows of text in groups: the strongest 20 (``bin_min`` and ``bin_contains`` -1), then up to 5 from each of 5 equal
intervals of strength, the highest first, with the share of all tokens that is in it; the lowest counts silent ones.
Numbers are rounded to 3 places, as theirs are. What needs weights or the model's activations is left empty, as theirs is
when it wasn't computed; explanations have no place in it, they go into a dump.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from saekit import records
from saekit.autointerp.explanation import feature_numbers
from saekit.autointerp.firings import Firings
from saekit.autointerp.formats.neuronpedia import check_tokens
from saekit.autointerp.formats.strict import numbered, read_json, whole
from saekit.types import SaekitError

BATCH, TOP, BINS, PER_BIN, BARS = 128, 20, 5, 5, 50
FIX = "make the upload again"
LISTS = (
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1", "correlated_neurons_indices",
    "correlated_neurons_l1", "correlated_neurons_pearson", "correlated_features_indices", "correlated_features_l1",
    "correlated_features_pearson", "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist",
    "vector",
)  # fmt: skip
SHAPE = {
    "model_id": str, "layer": int, "sae_set": str, "sae_id_suffix?": str | None,
    "features": [{
        "feature_index": int, "frac_nonzero": float, "neg_str": [str], "neg_values": [float], "pos_str": [str],
        "pos_values": [float], "freq_hist_data_bar_values": [float], "freq_hist_data_bar_heights": [float],
        "activations": [{"bin_min": float, "bin_max": float, "bin_contains": float, "tokens": list, "values": list, "qualifying_token_index": int}],
    }],
}  # fmt: skip


@dataclass(frozen=True)
class TopLogits:
    """Tokens whose logits a feature raises and lowers most, and by how much."""

    pos_str: tuple[str, ...] = ()
    pos_values: tuple[float, ...] = ()
    neg_str: tuple[str, ...] = ()
    neg_values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Target:
    """Where on Neuronpedia an upload goes: the model, the layer, and the set of dictionaries."""

    model_id: str
    layer: int
    sae_set: str
    sae_id_suffix: str | None = None


def write_upload(
    firings: Firings,
    path: "str | Path",
    target: Target,
    words: Callable[[Sequence[int]], Sequence[str]],
    features: Iterable[Any] | None = None,
    logits: Mapping[int, TopLogits] | None = None,
) -> Path:
    """Write an upload of features (without ``features``, of all that fire); ``words`` gives each token's text."""
    given = np.flatnonzero(firings.counts) if features is None else features
    chosen = sorted(set(feature_numbers(given, firings.n_features)))
    if not chosen:
        raise SaekitError("features are none that fire; give some")
    text = firings.about.get("text")
    dataset = str(text.get("name", "")) if isinstance(text, dict) else ""
    sizes = {"n_prompts_total": len(firings.tokens), "n_tokens_in_prompt": firings.seq}
    settings = {**asdict(target), **sizes, "huggingface_dataset_path": dataset, "written_by": "saekit"}
    skipped = {
        "model_id": target.model_id, "layer": target.layer, "sae_set": target.sae_set, "log_sparsity": None,
        "skipped_indexes": np.setdiff1d(np.arange(firings.n_features), chosen).tolist(),
    }  # fmt: skip
    with whole(Path(path)) as made:
        (made / "run_settings.json").write_text(json.dumps(settings, indent=4))
        (made / "skipped_indexes.json").write_text(json.dumps(skipped))
        for i, start in enumerate(range(0, len(chosen), BATCH)):
            listed = []
            for feature in chosen[start : start + BATCH]:
                seen = _seen(firings, feature, words)
                said = asdict((logits or {}).get(feature, TopLogits()))
                listed.append({"feature_index": feature, **{name: [] for name in LISTS}, **said, **seen, **sizes, "dataset": dataset})  # fmt: skip
            (made / f"batch-{i}.json").write_text(
                json.dumps({**asdict(target), "features": listed}, allow_nan=False)
            )
    return Path(path)


def read_upload(path: "str | Path") -> Iterator[dict[str, Any]]:
    """The batches of an upload, in order, each checked: the target's fields, and a list of ``features``."""
    files = numbered(Path(path), "batch-", ".json")
    if not files:
        raise SaekitError(f"folder {str(path)!r} holds no batch of an upload; give one that SAEDashboard or saekit wrote")  # fmt: skip
    return (_batch(file) for file in files.values())


def _batch(file: Path) -> dict[str, Any]:
    where, batch = f"batch {str(file)!r}", read_json(file, FIX)
    records.check(batch, SHAPE, where, FIX)
    for feature in batch["features"]:
        at = f"{where}, feature {feature['feature_index']},"
        for one in feature["activations"]:
            check_tokens(one["tokens"], one["values"], at, FIX)
            if not -1 <= one["qualifying_token_index"] < len(one["tokens"]):
                raise SaekitError(
                    f"{at} points at token {one['qualifying_token_index']} of {len(one['tokens'])}; {FIX}"
                )
    return batch


def _seen(firings: Firings, feature: int, words: Callable[[Sequence[int]], Sequence[str]]) -> dict[str, Any]:
    """What of a feature is seen in the text: density, histogram, rows by strength."""
    places, values = (np.asarray(array) for array in firings.of(feature))
    fires = values > 0
    at, strength = places[fires].astype(np.int64), values[fires].astype(np.float64)
    most = float(strength.max(initial=0.0))
    groups = [(-1.0, most, -1.0, _by_row(firings, at, strength, TOP))]
    edges = np.linspace(0, most, BINS + 1)
    for low, high in reversed(list(pairwise(edges.tolist())) if len(at) else []):
        inside = (strength >= low) & (strength <= high)
        silent = firings.n_tokens - len(at) if low == 0 else 0
        share = (int(inside.sum()) + silent) / firings.n_tokens
        rng = np.random.default_rng([0, feature])
        drawn = rng.permutation(np.flatnonzero(inside))
        groups.append((low, high, share, _by_row(firings, at[drawn], np.ones(len(drawn)), PER_BIN)))
    heights, bars = np.histogram(strength, BARS) if len(at) else (np.empty(0), np.empty(1))
    return {
        "frac_nonzero": len(values) / max(firings.n_tokens, 1),
        "freq_hist_data_bar_values": np.round((bars[1:] + bars[:-1]) / 2, 3).tolist(),
        "freq_hist_data_bar_heights": heights.tolist(),
        "activations": [
            _shown(firings, place, places, values, words, (low, high, share))
            for low, high, share, chosen in groups for place in chosen
        ],
    }  # fmt: skip


def _by_row(firings: Firings, at: np.ndarray, rank: np.ndarray, n: int) -> list[int]:
    """Up to ``n`` places of the highest rank, no two in a row of the text."""
    order = np.argsort(-rank, kind="stable")
    _, first = np.unique(at[order] // firings.seq, return_index=True)
    return at[order[np.sort(first)[:n]]].tolist()


def _shown(
    firings: Firings,
    place: int,
    places: np.ndarray,
    values: np.ndarray,
    words: Callable[[Sequence[int]], Sequence[str]],
    group: tuple[float, float, float],
) -> dict[str, Any]:
    """The row of a place, without masked tokens."""
    row, position = divmod(place, firings.seq)
    kept = np.flatnonzero(firings.mask[row])
    first, stop = np.searchsorted(places, [row * firings.seq, (row + 1) * firings.seq])
    own = np.zeros(firings.seq)
    own[places[first:stop].astype(np.int64) - row * firings.seq] = values[first:stop]
    low, high, share = group
    return {
        "bin_min": round(low, 3), "bin_max": round(high, 3), "bin_contains": round(share, 5),
        "tokens": list(words(firings.tokens[row, kept].tolist())), "values": np.round(own[kept], 3).tolist(),
        "qualifying_token_index": int(np.searchsorted(kept, position)),
    }  # fmt: skip
