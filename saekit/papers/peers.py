"""Train another toolkit's dictionary on given rows: run by the interpreter of an environment that it is in.

    PYTHON peers.py '{"peer": "saelens", "kind": "topk", ...}'

writes decoder, bias and sparse codes of the evaluation rows as arrays, and prints one line of JSON. It
imports numpy, torch and the peer, and nothing of saekit: their requirements exclude ours. Each trains by
its own trainer, at a rate that is given (None: its own choice); known to run: sae-lens 6.54.12, dictionary-learning 0.1.0.
"""

import contextlib
import json
import os
import sys
import tempfile
import time
import warnings

import numpy as np
import torch

DECAY = 0.2  # share of the run, its last, in which both toolkits' examples bring the rate down


def saelens(kind, batches, d_in, n, k, lr, seed):
    """SAELens' trainer; returns ``encode(x, factor)``, which scales the thresholds, decoder and bias."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    name = {"topk": "TopK", "batchtopk": "BatchTopK", "matryoshka": "MatryoshkaBatchTopK"}[kind]
    options = {"matryoshka_widths": [n >> s for s in range(4, -1, -1)]} if kind == "matryoshka" else {}
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=n, k=k, **options)
    sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    steps, size = len(batches), len(batches[0])
    settings = SAETrainerConfig(
        total_training_samples=steps * size, train_batch_size_samples=size, lr=lr, lr_end=0.0,
        lr_decay_steps=int(DECAY * steps),
    )  # fmt: skip
    trainer = SAETrainer(settings, sae, iter(batches))
    trainer.fit()
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        found = sae_lens.SAE.load_from_disk(folder, device="cpu")
    if kind != "topk":
        start = found.threshold.detach().clone()

    def encode(x, factor):
        if kind != "topk":
            found.threshold.data.copy_(start * factor)
        return found.encode(x)

    return encode, found.W_dec.detach(), found.b_dec.detach()


def dictionary_learning(kind, batches, d_in, n, k, lr, seed):
    """dictionary_learning's trainers; returns what :func:`saelens` does."""
    from importlib import import_module

    place = {"topk": ("top_k", "TopKTrainer"), "batchtopk": ("batch_top_k", "BatchTopKTrainer"), "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer")}[kind]  # fmt: skip
    steps = len(batches)
    options = {"group_fractions": [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2]} if kind == "matryoshka" else {}
    trainer = getattr(import_module(f"dictionary_learning.trainers.{place[0]}"), place[1])(
        steps=steps, activation_dim=d_in, dict_size=n, k=k, layer=0, lm_name="", device="cpu", lr=lr,
        seed=seed, warmup_steps=min(1000, steps // 10), decay_start=int((1 - DECAY) * steps),
        threshold_start_step=min(1000, steps // 6), **options,
    )  # fmt: skip
    for step in range(steps):
        trainer.update(step, batches[step])
    found = trainer.ae
    start = found.threshold.detach().clone()

    def encode(x, factor):
        if kind == "topk":
            return found.encode(x)
        found.threshold.data.copy_(start * factor)
        return found.encode(x, use_threshold=True)

    weight = found.decoder.weight.T if hasattr(found, "decoder") else found.W_dec
    return encode, weight.detach(), found.b_dec.detach()


PEERS = {"saelens": saelens, "dictionary_learning": dictionary_learning}


class Batches:
    """Batches of a file of rows, in their order."""

    def __init__(self, path, size):
        self.rows, self.size = np.load(path, mmap_mode="r"), size

    def __len__(self):
        return len(self.rows) // self.size

    def __getitem__(self, step):
        if step >= len(self):
            raise IndexError(step)
        return torch.from_numpy(np.array(self.rows[step * self.size : (step + 1) * self.size]))


def mean_l0(encode, x, factor):
    """Mean number of codes above 0."""
    return sum((encode(part, factor) > 0).sum().item() for part in x.split(4096)) / len(x)


def calibrated(encode, x, k):
    """The factor of the thresholds at which mean L0 on ``x`` is nearest to k, by bisection on its logarithm."""
    low, high = -4.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_l0(encode, x, 2.0**middle) > k else (low, middle)
    return 2.0 ** ((low + high) / 2)


def main():
    """Train, calibrate to the wanted L0, encode, write."""
    warnings.filterwarnings("ignore")
    given = json.loads(sys.argv[1])
    torch.manual_seed(given["seed"])
    batches = Batches(given["rows"], given["batch_size"])
    k, kind = given["k"], given["kind"]
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        encode, decoder, bias = PEERS[given["peer"]](
            kind, batches, batches.rows.shape[1], given["n_features"], k, given["lr"], given["seed"]
        )
    seconds = time.perf_counter() - began
    with torch.no_grad():
        held_out = torch.from_numpy(np.load(given["held_out"]))
        own = mean_l0(encode, held_out, 1.0)
        factor = 1.0 if kind == "topk" else calibrated(encode, held_out, k)
        x = torch.from_numpy(np.load(given["evaluation"]))
        codes = torch.cat([encode(part, factor).to_sparse() for part in x.split(4096)]).coalesce()
    row, feature = codes.indices().numpy()
    arrays = {"row": row, "feature": feature, "value": codes.values().numpy(), "decoder": decoder.numpy(), "bias": bias.numpy()}  # fmt: skip
    np.savez(given["out"], **arrays)
    print(json.dumps({"seconds": seconds, "own_l0": own, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    os.environ["WANDB_MODE"] = "disabled"
    main()
