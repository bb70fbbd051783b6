"""Heads by discrete codes: what they write, how codes are counted, chance, and ground truth by ablation."""

import itertools

import pytest
import torch
from test_weights import TOYS, toy

from saekit.circuits import discrete
from saekit.circuits.weights import weights
from saekit.testbed import known_circuits
from saekit.types import SaekitError

LABELS = torch.tensor([True, True, True, False, False, False])
CODES = torch.tensor([[7, 1, 1, -1], [7, 2, 2, 4], [7, 2, 3, 4], [7, 1, 4, -1], [7, 2, 5, -1], [7, 9, 6, -1]])


@pytest.mark.parametrize("case", TOYS)
def test_what_heads_write_adds_up_to_the_layers_output(case: str) -> None:
    record = weights(toy(case))
    prompts = [torch.randint(64, (n,), generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    made = discrete.written(record, prompts, position=2).unflatten(1, (2, 4)).sum(2)
    for tokens, own in zip(prompts, made, strict=True):
        for layer, block in enumerate(record.blocks):
            out = record.run(tokens)[0][layer]["attn_out"][2] - block.attention.b_O
            torch.testing.assert_close(own[layer], out, rtol=0, atol=1e-5)


def test_codes_are_the_strongest_features() -> None:
    rows = torch.eye(6).repeat(20, 1) + 0.01 * torch.randn(120, 6, generator=torch.Generator().manual_seed(0))
    d = discrete.fit(rows, n_features=24, coefficient=0.5, steps=100)
    codes = discrete.codes(d, rows.view(20, 6, 6))
    assert codes.shape == (20, 6)
    dense = d.encode(rows).to_dense()
    own = dense.gather(1, codes.view(-1, 1).clamp(min=0))[:, 0]
    assert torch.equal(own, dense.max(1).values) and (own > 0).all()
    # the six directions have codes of their own
    modes = codes.mode(0).values
    assert len(modes.unique()) == 6 and (codes == modes).float().mean() > 0.9
    with torch.no_grad():
        d.b_enc.fill_(-1e3)
    assert (discrete.codes(d, rows.view(20, 6, 6)) == discrete.SILENT).all()


def test_nodes_are_scored_by_codes_of_positive_prompts_alone() -> None:
    assert discrete.node_scores(CODES, LABELS).tolist() == [0, 0, 3, 1]
    assert discrete.node_scores(CODES, ~LABELS).tolist() == [0, 1, 3, 0]


def test_edges_are_scored_by_pairs_of_codes_of_later_layers() -> None:
    found = discrete.edge_scores(CODES, LABELS, layers=2)
    assert found[0].tolist() == [0, 0, 3, 1] and found[1].tolist() == [0, 0, 3, 1]
    assert (found[2:] == 0).all()
    assert discrete.edge_scores(CODES, LABELS, layers=4)[0, 1] == 0


def test_chance_is_the_mean_over_all_labels() -> None:
    """In closed form as by counting: so no head scores above another if labels mean nothing."""
    scores = discrete.node_scores(CODES, LABELS, chance=True)
    total, plain = torch.zeros(4), torch.zeros(4)
    every = list(itertools.combinations(range(6), 3))
    for some in every:
        labels = torch.zeros(6, dtype=torch.bool)
        labels[list(some)] = True
        total += discrete.node_scores(CODES, labels, chance=True)
        only = [~torch.isin(column, column[~labels]) for column in CODES.T]
        plain += torch.stack(only).sum(1)
    torch.testing.assert_close(total, torch.zeros(4), rtol=0, atol=1e-5)
    found = torch.tensor([0.0, 0.0, 3.0, 2.0])  # positive prompts with a code of their own
    torch.testing.assert_close(scores, found - plain / len(every), rtol=0, atol=1e-5)


def test_a_threshold_is_a_share_of_the_largest_score() -> None:
    scores = torch.tensor([0.0, 4.0, 1.0, 2.0])
    assert discrete.above(scores, 0.5).tolist() == [False, True, False, True]
    assert not discrete.above(torch.zeros(3), 0.5).any()


def test_auc_is_the_share_of_ordered_pairs() -> None:
    truth = torch.tensor([True, False, True, False])
    assert discrete.roc_auc(torch.tensor([3.0, 1.0, 2.0, 0.0]), truth) == 1
    assert discrete.roc_auc(torch.tensor([0.0, 1.0, 2.0, 2.0]), truth) == 0.375
    assert discrete.roc_auc(torch.ones(4), truth) == 0.5


def test_ablation_finds_the_heads_of_a_known_circuit() -> None:
    """Of the hand-built one for indirect objects: three in all, two of which act at the last token."""
    known = known_circuits.indirect_object(distractors=2, rotate=True)
    g = torch.Generator().manual_seed(0)
    chosen = [p for p in known.prompts(400, g) if len(p.tokens) == 9][:20]
    tokens, rows = torch.stack([p.tokens for p in chosen]), torch.arange(len(chosen))
    at = torch.tensor([p.pairs[0].query[1] for p in chosen])
    receiver, subject = torch.tensor([p.answers[0] for p in chosen]), tokens[rows, at]
    other = tokens.clone()
    other[rows, at] = 2 + (torch.maximum(receiver, subject) - 1) % 32  # a third name, or nearly always
    spliced = discrete.heads(known.model)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[rows, -1, receiver] - logits[rows, -1, subject]

    last = discrete.ablated(spliced, metric, tokens, other, last=True)
    whole = discrete.ablated(spliced, metric, tokens, other)
    assert (whole >= 0.05).nonzero()[:, 0].tolist() == [0, 3, 6]
    assert (last >= 0.05).nonzero()[:, 0].tolist() == [3, 6]
    # all but the circuit's heads, together, cost nothing
    assert whole[[1, 2, 4, 5, 7, 8]].abs().max() <= 0.02


def test_what_has_no_answer_is_refused() -> None:
    with pytest.raises(SaekitError, match="positive marks 6 of 6 prompts"):
        discrete.node_scores(CODES, torch.ones(6, dtype=torch.bool))
    with pytest.raises(SaekitError, match="there are codes of 6"):
        discrete.edge_scores(CODES, LABELS[:3], layers=2)
    with pytest.raises(SaekitError, match="truth marks 0 of 3 nodes"):
        discrete.roc_auc(torch.ones(3), torch.zeros(3, dtype=torch.bool))
