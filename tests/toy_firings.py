"""Firings of made-up codes, for the tests of files that hold them."""

from pathlib import Path

import numpy as np
import torch

from saekit.autointerp.firings import Firings, Writer
from saekit.types import Codes

ROWS, SEQ, N = 30, 64, 40
POINT = "layers.1"


def codes(seed: int, rows: int = ROWS, density: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [rows, SEQ] and dense codes [rows, SEQ, N], of which features 0-3, 17-24 and the last never fire."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 500, (rows, SEQ), generator=g)
    shape = (rows, SEQ, N)
    dense = torch.randn(shape, generator=g).exp() * (torch.rand(shape, generator=g) < density)
    dense[..., [0, 1, 2, 3, *range(17, 25), N - 1]] = 0
    return tokens, dense


def kept(path: Path, tokens: torch.Tensor, dense: torch.Tensor) -> Firings:
    writer = Writer(path, dense.shape[-1])
    everything = torch.ones(tokens.shape, dtype=torch.bool)
    writer.add(tokens, None, everything, Codes.from_dense(dense))
    return writer.close({"model": {"name": "toy"}, "text": {"name": "noise"}, "split": "train"})


def assert_same(found: Firings, truth: Firings) -> None:
    """Equal places and tokens; values that differ by rounding to float16, by at most the least of them where they are tiny."""
    assert (found.n_features, found.seq) == (truth.n_features, truth.seq)
    np.testing.assert_array_equal(found.tokens, truth.tokens)
    np.testing.assert_array_equal(found.offsets, truth.offsets)
    np.testing.assert_array_equal(found.places, truth.places)
    np.testing.assert_allclose(found.values, truth.values, rtol=2.0**-11, atol=2.0**-24)
    assert (np.sign(found.values) == np.sign(truth.values)).all()


def signed(path: Path) -> Firings:
    """Some of the codes are below 0, tiny, or as large as float16 goes."""
    tokens, dense = codes(0)
    dense[2, 5, 6], dense[2, 6, 6], dense[3, 0, 7], dense[3, 1, 7] = -2.5, 1e-9, -1e-9, 65504.0
    return kept(path, tokens, dense)
