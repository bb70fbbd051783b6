"""Reports of suites as SAEBench 0.6 writes its results, for whoever compares files: one JSON for an evaluation of one dictionary.

What was measured differently is said in ``eval_config``: texts and attributes are the user's own, and probes are exact minima.
SAEBench's unlearning is a score of multiple-choice questions, and ours a loss, which its schema has no place for.
"""

import importlib.metadata
import json
import statistics
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from saekit.activations import write_atomic
from saekit.dictionaries import Dictionary
from saekit.evaluate.core import Report
from saekit.evaluate.probing import ALL, KS
from saekit.evaluate.scr_tpp import ABLATED
from saekit.pages import finite
from saekit.types import SaekitError

Shape = tuple[
    str, dict[str, Any], list[dict[str, Any]]
]  # its name of the evaluation, metrics by category, details


def _probing(report: Report) -> Shape:
    sides = {"llm": "coordinates", "sae": "features"}
    metrics: dict[str, dict[str, float]] = {}
    for short, own in sides.items():
        metrics[short] = {f"{short}_test_accuracy": float(report[f"{own}_{ALL}"])}
        metrics[short] |= {f"{short}_top_{k}_test_accuracy": float(report[f"{own}_{k}"]) for k in KS}
    detail = {"dataset_name": report.about["text"]["name"], **metrics["llm"], **metrics["sae"]}
    return "sparse_probing", metrics, [detail]


def _absorption(report: Report) -> Shape:
    each: Mapping[str, Mapping[str, float]] = report.about["each"]
    names = {
        "absorption_fraction_score": "fraction",
        "full_absorption_score": "full",
        "num_split_features": "splits",
    }
    mean = {}
    for name, own in names.items():
        values = [one[own] for one in each.values()]
        mean[f"mean_{name}"] = statistics.fmean(values)
        mean[f"std_dev_{name}"] = statistics.pstdev(values)
    details = [
        {
            "first_letter": value, "mean_absorption_fraction": one["fraction"], "full_absorption_rate": one["full"],
            "num_full_absorption": round(one["full"] * one["texts"]), "num_probe_true_positives": int(one["texts"]),
            "num_split_features": int(one["splits"]),
        }
        for value, one in each.items()
    ]  # fmt: skip
    return "absorption_first_letter", {"mean": mean}, details


def _scr(report: Report) -> Shape:
    metrics = {}
    for n in ABLATED:
        metrics[f"scr_metric_threshold_{n}"] = float(report[f"scr_{n}"])
        metrics |= {f"scr_dir{i}_threshold_{n}": float(report[f"scr_dir{i}_{n}"]) for i in (1, 2)}
    return "scr", {"scr_metrics": metrics}, [{"dataset_name": report.about["text"]["name"], **metrics}]


def _tpp(report: Report) -> Shape:
    metrics = {f"tpp_threshold_{n}_total_metric": float(report[f"tpp_{n}"]) for n in ABLATED}
    return "tpp", {"tpp_metrics": metrics}, [{"dataset_name": report.about["text"]["name"], **metrics}]


def _ravel(report: Report) -> Shape:
    names = {
        "disentanglement_score": "disentanglement",
        "cause_score": "cause",
        "isolation_score": "isolation",
    }
    metrics = {name: float(report[own]) for name, own in names.items()}
    return "ravel", {"ravel": metrics}, []


SHAPES: dict[str, Callable[[Report], Shape]] = {
    "sparse_probing": _probing, "absorption": _absorption, "scr": _scr, "tpp": _tpp, "ravel": _ravel
}  # fmt: skip


def check_saebench(suite: str, values: Iterable[str] = ()) -> str:
    """The suite, if SAEBench's results have a place for it, and for what is asked about."""
    if suite not in SHAPES:
        raise SaekitError(
            f"suite {suite!r} has no place in SAEBench's results; choose one of {', '.join(SHAPES)}"
        )
    long = [value for value in values if len(value) != 1]
    if suite == "absorption" and long:
        raise SaekitError(
            f"SAEBench's absorption is of letters, and {long[0]!r} is none; leave saebench out, or ask about letters"
        )
    return suite


def to_saebench(report: Report, dictionary: Dictionary, name: str) -> dict[str, Any]:
    """A report as SAEBench's result of a dictionary called ``name``; refused for suites that it has no place for."""
    suite = check_saebench(report.about.get("suite", "core"), report.about.get("each", ()))
    kind, metrics, details = SHAPES[suite](report)
    config = {
        "random_seed": report.about["seed"], "model_name": report.about["model"]["name"], "measured_by": "saekit",
        "texts": report.about["text"]["name"], "attribute": report.about["attribute"],
    }  # fmt: skip
    version = importlib.metadata.version("saekit")
    return {
        "eval_type_id": kind, "eval_config": config, "eval_id": str(uuid.uuid4()), "datetime_epoch_millis": int(time.time() * 1000),
        "eval_result_metrics": metrics, "eval_result_details": details, "sae_bench_commit_hash": f"saekit {version}",
        "sae_lens_id": "custom_sae", "sae_lens_release_id": name, "sae_lens_version": None,
        "sae_cfg_dict": {**dictionary.config.to_json(), "hook_name": report.about["hook_point"]}, "eval_result_unstructured": None,
    }  # fmt: skip


def write_saebench(report: Report, dictionary: Dictionary, name: str, folder: Path) -> Path:
    """Write it where SAEBench's readers look: ``EVAL/NAME_custom_sae_eval_results.json``."""
    data = to_saebench(report, dictionary, name)
    file = folder / data["eval_type_id"] / f"{name.replace('/', '_')}_custom_sae_eval_results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(finite(data), indent=1).encode())
    return file
