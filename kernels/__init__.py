"""Fused sparse operations on plain tensors; rank 0, so nothing else of saekit is imported here.

One folder per operation. ``reference.py`` is the definition, dense and readable; ``eager.py`` the
exact sparse path in plain torch, for any device and dtype; ``cpu.py`` numba; ``triton.py`` the GPU.
``backend.py`` says which one runs and why. Operations are ``torch.library`` custom ops, so
autograd, ``torch.compile`` and ``opcheck`` see them.
"""

if __name__ != "saekit.kernels":
    raise ImportError("this folder is the package saekit.kernels: import it under that name (run python -P)")

from saekit.kernels.adam import adam_step as adam_step
from saekit.kernels.adam import gradient_norm as gradient_norm
from saekit.kernels.budgets import budget_error as budget_error
from saekit.kernels.encode import batchtopk_encode as batchtopk_encode
from saekit.kernels.encode import threshold_encode as threshold_encode
from saekit.kernels.encode import topk_encode as topk_encode
from saekit.kernels.encode import topk_encode_aux as topk_encode_aux
from saekit.kernels.encode.jumprelu import KERNELS as KERNELS
from saekit.kernels.encode.jumprelu import jumprelu as jumprelu
from saekit.kernels.error import nested_error as nested_error
from saekit.kernels.error import squared_error as squared_error
from saekit.kernels.factors import Factors as Factors
from saekit.kernels.factors import collect as collect
from saekit.kernels.product import sampled_product as sampled_product
from saekit.kernels.product import sparse_decode as sparse_decode
from saekit.kernels.pursuit import pursuit_encode as pursuit_encode
from saekit.kernels.threads import serial as serial
