"""Adam over sparse gradients, and moments in few bits."""

import pytest
import torch
from test_kernels import DTYPES, same

from saekit import kernels
from saekit.kernels.adam import reference as adam_reference
from saekit.kernels.adam.short import restored, store


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_adam_equals_its_reference(unit: bool, dtype: torch.dtype, factored: bool, masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(70, 33, generator=g, dtype=dtype), dim=-1)
    mine = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    theirs = [t.clone() for t in mine]
    for step in range(1, 6):
        f = kernels.Factors()
        for _ in range(2):
            rows, features = (
                torch.randint(0, 50, (300,), generator=g),
                torch.randint(0, 60, (300,), generator=g),
            )
            f.add(
                rows,
                features,
                torch.randn(300, generator=g, dtype=dtype),
                torch.randn(50, 33, generator=g, dtype=dtype),
            )
        dense = f.dense(70)
        options = {
            "rate": 0.01,
            "step": step,
            "betas": (0.9, 0.99),
            "eps": 1e-8,
            "scale": 0.7,
            "unit": unit,
            "masked": masked,
        }
        norm = kernels.gradient_norm([mine[0]], [f if factored else dense], [unit])
        along = (dense * mine[0]).sum(-1, keepdim=True) * mine[0] if unit else 0
        torch.testing.assert_close(norm, (dense - along).norm(), rtol=1e-4, atol=1e-4)
        kernels.adam_step(*mine[:1], f if factored else dense, *mine[1:], **options)
        adam_reference.adam_step(*theirs[:1], dense, *theirs[1:], **options)
        same(tuple(mine), tuple(theirs))


def test_adam_is_torchs() -> None:
    weight = torch.randn(30, 7)
    p = weight.clone().requires_grad_()
    torchs, m, v = torch.optim.Adam([p], lr=0.02), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 8):
        p.grad = torch.randn(30, 7)
        kernels.adam_step(weight, p.grad, m, v, rate=0.02, step=step)
        torchs.step()
    torch.testing.assert_close(weight, p.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("states", "allowed"), [(torch.bfloat16, 0.05), (torch.uint8, 0.25)])
def test_short_moments_follow_those_in_full(dtype: torch.dtype, states: torch.dtype, allowed: float) -> None:
    """The second moment must be able to fall: rounding to the nearest would freeze it."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    weight = torch.randn(64, 64, generator=g, dtype=dtype)
    full = [weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)]
    short = [weight.clone(), *(torch.zeros(64, 64, dtype=states) for _ in range(2))]
    for step in range(1, 401):
        gradient = torch.randn(64, 64, generator=g, dtype=dtype) * (1.0 if step < 100 else 0.01)
        for w, m, v in (full, short):
            kernels.adam_step(w, gradient, m, v, rate=1e-3, step=step, betas=(0.9, 0.99))
    second = restored(short[2], False, torch.float64)
    assert 0.9 < second.mean() / full[2].double().mean() < 1.1
    moved = (full[0] - weight).norm()
    assert (short[0] - full[0]).norm() < allowed * moved


@pytest.mark.parametrize("signed", [True, False])
def test_floats_of_eight_bits_keep_their_codes_and_are_right_on_average(signed: bool) -> None:
    torch.manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    values = restored(codes, signed, torch.float32)
    again = torch.empty_like(codes)
    store(again, values, signed)
    assert torch.equal(restored(again, signed, torch.float32), values)
    value = (torch.randn(50, dtype=torch.float64) * (1 if signed else 0.3)).float()
    value = value if signed else value.abs()
    kept = torch.empty(20_000, 50, dtype=torch.uint8)
    store(kept, value.expand(20_000, 50), signed)
    torch.testing.assert_close(restored(kept, signed, torch.float32).mean(0), value, rtol=5e-3, atol=0)
    # compiled and plain code read and write the same numbers: a step of rate and betas 0 stores the gradient
    m, v = torch.zeros(20_000, 50, dtype=torch.uint8), torch.zeros(20_000, 50, dtype=torch.uint8)
    weight = torch.zeros(20_000, 50)
    kernels.adam_step(weight, value.expand(20_000, 50).contiguous(), m, v, rate=0.0, step=1, betas=(0.0, 0.0))
    for state, expected, kind in ((m, value, True), (v, value.square(), False)):
        torch.testing.assert_close(restored(state, kind, torch.float32).mean(0), expected, rtol=1e-2, atol=0)


def test_bf16_weights_move_by_less_than_their_last_place() -> None:
    torch.manual_seed(0)
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    moments = [torch.zeros(64, 64, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(1, 101):
        kernels.adam_step(weight, torch.ones(64, 64, dtype=torch.bfloat16), *moments, rate=1e-4, step=step)
    assert weight.double().mean().item() == pytest.approx(1 - 0.01, abs=1e-3)
