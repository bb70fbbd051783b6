"""Atoms that are kernels or functions at every place: rows are shifts by hand, and few rows teach what all places share."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import saekit
from saekit.analyses import operators
from saekit.dictionaries.surgery import prune
from saekit.types import SaekitError

KERNELS, N, SIZE = 3, 32, 6


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(atoms: str, selection: str = "topk", places: int = N, seed: int = 0, **options) -> saekit.Dictionary:
    settings = {"normalise": "none", "objective": ("reconstruction",), "k": 2, "seed": seed, **options}
    return saekit.create(
        "topk", d_in=places, n_features=KERNELS * places, selection=selection, atoms=atoms, **settings
    )


def test_rows_are_the_shifts_of_kernels() -> None:
    ring = made("convolutional", size=SIZE)
    for c, kernel in enumerate(ring.atoms.kernels.detach()):
        padded = torch.cat([kernel, torch.zeros(N - SIZE)])
        for by in range(N):
            assert torch.equal(ring.W_dec[c * N + by], padded.roll(by))
    torus = made("convolutional", size=2, grid=(4, 8))
    padded = torch.nn.functional.pad(torus.atoms.kernels[1].detach(), (0, 6, 0, 2))
    assert torch.equal(torus.W_dec[N + 8 * 3 + 5].view(4, 8), padded.roll((3, 5), (0, 1)))
    several = made("convolutional", size=(2, 4), grid=(8, 4))
    held = several.W_dec.unflatten(0, (KERNELS, N))[:, 0].unflatten(1, (8, 4)) != 0
    assert [(one.any(1).sum().item(), one.any(0).sum().item()) for one in held] == [(2, 2), (4, 4), (2, 2)]
    for d in (ring, torus, several, made("fourier", modes=5)):
        assert torch.allclose(d.W_dec.norm(dim=1), torch.ones(KERNELS * N), atol=1e-5)


def test_they_are_the_operators_of_the_paper() -> None:
    z = torch.rand(5, KERNELS * N, generator=g()) * (torch.rand(5, KERNELS * N, generator=g(1)) < 0.1)
    ring = made("convolutional", size=SIZE)
    theirs = operators.Convolutional(ring.atoms.kernels.detach(), 0.1, 3)
    maps = z.unflatten(1, (KERNELS, N))
    torch.testing.assert_close(z @ ring.W_dec, theirs.decode(maps), atol=1e-5, rtol=0)
    smooth = made("fourier", modes=5)
    functions = operators.Fourier(smooth.atoms.functions().detach(), 5, 0.1, 3)
    torch.testing.assert_close(z @ smooth.W_dec, functions.decode(maps), atol=1e-5, rtol=0)
    assert torch.fft.rfft(smooth.W_dec)[:, 6:].abs().max() < 1e-5
    whole = made("fourier", modes=N // 2)  # all frequencies make any kernel
    kernels = made("convolutional", size=N)
    torch.testing.assert_close(whole.W_dec, kernels.W_dec, atol=1e-5, rtol=0)


def signals(rows: int, planted: Tensor, seed: int) -> Tensor:
    """Two kernels at places, of sizes 1 to 2."""
    generator, x = g(seed), torch.zeros(rows, N)
    for _ in range(2):
        which, by = (torch.randint(n, (rows,), generator=generator) for n in (KERNELS, N))
        place = (torch.arange(N) - by[:, None]) % N
        x += planted[which].gather(1, place) * (1 + torch.rand(rows, 1, generator=generator))
    return x


def test_400_rows_teach_kernels_and_not_each_place_s_atom(tmp_path: Path) -> None:
    planted = torch.zeros(KERNELS, N)
    planted[:, :SIZE] = torch.randn(KERNELS, SIZE, generator=g())
    planted = normalize(planted, dim=1)
    truth = torch.stack([planted.roll(by, 1) for by in range(N)], 1).flatten(0, 1)
    found = {}
    for atoms, options in (("convolutional", {"size": 12}), ("tied", {})):
        d = made(atoms, "pursuit", **options)
        saekit.train(d, signals(400, planted, 1), steps=300, batch_size=100, lr=1e-2, out=tmp_path / atoms)
        x = signals(1000, planted, 2)
        left = (x - d(x).detach()).square().sum() / x.square().sum()
        found[atoms] = ((truth @ d.W_dec.detach().T).abs().amax(1).mean().item(), left.item())
        assert torch.equal(saekit.load(tmp_path / atoms).W_dec, d.W_dec)
    assert found["convolutional"][0] > 0.99 and found["convolutional"][1] < 0.05
    assert found["tied"][0] < 0.97 and found["tied"][1] > 2 * found["convolutional"][1]


def test_what_has_no_places_is_refused() -> None:
    for call, words in (
        (lambda: saekit.create("topk", d_in=32, n_features=70, k=2, atoms="fourier"), "n_features = 70 must be a multiple of the 32 places"),
        (lambda: made("convolutional", size=33), "size = 33 is more than the grid's 32 places"),
        (lambda: made("convolutional", grid=(4, 4)), r"grid = \(4, 4\) has 16 places, and rows have 32"),
        (lambda: made("convolutional", size=(8, 40)), r"size = \(8, 40\) is more than the grid's 32 places"),
        (lambda: made("convolutional", size=0), "size = 0 must be at least 1"),
        (lambda: made("convolutional", grid=(0, 4)), r"grid = \(0, 4\) must hold lengths"),
        (lambda: made("fourier", modes=17), "modes = 17 must be at most 16"),
        (lambda: prune(made("fourier"), torch.arange(KERNELS * N) < N), "are shifts of kernels, none of which can go alone"),
        (lambda: made("fourier", modes=-1), "modes = -1 must be at least 0"),
        (lambda: saekit.create("transcoder", d_in=8, d_out=8, n_features=16, k=2, atoms="fourier"), "stand at every place of one row, and wiring 'transcoder'"),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=words):
            call()
