"""Time operations and whole training steps against one dense encode product, and prove them first.

Every case is run small against dense definitions before it is timed; where they disagree no speed
is given. A time is the median over steps that alternate with the floor, ``x W^T`` in fp32, in the
same process.
"""

import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import saekit.kernels as kernels
from saekit.kernels.adam import reference as adam_reference
from saekit.kernels.backend import explain
from saekit.kernels.budgets.reference import budget_error as dense_budgets
from saekit.kernels.encode import reference as encode_reference
from saekit.kernels.encode.jumprelu import jumprelu
from saekit.kernels.error.reference import nested_error as dense_error
from saekit.kernels.pursuit.reference import pursue as dense_pursuit

RESULTS = Path(__file__).with_name("results.jsonl")
PREFIXES = 5  # of the Matryoshka case: n / 16, n / 8, ..., n
BANDWIDTH = 0.05
DEAD = 0.3  # share of dead features in the AuxK cases
TOLERANCE = 1e-3  # of gradients and updates, relative to their norm
RATE = 1e-4


class Shape:
    """Sizes of a case: rows of a batch, widths, active features."""

    def __init__(self, d_in, n_features, k, batch):
        self.d_in, self.n_features, self.k, self.batch = d_in, n_features, k, batch


class State:
    """Weights, moments and data of a case."""

    def __init__(self, shape, seed=0, device="cpu", dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        d, n = shape.d_in, shape.n_features
        self.shape = shape
        self.x = planted(shape, g).to(device, dtype)
        self.W_dec = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=-1).to(device, dtype)
        self.W_enc = self.W_dec.clone()
        self.b_enc, self.b_dec = (
            torch.zeros(n, device=device, dtype=dtype),
            torch.zeros(d, device=device, dtype=dtype),
        )
        self.threshold = torch.zeros(n, device=device, dtype=dtype)
        self.dead = (torch.rand(n, generator=g) < DEAD).to(device)
        self.step = 0
        self.codes: Any = None

    def trained(self, names):
        """The named weights, with gradients, and their moments."""
        self.names = names
        self.moments: dict[str, tuple[torch.Tensor, torch.Tensor]]
        for name in names:
            getattr(self, name).requires_grad_()
        self.moments = {
            name: (torch.zeros_like(getattr(self, name)), torch.zeros_like(getattr(self, name)))
            for name in names
        }
        return [getattr(self, name) for name in names]


def planted(shape, generator):
    """Sparse sums of 4 d_in unit directions with a little noise, rows of mean squared norm d_in."""
    directions = torch.nn.functional.normalize(
        torch.randn(4 * shape.d_in, shape.d_in, generator=generator), dim=1
    )
    fires = (torch.rand(shape.batch, 4 * shape.d_in, generator=generator) < 0.01).float()
    x = (fires * torch.rand(fires.shape, generator=generator)) @ directions
    x += 0.01 * torch.randn(x.shape, generator=generator)
    return x * (shape.d_in / x.square().sum(-1).mean()).sqrt()


def _rectangular(s, indices, values) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = torch.arange(len(s.x) + 1, device=s.x.device) * indices.shape[1]
    return offsets, indices.reshape(-1), values.reshape(-1)


def _prefixes(n):
    return [max(1, n >> shift) for shift in range(PREFIXES - 1, -1, -1)]


# losses of a step, sparse and by their dense definitions


def topk_loss(s, shortlist):
    """Mean squared error of TopK."""
    values, indices = kernels.topk_encode(s.x, s.W_enc, s.b_enc, s.shape.k, shortlist=shortlist)
    return kernels.squared_error(*_rectangular(s, indices, values.relu()), s.W_dec, s.b_dec, s.x)[0].mean()


def _dense_rows(s, offsets, indices, values, prefixes=None):
    n = s.shape.n_features
    prefixes = prefixes or [n]
    shares = [1 / len(prefixes)] * len(prefixes)
    return dense_error(offsets, indices, values, s.W_dec, s.b_dec, s.x, prefixes, shares)


def topk_dense(s):
    """The same by definition."""
    values, indices = encode_reference.topk(s.x, s.W_enc, s.b_enc, s.shape.k, s.shape.n_features, False)
    return _dense_rows(s, *_rectangular(s, indices, values.relu()))[0].mean()


def batchtopk_loss(s, shortlist):
    """Mean squared error of BatchTopK."""
    offsets, indices, values = kernels.batchtopk_encode(s.x, s.W_enc, s.b_enc, s.shape.k, shortlist=shortlist)
    return kernels.squared_error(offsets, indices, values.relu(), s.W_dec, s.b_dec, s.x)[0].mean()


def batchtopk_dense(s):
    """The same by definition."""
    offsets, indices, values = encode_reference.batchtopk(s.x, s.W_enc, s.b_enc, s.shape.k)
    return _dense_rows(s, offsets, indices, values.relu())[0].mean()


def matryoshka_loss(s, shortlist):
    """BatchTopK with the errors of nested prefixes."""
    offsets, indices, values = kernels.batchtopk_encode(s.x, s.W_enc, s.b_enc, s.shape.k, shortlist=shortlist)
    prefixes = _prefixes(s.shape.n_features)
    return kernels.nested_error(offsets, indices, values.relu(), s.W_dec, s.b_dec, s.x, prefixes)[0].mean()


def matryoshka_dense(s):
    """The same by definition."""
    offsets, indices, values = encode_reference.batchtopk(s.x, s.W_enc, s.b_enc, s.shape.k)
    return _dense_rows(s, offsets, indices, values.relu(), _prefixes(s.shape.n_features))[0].mean()


def hierarchical_loss(s, shortlist):
    """TopK with the errors of every budget up to k."""
    values, indices = kernels.topk_encode(s.x, s.W_enc, s.b_enc, s.shape.k, shortlist=shortlist)
    return kernels.budget_error(indices, values.relu(), s.W_dec, s.b_dec, s.x)[0].mean()


def hierarchical_dense(s):
    """The same by definition."""
    values, indices = encode_reference.topk(s.x, s.W_enc, s.b_enc, s.shape.k, s.shape.n_features, False)
    shares = [1 / s.shape.k] * s.shape.k
    return dense_budgets(indices, values.relu(), s.W_dec, s.b_dec, s.x, shares)[0].mean()


def jumprelu_loss(s, shortlist):
    """Mean squared error and L0 of JumpReLU."""
    offsets, indices, u = kernels.threshold_encode(
        s.x, s.W_enc, s.b_enc, s.threshold.detach() - BANDWIDTH / 2, shortlist=shortlist
    )
    z, on = jumprelu(u, indices, s.threshold, BANDWIDTH)
    squared = kernels.squared_error(offsets, indices, z, s.W_dec, s.b_dec, s.x)[0]
    return squared.mean() + 0.1 * on.sum() / len(s.x)


def jumprelu_dense(s):
    """The same over every entry."""
    pre = s.x @ s.W_enc.T + s.b_enc
    every = torch.arange(pre.shape[1]).expand(pre.shape).flatten()
    z, on = jumprelu(pre.flatten(), every, s.threshold, BANDWIDTH)
    error = z.view(pre.shape) @ s.W_dec + s.b_dec - s.x
    return error.square().sum(-1).mean() + 0.1 * on.sum() / len(s.x)


def aux_loss(k_aux):
    """TopK with AuxK over a share DEAD of the features."""

    def loss(s, shortlist):
        values, indices, aux_values, aux_indices = kernels.topk_encode_aux(
            s.x, s.W_enc, s.b_enc, s.shape.k, s.dead, min(k_aux, s.shape.n_features), shortlist=shortlist
        )
        squared, error = kernels.squared_error(
            *_rectangular(s, indices, values.relu()), s.W_dec, s.b_dec, s.x
        )
        aux = _rectangular(s, aux_indices, aux_values.relu())
        missed, _ = kernels.squared_error(*aux, s.W_dec, torch.zeros_like(s.b_dec), -error)
        return squared.mean() + missed.mean() / 32

    def dense(s):
        values, indices, aux_values, aux_indices = encode_reference.topk(
            s.x,
            s.W_enc,
            s.b_enc,
            s.shape.k,
            s.shape.n_features,
            False,
            s.dead,
            min(k_aux, s.shape.n_features),
        )
        squared, _, error = _dense_rows(s, *_rectangular(s, indices, values.relu()))
        offsets, indices, values = _rectangular(s, aux_indices, aux_values.relu())
        n = s.shape.n_features
        missed = dense_error(
            offsets, indices, values, s.W_dec, torch.zeros_like(s.b_dec), -error.detach(), [n], [1.0]
        )[0]
        return squared.mean() + missed.mean() / 32

    return loss, dense


def pursuit_loss(s, shortlist):
    """Mean squared residual of matching pursuit."""
    return (
        kernels.pursuit_encode(s.x - s.b_dec, s.W_dec, s.shape.k, shortlist=shortlist)[2]
        .square()
        .sum(-1)
        .mean()
    )


def pursuit_dense(s):
    """The same by definition."""
    return dense_pursuit(s.x - s.b_dec, s.W_dec, s.shape.k)[2].square().sum(-1).mean()


WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
STEPS = {
    "topk": (topk_loss, topk_dense, WEIGHTS),
    "batchtopk": (batchtopk_loss, batchtopk_dense, WEIGHTS),
    "matryoshka": (matryoshka_loss, matryoshka_dense, WEIGHTS),
    "hierarchical": (hierarchical_loss, hierarchical_dense, WEIGHTS),
    "jumprelu": (jumprelu_loss, jumprelu_dense, (*WEIGHTS, "threshold")),
    "auxk32": (*aux_loss(32), WEIGHTS),
    "auxk256": (*aux_loss(256), WEIGHTS),
    "pursuit": (pursuit_loss, pursuit_dense, ("W_dec", "b_dec")),
}


def step(s, loss, shortlist):
    """One whole training step: forward, backward, Adam with the decoder on the sphere."""
    weights = [getattr(s, name) for name in s.names]
    with kernels.collect([w for w in weights if w.ndim == 2]) as factors:
        loss(s, shortlist).backward()
    s.step += 1
    for name, weight in zip(s.names, weights, strict=True):
        gradient = factors.get(weight) or weight.grad
        m, v = s.moments[name]
        kernels.adam_step(weight, gradient, m, v, rate=RATE, step=s.step, unit=name == "W_dec")
        weight.grad = None


def gradients(s, loss, shortlist):
    """The gradients of a step, dense; the weights stay as they are."""
    weights = [getattr(s, name) for name in s.names]
    with kernels.collect([w for w in weights if w.ndim == 2]) as factors:
        loss(s, shortlist).backward()
    found = [factors[w].dense(len(w)) if factors.get(w) else w.grad for w in weights]
    for weight in weights:
        weight.grad = None
    return found


def step_parity(s, loss, dense, shortlist):
    """Three steps: the largest relative error of a gradient, and of an update made from the same gradients."""
    worst = 0.0
    for _ in range(3):
        weights = [getattr(s, name) for name in s.names]
        mine, theirs = gradients(s, loss, shortlist), torch.autograd.grad(dense(s), weights)
        worst = max(worst, *(_difference(a, b) for a, b in zip(mine, theirs, strict=True)))
        before = [w.detach().clone() for w in weights]
        expected = [w.clone() for w in before]
        for name, weight, gradient in zip(s.names, expected, mine, strict=True):
            m, v = (moment.clone() for moment in s.moments[name])
            adam_reference.adam_step(
                weight, gradient, m, v, RATE, s.step + 1, (0.9, 0.999), 1e-8, 1.0, name == "W_dec", False
            )
        step(s, loss, shortlist)
        for weight, start, end in zip(weights, before, expected, strict=True):
            worst = max(worst, _difference(weight.detach() - start, end - start))
    return worst


def _difference(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


def encode_only(s, shortlist):
    """Codes of a batch."""
    return kernels.topk_encode(s.x, s.W_enc, s.b_enc, s.shape.k, shortlist=shortlist)


def decode_only(s, _):
    """A reconstruction from given codes."""
    offsets, indices, values = s.codes
    return kernels.sparse_decode(offsets, indices, values, s.W_dec)


OPERATIONS = {"encode": encode_only, "decode": decode_only}


def parity(name, shortlist):
    """The largest relative difference to the dense definitions, at two small and odd shapes."""
    worst = 0.0
    for shape in (Shape(24, 200, 5, 33), Shape(100, 1000, 16, 63)):
        if name in OPERATIONS:
            s = State(shape)
            values, indices = kernels.topk_encode(s.x, s.W_enc, s.b_enc, shape.k, shortlist=shortlist)
            expected, at = encode_reference.topk(s.x, s.W_enc, s.b_enc, shape.k, shape.n_features, False)
            worst = max(worst, float((indices != at).any()), _difference(values, expected))
            codes = _rectangular(s, indices, values)
            dense = torch.zeros(shape.batch, shape.n_features).scatter_(1, indices.long(), values) @ s.W_dec
            worst = max(
                worst, _difference(kernels.sparse_decode(codes[0], codes[1], codes[2], s.W_dec), dense)
            )
            continue
        loss, dense, names = STEPS[name]
        s = State(shape)
        _set_threshold(s)
        s.trained(names)
        worst = max(worst, step_parity(s, loss, dense, shortlist))
    return worst


def _set_threshold(s):
    """One threshold for all features, with about 1.5 k entries of a row above it."""
    pre = s.x[:64].float() @ s.W_enc.float().T
    share = 1 - 1.5 * s.shape.k / s.shape.n_features
    s.threshold.fill_(torch.quantile(pre.flatten()[:: max(1, pre.numel() // 1_000_000)], share).item())


def measure(name, shape, shortlist="fp32", steps=10, seed=0):
    """One row of results: parity, the floor, the time of a step, their ratio."""
    worst = parity(name, shortlist)
    row = {
        "case": name, "backend": explain("cpu", torch.float32)[0], "shortlist": shortlist, **vars(shape), "dtype": "fp32",
        "parity": worst, "parity_holds": worst <= TOLERANCE,
    }  # fmt: skip
    if worst > TOLERANCE:
        return row
    s = State(shape, seed)
    _set_threshold(s)
    if name in OPERATIONS:
        s.codes = _rectangular(s, *reversed(kernels.topk_encode(s.x, s.W_enc, s.b_enc, shape.k)))
        run = lambda: OPERATIONS[name](s, shortlist)  # noqa: E731
    else:
        s.trained(STEPS[name][2])
        run = lambda: step(s, STEPS[name][0], shortlist)  # noqa: E731
    if shortlist == "bf16" and not same_selection(name, s):
        return {**row, "parity_holds": False}
    floor_weight, floors, reused, times = s.W_enc.detach().clone(), [], [], []
    product = torch.empty(shape.batch, shape.n_features)
    for turn in range(steps + 3):
        first = _seconds(lambda: s.x @ floor_weight.T)  # as it is written, its result newly allocated
        second = _seconds(lambda: torch.mm(s.x, floor_weight.T, out=product))
        with kernels.serial():
            third = _seconds(run)
        if turn >= 3:
            floors.append(first)
            reused.append(second)
            times.append(third)
    low, mid, high = (statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))
    floor = statistics.median(floors)
    return {
        **row, "floor_ms": floor * 1e3, "floor_reused_ms": statistics.median(reused) * 1e3, "p20_ms": low * 1e3, "p50_ms": mid * 1e3, "p80_ms": high * 1e3,
        "ratio": mid / floor, "steps": steps, **machine(),
    }  # fmt: skip


def _seconds(work):
    """Time of a piece of work, begun when torch's workers no longer spin after the one before."""
    time.sleep(0.02)
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


@torch.no_grad()
def same_selection(name, s):
    """Whether the bf16 shortlist gives the bits of the fp32 one for every row, at the shape that is timed."""
    x, weight, bias, k = s.x, s.W_enc.detach(), s.b_enc.detach(), s.shape.k
    encode = {
        "batchtopk": lambda how: kernels.batchtopk_encode(x, weight, bias, k, shortlist=how),
        "matryoshka": lambda how: kernels.batchtopk_encode(x, weight, bias, k, shortlist=how),
        "jumprelu": lambda how: kernels.threshold_encode(
            x, weight, bias, s.threshold.detach(), shortlist=how
        ),
        "pursuit": lambda how: kernels.pursuit_encode(x, s.W_dec.detach(), k, shortlist=how),
    }.get(name, lambda how: kernels.topk_encode_aux(x, weight, bias, k, s.dead, k, shortlist=how))
    return all(torch.equal(a, b) for a, b in zip(encode("fp32"), encode("bf16"), strict=True))


def machine():
    """What a time depends on."""
    info = Path("/proc/cpuinfo")
    names = (
        [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        if info.exists()
        else []
    )
    return {
        "device": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def peak_memory(name, shape, shortlist="fp32"):
    """Extra bytes that three steps take at their peak, above the process after a step at a tiny shape."""
    settings = json.dumps([name, vars(shape), shortlist])
    done = subprocess.run(
        [sys.executable, "-P", "-m", "saekit.kernels.bench", settings],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def _status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def _peak_main(name, shape, shortlist):
    def three(sizes):
        s = State(sizes)
        _set_threshold(s)
        s.trained(STEPS[name][2])
        for _ in range(3):
            with kernels.serial():
                step(s, STEPS[name][0], shortlist)
        return s

    three(Shape(16, 64, 4, 32))
    s = State(shape)  # the data and what made it are not the step's
    data = s.x.clone()
    del s
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    s = State.__new__(State)
    g = torch.Generator().manual_seed(0)
    s.shape, s.x, s.step = shape, data, 0
    s.W_dec = torch.empty(shape.n_features, shape.d_in).normal_(generator=g)
    s.W_dec /= torch.linalg.vector_norm(s.W_dec, dim=-1, keepdim=True)
    s.W_enc, s.b_enc, s.b_dec = s.W_dec.clone(), torch.zeros(shape.n_features), torch.zeros(shape.d_in)
    s.threshold, s.dead = torch.zeros(shape.n_features), torch.rand(shape.n_features, generator=g) < DEAD
    _set_threshold(s)
    weights = s.trained(STEPS[name][2])
    for _ in range(3):
        with kernels.serial():
            step(s, STEPS[name][0], shortlist)
    size = sum(w.numel() * 4 for w in weights)
    print(json.dumps({"extra": _status("VmHWM") - before, "parameters_gradients_states": 4 * size}))


def record(rows, path=RESULTS):
    """Append rows to the table of results."""
    with Path(path).open("a") as file:
        for row in rows:
            file.write(
                json.dumps(
                    {
                        k: (round(v, 4) if isinstance(v, float) and math.isfinite(v) else v)
                        for k, v in row.items()
                    }
                )
                + "\n"
            )


if __name__ == "__main__":
    _name, _shape, _shortlist = json.loads(sys.argv[1])
    _peak_main(_name, Shape(**_shape), _shortlist)
