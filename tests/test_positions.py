"""How much a feature says of the position: the closed form, and what chance adds."""

import numpy as np
import pytest
import torch
from test_families import collected

from saekit.autointerp.families import Families
from saekit.autointerp.positions import ROWS, position_information


def closed_form(rates: list[float]) -> float:
    """Mutual information by the paper's formula."""
    mean, total = sum(rates) / len(rates), 0.0
    for r in rates:
        total += sum(p * np.log(p / q) for p, q in ((r, mean), (1 - r, 1 - mean)) if p > 0)
    return total / len(rates)


RATES = {
    "constant": [0.3] * 8,
    "on and off": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "waves": [0.9, 0.1] * 8,
    "weak": [0.8] * 10 + [0.3] * 14,
    "slope": [i / 20 for i in range(1, 20)],
    "rare": [0.05, *[0.0] * 30],
}


def of_rates(rates: list[float], rows: int) -> Families:
    on = torch.zeros(rows, len(rates), 1)
    for p, rate in enumerate(rates):
        on[: round(rate * rows), p] = 1.0
    tokens = torch.arange(rows * len(rates)).view(rows, -1)
    return collected(tokens, None, torch.ones_like(tokens, dtype=torch.bool), on)


@pytest.mark.parametrize("name", RATES)
def test_information_is_the_closed_form(name: str) -> None:
    rates, rows = RATES[name], 400
    found = of_rates(rates, rows)
    assert found.information[0] == pytest.approx(closed_form(rates), abs=1e-12)
    rate, error = found.rates(0)
    assert rate.tolist() == rates
    assert error == pytest.approx([np.sqrt(r * (1 - r) / rows) for r in rates], abs=1e-15)
    kinds = {"on and off": "strong", "waves": "strong, oscillatory", "weak": "weak", "slope": "weak"}
    assert (found.positional[0].kind if 0 in found.positional else None) == kinds.get(name)


def test_information_weighs_positions_by_their_tokens() -> None:
    tokens = np.array([30, 0, 90])
    fired = np.array([[30, 0, 0], [15, 0, 45]])
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert position_information(fired, tokens) == pytest.approx([entropy, 0.0], abs=1e-12)


@pytest.mark.parametrize("rows", [2, ROWS, 120])
@pytest.mark.parametrize("burst", [1, 25, 100])
def test_features_of_chance_are_not_positional(burst: int, rows: int) -> None:
    """Of 200 features that fire at random, alone or in bursts, at most two; counted alone they all might be."""
    seq, n = 200, 200
    g = torch.Generator().manual_seed(burst + rows)
    rate = torch.linspace(0.01, 0.9, n)
    # a burst begins anywhere: its grid is shifted by another offset in each row
    offset = torch.randint(burst, (rows, 1, n), generator=g)
    block = (torch.arange(seq)[None, :, None] + offset) // burst
    drawn = torch.rand(rows, seq // burst + 1, n, generator=g)
    on = (drawn.gather(1, block) < rate).float()
    tokens = torch.randint(50, (rows, seq), generator=g)
    found = collected(tokens, None, torch.ones_like(tokens, dtype=torch.bool), on)
    assert len(found.positional) <= 2
    if rows == 2:
        raw = position_information(found.fired_at, found.tokens_at)
        assert (raw > 0.05).mean() > 0.5 and found.information.max() == 0.0


def test_what_chance_adds_to_information_is_taken_off() -> None:
    """Features that share 0.04 nats with the position show about 0.057 on 30 rows of 200."""
    g = torch.Generator().manual_seed(0)
    rates = torch.where(torch.arange(200) < 100, 0.641, 0.359)
    assert closed_form(rates.tolist()) == pytest.approx(0.04, abs=1e-3)
    on = (torch.rand(ROWS, 200, 100, generator=g) < rates[:, None]).float()
    tokens = torch.randint(50, (ROWS, 200), generator=g)
    found = collected(tokens, None, torch.ones_like(tokens, dtype=torch.bool), on)
    assert (found.information > 0.05).mean() > 0.8 and len(found.positional) <= 5
