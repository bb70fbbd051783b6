"""Every term of an objective equals its paper's formula: value and all gradients, by dense autograd on a few rows.

Atoms are free, of several norms, or of norm 1; codes are the definitions of test_selection_definitions.
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from test_selection_definitions import (
    BANDWIDTH,
    DEFINITIONS,
    SEEDS,
    D,
    Given,
    N,
    drawn,
    largest,
    made,
    open_at,
    parameters,
    routes,
    rows_of,
    same_gradients,
)
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import saekit
from saekit.dictionaries import Dictionary, TrainState
from saekit.dictionaries.objective import OBJECTIVES
from saekit.harvest import ContinuedSource
from saekit.models import load_model
from saekit.types import ActivationBatch

STEPS = 100
AT = {0: 0, 1: 3, 2: 60}  # the step of a run of STEPS that each seed looks at: two of them within the warm-up
WARMUP = 0.2
DEAD = torch.arange(N) % 3 == 0
PEERS = (drawn(91, N, D), 3 * drawn(92, 17, D))  # decoders of two other dictionaries, of any norm and width


@dataclass
class Pass(Given):
    """What a term is a function of: beside what a selection gets, the codes."""

    z: Tensor = field(default_factory=lambda: torch.zeros(0))

    @property
    def atoms(self) -> Tensor:
        return self.leaves["atoms.weight"]

    @property
    def sizes(self) -> Tensor:
        """``|z| ||d||`` of every feature and row."""
        return self.z.abs() * self.atoms.norm(dim=1)

    def error(self, z: Tensor) -> Tensor:
        """``mean_rows ||y - z D - b_dec||^2``."""
        return (self.x - z @ self.atoms - self.leaves["b_dec"]).square().sum(1).mean()

    def weight(self) -> float:
        """The coefficient, which rises from 0 over the share ``warmup`` of the run."""
        assert self.state.steps is not None
        return self.options["coefficient"] * min(1.0, (self.state.step + 1) / (WARMUP * self.state.steps))


def hierarchical(a: Pass) -> Tensor:
    """2505.24473: the mean over budgets of the error of the largest codes alone."""
    budgets = a.options.get("budgets", range(1, a.options["k"] + 1))
    return torch.stack([a.error(a.z * largest(a.z, j)) for j in budgets]).mean()


def matryoshka(a: Pass) -> Tensor:
    """2503.17547: the mean over prefixes of the error of their features alone."""
    lengths = a.options.get("prefixes", [N // 2**level for level in range(a.options.get("levels", 5))])
    return torch.stack([a.error(a.z * (torch.arange(N) < m)) for m in lengths]).mean()


def auxk(a: Pass) -> Tensor:
    """2406.04093, app. A.2: the largest dead features reconstruct the residual, as a share of its variance."""
    e = (a.x - a.z @ a.atoms - a.leaves["b_dec"]).detach()
    kept = a.pre.masked_fill(~DEAD, -torch.inf)
    z = torch.where(largest(kept, a.options["k_aux"]) > 0, kept, 0).relu()
    share = (e - z @ a.atoms).square().sum() / (e - e.mean(0)).square().sum()
    return a.options["coefficient"] * D * share


def l1(a: Pass) -> Tensor:
    return a.weight() * a.sizes.sum(1).mean()


def l1_of_the_gate(a: Pass) -> Tensor:
    """2404.16014: the penalty falls on ``ReLU(pi)``; here each with the norm of its atom."""
    return a.weight() * (a.pre.relu() * a.atoms.norm(dim=1)).sum(1).mean()


def tanh(a: Pass) -> Tensor:
    return a.weight() * torch.tanh(a.options.get("slope", 4.0) * a.sizes).sum(1).mean()


def tanh_of_jumps(a: Pass) -> Tensor:
    """Codes are not negative, and one that is silent has a slope, by which it teaches its threshold."""
    return a.weight() * torch.tanh(4 * a.z * a.atoms.norm(dim=1)).sum(1).mean()


def on(a: Pass) -> Tensor:
    return open_at(a.pre, a.leaves["selection.threshold"], BANDWIDTH, a.options.get("kernel", "rectangle"))[1]


def l0(a: Pass) -> Tensor:
    return a.weight() * on(a).sum(1).mean()


def l0_target(a: Pass) -> Tensor:
    """A quadratic pull, ``coefficient d_out (L0 / k - 1)^2``."""
    return a.weight() * D * (on(a).sum(1).mean() / a.options["k"] - 1).square()


def gate(a: Pass) -> Tensor:
    """2404.16014: ``||y - ReLU(pi) sg[D] - sg[b_dec]||^2``."""
    frozen = replace(a, leaves={name: p.detach() for name, p in a.leaves.items()})
    return a.options["coefficient"] * frozen.error(a.pre.relu())


def load_balance(a: Pass) -> Tensor:
    """Fedus et al. 2022, eq. 4: ``experts sum_e f_e P_e``, f the share of rows that go to an expert, cut from the graph."""
    p, experts = routes(a), a.options["experts"]
    share = torch.stack([(p.argmax(1) == e).to(p).mean() for e in range(experts)])
    return a.options["coefficient"] * D * experts * (share * p.mean(0)).sum()


def nearest(atoms: Tensor) -> Tensor:
    """``cos^2`` of each atom with the one that is nearest to it."""
    cosine = cosine_similarity(atoms[:, None], atoms[None], dim=-1)
    return (cosine * (1 - torch.eye(len(atoms), dtype=atoms.dtype))).square().amax(1)


def orthogonality(a: Pass) -> Tensor:
    """2509.33033 with the whole dictionary as its one chunk."""
    return a.options["coefficient"] * D * nearest(a.atoms).mean()


def mutual(a: Pass) -> Tensor:
    """2411.01220: ``1 - MMCS``, the mean over both ways of the mean largest cosine, and over peers."""
    found = []
    for peer in PEERS:
        cosine = cosine_similarity(a.atoms[:, None], peer[None], dim=-1)
        found += [1 - cosine.amax(1).mean(), 1 - cosine.amax(0).mean()]
    return a.weight() * torch.stack(found).mean()


LIGHT = {"coefficient": 0.7, "warmup": WARMUP}
TERMS: list[tuple[str, str, dict[str, Any], dict[str, Any], Callable[[Pass], Tensor]]] = [
    # term, selection, the selection's options, the term's, definition
    ("reconstruction", "relu", {}, {}, lambda a: a.error(a.z)),
    ("reconstruction", "topk", {"k": 4}, {}, lambda a: a.error(a.z)),
    ("hierarchical", "topk", {"k": 6}, {}, hierarchical),
    ("hierarchical", "topk", {"k": 6}, {"budgets": (1, 3, 6)}, hierarchical),
    ("hierarchical", "topk", {"k": 6}, {"budgets": (2, 5)}, hierarchical),
    ("matryoshka", "batchtopk", {"k": 6}, {}, matryoshka),
    ("matryoshka", "relu", {}, {"levels": 3}, matryoshka),
    ("matryoshka", "relu", {}, {"prefixes": (2, 7, N)}, matryoshka),
    ("auxk", "topk", {"k": 4}, {"k_aux": 3, "coefficient": 0.25}, auxk),
    ("l1", "relu", {}, LIGHT, l1),
    ("l1", "abstopk", {"k": 4}, LIGHT, l1),
    ("l1", "gated", {}, LIGHT, l1_of_the_gate),
    ("l0", "jumprelu", {"bandwidth": BANDWIDTH}, LIGHT, l0),
    ("l0", "jumprelu", {"bandwidth": BANDWIDTH, "kernel": "triangle"}, LIGHT, l0),
    ("l0_target", "jumprelu", {"bandwidth": BANDWIDTH, "kernel": "parabola"}, {"k": 5.0, **LIGHT}, l0_target),
    ("tanh", "relu", {}, LIGHT, tanh),
    ("tanh", "relu", {}, {"slope": 0.5, **LIGHT}, tanh),
    ("tanh", "jumprelu", {"bandwidth": BANDWIDTH}, LIGHT, tanh_of_jumps),
    ("gate", "gated", {}, {"coefficient": 0.7}, gate),
    ("load_balance", "switch", {"k": 3, "experts": 4}, {"coefficient": 0.7}, load_balance),
    ("load_balance", "switch", {"k": 3, "experts": 4, "heaviside": True}, {"coefficient": 0.7}, load_balance),
    ("orthogonality", "relu", {}, {"coefficient": 0.7, "chunk": N}, orthogonality),
    ("orthogonality", "relu", {}, {"coefficient": 0.7}, orthogonality),  # a chunk wider than the dictionary
    ("mutual", "relu", {}, LIGHT, mutual),
]  # fmt: skip
BESIDE = {"gated": ("gate",)}  # terms that a selection can't do without
ELSEWHERE = {"p_annealed", "end_to_end"}  # below, as they need a run, and a model


def test_every_term_has_a_definition() -> None:
    assert {term for term, *_ in TERMS} | ELSEWHERE == set(OBJECTIVES.table)


@pytest.mark.parametrize("atoms", ["free", "unit_norm"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("term", "selection", "options", "own", "definition"), TERMS,
    ids=["-".join([term, selection, *own, *options]) for term, selection, options, own, _ in TERMS],
)  # fmt: skip
def test_a_term_equals_its_definition(
    term: str, selection: str, options: dict, own: dict, definition: Callable[[Pass], Tensor], seed: int, atoms: str
) -> None:  # fmt: skip
    fit = () if OBJECTIVES[term].fit else ("reconstruction",)
    names = tuple(dict.fromkeys((*fit, term, *BESIDE.get(selection, ()))))
    d = made(selection, names, seed, atoms=atoms, **options, **{f"{term}.{key}": v for key, v in own.items()})
    state = TrainState(AT[seed], STEPS, dead=DEAD, peers=PEERS)
    rows, leaves = rows_of(seed), parameters(d)
    loss = d.loss(rows, state)
    given = Pass(d.norm_in(rows), leaves, {**options, **own}, state)
    given.z = DEFINITIONS[selection](replace(given, options=options))
    expected = definition(given)
    assert expected > 0
    torch.testing.assert_close(loss.terms[term], expected)
    same_gradients(d, loss.terms[term], expected, leaves)
    torch.testing.assert_close(loss.total, torch.stack([*loss.terms.values()]).sum())


def importance_of(codes: list[Tensor]) -> Tensor:
    """The running mean of ``z^2`` over batches, with a memory of 20 of them."""
    out = torch.zeros(N, dtype=torch.float64)
    for z in codes:
        out = 0.95 * out + 0.05 * z.square().mean(0)
    return out


def drawn_prefixes(seed: int, **options: Any) -> tuple[Dictionary, Tensor]:
    """A Matryoshka of random prefixes after some batches, and its features by falling importance ``E[z^2] ||d||^2``."""
    d = made("relu", ("matryoshka",), seed, random=True, **options)
    seen = [d.loss(rows_of(40 + i), TrainState(i, STEPS)).codes for i in range(3)]
    for i, codes in enumerate(seen):
        d.observe(codes, TrainState(i, STEPS))
    energy = importance_of([codes.to_dense() for codes in seen]) * d.W_dec.detach().square().sum(1)
    return d, energy.argsort(descending=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_prefixes_are_of_features_by_importance(seed: int) -> None:
    """With two levels a step's term is the mean of the whole and of one shorter prefix of that order, whichever was drawn."""
    d, order = drawn_prefixes(seed, levels=2)
    assert not torch.equal(order, torch.arange(N))
    rows, lengths = rows_of(seed), set()
    for step in range(6):
        term, leaves = d.loss(rows, TrainState(step, STEPS, seed)).terms["matryoshka"], parameters(d)
        a = Pass(d.norm_in(rows), leaves, {})
        z = DEFINITIONS["relu"](a)
        errors = [a.error(z * torch.isin(torch.arange(N), order[:m])) for m in range(1, N + 1)]
        candidates = torch.stack([(e + errors[-1]) / 2 for e in errors])
        drawn_length = int((candidates - term).abs().argmin())
        torch.testing.assert_close(term, candidates[drawn_length])
        same_gradients(d, term, candidates[drawn_length], leaves)
        lengths.add(drawn_length + 1)
    assert len(lengths) > 2


def test_random_prefixes_have_lengths_by_a_pareto_law() -> None:
    """``P(length >= l) = (l^-a - n^-a) / (1 - n^-a)`` on 1..n, seen through the terms of many steps."""
    d, order = drawn_prefixes(0, levels=2, pareto=0.5)
    rows = rows_of(0, 2)
    a = Pass(d.norm_in(rows), parameters(d), {})
    z = DEFINITIONS["relu"](a).detach()
    with torch.no_grad():
        prefixes = [z * torch.isin(torch.arange(N), order[:m]) for m in range(1, N + 1)]
        errors = torch.stack([a.error(prefix) for prefix in prefixes])
        terms = [d.loss(rows, TrainState(step, None, 5)).terms["matryoshka"] for step in range(300)]
    # features silent on these rows leave lengths that can't be told apart: the shortest stands for them
    away = ((errors + errors[-1]) / 2 - torch.stack(terms)[:, None]).abs().round(decimals=9)
    length = 1 + away.argmin(1)
    for m in range(2, N):
        if errors[m - 1].isclose(errors[m - 2]):
            continue
        law = (m**-0.5 - N**-0.5) / (1 - N**-0.5)
        assert (length >= m).double().mean().item() == pytest.approx(law, abs=0.1)


def test_chunks_are_parts_of_the_dictionary() -> None:
    """Of 6 atoms in chunks of 3 the term is that of one of the 10 ways to cut them, and every way comes up."""
    d = saekit.create(
        "relu", d_in=D, n_features=6, atoms="free", objective=("reconstruction", "orthogonality"), chunk=3,
        **{"orthogonality.coefficient": 1.0},
    ).double()  # fmt: skip
    with torch.no_grad():
        d.atoms.weight.copy_(drawn(3, 6, D))
    d.set_normalisation(rows_of(0))
    atoms, ways = d.W_dec.detach().clone().requires_grad_(), []
    for rest in itertools.combinations(range(1, 6), 2):
        mine = torch.tensor([0, *rest])
        others = torch.tensor([i for i in range(6) if i not in mine.tolist()])
        ways.append(D * torch.cat([nearest(atoms[mine]), nearest(atoms[others])]).mean())
    seen = set()
    for step in range(80):
        term = d.loss(rows_of(0), TrainState(step, STEPS)).terms["orthogonality"]
        way = int((torch.stack(ways) - term).abs().argmin())
        torch.testing.assert_close(term, ways[way])
        expected = torch.autograd.grad(ways[way], atoms, retain_graph=True)[0]
        torch.testing.assert_close(torch.autograd.grad(term, d.atoms.weight)[0], expected)
        seen.add(way)
    assert len(seen) == 10


@pytest.mark.parametrize("steps", [60, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_p_annealing_lowers_p_and_keeps_the_size_of_the_penalty(seed: int, steps: int) -> None:
    """2408.00113: ``lambda_s sum z^p_s``, and ``lambda_(s+1) sum z^p_(s+1) = lambda_s sum z^p_s`` where p changes.

    p is 1 until ``begin``, then goes through ``changes + 1`` equal stretches down to ``p_end``. Powers below 1 are
    taken of codes plus 0.001, so that their slope is bounded. A run of 5 steps skips values of p.
    """
    d = made(
        "relu", ("reconstruction", "p_annealed"), seed, changes=6, begin=0.25, p_end=0.3,
        **{"p_annealed.coefficient": 0.7, "p_annealed.warmup": 0.0},
    )  # fmt: skip
    rows, leaves = rows_of(seed), parameters(d)

    def penalty(p: float) -> Tensor:
        a = Pass(d.norm_in(rows), leaves, {})
        a.z = DEFINITIONS["relu"](a)
        size = a.sizes if p == 1 else torch.where(a.sizes > 0, (a.sizes + 1e-3) ** p, 0)
        return size.sum(1).mean()

    weight, powers = 0.7, [1.0]
    for step in range(steps):
        loss, expected = d.loss(rows, TrainState(step, steps)), weight * penalty(powers[-1])
        torch.testing.assert_close(loss.terms["p_annealed"], expected)
        same_gradients(d, loss.terms["p_annealed"], expected, leaves)
        d.observe(loss.codes, TrainState(step, steps))
        stretch = math.floor(((step + 1) / steps - 0.25) / 0.75 * 7)
        powers.append(1 + (0.3 - 1) * min(6, max(0, stretch)) / 6)
        weight *= penalty(powers[-2]).item() / penalty(powers[-1]).item()
    assert powers[-1] == pytest.approx(0.3) and len(set(powers)) == (7 if steps == 60 else 5)


@pytest.mark.parametrize("term", ["l1", "tanh"])
def test_a_steered_coefficient_follows_its_controller(term: str) -> None:
    """``log c += 0.02 e + (e - e before)``, e = log(L0 / target): L0 averaged over 20 steps, the target falling from the first."""
    options = {"coefficient": 0.7, "k": 3.0, "warmup": 0.0}
    d = made("relu", ("reconstruction", term), 0, **{f"{term}.{key}": v for key, v in options.items()})
    rows = rows_of(0)
    a = Pass(d.norm_in(rows), parameters(d), {**LIGHT, "coefficient": 1.0}, TrainState(STEPS, STEPS))
    a.z = DEFINITIONS["relu"](a)
    whole = {"l1": l1, "tanh": tanh}[term](a)
    log_weight, first, l0, before = math.log(0.7), 0.0, 0.0, 0.0
    for step in range(50):
        loss = d.loss(rows_of(step), TrainState(step, STEPS))
        now = (loss.codes.to_dense() != 0).sum(1).double().mean().item()
        torch.testing.assert_close(
            d.loss(rows, TrainState(step, STEPS)).terms[term], math.exp(log_weight) * whole
        )
        d.observe(loss.codes, TrainState(step, STEPS))
        first, l0 = (first, l0 + (now - l0) / 20) if step else (now, now)
        done = min(1.0, (step + 1) / (0.3 * STEPS))
        e = math.log(l0) - (1 - done) * math.log(first) - done * math.log(3)
        log_weight += 0.02 * e + (e - before if step else 0)
        before = e


@pytest.mark.parametrize("later", [0.0, 0.5])
def test_end_to_end_equals_its_definition(tiny_gpt2, later: float) -> None:
    """2405.12241: KL(original || spliced) and the error of the later blocks, by a forward hook of our own."""
    module = copy.deepcopy(tiny_gpt2.module)
    with torch.no_grad():
        # sure of its predictions, or both directions of KL would be alike
        module.transformer.wte.weight.mul_(20)
    model = load_model(module, tokenizer=tiny_gpt2.tokenizer, name="sure")
    point = "blocks.0.hook_resid_post"
    source = ContinuedSource(saekit.harvest(model, "stdlib", point, tokens=400, context=16))
    batch = next(source.batches(source.hook_points, 4, 0))
    assert isinstance(batch, ActivationBatch) and batch.tokens is not None
    d = saekit.create(
        "relu", d_in=32, n_features=48, atoms="free", objective=("reconstruction", "end_to_end"), kl=0.7, later=later,
    )  # fmt: skip
    d.set_normalisation([batch])
    with torch.no_grad():
        d.atoms.weight.mul_(0.4 + 2 * torch.rand(48, 1, generator=torch.Generator().manual_seed(0)))
    leaves = parameters(d)
    x, states = d.norm_in(batch.rows(point)), []
    z = DEFINITIONS["relu"](Given(x, leaves, {}))
    rows = d.norm_out.invert(z @ leaves["atoms.weight"] + leaves["b_dec"])
    full = batch.activations[point].clone().index_put((batch.mask,), rows)

    def run(replaced: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        def splice(block: nn.Module, _: Any, out: Any) -> Any:
            if replaced is None:
                return None
            return (replaced, *out[1:]) if isinstance(out, tuple) else replaced

        def keep(block: nn.Module, _: Any, out: Any) -> None:
            states.append((out[0] if isinstance(out, tuple) else out)[batch.mask])

        states.clear()
        blocks = module.transformer.h
        handles = [
            blocks[0].register_forward_hook(splice),
            *(b.register_forward_hook(keep) for b in blocks[1:]),
        ]
        logits = model.logits(model.inputs(batch.tokens, batch.documents >= 0))
        for handle in handles:
            handle.remove()
        return logits[batch.mask].log_softmax(-1), list(states)

    with torch.no_grad():
        log_p, clean = run(None)
    log_q, changed = run(full)
    kl = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    other = (log_q.exp() * (log_q - log_p)).sum(1).mean()
    assert (kl / other).log().abs() > 0.1
    shares = [
        (c - h).square().sum() / (h - h.mean(0)).square().sum() for h, c in zip(clean, changed, strict=True)
    ]
    expected = 32 * (0.7 * kl + later * torch.stack(shares).mean())
    term = d.loss(d.gather([batch]), TrainState(downstream=batch.downstream)).terms["end_to_end"]
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-4)
    same_gradients(d, term, expected, leaves, rtol=1e-3, atol=1e-3 * expected.item())


def test_sparse_adam_moves_only_what_has_a_gradient() -> None:
    """2508.16929: moments of all entries decay; those that have a gradient add it and move, the others keep their bits."""
    d = made("topk", ("reconstruction",), 0, k=2)
    trainer = saekit.Trainer(d, lr=1e-2, warmup=1, optimizer="sparse_adam", betas=(0.9, 0.99))
    held = {name: p for name, p in d.named_parameters() if p.requires_grad}
    theirs = {name: p.detach().clone() for name, p in held.items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in held.items()}
    rested = 0
    for step in range(1, 7):
        rows = rows_of(step, 4)  # few rows, so that most features rest
        before = {name: p.detach().clone() for name, p in held.items()}
        twin = copy.deepcopy(d)
        own = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(twin.loss(rows).total, list(own.values()))
        trainer.step(rows)
        for (name, p), g in zip(held.items(), gradients, strict=True):
            m, v = moments[name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.99).addcmul_(g, g, value=0.01)
            change = 1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
            theirs[name] -= torch.where(g != 0, change, 0)
            assert torch.equal(p.detach()[g == 0], before[name][g == 0])
            rested += int((m[g == 0] != 0).sum())
            torch.testing.assert_close(p.detach(), theirs[name])
    assert rested > 100  # entries that Adam would have moved on
    for (m, v), name in zip(trainer.optimizer.moments, held, strict=True):
        torch.testing.assert_close(m, moments[name][0])
        torch.testing.assert_close(v, moments[name][1])
