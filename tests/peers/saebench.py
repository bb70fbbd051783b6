"""SAEBench 0.6 on a dictionary of saekit's: ``saebench.py FOLDER``; see tests/test_saebench.py.

Its own loader, its "core" metrics with the reconstruction spliced into a model, its ablations and its probes' codes.
"""

import sys
from typing import Any

import torch
from datasets import Dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_bench.evals.scr_and_tpp.main import ablated_precomputed_activations
from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
from sae_bench.sae_bench_utils.general_utils import check_decoder_norms, load_and_format_sae
from sae_lens.training.activations_store import ActivationsStore
from transformer_lens import HookedTransformer, HookedTransformerConfig

import saekit
from saekit.hub.saebench import as_saebench

CONTEXT = 16


def model() -> HookedTransformer:
    torch.manual_seed(0)
    config = HookedTransformerConfig(
        n_layers=3,
        d_model=32,
        d_head=8,
        n_heads=4,
        d_mlp=64,
        d_vocab=4096,
        n_ctx=CONTEXT,
        act_fn="gelu",
        seed=0,
    )
    return HookedTransformer(config, tokenizer=saekit.load_model("code-lm").tokenizer)


def store(net: HookedTransformer, at: str) -> ActivationsStore:
    rows = torch.randint(3, 4000, (64, CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()
    return ActivationsStore(
        model=net, dataset=Dataset.from_dict({"input_ids": rows}), streaming=False, hook_name=at, hook_head_index=None,
        context_size=CONTEXT, d_in=32, n_batches_in_buffer=2, total_training_tokens=64 * CONTEXT, store_batch_size_prompts=4,
        train_batch_size_tokens=32, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"), dtype="float32",
    )  # fmt: skip


def main(folder: str) -> None:
    d = saekit.load(folder)
    sae: Any
    name, sae, _ = load_and_format_sae("mine", as_saebench(d, "core"), "cpu")
    sae = sae.to(device="cpu", dtype=torch.float32)
    assert name == "custom_sae" and check_decoder_norms(sae.W_dec.data)
    net = model()
    config = CoreEvalConfig(
        model_name="toy", batch_size_prompts=4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    found, by_feature = run_evals(sae, store(net, sae.cfg.hook_name), net, config)
    # the same tokens by saekit's own arithmetic
    again = store(net, sae.cfg.hook_name)
    spliced_rows = torch.cat([again.get_batch_tokens(4) for _ in range(2)])
    again.reset_input_dataset()
    rows = torch.cat([again.get_batch_tokens(4) for _ in range(2)])
    with torch.no_grad():
        x = net.run_with_cache(rows, names_filter=sae.cfg.hook_name)[1][sae.cfg.hook_name]
        codes = d.encode(x)
        l0 = codes.l0().float().mean().item()
        cosine = torch.cosine_similarity(d(x), x, dim=-1).mean().item()
    said = {key: value for group in found.values() for key, value in group.items()}
    assert abs(said["l0"] - l0) < 1e-3, (said["l0"], l0)
    assert abs(said["cossim"] - cosine) < 1e-4, (
        said["cossim"],
        cosine,
    )  # its mse depends on the batch's size
    spliced = found["model_performance_preservation"]["ce_loss_with_sae"]
    true = net.run_with_hooks(
        spliced_rows, return_type="loss", fwd_hooks=[(sae.cfg.hook_name, lambda x, hook: d(x))]
    )
    assert abs(spliced - float(true)) < 1e-3, (spliced, float(true))
    assert len(by_feature["encoder_norm"]) == len(by_feature["feature_density"]) == d.n_features
    # probes read codes, ablations take a feature's direction away
    meaned = get_sae_meaned_activations({"a": x}, sae, 4)["a"]
    torch.testing.assert_close(meaned, sae.encode(x).mean(1))
    some = torch.zeros(d.n_features, dtype=torch.bool)
    some[int(sae.encode(x).sum((0, 1)).argmax())] = True
    ablated = ablated_precomputed_activations(x, sae, some, 4)
    own = codes.to_dense()[..., some]
    true = (x - own @ d.norm_out.directions(d.W_dec)[some]).mean(1)
    torch.testing.assert_close(ablated, true, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1])
