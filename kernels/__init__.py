"""Fused sparse operations on plain tensors; rank 0, so nothing else of saekit is imported here.

One folder per operation: ``reference.py`` is the definition (dense, readable), ``eager.py`` the
exact sparse path in plain torch that runs on any device.
"""

if __name__ != "saekit.kernels":
    raise ImportError("this folder is the package saekit.kernels: import it under that name (run python -P)")

from saekit.kernels.sparse_decode import sparse_decode as sparse_decode
from saekit.kernels.topk_encode import topk_encode as topk_encode
