"""What a whole training step of every wiring costs: against its dense products, and against an autoencoder's step."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saekit.contract import sparse_equals_dense
from saekit.dictionaries import Dictionary, create
from saekit.kernels.bench import Shape, machine
from saekit.trainers import Trainer

PLACES = 4  # sources of the crosscoder, layers of the CLT
HEADS, SEQ = 4, 64  # of Lorsa: QK heads, positions of a sequence
WARM = 3  # steps before the clock

# wiring -> (options of create, columns of a row in units of d_in, (columns, features) of its encoders' products)
WIRINGS: dict[str, tuple[Callable[[Shape], dict[str, Any]], int, Callable[[Shape], list[tuple[int, int]]]]] = {
    "autoencoder": (lambda s: {"name": "topk"}, 1, lambda s: [(s.d_in, s.n_features)]),
    "transcoder": (lambda s: {"name": "transcoder"}, 2, lambda s: [(s.d_in, s.n_features)]),
    "skip_transcoder": (
        lambda s: {"name": "skip_transcoder"}, 2, lambda s: [(s.d_in, s.n_features), (s.d_in, s.d_in)],
    ),
    "crosscoder": (
        lambda s: {"name": "crosscoder", "d_in": (s.d_in,) * PLACES}, PLACES,
        lambda s: [(PLACES * s.d_in, s.n_features)],
    ),
    "clt": (
        lambda s: {"name": "clt", "n_layers": PLACES, "k": max(PLACES, s.k // PLACES * PLACES)}, 2 * PLACES,
        lambda s: [(s.d_in, s.n_features // PLACES)] * PLACES,
    ),
    "lorsa": (
        lambda s: {"name": "lorsa", "n_qk": HEADS, "d_qk": max(2, s.d_in // HEADS)}, 2,
        lambda s: [(s.d_in, s.n_features // HEADS)] * HEADS,
    ),
}  # fmt: skip


def make(name: str, shape: Shape) -> Dictionary:
    """The dictionary of a case: TopK with ``k`` active features in all, whatever the wiring."""
    return create(
        **{"d_in": shape.d_in, "n_features": shape.n_features, "k": shape.k, **WIRINGS[name][0](shape)}
    )


def rows_for(name: str, shape: Shape) -> Tensor:
    """A batch of noise as the wiring reads it: rows, or sequences of as many positions."""
    x = torch.randn(
        shape.batch, WIRINGS[name][1] * shape.d_in, generator=torch.Generator().manual_seed(shape.d_in)
    )
    return x.unflatten(0, (-1, min(SEQ, shape.batch))) if name == "lorsa" else x


def measure(name: str, shape: Shape, steps: int = 10) -> dict[str, Any]:
    """A row of results: a step of the wiring, its products and an autoencoder's step, by turns in one process."""
    row = {"case": name, **vars(shape), "dtype": "fp32", "shortlist": "default", "parity_holds": _holds(name)}
    if not row["parity_holds"]:
        return row
    g = torch.Generator().manual_seed(0)
    products = [
        (torch.randn(shape.batch, d, generator=g), torch.randn(n, d, generator=g).T)
        for d, n in WIRINGS[name][2](shape)
    ]
    trainers = {case: (Trainer(make(case, shape)), rows_for(case, shape)) for case in {name, "autoencoder"}}
    work: dict[str, Callable[[], Any]] = {
        "floor": lambda: [x @ w for x, w in products],
        **{case: _stepping(*given) for case, given in trainers.items()},
    }
    times: dict[str, list[float]] = {key: [] for key in work}
    for turn in range(WARM + steps):
        for key, run in _turned(work.items(), turn):
            time.sleep(0.02)  # torch's workers spin for a while after a product
            began = time.perf_counter()
            run()
            if turn >= WARM:
                times[key].append(time.perf_counter() - began)
    middle = {key: statistics.median(found) * 1e3 for key, found in times.items()}
    return {
        **row, "floor_ms": middle["floor"], "p50_ms": middle[name], "ratio": middle[name] / middle["floor"],
        "autoencoder_ms": middle["autoencoder"], "over_autoencoder": middle[name] / middle["autoencoder"],
        "steps": steps, **machine(),
    }  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row as a person reads it."""
    head = f"{row['case']:19} {row['d_in']} -> {row['n_features']}, k {row['k']}, batch {row['batch']:<10}"
    if not row["parity_holds"]:
        return f"{head} parity FAILS: no speed"
    return (
        f"{head} {row['p50_ms']:8.1f} ms = {row['ratio']:.2f} x its products' {row['floor_ms']:.1f} ms"
        f" = {row['over_autoencoder']:.2f} x an autoencoder's step"
    )


def _stepping(trainer: Trainer, rows: Tensor) -> Callable[[], Any]:
    return lambda: trainer.step(rows)


def _turned(items: Iterable[Any], turn: int) -> list[Any]:
    """The items in an order that changes from turn to turn, so that none always follows the same one."""
    listed = list(items)
    return listed[turn % len(listed) :] + listed[: turn % len(listed)]


def _holds(name: str) -> bool:
    """Whether a small one decodes what its dense decoder does."""
    small = Shape(16, 64, 8, 192)
    with tempfile.TemporaryDirectory() as folder:
        try:
            sparse_equals_dense(lambda: make(name, small), rows_for(name, small), Path(folder))
        except AssertionError:
            return False
    return True
