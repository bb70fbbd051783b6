"""Transcoder circuits: an edge is what the prompt has times what the weights have, and de-embeddings name features (2406.11944)."""

import torch
from scipy.stats import spearmanr

from saekit.circuits.invariant import de_embedding, factors, paths
from saekit.circuits.places import Neurons
from saekit.circuits.qk import loadings
from saekit.circuits.targets import Feature
from saekit.circuits.trace import trace, traced
from saekit.circuits.weights import weights
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import RANDOM
from saekit.papers.row import Found, Row
from saekit.testbed import tasks
from saekit.testbed.handbuilt import Known
from saekit.testbed.known_neurons import greater_than

PROMPTS, DISTRACTORS, FEATURES = 20, 2, 40
BUILT, TRAINED = "built by hand", "trained"


def _thresholds(known: Known, seed: int) -> dict[str, float]:
    """Rank correlation of the year from which a neuron is on, by its de-embedding, with that of the built ramp.

    Beside it the same of random covectors with the neurons' biases.
    """
    w, years = weights(known.model), known.outputs.tolist()
    mlp, a = w.blocks[0].mlp, w.blocks[0].attention
    assert mlp is not None
    read, bias = mlp.W_in[: len(years)], mlp.b_in[: len(years)]
    g = torch.Generator().manual_seed(seed)
    random = torch.randn(read.shape, generator=g) * read.norm(dim=1, keepdim=True) / read.shape[1] ** 0.5
    brought = torch.einsum("hov,hvi->oi", a.W_O[:1], a.W_V[:1])  # by the head that looks at the year
    out = {}
    for name, covectors in (("own", read), (RANDOM, random[torch.randperm(len(random), generator=g)])):
        found = de_embedding(w, (0, "attn_in"), covectors @ brought)[:, years] + bias[:, None]
        first = torch.where((found > 0).any(1), (found > 0).int().argmax(1), len(years))
        rank = spearmanr(first.numpy(), range(len(years))).statistic
        out[name] = float(rank) if first.unique().numel() > 1 else 0.0
    return out


def _factorised(model: Model, tokens: torch.Tensor, seed: int) -> dict[str, float]:
    """The largest miss of ``invariant * dependent`` against traced edges, by the stream and by each head; and shuffled."""
    stands = [Neurons(f"blocks.{i}.mlp") for i in range(2)]
    run = traced(model, stands, tokens)
    earlier, later = run.parts
    some = (
        torch.randperm(len(later.part.positions), generator=torch.Generator().manual_seed(seed))[:FEATURES]
        .sort()
        .values
    )
    ways = [None, *((1, h) for h in range(run.frozen.queries[1].heads))]
    found = [factors(run, earlier, later, way).edges[some] for way in ways]
    missed, size, paired = 0.0, 0.0, 0.0
    for i, entry in enumerate(some.tolist()):
        target = Feature(int(later.part.features[entry]), later.stand, int(later.part.positions[entry]))
        parts = loadings(run, target)
        true = [torch.from_numpy(parts.rest), *torch.from_numpy(parts.heads[1])]
        for mine, row in zip(found, true, strict=True):
            missed = max(missed, (mine[i] - row[earlier.nodes]).abs().max().item())
            paired = max(paired, (mine[i].flip(0) - row[earlier.nodes]).abs().max().item())
            size = max(size, row[earlier.nodes].abs().max().item())
    return {"miss": missed / size, "shuffled": paired / size}


def measure(seed: int, tell: Tell) -> Found:
    """A greater-than circuit with distractors, its ways rotated, and a trained one."""
    known = greater_than(distractors=DISTRACTORS, rotate=True, seed=seed)
    thresholds = _thresholds(known, seed)
    prompts = known.prompts(PROMPTS, torch.Generator().manual_seed(seed))
    right = []
    for prompt in prompts:
        graph = trace(known.model, Neurons("blocks.0.mlp"), prompt.tokens, [prompt.answers[-1]])
        year = {edge.source[1] for edge in prompt.edges if edge.source[0] == "token"}
        tokens = [p.nodes[-1] for p in paths(graph) if graph.of_kind("token")[p.nodes[-1]]]
        right += [float(int(graph.nodes.position[tokens[0]]) in year)] if year and tokens else []
    tell(1, 2, "training")
    trained = tasks.trained("induction", seed)
    prompt_tokens = trained.task.prompts(1, torch.Generator().manual_seed(seed)).tokens[0]
    return {
        "spearman": thresholds, "solved": float(known.solved(prompts).float().mean()), "year": sum(right) / len(right),
        **_factorised(trained.model, prompt_tokens, seed),
    }  # fmt: skip


def judge(found: Found) -> Reproduction:
    """Both parts of the calculus."""
    own, random = found["spearman"]["own"], found["spearman"][RANDOM]
    return Reproduction(
        title="Transcoder circuits are what the prompt has times what the weights have",
        source="Dunefsky et al. 2024, arXiv 2406.11944",
        setting=f"a greater-than circuit {BUILT}, rotated, {DISTRACTORS} distracting heads and neurons; a {TRAINED} 2-layer induction model with its own neurons, {FEATURES} of them",
        claims=[
            Claim("rank correlation of neurons' thresholds by their de-embeddings with the true ones", "the greater-than circuit was read off de-embeddings (figures)", own, ">=", 0.99, random, "random covectors"),
            Claim("largest miss of invariant x dependent, over the largest edge: stream and every head", "exact by construction", found["miss"], "<=", 1e-5, found["shuffled"], "earlier features shuffled"),
            Claim("share of prompts whose strongest path from a token begins at the year", "paths lead to the YY token", found["year"], ">=", 0.9),
        ],
        figure=bars("De-embeddings of greater-than neurons", "rank correlation with the true threshold", {"greater-than": {"neurons": own, RANDOM: random}}),
        controls={"task solved": {BUILT: found["solved"]}},
    )  # fmt: skip


ROW = Row(measure, judge)
