"""Circuits of heads from a handful of prompts, without ablating anything: discrete codes (O'Neill & Bui 2024, 2405.12522).

What every head writes at one token, on prompts that need the circuit and on prompts of the same template that it can't
answer, is put into the features of one small dictionary, and a head's code is its strongest feature there. Heads with
codes that only the first prompts have are the circuit; two heads have an edge by the pairs of their codes.
"""

from collections.abc import Sequence
from math import lgamma

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.circuits.ablation import Yardstick
from saekit.circuits.patching import Metric, Prompts
from saekit.circuits.places import Heads
from saekit.circuits.spliced import Spliced
from saekit.circuits.weights import Weights, weights
from saekit.dictionaries import Dictionary, create
from saekit.dictionaries.training import TrainState
from saekit.models import Model, load_model
from saekit.types import SaekitError

FEATURES, L1, STEPS, RATE = (
    128,
    0.2,
    300,
    1e-3,
)  # 100 to 200 features and a few hundred epochs, as in the paper
SILENT = -1  # the code of a head none of whose features is active


def heads(model: "Model | str | nn.Module") -> Spliced:
    """The model with all its heads as nodes: a group for each layer, of n_heads * d_head dimensions."""
    model = load_model(model)
    places = [next(p for p, site in b.places.items() if site == "attn_out") for b in weights(model).blocks]
    return Spliced(model, [Heads(place) for place in places])


def _shape(w: Weights) -> tuple[int, int]:
    """Layers, and heads of each; numbers of heads count through all layers."""
    counts = {len(b.attention.W_O) for b in w.blocks}
    if len(counts) > 1:
        raise SaekitError(
            f"layers have {sorted(counts)} heads; give a model whose layers have the same number"
        )
    return len(w.blocks), counts.pop()


@torch.no_grad()
def written(
    model: Weights, prompts: Sequence[Tensor] | Tensor, position: int = -1
) -> Float[Tensor, "prompt head d"]:
    """What every head writes at a position of each prompt (token ids, of any lengths); those of layer 0 come first."""
    _shape(model)
    out = []
    for tokens in prompts:
        seen, _ = model.run(tokens)
        each = [
            torch.einsum(
                "hv,hov->ho", at["z"][position].unflatten(-1, (len(b.attention.W_O), -1)), b.attention.W_O
            )
            for at, b in zip(seen, model.blocks, strict=True)
        ]
        out.append(torch.cat(each))
    return torch.stack(out)


def fit(
    rows: Float[Tensor, "row d"], n_features: int = FEATURES, coefficient: float = L1, steps: int = STEPS,
    seed: int = 0,
) -> Dictionary:  # fmt: skip
    """A ReLU dictionary of what all heads wrote, by Adam on all rows at once: for some hundred rows, in seconds."""
    d = create("relu", d_in=rows.shape[1], n_features=n_features, coefficient=coefficient, seed=seed)
    d.prepare(rows)
    optimizer = torch.optim.Adam([p for p in d.parameters() if p.requires_grad], RATE)
    for step in range(steps):
        loss = d.loss(rows, TrainState(step, steps, seed))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        d.after_step()
    return d


@torch.no_grad()
def codes(d: Dictionary, made: Float[Tensor, "prompt head d"]) -> Int[Tensor, "prompt head"]:
    """The strongest feature of what every head wrote on every prompt, or SILENT."""
    strength, code = d.encode(made).to_dense().max(-1)
    return torch.where(strength > 0, code, SILENT).view(made.shape[:-1])


def _count(codes: Int[Tensor, " prompt"], positive: Bool[Tensor, " prompt"], chance: bool) -> float:
    """Positive prompts whose code no negative one has; ``chance``: less what shuffled labels give on average.

    A code of c prompts among n, of which p are positive, falls to positives alone with probability
    ``C(n - c, p - c) / C(n, p)``.
    """
    of, counts = torch.unique(codes, return_counts=True)
    only = ~torch.isin(of, codes[~positive])
    found = float(counts[only].sum()) if chance else float(only.sum())
    if not chance:
        return found
    n, p = len(codes), int(positive.sum())
    expected = sum(c * _within(n - c, p - c, n, p) for c in counts.tolist() if c <= p)
    return found - expected


def _within(a: int, b: int, n: int, p: int) -> float:
    """``C(a, b) / C(n, p)``."""

    def log(m: int, k: int) -> float:
        return lgamma(m + 1) - lgamma(k + 1) - lgamma(m - k + 1)

    return float(torch.tensor(log(a, b) - log(n, p)).exp())


def node_scores(
    codes: Int[Tensor, "prompt head"], positive: Bool[Tensor, " label"], chance: bool = False
) -> Float[Tensor, " head"]:
    """How many codes of each head are used on positive prompts and never on negative ones (the paper's score).

    A head whose codes differ from prompt to prompt has many such codes, whatever the labels. ``chance``: how many
    positive prompts have such a code, less how many would by chance; about 0 for every head if labels mean nothing.
    """
    _check(codes, positive)
    return torch.tensor([_count(column, positive, chance) for column in codes.T])


def edge_scores(
    codes: Int[Tensor, "prompt head"], positive: Bool[Tensor, " label"], layers: int, chance: bool = False
) -> Float[Tensor, "head head"]:
    """The same for pairs of codes, of a head [row] and one of a later layer [column]; 0 elsewhere."""
    _check(codes, positive)
    n = codes.shape[1]
    out, each = torch.zeros(n, n), n // layers
    pairs = codes.long() + 1
    width = int(pairs.max()) + 1
    for a in range(n):
        for b in range((a // each + 1) * each, n):
            out[a, b] = _count(pairs[:, a] * width + pairs[:, b], positive, chance)
    return out


def _check(codes: Tensor, positive: Tensor) -> None:
    if len(codes) != len(positive) or positive.all() or not positive.any():
        raise SaekitError(
            f"positive marks {int(positive.sum())} of {len(positive)} prompts and there are codes of {len(codes)}; give both kinds"
        )


def above(scores: Float[Tensor, "*node"], threshold: float) -> Bool[Tensor, "*node"]:
    """The circuit: nodes or edges whose score is at least this share of the largest."""
    return scores >= threshold * scores.max().clamp(min=1e-12)


def ablated(
    spliced: Spliced, metric: Metric, tokens: Prompts, other: Prompts, last: bool = False
) -> Float[Tensor, " head"]:
    """Ground truth, by a pass for every head: what its mean ablation costs of what ablating all heads does.

    The mean is over ``other`` prompts, at the same position; ``last``: at the last token only, where codes are read.
    """
    layers, each = _shape(spliced.weights)
    yard = Yardstick(spliced, metric, tokens, other)
    seq, out = yard.tokens.shape[1], torch.zeros(layers, each)
    for layer in range(layers):
        for head in range(each):
            circuit = [torch.ones(seq, group.n, dtype=torch.bool) for group in spliced.groups]
            circuit[layer].view(seq, each, -1)[-1 if last else slice(None), head] = False
            out[layer, head] = 1 - yard.faithfulness(circuit)
    return out.flatten()


def roc_auc(scores: Float[Tensor, " node"], truth: Bool[Tensor, " node"]) -> float:
    """Probability that a true node scores above one that is not, ties counting half."""
    if truth.all() or not truth.any():
        raise SaekitError(
            f"truth marks {int(truth.sum())} of {len(truth)} nodes; it needs nodes of both kinds"
        )
    off = scores[truth][:, None] - scores[~truth]
    return float(((off > 0).double() + 0.5 * (off == 0).double()).mean())
