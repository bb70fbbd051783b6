"""Every selection equals its paper's formula: dense codes of a few rows, written out, and all their gradients.

Atoms are free, of several norms, and every parameter is off its start. ``made``, ``parameters`` and ``DEFINITIONS``
also serve test_objective_definitions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_jumprelu import KERNEL
from torch import Tensor
from torch.nn.functional import normalize, one_hot

import saekit
from saekit.dictionaries import Dictionary, TrainState
from saekit.dictionaries.selection import SELECTIONS
from saekit.kernels import KERNELS

D, N, ROWS, STEPS = 8, 24, 20, 20
SEEDS = (0, 1, 2)
AT = {0: 0, 1: 4, 2: 15}  # the step of a run of STEPS that each seed looks at
BANDWIDTH = 0.9


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(selection: str, objective: tuple[str, ...], seed: int, **options: Any) -> Dictionary:
    """A dictionary in double precision, none of whose parameters is where it started."""
    d = saekit.create(
        "relu", d_in=D, n_features=N, seed=seed, **{"atoms": "free"} | options, selection=selection, objective=objective
    ).double()  # fmt: skip
    d.set_normalisation(drawn(500 + seed, 400, D) * 3 + 7)
    with torch.no_grad():
        for i, (name, p) in enumerate(d.named_parameters()):
            if p.requires_grad:
                p.add_(0.3 * drawn(1000 * seed + i, *p.shape))
            if name == "selection.threshold":
                p.copy_(0.2 + p.abs())
        d.atoms.weight.mul_(0.4 + 2 * torch.linspace(0, 1, N, dtype=torch.float64)[:, None])
        for weight in d.unit_weights():
            weight.copy_(normalize(weight, dim=1))
    d.prepared.fill_(True)
    return d


def rows_of(seed: int, rows: int = ROWS) -> Tensor:
    return drawn(700 + seed, rows, D) * 3 + 7


def parameters(d: Dictionary) -> dict[str, Tensor]:
    """Its parameters as leaves of a graph of our own."""
    return {name: p.detach().clone().requires_grad_() for name, p in d.named_parameters() if p.requires_grad}


def same_gradients(
    d: Dictionary, ours: Tensor, theirs: Tensor, leaves: dict[str, Tensor], **tolerance: float
) -> None:
    """The gradients of two values in every parameter; those of unit rows count along the sphere.

    What a formula leaves out gets none to the last bit, since Adam would make a step of what rounding leaves.
    """
    held = {name: p for name, p in d.named_parameters() if p.requires_grad}
    mine = torch.autograd.grad(ours, list(held.values()), allow_unused=True)
    expected = torch.autograd.grad(theirs, list(leaves.values()), allow_unused=True)
    unit = {id(weight) for weight in d.unit_weights()}
    for (name, p), a, b in zip(held.items(), mine, expected, strict=True):
        assert b is not None or a is None or not a.any(), f"{name} gets a gradient"
        a, b = (torch.zeros_like(p) if g is None else g for g in (a, b))
        if id(p) in unit:
            a, b = (g - (g * p).sum(1, keepdim=True) * p for g in (a, b))
        torch.testing.assert_close(a, b.to(a), msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@dataclass
class Given:
    """What a selection is a function of: rows in normalised space, the leaves, its options, the state."""

    x: Tensor
    leaves: dict[str, Tensor]
    options: dict[str, Any]
    state: TrainState = field(default_factory=TrainState)
    training: bool = True

    @property
    def W(self) -> Tensor:
        return self.leaves["encoder" if "encoder" in self.leaves else "atoms.weight"]

    @property
    def pre(self) -> Tensor:
        return self.x @ self.W.T + self.leaves["b_enc"]

    def k(self) -> int:
        """k of the step: linear from k_start, reached after the share ``anneal`` of the run."""
        k, start = self.options["k"], self.options.get("k_start")
        if start is None or not self.training:
            return k
        assert self.state.steps is not None
        done = min(1.0, (self.state.step + 1) / (self.options["anneal"] * self.state.steps))
        return round(start + done * (k - start))


def largest(scores: Tensor, k: int) -> Tensor:
    """1 at the k largest of each row, 0 elsewhere; cut from the graph."""
    return torch.zeros_like(scores).scatter(-1, scores.detach().topk(k, -1).indices, 1.0).detach()


def relu(g: Given) -> Tensor:
    return g.pre.clamp(min=0)


def topk(g: Given) -> Tensor:
    k = g.k() if g.training else round(g.options.get("alpha", 1) * g.options["k"])
    kept = g.pre * largest(g.pre, k)
    return kept.relu() if g.options.get("relu", True) else kept


def abstopk(g: Given) -> Tensor:
    return g.pre * largest(g.pre.abs(), g.options["k"])


def groupmax(g: Given) -> Tensor:
    groups = g.pre.unflatten(1, (g.options["k"], -1))
    return (groups * largest(groups, 1)).flatten(1).relu()


def batchtopk(g: Given) -> Tensor:
    if not g.training:
        return g.pre * (g.pre > g.options["threshold"])
    return (g.pre.flatten() * largest(g.pre.flatten(), g.k() * len(g.x))).view_as(g.pre).relu()


def open_at(u: Tensor, theta: Tensor, bandwidth: float, kernel: str) -> tuple[Tensor, Tensor]:
    """``(z, on)`` of 2407.14435 with its pseudo-derivatives in theta: ``-(theta / e) K`` and ``-(1 / e) K``."""
    on = (u > theta).to(u).detach()
    slope = (-KERNEL[kernel]((u - theta) / bandwidth) / bandwidth).detach()
    moves = theta - theta.detach()  # 0, of derivative 1
    return u * on + theta.detach() * slope * moves, on + slope * moves


def jumprelu(g: Given) -> Tensor:
    kernel = g.options.get("kernel", "rectangle")
    return open_at(g.pre, g.leaves["selection.threshold"], g.options["bandwidth"], kernel)[0]


def gated(g: Given) -> Tensor:
    """2404.16014: the gate opens by ``pi = W x + b_gate``; magnitudes are ``ReLU(exp(r) W x + b_mag)``."""
    magnitude = (g.leaves["selection.r"].exp() * (g.x @ g.W.T) + g.leaves["selection.b_mag"]).relu()
    return (g.pre > 0).to(magnitude) * magnitude


def pursuit(g: Given) -> Tensor:
    """2506.03093, row by row: the best atom, its share, the residual, until a rule stops the row."""
    o, rows = g.options, []
    k = o["k"] if g.training else o.get("k_inference", o["k"])
    for x in g.x:
        r, z, taken = x, torch.zeros(len(g.W), dtype=x.dtype), set[int]()
        for _ in range(k):
            if r.norm() <= o.get("tolerance", 0) * x.norm():
                break
            at = int((g.W @ r).argmax())
            value = (g.W[at] @ r).relu()
            z = z + value * one_hot(torch.tensor(at), len(g.W))
            r = r - value * g.W[at]
            if r.norm() < o.get("residual", 0) or (o.get("until_repeat") and (at in taken or value == 0)):
                break
            taken.add(at)
        rows.append(z)
    return torch.stack(rows)


@torch.no_grad()
def omp(g: Given) -> Tensor:
    out = torch.zeros(len(g.x), len(g.W), dtype=g.x.dtype)
    for x, z in zip(g.x, out, strict=True):
        support: list[int] = []
        for _ in range(g.options["k"]):
            scores = (g.W @ (x - z @ g.W)).abs()
            scores[support] = -1
            support.append(int(scores.argmax()))
            z[support] = torch.linalg.lstsq(g.W[support].T, x[:, None]).solution[:, 0]
    return out


def proximal(g: Given, steps: int) -> Tensor:
    """``z <- prox(z + gamma (x - z D) D^T)`` from 0, with ``gamma = 1 / ||D||^2``."""
    W, w = g.W, g.options["weight"]
    gamma = (1 / torch.linalg.matrix_norm(W, 2) ** 2).detach()
    z = torch.zeros(len(g.x), len(W), dtype=g.x.dtype)
    for _ in range(steps):
        u = z + gamma * (g.x - z @ W) @ W.T
        size = {
            "soft": (u.abs() - gamma * w).relu(),
            "hard": u.abs() * (u.abs() > (2 * gamma * w).sqrt()),
            "cel0": torch.minimum(u.abs(), (u.abs() - gamma * (2 * w) ** 0.5).relu() / (1 - gamma)),
        }[g.options["penalty"]]
        z = u.sign() * size
    return z


def unrolled(g: Given) -> Tensor:
    return proximal(g, g.options["steps"])


def iterative(g: Given) -> Tensor:
    return proximal(g, 50).detach()


def codebook(g: Given) -> Tensor:
    """2310.17230: the k codes of each group with the largest inner product with their direction, each worth 1."""
    W, groups = g.leaves["atoms.weight"], g.options.get("groups", 1)
    mine = torch.block_diag(*[torch.ones(N // groups, D // groups, dtype=W.dtype)] * groups)
    scores = g.x @ normalize(W * mine, dim=1).T
    return largest(scores.unflatten(1, (groups, -1)), g.options["k"]).flatten(1)


def routes(g: Given) -> Tensor:
    return (g.x @ g.leaves["selection.router"].T + g.leaves["selection.b_router"]).softmax(1)


def switch(g: Given) -> Tensor:
    """2410.08201: TopK within the expert of the largest probability, times that probability unless ``heaviside``."""
    p, experts = routes(g), g.options["experts"]
    mine = one_hot(p.argmax(1), experts).repeat_interleave(N // experts, 1)
    pre = g.pre.masked_fill(mine == 0, -torch.inf)
    kept = torch.where(largest(pre, g.options["k"]) > 0, pre, 0).relu()
    return kept if g.options.get("heaviside") else kept * p.amax(1, keepdim=True)


DEFINITIONS: dict[str, Callable[[Given], Tensor]] = {
    "relu": relu, "topk": topk, "abstopk": abstopk, "groupmax": groupmax, "batchtopk": batchtopk, "jumprelu": jumprelu,
    "gated": gated, "pursuit": pursuit, "omp": omp, "iterative": iterative, "unrolled": unrolled, "codebook": codebook,
    "switch": switch,
}  # fmt: skip
# what a selection can't be had without
OBJECTIVE = {"gated": ("reconstruction", "gate"), "switch": ("reconstruction", "load_balance")}
TIED = ("omp", "iterative", "codebook")
CASES: list[tuple[str, dict[str, Any]]] = [
    ("relu", {}),
    ("topk", {"k": 4}),
    ("topk", {"k": 4, "relu": False, "alpha": 1.5}),
    ("topk", {"k": 3, "k_start": 12, "anneal": 0.5}),
    ("topk", {"k": 12, "k_start": 3, "anneal": 0.25}),
    ("abstopk", {"k": 4}),
    ("groupmax", {"k": 6}),
    ("batchtopk", {"k": 4}),
    ("batchtopk", {"k": 3, "k_start": 12, "anneal": 0.5}),
    *(("jumprelu", {"bandwidth": BANDWIDTH, "kernel": kernel}) for kernel in KERNEL),
    ("gated", {}),
    ("pursuit", {"k": 5}),
    ("pursuit", {"k": 3, "k_inference": 9}),
    ("pursuit", {"k": 12, "tolerance": 0.4}),
    ("pursuit", {"k": 12, "residual": 1.0}),
    ("pursuit", {"k": 12, "until_repeat": True}),
    ("omp", {"k": 4}),
    *(("unrolled", {"penalty": p, "weight": 0.1, "steps": 4}) for p in ("soft", "hard", "cel0")),
    ("iterative", {"penalty": "soft", "weight": 0.3}),
    ("codebook", {"k": 3}),
    ("codebook", {"k": 2, "groups": 4}),
    ("switch", {"k": 3, "experts": 4}),
    ("switch", {"k": 3, "experts": 4, "heaviside": True}),
]


def case(selection: str, options: dict[str, Any], seed: int) -> Dictionary:
    tied = {"atoms": "tied"} if selection in TIED else {}
    long = {"unit_norm": False} if selection == "codebook" else {}
    d = made(selection, OBJECTIVE.get(selection, ("reconstruction",)), seed, **tied, **long, **options)
    d.after_step()
    return d


every_case = pytest.mark.parametrize(
    ("selection", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value))
)  # fmt: skip


def test_every_selection_and_kernel_has_a_definition() -> None:
    assert set(DEFINITIONS) == set(SELECTIONS.table) == {name for name, _ in CASES}
    assert set(KERNEL) == set(KERNELS)
    for name in DEFINITIONS:  # and every option, but those that choose a start (below)
        named = {option for selection, options in CASES if selection == name for option in options}
        assert set(SELECTIONS[name].Config.__dataclass_fields__) - {"start", "density"} <= named | (
            {"steps"} if name == "iterative" else set()
        )


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_codes_of_training_and_their_gradients(selection: str, options: dict[str, Any], seed: int) -> None:
    d, rows, state = case(selection, options, seed), rows_of(seed), TrainState(AT[seed], STEPS)
    loss, leaves = d.loss(rows, state), parameters(d)
    z = DEFINITIONS[selection](Given(d.norm_in(rows), leaves, options, state))
    torch.testing.assert_close(loss.codes.to_dense(), z.detach())
    assert (z != 0).any(1).sum() > ROWS / 2 and (z == 0).any()
    bias = leaves.get("b_dec", torch.zeros(D, dtype=torch.float64))  # a pursuit has none
    expected = (d.norm_in(rows) - z @ leaves["atoms.weight"] - bias).square().sum(1).mean()
    torch.testing.assert_close(loss.terms["reconstruction"], expected)
    same_gradients(d, loss.terms["reconstruction"], expected, leaves)


@pytest.mark.parametrize("seed", SEEDS)
@every_case
def test_codes_at_inference(selection: str, options: dict[str, Any], seed: int) -> None:
    d, rows = case(selection, options, seed), rows_of(seed)
    if selection == "batchtopk":  # the mean of the smallest codes that batches have kept
        kept = [d.loss(rows_of(10 + i), TrainState(STEPS, STEPS)).codes for i in range(3)]
        for codes in kept:
            d.observe(codes, TrainState())
        options = options | {"threshold": sum(c.values[c.values > 0].min() for c in kept) / 3}
    z = DEFINITIONS[selection](Given(d.norm_in(rows), parameters(d), options, training=False))
    torch.testing.assert_close(d.encode(rows).to_dense(), z)


@pytest.mark.parametrize(
    "kind", ["relu", "topk", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated", "matching_pursuit"]
)
def test_what_a_code_reads_is_its_gradient(kind: str) -> None:
    """Of parts that are trained too, and with ``value = w x + b``."""
    g, d = torch.Generator().manual_seed(0), saekit.create(kind, d_in=16, n_features=64, k=4, seed=0)
    with torch.no_grad():
        for weight in d.selection.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=g))
    x = torch.randn(20, 16, generator=g, requires_grad=True)
    codes = d.encode(x)
    w, b = d.read_by(codes.detach(), x.detach())
    on, row = codes.values != 0, codes.row_ids()
    firsts = torch.stack([((row == r) & on).nonzero()[0, 0] for r in row[on].unique()])
    (slope,) = torch.autograd.grad(codes.values[firsts].sum(), x)
    torch.testing.assert_close(slope[row[firsts]], w[firsts])
    torch.testing.assert_close(((w * x.detach()[row]).sum(1) + b)[on], codes.values.detach()[on])


@pytest.mark.parametrize("kind", ["omp", "switch", "unrolled", "pursuit", "topk"])
def test_rows_that_are_no_numbers_are_named(kind: str) -> None:
    k = {} if kind == "unrolled" else {"k": 4}
    name, chosen = (
        (kind, {})
        if kind in ("omp", "switch", "topk")
        else ("relu", {"selection": kind, "objective": "reconstruction"})
    )
    d = saekit.create(name, d_in=16, n_features=64, **k, **chosen)
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))
    x[40, 3] = torch.nan
    with pytest.raises(ValueError, match=r"x holds NaN.* 40; remove it"):
        d.encode(x)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_pursuits_solve_in_more_than_half_precision(kind: torch.dtype) -> None:
    d = saekit.create("omp", d_in=16, n_features=64, k=4, normalise="none")
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).to(kind)
    half, whole = d.to(kind)(x).float(), d.float()(x.float())
    assert saekit.metrics.fvu(whole, half) < 0.05 and half.isfinite().all()


def test_options_that_stop_a_pursuit_do_so() -> None:
    """Each of them ends some rows of these tests early, at different steps, and not all."""
    for options in ({"tolerance": 0.4}, {"residual": 1.0}, {"until_repeat": True}):
        d = case("pursuit", {"k": 12, **options}, 0)
        stopped = (d.encode(rows_of(0)).to_dense() != 0).sum(1)
        whole = (case("pursuit", {"k": 12}, 0).encode(rows_of(0)).to_dense() != 0).sum(1)
        assert (stopped <= whole).all() and (stopped < whole).any() and len(set(stopped.tolist())) > 2


def test_magnitudes_and_gate_of_a_gated_dictionary_train_their_own_biases() -> None:
    """Neither is in the other's graph: of parts that cancel, sums in another order would leave what Adam makes a step of."""
    d = made("gated", ("reconstruction", "gate", "l1"), 0)
    terms = d.loss(rows_of(0)).terms
    own = {"reconstruction": [d.selection.r, d.selection.b_mag], "gate": [d.b_enc], "l1": [d.b_enc]}
    for term, value in terms.items():
        for p in (d.b_enc, d.selection.r, d.selection.b_mag):
            found = torch.autograd.grad(value, p, allow_unused=True, retain_graph=True)[0]
            assert (found is not None) == any(p is other for other in own[term])


def above(u: Tensor, theta: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """Expectations of ``1[v > theta]`` and ``v 1[v > theta]`` for v = u + bandwidth t, with t distributed as the kernel."""
    low = ((theta - u) / BANDWIDTH).clamp(-0.5, 0.5)
    middle = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    t = low[..., None] + (0.5 - low)[..., None] * middle
    density = KERNEL[kernel](t) * (0.5 - low)[..., None] / 4000
    return density.sum(-1), ((u[..., None] + BANDWIDTH * t) * density).sum(-1)


@pytest.mark.parametrize("term", ["l0", "l1"])
@pytest.mark.parametrize("kernel", list(KERNELS))
def test_pseudo_gradients_are_the_slopes_of_the_smoothed_loss(kernel: str, term: str) -> None:
    """2407.14435: a threshold's pseudo-gradient is that of the loss with pre-activations spread by the kernel.

    L0 and L1 are linear in what opens and in the codes, so their smoothed values have a finite difference.
    """
    d = made(
        "jumprelu", ("reconstruction", term), 0, bandwidth=BANDWIDTH, kernel=kernel, **{f"{term}.warmup": 0.0}
    )
    rows, theta = rows_of(0, 4), d.selection.threshold
    leaves = parameters(d)
    u, lengths = Given(d.norm_in(rows), leaves, {}).pre.detach(), leaves["atoms.weight"].detach().norm(dim=1)

    def smoothed(theta: Tensor) -> Tensor:
        on, size = above(u, theta, kernel)
        return (on if term == "l0" else size * lengths).sum(0) / len(rows)

    h = 1e-4
    slope = (smoothed(theta.detach() + h) - smoothed(theta.detach() - h)) / (2 * h)
    mine = torch.autograd.grad(d.loss(rows).terms[term], theta)[0]
    assert (slope != 0).sum() > N / 2
    torch.testing.assert_close(mine, slope, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("density", [0.05, 0.3])
def test_a_jumprelu_begins_with_the_wanted_density(density: float) -> None:
    rows = rows_of(0, 400)
    d = saekit.create("jumprelu", d_in=D, n_features=N, density=density).double()
    d.prepare(rows)
    assert (d.encode(rows).to_dense() != 0).double().mean().item() == pytest.approx(density, abs=1e-3)
    fixed = saekit.create("jumprelu", d_in=D, n_features=N, start=0.7)
    fixed.prepare(rows.float())
    assert torch.equal(fixed.selection.threshold.detach(), torch.full((N,), 0.7))
