"""SAEBench 0.6's own functions on tensors that a test wrote: absorption, effects, ablated rows, SCR, TPP, features to probe.

    python -P tests/peers/saebench_formulas.py FILE

``FILE`` is a safetensors file with x [rows, d], codes [rows, feature], atoms [feature, d], direction [d], labels [rows] and
own [n]; results are written beside it. Models and SAEs are stood in for by what gives these tensors.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
from sae_bench.evals.scr_and_tpp import main as scr
from sae_bench.evals.sparse_probing import probe_training
from safetensors.torch import load_file, save_file

N = 2  # features that are ablated


def absorption(given: dict) -> dict:
    """Full absorption and the fraction of each row."""
    d, hook, at = given["atoms"].shape[1], "blocks.0.hook_resid_post", iter(range(len(given["x"])))
    batch = 10

    def run(prompts, names_filter):
        rows = [next(at) for _ in prompts]
        return None, {hook: given["x"][rows][:, None].expand(-1, 3, d)}

    model = SimpleNamespace(run_with_cache=run, to_tokens=lambda text: torch.zeros(1, 5))
    seen = iter(range(0, len(given["x"]), batch))

    def encode(x):
        first = next(seen)
        return given["codes"][first : first + batch]

    sae = SimpleNamespace(encode=encode, W_dec=given["atoms"], device="cpu")
    words = ["ab"] * len(given["x"])
    calculator = FeatureAbsorptionCalculator(
        model, icl_word_list=["cd", "ef"], batch_size=batch, topk_feats=5
    )
    found = calculator.calculate_absorption(
        sae, words, given["direction"], given["own"].tolist(), 0, show_progress=False
    )
    full = torch.tensor([one.is_full_absorption for one in found.word_results])
    return {
        "full": full,
        "fraction": torch.tensor([float(one.absorption_fraction) for one in found.word_results]),
    }


def ablations(given: dict) -> dict:
    """Effects of both kinds, the strongest features, and rows without them."""
    x, codes, atoms = given["x"], given["codes"], given["atoms"]

    def encode(_):
        return codes[:, None].clone()

    sae = SimpleNamespace(encode=encode, decode=lambda f: f @ atoms, W_dec=atoms)
    probe = SimpleNamespace(net=SimpleNamespace(weight=given["direction"][None]))
    scr.probe_training.prepare_probe_data = lambda acts, name, kind: (x[:, None], given["labels"])
    out = {}
    for kind in (True, False):
        effects = scr.get_effects_per_class_precomputed_acts(sae, probe, "a", {}, kind, len(x))
        chosen = scr.select_top_n_features(effects, N, "a")
        name = "scr" if kind else "tpp"
        out[f"{name}.effects"], out[f"{name}.chosen"] = effects, chosen
        out[f"{name}.rows"] = scr.ablated_precomputed_activations(x[:, None], sae, chosen, len(x))
    return out


def scores(given: dict) -> dict:
    """SCR and TPP of accuracies."""
    clean, biased, changed = given["accuracies"].tolist()
    data = "professor / nurse", "male / female"
    biased_on = [f"male_professor / female_nurse probe on {name} data" for name in data]
    accuracies = {data[0]: clean, data[1]: clean, biased_on[0]: biased, biased_on[1]: 1.0}
    ablated = {data[1]: {N: {biased_on[0]: changed}}, data[0]: {N: {biased_on[1]: 1.0}}}
    found = scr.get_scr_plotting_dict(ablated, accuracies)
    names = ["a", "b", "c"]
    kept = dict(zip(names, given["clean"].tolist(), strict=True))
    by = {
        a: {N: dict(zip(names, row, strict=True))}
        for a, row in zip(names, given["changed"].tolist(), strict=True)
    }
    _, each = scr.create_tpp_plotting_dict(by, kept)
    tpp = [each[name][f"tpp_threshold_{N}_total_metric"] for name in names]
    return {"scr": torch.tensor(found[f"scr_metric_threshold_{N}"]), "tpp": torch.tensor(tpp)}


def probed(given: dict) -> dict:
    """The features that sparse probes read."""
    return {"probing.chosen": ~probe_training.get_top_k_mean_diff_mask(given["codes"], given["labels"], N)}


if __name__ == "__main__":
    file = Path(sys.argv[1])
    given = load_file(file)
    out = {**absorption(given), **ablations(given), **scores(given), **probed(given)}
    save_file({k: v.contiguous() for k, v in out.items()}, file.with_name("found.safetensors"))
    print(json.dumps(sorted(out)))
