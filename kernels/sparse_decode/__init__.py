"""Decode sparse codes: every row is the weighted sum of the atoms it holds."""

from saekit.kernels.sparse_decode.eager import sparse_decode as sparse_decode
