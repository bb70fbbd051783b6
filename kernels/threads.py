"""numba runs on as many threads as torch, so that one setting governs both."""

import numba
import torch


def use_torch_threads():
    """Give numba torch's thread count, as far as numba has that many."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
