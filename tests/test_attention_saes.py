"""Features of what heads gather are sums over heads and sources, and those over everything that was written there."""

import pytest
import torch
from test_circuits import LAYERS, TOKENS
from test_weights import TOYS, toy

import saekit
from saekit.circuits import attention_saes
from saekit.circuits.frozen import Frozen
from saekit.circuits.places import Heads, Neurons, Stand, place
from saekit.circuits.rows import Trace
from saekit.circuits.weights import weights
from saekit.graph import KINDS
from saekit.models import Model
from saekit.types import SaekitError

POINT = "layers.{}.self_attn.o_proj:in"


def dictionary(m: Model, layer: int, name: str = "topk") -> saekit.Dictionary:
    """A dictionary of what a layer's heads gather, with biases."""
    d = saekit.create(name, d_in=32, n_features=96, seed=layer, **({"k": 8} if name == "topk" else {}))
    d.reads = d.writes = (POINT.format(layer),)
    tokens = torch.randint(64, (8, 12), generator=torch.Generator().manual_seed(1))
    d.prepare(d.gather(list(saekit.harvest(m, list(tokens), list(d.points), tokens=None))))
    with torch.no_grad():
        d.b_enc.add_(0.1 * torch.randn(96, generator=torch.Generator().manual_seed(2)))
        d.b_dec.add_(0.1 * torch.randn(32, generator=torch.Generator().manual_seed(3)))
    return d


@pytest.mark.parametrize("case", TOYS)
def test_shares_of_heads_and_sources_add_up_to_the_feature(case: str) -> None:
    m = toy(case)
    frozen = Frozen(weights(m), TOKENS)
    for layer, name in zip(LAYERS, ("topk", "relu"), strict=True):
        ((part, read, _),) = place(frozen, m, dictionary(m, layer, name)).parts
        shares = attention_saes.by_source(frozen, part, read)
        torch.testing.assert_close(shares.sum((1, 2)) + part.b, part.values, rtol=0, atol=1e-5)
        later = torch.arange(len(TOKENS)) > part.positions[:, None]
        assert (shares * later[:, None] == 0).all() and len(shares)
        # a head's own share is what its dimensions of z add
        z = (frozen.at(read)[part.positions] * part.w).unflatten(-1, (4, -1)).sum(-1)
        torch.testing.assert_close(shares.sum(2), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "case", ["root mean squares, rotary, gated, grouped", "post norms, silu", "parallel, norms of queries"]
)
@pytest.mark.parametrize("below", ["nothing", "dictionary", "heads and neurons"])
def test_what_was_written_at_a_source_adds_up_to_its_share(case: str, below: str) -> None:
    """Directly, and down to the leaves."""
    m = toy(case)
    frozen = Frozen(weights(m), TOKENS)
    stands: list[Stand] = [dictionary(m, 1)]
    if below == "dictionary":
        stands.append(dictionary(m, 0))
    elif below == "heads and neurons":
        stands += [Heads("layers.0.self_attn"), Neurons("layers.0.mlp")]
    run = Trace(frozen, [place(frozen, m, stand) for stand in stands])
    own = next(o for o in run.parts if o.stand == 0)
    shares = attention_saes.by_source(frozen, own.part, own.read)
    leaves = torch.from_numpy(run.columns.table().kind != KINDS.index("feature"))
    for entry in (3, len(shares) - 1):
        t = int(own.part.positions[entry])
        pairs = torch.tensor([[h, s] for h in range(4) for s in range(t + 1)])
        true = shares[entry, pairs[:, 0], pairs[:, 1]]
        for through in (False, True):
            rows, bias = attention_saes.recursive(run, own, entry, pairs, through)
            total = (rows[:, leaves] if through else rows).sum(1) + bias
            torch.testing.assert_close(total, true, rtol=0, atol=1e-5)
            if below != "nothing":
                assert (rows[:, ~leaves] != 0).any()


def test_a_node_below_adds_its_share() -> None:
    """What a feature of the layer below wrote at a source, carried up by hand, is its entry."""
    m = toy("no norms, gelu")
    frozen = Frozen(weights(m), TOKENS)
    run = Trace(frozen, [place(frozen, m, dictionary(m, layer)) for layer in (1, 0)])
    upper, lower = (next(o for o in run.parts if o.stand == i) for i in (0, 1))
    entry, pairs = len(upper.part.values) - 1, torch.tensor([[2, 6]])
    rows, _ = attention_saes.recursive(run, upper, entry, pairs)
    a = frozen.weights.blocks[1].attention
    looks = frozen.seen[1]["patterns"][2, upper.part.positions[entry], 6]
    w = upper.part.w[entry].unflatten(-1, (4, -1))[2]
    block = frozen.weights.blocks[0]
    z_to_stream = block.attention.W_O.transpose(1, 2).flatten(0, 1)
    assert block.mlp is not None
    for i in (lower.part.positions == 6).nonzero()[:, 0].tolist():
        moved = lower.part.written[0][i] @ z_to_stream
        moved = moved + (frozen.slopes[0][6] * (block.mlp.W_in @ moved)) @ block.mlp.W_out.T
        expected = looks * (w @ (a.W_V[2] @ moved))
        torch.testing.assert_close(rows[0, lower.nodes][i], expected, rtol=0, atol=1e-5)


def test_head_shares_are_norms_of_blocks() -> None:
    d = dictionary(toy("layer norms, learned"), 1)
    with torch.no_grad():
        d.atoms.weight[5] = 0
        d.atoms.weight[5, 8:16] = 3.0
        d.atoms.weight[6] = 1.0
    shares = attention_saes.head_shares(d, 4)
    torch.testing.assert_close(shares[5], torch.tensor([0.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(shares[6], torch.full((4,), 0.25))
    torch.testing.assert_close(shares.sum(1), torch.ones(96))


def test_what_is_no_dictionary_of_heads_is_refused() -> None:
    m = toy("layer norms, learned")
    frozen = Frozen(weights(m), TOKENS)
    d = saekit.create("topk", d_in=32, n_features=96, k=8)
    d.reads = d.writes = ("layers.1.self_attn",)
    ((part, read, _),) = place(frozen, m, d).parts
    with pytest.raises(SaekitError, match="reads 'attn_out' of layer 1"):
        attention_saes.by_source(frozen, part, read)
    with pytest.raises(SaekitError, match="n_heads = 5 does not divide"):
        attention_saes.head_shares(d, 5)
