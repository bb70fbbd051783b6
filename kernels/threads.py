"""numba runs on as many threads as torch, so that one setting governs both."""

import numba
import torch

MOST = numba.get_num_threads()  # what numba launched with: it can't go above


def use_torch_threads():
    """Give numba torch's thread count, as far as numba has that many."""
    numba.set_num_threads(min(torch.get_num_threads(), MOST))
