"""Discrete codes find circuits of heads from ten prompts, without ablating anything (2405.12522)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saekit.circuits import discrete
from saekit.circuits.patching import Metric
from saekit.circuits.spliced import Spliced
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.row import Found, Row
from saekit.testbed import induction, known_circuits
from saekit.testbed.handbuilt import Known
from saekit.testbed.tasks import trained

EXAMPLES, DRAWS, SHUFFLES = 10, 4, 20  # of each kind of prompt; draws of them; shuffles of labels
JUDGED, MATTERS = 60, 0.05  # prompts of the ground truth; what ablating a head has to cost, of ablating all
LENGTH, DISTRACTORS, LAYERS = 10, 2, 3  # of the hand-built model and its prompts
INDUCTION, IOI = "induction, trained", "indirect objects, hand-built"
PAPER, CHANCE = "paper's score", "less chance"
SHUFFLED, EVERYWHERE = "shuffled labels", "heads that matter at earlier tokens count too"


@dataclass(frozen=True)
class _Prompts:
    """Prompts that need the circuit, the same so changed that it has no answer, and the metric of the first."""

    positive: Tensor
    negative: Tensor
    metric: Metric


def _induction(n: int, g: torch.Generator) -> _Prompts:
    """Repeated sequences; in negative ones another token stands where the last one came before."""
    tokens, periods = induction.sequences(n, g)
    rows, at = torch.arange(n), induction.LENGTH - periods
    absent = torch.rand(n, induction.VOCABULARY, generator=g).scatter(1, tokens, -1.0)
    absent[:, 0] = -1
    other = tokens.clone()
    other[rows, at] = absent.argmax(1)
    answers = tokens[rows, at + 1]
    return _Prompts(tokens, other, lambda logits: logits[rows, -1, answers] - logits[:, -1].mean(-1))


def _indirect(known: Known, n: int, g: torch.Generator) -> _Prompts:
    """A gives something to B; in negative ones a third person gives, so that nobody is named twice."""
    chosen = [p for p in known.prompts(60 * n, g) if len(p.tokens) == LENGTH][:n]
    tokens, rows = torch.stack([p.tokens for p in chosen]), torch.arange(n)
    at = torch.tensor([p.pairs[0].query[1] for p in chosen])  # the second mention
    subject, receiver = tokens[rows, at], torch.tensor([p.answers[0] for p in chosen])
    names = torch.rand(n, len(known.outputs), generator=g)
    names[rows, subject - known.outputs[0]] = names[rows, receiver - known.outputs[0]] = -1
    other = tokens.clone()
    other[rows, at] = known.outputs[names.argmax(1)]
    return _Prompts(tokens, other, lambda logits: logits[rows, -1, receiver] - logits[rows, -1, subject])


def _judged(spliced: Spliced, few: _Prompts, last: Tensor, whole: Tensor, seed: int, layers: int) -> Found:
    """AUC of one draw of prompts against the heads that matter, and with shuffled labels; seconds of finding them."""
    g, began = torch.Generator().manual_seed(seed), time.monotonic()
    made = discrete.written(spliced.weights, torch.cat([few.positive, few.negative]))
    codes = discrete.codes(discrete.fit(made.flatten(0, 1), seed=seed), made)
    labels = torch.arange(len(codes)) < len(few.positive)
    scores = discrete.node_scores(codes, labels)
    edges = discrete.edge_scores(codes, labels, layers)
    out: Found = {"seconds": time.monotonic() - began}
    for name, chance in ((PAPER, False), (CHANCE, True)):
        scores = discrete.node_scores(codes, labels, chance)
        none = [
            discrete.roc_auc(
                discrete.node_scores(codes, labels[torch.randperm(len(labels), generator=g)], chance), last
            )
            for _ in range(SHUFFLES)
        ]
        out[name] = {
            "AUC": discrete.roc_auc(scores, last),
            EVERYWHERE: discrete.roc_auc(scores, whole),
            SHUFFLED: sum(none) / SHUFFLES,
        }
    per = len(last) // layers
    later = torch.arange(len(last)) // per
    pairs = later[:, None] < later
    true = (last[:, None] & last)[pairs]
    if true.any() and not true.all():
        out["AUC of edges"] = discrete.roc_auc(edges[pairs], true)
    return out


def _mean(of: Sequence[Found]) -> Found:
    first = of[0]
    return {
        key: _mean([one[key] for one in of])
        if isinstance(first[key], dict)
        else sum(one[key] for one in of) / len(of)
        for key in first
    }


def measure(seed: int, tell: Tell) -> Found:
    """Heads found from ten prompts of each kind, against exhaustive ablation of every head, in two models."""
    tell(0, 3, "training a model on induction")
    known = known_circuits.indirect_object(distractors=DISTRACTORS, rotate=True, seed=seed)
    worlds = {
        INDUCTION: (discrete.heads(trained("induction", seed).model), _induction, induction.LAYERS),
        IOI: (discrete.heads(known.model), lambda n, g: _indirect(known, n, g), LAYERS),
    }
    out: Found = {}
    for step, (name, (spliced, draw, layers)) in enumerate(worlds.items()):
        tell(1 + step, 3, name)
        many = draw(JUDGED, torch.Generator().manual_seed(1000 + seed))
        last, whole = (
            discrete.ablated(spliced, many.metric, many.positive, many.negative, last=at) >= MATTERS
            for at in (True, False)
        )
        found = []
        for i in range(DRAWS):
            few = draw(EXAMPLES, torch.Generator().manual_seed(100 * seed + i))
            found.append(_judged(spliced, few, last, whole, 100 * seed + i, layers))
        out[name] = {**_mean(found), "heads that matter": int(last.sum()), "heads": len(last)}
    return out


def judge(found: Found) -> Reproduction:
    """The paper's score and the same less chance, each beside shuffled labels."""
    none = "no number for this task"

    def claim(text: str, task: str, score: str) -> Claim:
        one = found[task][score]
        return Claim(text, "0.8 to 0.9 on IOI, greater-than and docstring in GPT-2 small", one["AUC"], ">=", 0.8, one[SHUFFLED], SHUFFLED)  # fmt: skip

    def off(task: str, score: str) -> list[float]:
        return [abs(v - 0.5) for v in found[task][score][SHUFFLED]]

    tasks = (INDUCTION, IOI)
    seconds = [max(values) for values in zip(*(found[task]["seconds"] for task in tasks), strict=True)]
    return Reproduction(
        title="Discrete codes of heads find a circuit from ten prompts",
        source="O'Neill & Bui 2024, arXiv 2405.12522",
        setting=f"{EXAMPLES} prompts that need the circuit and the same {EXAMPLES} changed in one token so that it has no answer, {DRAWS} draws of them a seed; truth: heads whose mean ablation at the last token, where codes are read, costs at least {MATTERS:.0%} of what ablating all costs; a 2-layer model trained on induction (a model a seed), hand-built indirect objects with distractors",
        claims=[
            claim("induction: AUC of the paper's score", INDUCTION, PAPER),
            claim("induction: AUC of the score less chance", INDUCTION, CHANCE),
            claim("indirect objects: AUC of the paper's score", IOI, PAPER),
            claim("indirect objects: AUC of the score less chance", IOI, CHANCE),
            Claim("induction: the paper's score with shuffled labels, distance of its AUC from 0.5", none, off(INDUCTION, PAPER), "<=", 0.1),
            Claim("induction: the score less chance with shuffled labels, distance of its AUC from 0.5", none, off(INDUCTION, CHANCE), "<=", 0.1),
            Claim("indirect objects: AUC of edges, the paper's score", none, found[IOI]["AUC of edges"], ">=", 0.8),
            Claim("seconds from prompts to scores, the slower task", "seconds, where ablation takes hours", seconds, "<=", 10),
        ],
        figure=bars("Heads of the circuit, found from ten prompts", "ROC-AUC", {f"{score}, {what}": {task: found[task][score][key] for task in tasks} for score in (PAPER, CHANCE) for what, key in (("true labels", "AUC"), (SHUFFLED, SHUFFLED))}),
        notes=[
            "The paper counts codes that only positive prompts have. Heads that write something else on every prompt have many of them whatever the labels are: with shuffled labels the count finds the same heads, so its AUC says which heads write much that varies, not which ones the task needs.",
            "Less what shuffled labels give on average, the score has an AUC of about 0.5 if labels mean nothing. It finds induction heads, but not heads that write one of the same names on prompts of both kinds: their codes are names, and no name is of one kind alone.",
        ],
        controls={key: {f"{task}, {score}": found[task][score][key] for task in tasks for score in (PAPER, CHANCE)} for key in ("AUC", SHUFFLED, EVERYWHERE)},
    )  # fmt: skip


ROW = Row(measure, judge)
