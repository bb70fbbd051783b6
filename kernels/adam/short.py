"""Numbers kept in fewer bits, in plain torch: bf16, and floats of 8 bits as uint8.

They are rounded up or down at random, in proportion to the distance: rounding to the nearest would
lose every change smaller than half a unit in the last place, so that Adam's second moment could
never fall. The floats of 8 bits have 2 bits of mantissa. The first moment's have a sign and reach
from 2^-28 to 2^4, the second's have none and reach from 2^-56 to 2^8; code 0 is 0.
"""

import torch

SIGNED, UNSIGNED = 396, 284  # what is left out of the upper 11 bits of fp32; as in jit.py
DROPPED = 21


def restored(state, signed, dtype):
    """A new tensor with the numbers of a state, in a wider dtype."""
    if state.dtype != torch.uint8:
        return state.to(dtype, copy=True)
    code = state.int()
    size = code & 127 if signed else code
    bits = (size + (SIGNED if signed else UNSIGNED)) << DROPPED
    value = torch.where(size > 0, bits.view(torch.float32), 0)
    return (torch.where(code > 127, -value, value) if signed else value).to(dtype)


def store(state, value, signed):
    """Write numbers into a state, at random up or down where it has fewer bits."""
    if state.dtype not in (torch.bfloat16, torch.uint8) or value.dtype == state.dtype:
        state.copy_(value)
        return
    bits = value.float().view(torch.int32)
    if state.dtype == torch.bfloat16:
        state.copy_(((bits + torch.randint_like(bits, 1 << 16)) & ~0xFFFF).view(torch.float32))
        return
    offset, most = (SIGNED, 127) if signed else (UNSIGNED, 255)
    size = (bits & 0x7FFFFFFF) + torch.randint_like(bits, 1 << DROPPED)
    code = ((size >> DROPPED) - offset).clamp(0, most)
    state.copy_(torch.where(value < 0, code | 128, code) if signed else code)
