"""The exam that every dictionary takes, importable for dictionaries that are made elsewhere.

``CONTRACT`` is a table of laws; each takes ``make()``, which gives the same fresh dictionary at each call,
rows to train on (of a transcoder: the columns read, then those written; whole sequences of them for a
dictionary that reads sequences), and an empty folder, and raises AssertionError where the law doesn't hold:

    from saekit.contract import examine
    examine(lambda: saekit.create("topk", d_in=16, n_features=64, k=4, selection="mine"), rows, folder)
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Config, Dictionary, TrainState
from saekit.dictionaries.parts import constant, parts
from saekit.hub import native
from saekit.trainers import train

Make = Callable[[], Dictionary]
STEPS, BATCH = 8, 64
NEAR = 0.75  # cosine of a planted direction and the nearest atom
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}


def _prepared(make: Make, rows: Tensor) -> Dictionary:
    d = make()
    d.prepare(d.gather([rows]))
    if d.atoms.trained:  # thresholds and other statistics of training take their first values
        d.observe(d.loss(rows[:BATCH]).codes, TrainState())
    return d


def _read(d: Dictionary, rows: Tensor) -> Tensor:
    return d.wiring.split(rows)[0]


def _quietly(*given: Any, **options: Any) -> None:
    """Train; so short a run may well miss the L0 that was asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        train(*given, **options)


def shapes(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Codes and outputs keep the leading shape of the input; codes are sorted into rows; an empty batch is one."""
    d = _prepared(make, rows)
    rows = _read(d, rows)
    x = rows[:12].unflatten(0, (3, 4))
    codes, lead = d.encode(x), x.shape[:-1]
    assert codes.shape == lead and codes.n_features == d.n_features
    assert codes.offsets.shape == (lead.numel() + 1,)
    assert codes.indices.dtype == torch.int32 and bool((codes.indices < d.n_features).all())
    assert d.decode(codes, x).shape == (*lead, d.d_out) and d(x).shape == (*lead, d.d_out)
    assert d.encode(rows[:0]).rows == 0 and d(rows[:0]).shape == (0, *rows.shape[1:-1], d.d_out)


def rows_are_independent(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """``encode`` is a function of its own row (or sequence) alone, whatever the batch; no feature has two codes in a row."""
    d = _prepared(make, rows)
    rows = _read(d, rows)
    # not of the rows observed: a threshold may be exactly one of their activations, and its last bit decide
    fresh = rows[BATCH : BATCH + 40]
    whole = d.encode(fresh).to_dense()
    alone = torch.cat([d.encode(row[None]).to_dense() for row in fresh])
    torch.testing.assert_close(whole, alone, **CLOSE)
    codes = d.encode(rows)
    key = (codes.row_ids() * d.n_features + codes.indices)[codes.values != 0]
    assert len(key.unique()) == len(key)


def sparse_equals_dense(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Decoding codes equals the dense product with the decoder."""
    d = _prepared(make, rows)
    x = _read(d, rows[:50])
    codes = d.encode(x)
    dense = codes.to_dense() if d.wiring.kind == "cross_layer" else d.expanded(codes, d.read(x)).to_dense()
    dense = dense.flatten(0, -2) @ d.W_dec + d.b_dec
    if d.wiring.skip is not None:
        dense = dense + d.norm_in(x) @ d.wiring.skip.T
    torch.testing.assert_close(
        d.decode(codes, x).flatten(0, -2),
        d.norm_out.invert(dense),
        rtol=1e-4,
        atol=1e-4 * float(rows.abs().max()),
    )


def inference_is_the_same_function(
    make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path
) -> None:
    """``to_inference`` keeps codes and outputs to 1e-5 relative, but for codes at the edge of being chosen."""
    d = _prepared(make, rows)
    folded = d.to_inference()
    rows = _read(d, rows)
    a, b = d.encode(rows).to_dense(), folded.encode(rows).to_dense()
    size = a.abs().max()
    moved = ((a != 0) != (b != 0)).any(-1)
    assert moved.double().mean() <= 0.02, "supports differ"
    assert ((a - b)[~moved].abs() <= 2e-5 * size).all(), "codes differ"
    x, y = d(rows)[~moved], folded(rows)[~moved]
    assert ((x - y).abs() <= 2e-5 * rows.abs().max()).all(), "outputs differ"


def it_comes_apart(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Each code is ``w x + b`` of what it reads, and what all write is the output: also for an input not seen."""
    d = _prepared(make, rows)
    x = _read(d, rows[BATCH] if d.wiring.kind == "sequences" else rows[BATCH : BATCH + 20])
    size, fixed = float(rows.abs().max()), constant(d)
    out = fixed.b.repeat(len(x), 1) if fixed.skip is None else x @ fixed.skip.T + fixed.b
    sides = list(out.split(d.wiring.parts_out, -1))
    dense = torch.zeros(len(x), d.n_features)
    for part in parts(d, x):
        read = x.split(d.wiring.parts_in, -1)[part.read] if d.wiring.kind == "cross_layer" else x
        gathered = read[part.positions]
        if part.patterns is not None and part.heads is not None:
            gathered = torch.einsum("es,sd->ed", part.patterns[part.heads, part.positions], read)
        near = 1e-4 * max(1.0, float(part.values.abs().max() if len(part.values) else 0))
        torch.testing.assert_close((part.w * gathered).sum(1) + part.b, part.values, rtol=1e-4, atol=near)
        dense[part.positions, part.features] = part.values
        for to, written in zip(part.writes, part.written, strict=True):
            sides[to] = sides[to].index_add(0, part.positions, written)
    torch.testing.assert_close(dense, d.encode(x).to_dense(), **CLOSE)
    torch.testing.assert_close(torch.cat(sides, -1), d(x), rtol=1e-4, atol=1e-4 * size)


def saved_is_loaded(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Saving and loading gives the same config, the same bits, and so the same outputs."""
    d = _prepared(make, rows)
    d.reads = d.writes = ("blocks.1.hook_resid_post",)
    d.card = {"data": {"kind": "test"}}
    for one in (d, d.to_inference()):
        native.save(one, folder / "d")
        back = native.load(folder / "d")
        assert back.config == one.config and back.reads == one.reads and back.card == one.card
        assert Config.from_json(one.config.to_json()) == one.config
        for key, value in one.state_dict().items():
            assert torch.equal(value, back.state_dict()[key]), key
        assert torch.equal(one(_read(d, rows[:20])), back(_read(d, rows[:20])))


def gradients_reach_every_parameter(
    make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path
) -> None:
    """The loss is the sum of its terms, and trains every parameter with finite gradients."""
    d = _prepared(make, rows)
    dead = torch.zeros(d.n_features, dtype=torch.bool)
    dead[-2:] = True
    peer = torch.randn(d.n_features, d.d_out, generator=torch.Generator().manual_seed(0))
    loss = d.loss(rows, TrainState(step=5, steps=10, dead=dead, peers=(peer,)))
    torch.testing.assert_close(loss.total, sum(loss.terms.values()))
    loss.total.backward()
    for key, parameter in d.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            assert grad is not None and bool(grad.isfinite().all()) and bool(grad.abs().sum() > 0), key
    for name, term in loss.terms.items():
        assert bool(term > 0), f"{name} is {term.item()}"


def every_term_trains(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Each term of the objective by itself sends a gradient to some parameter: none is there for show."""
    d = _prepared(make, rows)
    dead = torch.zeros(d.n_features, dtype=torch.bool)
    dead[-2:] = True
    peer = torch.randn(d.n_features, d.d_out, generator=torch.Generator().manual_seed(0))
    trained = [p for p in d.parameters() if p.requires_grad]
    loss = d.loss(rows, TrainState(step=5, steps=10, dead=dead, peers=(peer,)))
    for name, term in loss.terms.items():
        assert term.requires_grad, f"{name} is cut from the graph"
        grads = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        assert any(g is not None and bool(g.abs().sum() > 0) for g in grads), f"{name} trains nothing"


def loss_changes_nothing(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Computing a loss twice gives the same bits and leaves every tensor as it was."""
    d = _prepared(make, rows)
    before = copy.deepcopy(d.state_dict())
    first, second = d.loss(rows, TrainState(step=3, steps=10)), d.loss(rows, TrainState(step=3, steps=10))
    assert torch.equal(first.total, second.total)
    for key, value in d.state_dict().items():
        assert torch.equal(value, before[key]), key


def resume_is_exact(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """A run that goes on from its checkpoint ends with the same bytes as one that was never interrupted."""

    def run(out: Path) -> bytes:
        _quietly(make(), rows, STEPS, BATCH, out, checkpoint_every=STEPS // 2, lr=1e-3, dead_after=BATCH)
        return (out / "dictionary.safetensors").read_bytes()

    whole = run(folder / "whole")
    assert run(folder / "again") == whole, "not deterministic"
    (folder / "again" / "dictionary.safetensors").unlink()
    last = folder / "again" / "checkpoints" / f"step-{STEPS:08d}"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    assert run(folder / "again") == whole


def training_helps(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """A short training lowers the error of the fresh dictionary."""
    fresh = _prepared(make, rows)
    d = make()
    _quietly(d, rows, 60, min(256, len(rows)), lr=3e-3)
    x, y = d.wiring.split(rows)
    assert metrics.fvu(y, d(x).detach()) < metrics.fvu(y, fresh(x).detach())


def recovers_planted_features(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: Path) -> None:
    """Training on sums of planted directions brings atoms nearer to them than random ones are.

    A law of atoms that are trained: those of a control stay where they are. A start at the data is near already, and need not come nearer than ``NEAR`` and .05.
    """
    d = make()
    if getattr(type(d.atoms), "fixed", False):
        return
    g = torch.Generator().manual_seed(8191)  # not the seed of a dictionary, whose directions these would be
    n = 3 * d.d_in // 2
    read, written = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=g), dim=-1)
        for width in (d.d_in, d.d_out)
    )
    on = torch.rand(4096, n, generator=g) < 2 / n
    codes = on * (1 + torch.rand(on.shape, generator=g))
    truth = read if d.wiring.same_space else written
    rows = codes @ truth if d.wiring.same_space else torch.cat([codes @ read, codes @ truth], 1)
    if d.wiring.kind == "sequences":  # of one position, where attention has no choice
        rows = rows[:, None]

    def nearness(atoms: Tensor) -> float:
        return (torch.nn.functional.normalize(atoms, dim=-1) @ truth.T).abs().amax(0).mean().item()

    def own(of: Dictionary) -> float:
        return nearness(of.norm_out.directions(of.W_dec.detach()))

    fresh, random = own(_prepared(make, rows)), nearness(torch.randn(d.W_dec.shape, generator=g))
    for _ in range(10):  # most need one round
        _quietly(d, rows, 75, 256, lr=3e-3)
        if own(d) > max(random, min(fresh, NEAR)) + 0.05:
            return
    raise AssertionError(f"{own(d):.3f} after training, {fresh:.3f} before, random {random:.3f}")


CONTRACT = {
    law.__name__: law
    for law in (
        shapes, rows_are_independent, sparse_equals_dense, it_comes_apart, inference_is_the_same_function, saved_is_loaded,
        gradients_reach_every_parameter, every_term_trains, loss_changes_nothing, resume_is_exact, training_helps,
        recovers_planted_features,
    )
}  # fmt: skip
UNTRAINED = (
    "shapes",
    "rows_are_independent",
    "sparse_equals_dense",
    "it_comes_apart",
    "inference_is_the_same_function",
    "saved_is_loaded",
)


def laws(dictionary: Dictionary) -> list[str]:
    """The laws that apply: those of training only where there is something to train."""
    trained = any(p.requires_grad for p in dictionary.parameters())
    return [name for name in CONTRACT if trained or name in UNTRAINED]


def examine(make: Make, rows: Float[Tensor, "batch *seq columns"], folder: "str | Path") -> None:
    """Put a dictionary to every law; ``rows`` should number 500 or more, whole sequences 64 or more."""
    for name in laws(make()):
        inner = Path(folder) / name
        inner.mkdir(parents=True)
        try:
            CONTRACT[name](make, rows, inner)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
