"""The same proof and timing on a GPU: ``make bench-gpu``, or ``python -P -m saekit.kernels.bench_gpu [PEERS_PYTHON]``.

Needs torch with CUDA and Triton, nothing else. In bf16, at 2304 -> 65536, k 64, batch 4096: a whole
TopK step against one encode product plus one fused Adam pass over the same weights, against a
dense step written in torch's operations, and against sparsify where PEERS_PYTHON has it.
"""

import json
import statistics
import subprocess
import sys
import time

import torch

from saekit.kernels import bench, peers
from saekit.kernels.backend import explain

SHAPE = bench.Shape(2304, 65536, 64, 4096)
PARITY = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative error of gradients; bf16 has 8 bits
WARM_UP = 3  # rounds
ROUND = 5  # steps that may run ahead of the device, as they do in training


def timed(run, device, steps):
    """Median milliseconds of a call, the device waited for after every ROUND of them."""

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for turn in range(steps + WARM_UP):
        wait()
        began = time.perf_counter()
        for _ in range(ROUND):
            run()
        wait()
        if turn >= WARM_UP:
            times.append((time.perf_counter() - began) / ROUND)
    return 1e3 * statistics.median(times)


def parity(name, device, dtype):
    """Largest relative error of a gradient against the dense definition in fp32, at an odd shape."""
    loss, dense, names = bench.STEPS[name]
    shape = bench.Shape(100, 1000, 16, 63)
    s, reference = bench.State(shape, 0, device, dtype), bench.State(shape, 0, device)
    for each in (s, reference):
        each.trained(names)
    for target in ("x", *names):  # the same numbers, also where bf16 has rounded them
        getattr(reference, target).data.copy_(getattr(s, target).detach())
    mine = bench.gradients(s, loss, "fp32")
    theirs = torch.autograd.grad(dense(reference), [getattr(reference, n) for n in names])
    return max(
        ((a.float() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(mine, theirs, strict=True)
    )


def dense_step(s, adam):
    """A TopK step as toolkits without sparse kernels write it: dense codes, dense gradients."""
    pre = s.x @ s.W_enc.T + s.b_enc
    values, indices = pre.topk(s.shape.k)
    codes = torch.zeros_like(pre).scatter(1, indices, values.relu())
    loss = (codes @ s.W_dec + s.b_dec - s.x).float().square().sum(-1).mean()
    adam.zero_grad()
    loss.backward()
    adam.step()


def main(device="cuda", shape=SHAPE, dtype=torch.bfloat16, steps=10, peers_python=None):
    """Rows of results; the step gets a speed only where every parity holds."""
    row = {
        "case": "topk", "backend": explain(device, dtype)[0], **vars(shape), "dtype": str(dtype).removeprefix("torch."), **bench.machine(),
        "parity": {f"{name} {d}": parity(name, device, d) for name in ("topk", "batchtopk", "auxk32") for d in PARITY},
    }  # fmt: skip
    if device == "cuda":
        row["device"] = torch.cuda.get_device_name()
    row["parity_holds"] = all(
        error <= PARITY[d] for d in PARITY for key, error in row["parity"].items() if key.endswith(str(d))
    )
    if not row["parity_holds"]:
        return row
    s = bench.State(shape, 0, device, dtype)
    weights = s.trained(bench.WEIGHTS)
    product = timed(lambda: s.x @ s.W_enc.detach().T, device, steps)
    fused = torch.optim.Adam(weights, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    adam = timed(fused.step, device, steps)
    del fused
    for weight in weights:
        weight.grad = None
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    ours = timed(lambda: bench.step(s, bench.topk_loss, "fp32"), device, steps)
    row |= {"product_ms": product, "adam_ms": adam, "p50_ms": ours, "ratio": ours / (product + adam)}
    if device == "cuda":
        row["extra"] = torch.cuda.max_memory_allocated() - before
        row["no_dense_codes"] = row["extra"] < shape.batch * shape.n_features * s.x.element_size()
    dense_adam = torch.optim.Adam(weights, fused=True)
    row["dense_ms"] = timed(lambda: dense_step(s, dense_adam), device, steps)
    row["over_dense"] = row["dense_ms"] / ours
    if peers_python:
        settings = json.dumps(
            [
                "sparsify",
                "topk",
                shape.d_in,
                shape.n_features,
                shape.k,
                shape.batch,
                steps,
                device,
                row["dtype"],
            ]
        )
        done = subprocess.run(
            [peers_python, peers.__file__, settings], capture_output=True, text=True, check=True
        )
        row["sparsify_ms"] = json.loads(done.stdout.splitlines()[-1])["p50_ms"]
        row["over_sparsify"] = row["sparsify_ms"] / ours
    return row


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("error: device 'cuda' isn't available here; run this on a machine with a GPU")
    found = main(peers_python=sys.argv[1] if len(sys.argv) > 1 else None)
    print(json.dumps(found, indent=1))
    bench.record([found])
    sys.exit(0 if found["parity_holds"] else 1)
