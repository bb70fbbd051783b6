"""Time other toolkits' own training steps on the same data: run by the interpreter of an environment they are in.

    PYTHON peers.py '["saelens", "topk", 512, 16384, 32, 2048, 6]'

prints one line of JSON. It imports torch and the peer, and nothing of saekit: their requirements
exclude ours. Known to run: sae-lens 6.54.12, dictionary-learning 0.1.0, eai-sparsify 1.3.3.
"""

import json
import os
import statistics
import sys
import time
import warnings

import torch

RATE = 3e-4


def data(d_in, batch, generator):
    """Sparse sums of 4 d_in unit directions with a little noise."""
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=generator), dim=1)
    fires = (torch.rand(batch, 4 * d_in, generator=generator) < 0.01).float()
    return (fires * torch.rand(fires.shape, generator=generator)) @ directions


def _saelens(model, coefficients):
    from sae_lens.saes.sae import TrainStepInput

    adam, dead = torch.optim.Adam(model.parameters(), lr=RATE), torch.zeros(model.cfg.d_sae, dtype=torch.bool)

    def step(x):
        given = TrainStepInput(
            sae_in=x,
            coefficients=coefficients,
            dead_neuron_mask=dead,
            n_training_steps=0,
            is_logging_step=False,
        )
        loss = model.training_forward_pass(given).loss
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return step


def saelens(kind, d_in, n, k):
    """SAELens' training SAEs with their own losses, Adam and the clip of its trainer."""
    import sae_lens

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK", "jumprelu": "JumpReLU", "pursuit": "MatchingPursuit"}[kind]  # fmt: skip
    options = {"topk": {"k": k}, "batchtopk": {"k": k}, "jumprelu": {}, "pursuit": {"max_iterations": k}}.get(
        kind
    )
    if options is None:
        options = {"k": k, "matryoshka_widths": [n >> shift for shift in range(4, -1, -1)]}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=n, **options)
    return _saelens(
        getattr(sae_lens, f"{name}TrainingSAE")(config), {"l0": 1.0} if kind == "jumprelu" else {}
    )


def dictionary_learning(kind, d_in, n, k):
    """dictionary_learning's trainers."""
    from importlib import import_module

    place = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer"), "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"), "jumprelu": ("jumprelu", "JumpReluTrainer")}[kind]  # fmt: skip
    options = {"target_l0": k} if kind == "jumprelu" else {"k": k}
    if kind == "matryoshka":
        options["group_fractions"] = [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    trainer = getattr(import_module(f"dictionary_learning.trainers.{place[0]}"), place[1])(
        steps=10_000, activation_dim=d_in, dict_size=n, layer=0, lm_name="", device="cpu", lr=RATE, **options
    )
    steps = iter(range(10_000))
    return lambda x: trainer.update(next(steps), x)


def sparsify(kind, d_in, n, k, device="cpu", dtype=torch.float32):
    """sparsify's coder, Adam and its renormalisation of the decoder; also on a GPU."""
    if device == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(d_in, SparseCoderConfig(num_latents=n, k=k), device=device, dtype=dtype)
    adam = torch.optim.Adam(coder.parameters(), lr=RATE)

    def step(x):
        loss = coder(x).fvu
        adam.zero_grad()
        loss.backward()
        adam.step()
        coder.set_decoder_norm_to_unit_norm()

    return step


PEERS = {
    "saelens": (saelens, ("topk", "batchtopk", "matryoshka", "jumprelu", "pursuit")),
    "dictionary_learning": (dictionary_learning, ("topk", "batchtopk", "matryoshka", "jumprelu")),
    "sparsify": (sparsify, ("topk",)),
}


def main():
    """Median milliseconds of a step, after two that warm up."""
    warnings.filterwarnings("ignore")
    peer, kind, d_in, n, k, batch, steps, *place = json.loads(sys.argv[1])  # place: device and dtype
    torch.manual_seed(0)
    x = data(d_in, batch, torch.Generator().manual_seed(0))
    if place:
        place = [place[0], getattr(torch, place[1])]
        x = x.to(*place)
    step, times = PEERS[peer][0](kind, d_in, n, k, *place), []
    each = 5 if x.is_cuda else 1  # on a GPU some run ahead, as they do in training
    for _ in range(steps + 2):
        began = time.perf_counter()
        for _ in range(each):
            step(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - began) / each)
    print(json.dumps({"peer": peer, "case": kind, "p50_ms": 1e3 * statistics.median(times[2:])}))


if __name__ == "__main__":
    main()
