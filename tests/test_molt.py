"""A mixture of linear transforms: each feature writes what its map makes of the input, and only the maps that are on."""

import pytest
import torch
from largest import Largest
from torch import Tensor

import saekit
from saekit.dictionaries.training import TrainState

RANKS = (2, 3)


def make(n_features: int = 40, **options) -> saekit.Dictionary:
    d = saekit.create("molt", d_in=16, d_out=12, n_features=n_features, k=4, ranks=RANKS, **options)
    with torch.no_grad():
        d.b_enc.normal_(generator=torch.Generator().manual_seed(0))
        d.b_dec.normal_(generator=torch.Generator().manual_seed(1))
    return d


def rows(n: int = 300) -> Tensor:
    return torch.randn(n, 28, generator=torch.Generator().manual_seed(2)) + 1


def test_it_is_the_sum_of_its_maps() -> None:
    """``b + sum_i z_i U_i V_i x`` over the active maps (Kamath et al. 2025), in normalised space."""
    d = make()
    d.prepare(rows())
    x = d.norm_in(rows()[:, :16])
    z = d.encode(rows()[:, :16]).to_dense()
    expected, start = d.b_dec.expand(len(x), -1), 0
    for i, rank in enumerate(d.ranks.tolist()):
        U, V = d.W_dec[start : start + rank], d.V[start : start + rank]
        expected = expected + z[:, i : i + 1] * (x @ V.T @ U)
        start += rank
    assert start == d.n_atoms == len(d.V)
    torch.testing.assert_close(d.norm_out(d(rows()[:, :16])), expected, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_dense_maps() -> None:
    d = make(objective=("reconstruction",))
    d.prepare(rows())
    d.loss(rows()).total.backward()
    x, y = d.norm_in(rows()[:, :16]), d.norm_out(rows()[:, 16:])
    names = ("encoder", "b_enc", "V", "b_dec")
    dense = {name: getattr(d, name).detach().clone().requires_grad_() for name in names}
    atoms = d.W_dec.detach().clone().requires_grad_()
    pre = x @ dense["encoder"].T + dense["b_enc"]
    top = pre.topk(4)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    inside = (x @ dense["V"].T) * z.repeat_interleave(d.ranks, 1)
    (inside @ atoms + dense["b_dec"] - y).square().sum(1).mean().backward()
    for name in names:
        torch.testing.assert_close(getattr(d, name).grad, dense[name].grad, rtol=1e-3, atol=1e-5)
    wanted = atoms.grad - (atoms.grad * atoms).sum(1, keepdim=True) * atoms  # on the sphere
    got = d.atoms.weight.grad
    got = got - (got * atoms).sum(1, keepdim=True) * atoms
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_no_tensor_has_an_entry_for_every_row_and_atom(training: bool) -> None:
    d, x = make(n_features=1000), rows(600)
    d.prepare(x)
    trainer = saekit.Trainer(d)
    trainer.step(x)
    with Largest() as found:
        trainer.step(x) if training else d(x[:, :16])
    # weights and moments have n_atoms * 16 entries at most
    assert found.numel < 600 * 1000, found.numel


def test_penalties_fall_on_the_size_of_a_map() -> None:
    """``sum |z_i| ||U_i V_i||_F``, for atoms of any length and ranks that differ."""
    d = saekit.create(
        "molt", d_in=6, ranks=(1, 3), n_features=8, selection="relu", atoms="free", objective=("reconstruction", "l1"),
        normalise="none",
    )  # fmt: skip
    with torch.no_grad():
        d.atoms.weight.mul_(torch.rand(len(d.V), 1) + 0.5)
    x = torch.randn(50, 6)
    stops = d.ranks.cumsum(0).tolist()
    maps = [
        d.atoms.rows()[stop - r : stop].T @ d.V[stop - r : stop]
        for stop, r in zip(stops, d.ranks.tolist(), strict=True)
    ]
    norms = torch.stack([torch.linalg.matrix_norm(m) for m in maps])
    expected = (d.encode(x).to_dense() * norms).sum(1).mean()
    term = d.loss(torch.cat([x, x], 1), TrainState(step=10, steps=10)).terms["l1"]
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-5)
