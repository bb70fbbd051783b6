"""What circuits keep of a metric where everything outside of them is ablated (Marks et al. 2025, 2403.19647, section 4)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.circuits.frozen import Site
from saekit.circuits.patching import Circuit, Effects, Metric, Prompts, check, measure
from saekit.circuits.spliced import Changes, Spliced
from saekit.registry import nearest
from saekit.types import Codes, SaekitError

Scores = Sequence[Float[Tensor, "..."]]
ABLATIONS = ("mean", "resample", "zero")
SHARES = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
)  # of the nodes: MIB's (Mueller et al. 2025)


def top(scores: Scores, n: int) -> list[Bool[Tensor, "..."]]:
    """The circuit of the n nodes with the largest absolute scores."""
    flat = torch.cat([s.abs().flatten() for s in scores])
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(min(n, len(flat))).indices] = True
    parts = kept.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores, strict=True)]


def above(scores: Scores, threshold: float) -> list[Bool[Tensor, "..."]]:
    """The circuit of the nodes whose absolute scores are above a threshold (the paper's T_N)."""
    return [s.abs() > threshold for s in scores]


def complement(circuit: Circuit) -> list[Bool[Tensor, "..."]]:
    """All other nodes."""
    return [~kept for kept in circuit]


class Yardstick:
    """Circuits by what they keep of a metric's mean over prompts, nodes outside of them ablated.

    Ablated nodes are set to their ``mean`` over ``other`` prompts at the same position (as in the paper: the patch
    prompts), to what they are on one of them drawn at random (``resample``), or to ``zero``; kept ones respond to that.
    """

    @torch.no_grad()
    def __init__(
        self, spliced: Spliced, metric: Metric, tokens: Prompts, other: Prompts | None = None,
        ablation: str = "mean", seed: int = 0,
    ):  # fmt: skip
        if ablation not in ABLATIONS:
            raise SaekitError(f"ablation {ablation!r} is unknown{nearest(ablation, list(ABLATIONS))}")
        if other is None and ablation != "zero":
            raise SaekitError(
                f"other is not given, and ablation {ablation!r} takes nodes from other prompts; give some"
            )
        self.spliced, self.metric, self.ablation = spliced, metric, ablation
        self.plain = spliced.run(tokens)
        self.tokens = self.plain.tokens
        self.other = None if other is None or ablation == "zero" else spliced.run(other)
        if self.other is not None and self.other.tokens.shape[1] != self.tokens.shape[1]:
            raise SaekitError(
                f"other prompts have {self.other.tokens.shape[1]} tokens and the metric's {self.tokens.shape[1]}; give some of the same length"
            )
        g = torch.Generator().manual_seed(seed)
        n = 0 if self.other is None else len(self.other.tokens)
        self.drawn = torch.randint(max(n, 1), (len(self.tokens),), generator=g).to(self.tokens.device)
        self.whole = measure(metric, self.plain).mean().item()
        self.nothing = self._kept([torch.zeros(group.n, dtype=torch.bool) for group in spliced.groups])
        if self.whole == self.nothing:
            raise SaekitError(
                f"metric is {self.whole:.4g} with all nodes and with none, so nothing can be faithful; choose prompts on which it depends on them"
            )

    def faithfulness(self, circuit: Circuit) -> float:
        """``(m(C) - m(0)) / (m(M) - m(0))``: 1 for all nodes, 0 for none."""
        return (self._kept(circuit) - self.nothing) / (self.whole - self.nothing)

    def completeness(self, circuit: Circuit) -> float:
        """The faithfulness of all other nodes: 0 where nothing that matters was left out."""
        check(self.spliced, circuit, self.tokens.shape[1])
        return self.faithfulness(complement(circuit))

    def curve(self, found: Effects, positions: bool = True, shares: Sequence[float] = SHARES) -> list[float]:
        """Faithfulness of the circuits of the active nodes with the strongest effects, at shares of their number."""
        active = found.active(positions)
        scores = [s.abs().where(on, -1.0) for s, on in zip(found.mean(positions), active, strict=True)]
        n = sum(int(on.sum()) for on in active)
        return [self.faithfulness(top([s + 1 for s in scores], round(share * n))) for share in shares]

    @torch.no_grad()
    def _kept(self, circuit: Circuit) -> float:
        check(self.spliced, circuit, self.tokens.shape[1])
        circuit = [kept.to(self.tokens.device) for kept in circuit]
        features: dict[int, Callable[[Codes], Codes]] = {}
        errors: dict[int, Callable[[Tensor], Tensor]] = {}
        added: dict[Site, Tensor] = {}
        for g, group in enumerate(self.spliced.groups):
            if group.kind == "feature":
                features[g] = Keep(circuit[g])
            else:
                errors[g] = _KeepError(circuit[g], self._instead(self._error(group.writes[0])))
        if self.other is not None:
            outside = {g: Keep(~circuit[g]) for g in features}
            silent = {g: Keep(torch.zeros_like(circuit[g])) for g in features}
            for site in self.spliced.written:
                loud, none = (
                    {g: keep(self.other.codes(g)) for g, keep in k.items()} for k in (outside, silent)
                )
                added[site] = self._instead(self.other.hat(site, loud) - self.other.hat(site, none))
        run = self.spliced.run(self.tokens, Changes(features, errors, added))
        return measure(self.metric, run).mean().item()

    def _error(self, site: Site) -> Tensor:
        return (self.plain if self.other is None else self.other).error(site)

    def _instead(self, values: Float[Tensor, "other seq d"]) -> Float[Tensor, "some seq d"]:
        """What ablated nodes are set to, of their values on the other prompts."""
        if self.ablation == "mean":
            return values.mean(0, keepdim=True)
        return values[self.drawn] if self.ablation == "resample" else torch.zeros_like(values)


@dataclass(frozen=True)
class Keep:
    """Silences the features that are not ``kept``, at each position or at all alike."""

    kept: Bool[Tensor, "..."]

    def __call__(self, codes: Codes) -> Codes:
        unit = codes.indices.long()
        kept = self.kept[unit] if self.kept.ndim == 1 else self.kept[codes.row_ids() % codes.shape[1], unit]
        return codes.with_values(codes.values * kept)


@dataclass(frozen=True)
class _KeepError:
    kept: Bool[Tensor, "..."]
    instead: Tensor

    def __call__(self, error: Tensor) -> Tensor:
        return error.where(self.kept, self.instead)


def areas(faithfulness: Sequence[float], shares: Sequence[float] = SHARES) -> tuple[float, float]:
    """MIB's measures of a curve, by trapezoids (Mueller et al. 2025, 2504.13151): CPR, the area under the curve, and
    CMD, that between it and 1."""
    cpr = cmd = 0.0
    for i in range(len(shares) - 1):
        (a, b), width = faithfulness[i : i + 2], shares[i + 1] - shares[i]
        cpr += width * (a + b) / 2
        cmd += width * (abs(1 - a) + abs(1 - b)) / 2
    return cpr, cmd


def ablate(
    spliced: Spliced, tokens: Prompts, features: "Mapping[int, Sequence[int] | Tensor]"
) -> Float[Tensor, "prompt seq read"]:
    """What is read where some features, listed by stand, are zero and errors stay what they are (the paper's SHIFT)."""
    changes: dict[int, Callable[[Codes], Codes]] = {}
    for stand, listed in features.items():
        if not 0 <= stand < len(spliced.stands):
            raise SaekitError(f"stand {stand} is none; there are {len(spliced.stands)}, counted from 0")
        total = sum(spliced.stands[stand].sizes)
        wanted = torch.as_tensor(listed, dtype=torch.int64, device=spliced.weights.W_E.device)
        wrong = wanted[(wanted < 0) | (wanted >= total)]
        if len(wrong):
            raise SaekitError(f"feature {int(wrong[0])} of stand {stand} is none; it has 0 to {total - 1}")
        kept = torch.ones(total, dtype=torch.bool, device=wanted.device)
        kept[wanted] = False
        for g, group in enumerate(spliced.groups):
            if group.stand == stand and group.kind == "feature":
                changes[g] = Keep(kept[group.first : group.first + group.n])
    return spliced.run(tokens, Changes(features=changes)).out
