"""Encode and keep the k largest pre-activations of each row.

``u = x W^T + b``; per row the k largest entries of u, by falling value, exact ties to the lowest
index. Gradients flow through the kept entries only, so all of them are sparse.
"""

from saekit.kernels.topk_encode.eager import topk_encode as topk_encode
