"""Sparse feature circuits: fewer features than neurons explain a behaviour, and spurious ones can be removed (2403.19647)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from saekit.circuits.ablation import Yardstick, ablate, areas, top
from saekit.circuits.patching import METHODS, effects, way
from saekit.circuits.places import Heads, Neurons, Stand
from saekit.circuits.spliced import Changes, Spliced
from saekit.dictionaries import Dictionary, create
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed import agreement, biographies
from saekit.testbed.tasks import Task, fit

LAYERS, D = 2, 64
SHAPE: dict[str, Any] = {"d_in": D, "n_features": 256, "k": 8}
SENTENCES, AT_ONCE, STEPS, BATCH = 6000, 512, 200, 1024  # of dictionaries' training
HALVES = [f"layers.{i}.{half}:out" for i in range(LAYERS) for half in ("self_attn", "mlp")]
STREAM = ["layers.0:in", *(f"layers.{i}:out" for i in range(LAYERS))]
FEATURES, NEURONS, NODES = "features", "neurons and heads", "random nodes"
PAIRS, HELD_OUT, EXACT = 64, 128, 16
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
FAITHFUL = 0.9
MANY, FEW, FIRST = "40 steps", "10 steps", "attribution patching"
HOW: dict[str, dict[str, Any]] = {MANY: {"steps": 40}, FEW: {"steps": 10}, FIRST: {"method": "attribution"}}
READOUT, LIVES, TEXTS, EXAMINED, SHARE = "layers.1:out", 64, 1000, 150, 0.8
SHIFT, RETRAINED, ANY = "SHIFT", "SHIFT, probe retrained", "as many random features"


def _model(task: Task, seed: int) -> Model:
    *_, (module, _) = fit(task, seed)
    return load_model(module, name=task.name)


def _dictionaries(model: Model, points: Sequence[str], tokens: Tensor, seed: int) -> dict[str, list[Stand]]:
    """Dictionaries of some places, one list for each kind, trained on the same rows."""
    ds: dict[str, Dictionary] = {}
    for kind, preset in ((FEATURES, "topk"), (FROZEN, "frozen")):
        for point in points:
            ds[f"{kind} {point}"] = d = create(preset, seed=seed, **SHAPE)
            d.reads = d.writes = (point,)
    fit_all(ds, harvest(model, list(tokens.split(AT_ONCE)), points, tokens=None), STEPS, BATCH, seed=seed)
    out: dict[str, list[Stand]] = {kind: [ds[f"{kind} {p}"] for p in points] for kind in (FEATURES, FROZEN)}
    return out | {RANDOM: [untrained(ds[f"{FROZEN} {p}"]) for p in points]}


class _Agreement:
    """Sentences whose subject's number is changed; the metric is how much verbs of the other number are preferred."""

    def __init__(self, n: int, generator: torch.Generator):
        clean, patch = agreement.pairs(n, generator)
        self.clean, self.patch = clean.tokens, patch.tokens
        self.plural = (clean.answers[:, -1] >= agreement.FIRST_VERB + agreement.VERBS).long()

    def __call__(self, logits: Tensor) -> Tensor:
        return agreement.preference(logits, self.plural)


def _circuits(seed: int) -> Found:
    """Circuits of subject-verb agreement in features and in neurons, and how far integrated gradients add up."""
    model, g = _model(agreement.TASK, seed), torch.Generator().manual_seed(1000 + seed)
    stands = _dictionaries(model, HALVES, agreement.prompts(SENTENCES, g).tokens, seed)
    stands[NEURONS] = [
        kind(f"layers.{i}.{half}")
        for i in range(LAYERS)
        for kind, half in ((Heads, "self_attn"), (Neurons, "mlp"))
    ]
    task, held_out = _Agreement(PAIRS, g), _Agreement(HELD_OUT, g)
    out: Found = {name: _curve(Spliced(model, s), task, held_out, seed) for name, s in stands.items()}
    stream = [create("random", **SHAPE, seed=seed) for _ in STREAM]
    for d, point in zip(stream, STREAM, strict=True):
        d.reads = d.writes = (point,)
    missed = {}
    for name, how in HOW.items():
        missed[name] = [
            off for s in (stands[FEATURES], stream) for off in _missed(Spliced(model, s), task, how)
        ]
    return {
        "circuits": out,
        "missed": missed,
        "ranks": _ranks(Spliced(model, stands[FEATURES]), _Agreement(EXACT, g)),
    }


def _curve(spliced: Spliced, task: _Agreement, held_out: _Agreement, seed: int) -> Found:
    """Faithfulness on other sentences of the circuits of the nodes with the strongest effects, by their number."""
    found = effects(spliced, task, task.clean, task.patch)
    yardstick = Yardstick(spliced, held_out, held_out.clean, held_out.patch)
    scores, active = found.mean(), found.active()
    curve = [yardstick.faithfulness(top(scores, n)) for n in SIZES]
    total = sum(int(on.sum()) for on in active)
    needed = next((n for n, f in zip(SIZES, curve, strict=True) if f >= FAITHFUL), total)
    kept = top(scores, needed)
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.rand(on.shape, generator=g) * on for on in active]
    cpr, cmd = areas(yardstick.curve(found))
    sizes = {
        kind: sum(float(s.abs().sum()) for s, g in zip(scores, found.groups, strict=True) if g.kind == kind)
        for kind in ("feature", "error")
    }
    return {
        "curve": curve, "nodes": needed, "active": total, "share": needed / total, "CPR": cpr, "CMD": cmd,
        "others": yardstick.completeness(kept), "errors": sizes["error"] / sum(sizes.values()),
        NODES: [yardstick.faithfulness(top(drawn, n)) for n in SIZES],
    }  # fmt: skip


def _ranks(spliced: Spliced, task: _Agreement) -> dict[str, float]:
    """Rank correlation of effects with those of patching nodes one by one."""
    from scipy.stats import spearmanr

    exact, *others = (effects(spliced, task, task.clean, task.patch, method).mean() for method in METHODS)
    one = torch.cat([mean.flatten() for mean in exact])
    differs = one != 0
    return {
        name: float(
            spearmanr(one[differs], torch.cat([m.detach().flatten() for m in means])[differs]).statistic
        )
        for name, means in zip((FIRST, FEW), others, strict=True)
    }


def _missed(spliced: Spliced, task: _Agreement, how: dict[str, Any]) -> list[float]:
    """At each site: by how much a prompt's effects miss what patching all of it does, over what patching the prompt does."""
    found = effects(spliced, task, task.clean, task.patch, **how)
    with torch.no_grad():
        start, end = spliced.run(task.clean), spliced.run(task.patch)
        own, whole = task(start.out), (task(end.out) - task(start.out)).abs().mean()
        out = []
        for unit in spliced.units:
            moved = task(spliced.run(task.clean, Changes(added=way(start, end, unit))).out) - own
            told = torch.stack([found.by_prompt[g].to_dense().sum((1, 2)) for g in unit]).sum(0)
            out.append(((told - moved).abs().mean() / whole).item())
    return out


class _Probe:
    """A classifier of the mean over positions of what is read."""

    def __init__(self, x: Tensor, field: Tensor):
        from sklearn.linear_model import LogisticRegression

        fitted = LogisticRegression(max_iter=5000).fit(x.mean(1).numpy(), field.numpy())
        self.w, self.b = torch.tensor(fitted.coef_[0]).float(), float(fitted.intercept_[0])

    def __call__(self, x: Tensor) -> Tensor:
        """The log odds of field 1."""
        return x.mean(1) @ self.w + self.b


def _accuracies(probe: _Probe, x: Tensor, field: Tensor, gender: Tensor) -> dict[str, float]:
    said = (probe(x) > 0).long()
    cells = [said[(field == f) & (gender == g)] == f for f in (0, 1) for g in (0, 1)]
    return {
        "field": (said == field).float().mean().item(), "gender": (said == gender).float().mean().item(),
        "worst group": min(cell.float().mean().item() for cell in cells),
    }  # fmt: skip


class _Lives:
    """What classifiers are trained and tested on: training data in which gender tells the field, and data where not."""

    def __init__(self, generator: torch.Generator):
        self.field = torch.randint(2, (TEXTS,), generator=generator)
        self.train = biographies.lives(self.field, self.field, generator)
        self.fair, self.test, self.texts = ((*biographies.drawn(TEXTS, generator),) for _ in range(3))
        self.tokens = [biographies.lives(*who, generator) for who in (self.fair, self.test, self.texts)]


def _spurious(spliced: Spliced, probe: _Probe, lives: _Lives) -> dict[int, Tensor]:
    """In the place of the person who judges features: those of the probe's circuit that fire for one gender.

    ``SHARE`` of what they add up to on ordinary texts, of which the field is not known, is in those of one gender.
    """
    sign = 2 * lives.field[:LIVES] - 1
    found = effects(spliced, lambda x: probe(x) * sign, lives.train[:LIVES])
    circuit = top(found.mean(positions=False), EXAMINED)
    (_, gender), tokens = lives.texts, lives.tokens[2]
    with torch.no_grad():
        run = spliced.run(tokens)
    out = {}
    for g, group in enumerate(spliced.groups):
        if group.kind == "feature":
            sums = run.codes(g).to_dense().sum(1).detach()
            both = torch.stack([sums[gender == k].mean(0) for k in (0, 1)])
            out[group.stand] = ((both.amax(0) >= SHARE * both.sum(0)) & circuit[g]).nonzero()[:, 0]
    return out


def _removed(spliced: Spliced, features: Mapping[int, Tensor], probe: _Probe, lives: _Lives) -> Found:
    """Accuracies where features are ablated, of the probe and of one that is trained behind the ablation."""
    with torch.no_grad():
        train, test = (ablate(spliced, tokens, features) for tokens in (lives.train, lives.tokens[1]))
    return {
        SHIFT: _accuracies(probe, test, *lives.test),
        RETRAINED: _accuracies(_Probe(train, lives.field), test, *lives.test),
        "features": sum(len(f) for f in features.values()),
    }


def _shift(seed: int) -> Found:
    """A probe of the field whose training data confound it with gender, before and after features are removed."""
    model, g = _model(biographies.TASK, seed), torch.Generator().manual_seed(2000 + seed)
    stands = _dictionaries(model, [STREAM[0], *HALVES], biographies.prompts(SENTENCES, g).tokens, seed)
    lives = _Lives(g)
    plain = Spliced(model, [], READOUT)
    with torch.no_grad():
        train, fair, test = (plain.run(t).out for t in (lives.train, *lives.tokens[:2]))
    probe, oracle = _Probe(train, lives.field), _Probe(fair, lives.fair[0])
    out: Found = {
        "probe": _accuracies(probe, test, *lives.test),
        "oracle": _accuracies(oracle, test, *lives.test),
    }
    for name, own in stands.items():
        spliced = Spliced(model, own, READOUT)
        chosen = _spurious(spliced, probe, lives)
        out[name] = _removed(spliced, chosen, probe, lives)
        if name == FEATURES:
            with torch.no_grad():
                run = spliced.run(lives.tokens[2])
            fires = {
                spliced.groups[u[0]].stand: (run.codes(u[0]).firing_counts() > 0).nonzero()[:, 0]
                for u in spliced.units
            }
            drawn = {i: f[torch.randperm(len(f), generator=g)[: len(chosen[i])]] for i, f in fires.items()}
            out[ANY] = _removed(spliced, drawn, probe, lives)
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Circuits of agreement in one small model, and a confounded probe of another."""
    tell(0, 2, "subject-verb agreement")
    circuits = _circuits(seed)
    tell(1, 2, "a confounded probe")
    return {**circuits, "shift": _shift(seed)}


def judge(found: Found) -> Reproduction:
    """Numbers of nodes at equal faithfulness, and accuracies of the group that the probe does worst on."""
    circuits, missed, shift = found["circuits"], found["missed"], found["shift"]
    mine = circuits[FEATURES]

    def fewer(name: str) -> list[float]:
        return [a / b for a, b in zip(circuits[NEURONS]["nodes"], circuits[name]["nodes"], strict=True)]

    def worst(how: str) -> list[float]:
        return [max(sites) for sites in missed[how]]

    def gained(accuracies: Found) -> list[float]:
        return [a - b for a, b in zip(accuracies["worst group"], shift["probe"]["worst group"], strict=True)]

    def mean(curves: Sequence[Sequence[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*curves, strict=True)]

    lines = {name: (SIZES, mean(c["curve"])) for name, c in circuits.items()}
    shown = {"probe": shift["probe"], "oracle: trained on fair data": shift["oracle"]}
    for name in (FEATURES, ANY, FROZEN, RANDOM):
        shown |= {
            f"{name}: {kind}" if name != FEATURES else kind: shift[name][kind] for kind in (SHIFT, RETRAINED)
        }
    return Reproduction(
        title="Circuits of sparse features are smaller than those of neurons, and editing them removes a spurious cue",
        source="Marks et al. 2025 (ICLR), arXiv 2403.19647; CPR and CMD: Mueller et al. 2025, arXiv 2504.13151",
        setting=f"{LAYERS}-layer transformers of width {D}; {SHAPE['n_features']} features, k = {SHAPE['k']}, on what attention and MLPs write (the probe: and on embeddings); agreement across a relative clause, effects on {PAIRS} pairs, faithfulness on {HELD_OUT} others with means outside; probe: {TEXTS} lives, field = gender in training, tested on {TEXTS} fair ones; a feature is removed that is among {EXAMINED} nodes of the probe's circuit and has {SHARE:.0%} of its activation in texts of one gender",
        claims=[
            Claim(f"integrated gradients, {MANY}: what a site's effects miss of patching all of it, over m(patch) - m(clean), worst site", "an axiom; its code's left Riemann sum of 10 steps misses it by O(1/N)", worst(MANY), "<=", 0.02, worst(FEW), f"{FEW}, as many as the paper's, by the midpoint rule"),
            Claim(f"nodes of neurons and heads over those of features at faithfulness {FAITHFUL}", "about 1500 neurons for what takes 100 features, in Pythia-70M", fewer(FEATURES), ">=", 2.0, fewer(FROZEN), FROZEN),
            Claim(f"share of the active nodes that faithfulness {FAITHFUL} takes", "no number", mine["share"], "<=", 0.1, circuits[NEURONS]["share"], NEURONS),
            Claim("what these nodes leave outside: faithfulness of all others", "near 0, in Pythia-70M", mine["others"], "<=", 0.2),
            Claim("CPR of features", "no number", mine["CPR"], ">=", 0.9, circuits[RANDOM]["CPR"], RANDOM),
            Claim("CMD of features", "no number", mine["CMD"], "<=", 0.1, circuits[RANDOM]["CMD"], RANDOM),
            Claim("SHIFT: gain in accuracy of the worst group", "0.516 (0.244 to 0.760, Bias in Bios)", gained(shift[FEATURES][SHIFT]), ">=", 0.3, gained(shift[ANY][SHIFT]), ANY),
            Claim("SHIFT and a retrained probe: gain in accuracy of the worst group", "0.646 (0.244 to 0.890, Bias in Bios)", gained(shift[FEATURES][RETRAINED]), ">=", 0.3, gained(shift[ANY][RETRAINED]), ANY),
        ],
        figure=figure("Agreement across a relative clause: what circuits keep", "nodes", "faithfulness", {**lines, NODES: (SIZES, mean(mine[NODES]))}, xaxis={"type": "log"}),
        notes=[
            "Errors are nodes as well: where a dictionary leaves much over, few errors carry the behaviour, and a circuit is small without saying anything (errors: their share of the absolute effects). CPR and CMD count nodes by their share, of which neurons have more. "
            "The paper's neurons are the coordinates of what modules write; those of an MLP's activations come closer to features (Arora et al. 2026, arXiv 2601.22594). "
            "Where many nodes carry the same, moving one of them changes little else, and first-order effects rank them more like exact patching than integrated gradients, which move all of a site; these alone add up (Spearman: with exact effects of features). "
            "As in Bias in Bios, what is spurious shows in single tokens, so that it could be left out of the text as well."
        ],
        controls={
            **{key: {name: c[key] for name, c in circuits.items()} for key in ("nodes", "active", "errors", "CPR", "CMD")},
            "missed": {how: worst(how) for how in HOW},
            "Spearman": found["ranks"],
            **{key: {name: a[key] for name, a in shown.items()} for key in ("field", "gender", "worst group")},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
