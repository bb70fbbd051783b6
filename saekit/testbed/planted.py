"""Activations whose features are known: sparse codes drawn from a law, written by planted directions.

The generator follows SynthSAEBench (Chanin & Garriga-Alonso 2026, arXiv 2602.14687): Zipf firing
rates, a low-rank Gaussian copula, a forest of features in which a child needs its parent and
siblings exclude each other, Gaussian magnitudes, more features than dimensions. Where the paper's
description leaves a marginal approximate, the construction here makes it exact:

* siblings compete by an exponential race with weights P(child | parent), so every rate is known in
  closed form (``PlantedWorld.rates``) and equals the law wherever the law is feasible;
* inside a family (ancestors and their siblings) copula directions are orthogonal: the tree alone
  ties a child to its parent, and the copula ties features of different families;
* all rows of the copula's factor have the same norm, ``correlation * sqrt(rank)``.

Cost of sampling: features in the forest are only drawn in the rows where their parent fired. Without
correlations the others are drawn by geometric jumps from firing to firing. With correlations every
cell has its own probability, so roots and free features are compared with their thresholds in blocks
of 2^20 cells at most. No ``[batch, n_features]`` array is built in either case.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from saekit.registry import nearest
from saekit.types import Codes, SaekitError

CHUNK = 1024  # rows drawn at a time; part of what a seed means: another value gives other samples
BLOCK = 1 << 20  # cells compared with their thresholds at a time (4 MB)
ORTHOGONAL_LR = 3e-4  # the paper's
WORLD, TRAINING, EVALUATION = range(3)  # streams of random numbers

Entries = tuple[Tensor, Tensor, Tensor]  # row, feature and value of each active cell, all [nnz]


@dataclass(frozen=True)
class PlantedConfig:
    """What a planted world is made of. The defaults are the ``small`` preset.

    ``exponent``, ``p_max``, ``p_min``: firing rate of the feature of rank r is ``r^-exponent``,
    mapped affinely so that the first is ``p_max`` and the last ``p_min``. ``correlation``: standard
    deviation of the entries of the copula's factor [n_features, rank]; 0 for independent features.
    ``roots``, ``branching``, ``depth``: the first features, by rising depth, form ``roots`` trees.
    ``orthogonal_steps``: Adam steps on the squared off-diagonal cosines. ``magnitude_mean``: mean
    of the first and the last feature, linear between. ``magnitude_std``: the standard deviations
    are ``|Normal(first, second)|``. ``bias``: norm of the constant added to every activation.
    """

    n_features: int = 512
    d_in: int = 64
    exponent: float = 0.5
    p_max: float = 0.4
    p_min: float = 5e-4
    rank: int = 10
    correlation: float = 0.15
    roots: int = 8
    branching: int = 4
    depth: int = 2
    orthogonal_steps: int = 100
    magnitude_mean: tuple[float, float] = (5.0, 4.0)
    magnitude_std: tuple[float, float] = (0.5, 0.5)
    bias: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name in ("n_features", "d_in", "branching"):
            self._require(name, getattr(self, name) >= 1, "use 1 or more")
        for name in ("rank", "correlation", "roots", "depth", "orthogonal_steps", "bias", "seed"):
            self._require(name, getattr(self, name) >= 0, "use 0 or more")
        family, below = 1 + self.depth * self.branching, 1 / math.sqrt(max(self.rank, 1))
        bare = not (self.correlated and self.roots)
        for name, valid, fix in (
            ("exponent", 0 < self.exponent < math.inf, "use a positive number"),
            ("p_max", 0 < self.p_max <= 1, "use a probability above 0"),
            ("p_min", 0 < self.p_min <= self.p_max, f"use a probability above 0, at most p_max={self.p_max}"),
            ("correlation", self.correlation < below, f"use less than 1/sqrt(rank) = {below:.3g}"),
            ("n_features", self.n_features >= self.forest_size, f"the forest needs {self.forest_size}"),
            ("rank", bare or self.rank >= family, f"use 1 + depth * branching = {family}, or correlation=0"),
            ("magnitude_mean", min(self.magnitude_mean) > 0, "use two positive numbers"),
            ("magnitude_std", min(self.magnitude_std) >= 0, "use two numbers of 0 or more"),
        ):
            self._require(name, valid, fix)

    def _require(self, name: str, valid: bool, fix: str) -> None:
        if not valid:
            raise SaekitError(f"PlantedConfig.{name} is {getattr(self, name)!r}: {fix}")

    @property
    def correlated(self) -> bool:
        """Whether features of different families are tied by the copula."""
        return self.correlation > 0 and self.rank > 0

    @property
    def level_sizes(self) -> list[int]:
        """Number of features at each depth of the forest, roots first."""
        return [self.roots * self.branching**level for level in range(self.depth + 1)]

    @property
    def forest_size(self) -> int:
        """Number of features that belong to a tree."""
        return sum(self.level_sizes)


PRESETS = {
    "small": PlantedConfig(),
    "synthsaebench-16k": PlantedConfig(
        n_features=16384, d_in=768, rank=25, correlation=0.1, roots=128, branching=4, depth=3, seed=42
    ),
}


def preset(name: str, **changes: Any) -> PlantedConfig:
    """A named config (``small``, ``synthsaebench-16k``), with some fields changed."""
    if name not in PRESETS:
        raise SaekitError(f"planted world {name!r} is unknown{nearest(name, PRESETS)}")
    return replace(PRESETS[name], **changes)


class PlantedWorld:
    """A planted dictionary and the law of its codes; sampling is a function of seed and step only.

    ``directions`` [n_features, d_in] unit rows; ``bias`` [d_in]; ``parent`` int64 [n_features], -1
    for roots and free features; ``law`` float64 [n_features], the Zipf rates; ``rates`` float64
    [n_features], the exact firing rates: the law, except that siblings whose rates by the law add
    up to more than their parent's share the parent's, and that no rate exceeds the chance of a
    positive magnitude; ``loadings`` [n_features, rank], the copula's factor. Constants are drawn on
    the CPU, so a seed means one world on every device; samples are drawn on ``device``, and other
    devices draw other samples of the same law.
    """

    def __init__(
        self, config: PlantedConfig, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ):
        self.config, self.device, self.dtype = config, torch.device(device), dtype
        c, generator = config, self._generator(WORLD, 0, torch.device("cpu"))
        self.directions = _unit_directions(c, generator, self.device)
        self.bias = (F.normalize(torch.randn(c.d_in, generator=generator), dim=0) * c.bias).to(self.device)
        centre, spread = c.magnitude_std
        std = (centre + spread * torch.randn(c.n_features, generator=generator)).abs()
        mean = torch.linspace(*c.magnitude_mean, c.n_features)
        self.magnitude_mean, self.magnitude_std = mean.to(self.device), std.to(self.device)
        self.loadings = _loadings(c, generator).to(self.device)
        # standard deviation of the part of a copula latent that no other feature shares
        self._noise = math.sqrt(1 - c.rank * c.correlation**2)

        parent, first_child = _forest(c)
        law = _zipf(c)
        rates, draw = _rates(c, law, torch.special.ndtr(mean.double() / std.double()))
        self.parent, self._first_child = parent.to(self.device), first_child.to(self.device)
        self.law, self.rates, self._draw = law.to(self.device), rates.to(self.device), draw.to(self.device)
        # features that need no parent: roots and those outside the forest
        top = torch.cat([torch.arange(c.roots), torch.arange(c.forest_size, c.n_features)])
        self._top = top.to(self.device)
        self._threshold = -torch.special.ndtri(draw[top]).float().to(self.device)

    def batch(self, batch_size: int, step: int) -> tuple[Float[Tensor, "batch d_in"], Codes]:
        """The training batch of one step: activations and their true codes.

        A function of (seed, step, batch_size): resuming at a step needs nothing else. Codes hold
        only active features, by rising index.
        """
        if batch_size < 1:
            raise SaekitError(f"batch_size is {batch_size}: use at least 1")
        if not 0 <= step < 1 << 30:
            raise SaekitError(f"step is {step}: use a number from 0 to 2^30 - 1")
        codes = self._sample(batch_size, batch_size, self._generator(TRAINING, step, self.device))
        return self.decode(codes), codes

    def evaluation_set(self, n: int) -> tuple[Float[Tensor, "rows d_in"], Codes]:
        """The first n rows of the world's frozen evaluation stream, which training never draws."""
        if n < 1:
            raise SaekitError(f"n is {n}: use at least 1 row")
        # whole chunks, so that a larger set extends a smaller one
        drawn = -(-n // CHUNK) * CHUNK
        codes = self._sample(drawn, n, self._generator(EVALUATION, 0, self.device))
        return self.decode(codes), codes

    def decode(self, codes: Codes) -> Float[Tensor, "rows d_in"]:
        """Activations of true codes: the sum of value times direction, plus the bias."""
        summed = F.embedding_bag(
            codes.indices.long(), self.directions, codes.offsets,
            mode="sum", per_sample_weights=codes.values, include_last_offset=True,
        )  # fmt: skip
        return (summed + self.bias).to(self.dtype)

    def _generator(self, stream: int, index: int, device: torch.device) -> torch.Generator:
        # torch's CPU generator keeps 32 bits of its seed, so hashed seeds would collide within a
        # long run; a bijection of (index, stream) cannot, and it keeps the streams apart
        key = int.from_bytes(hashlib.blake2b(str(self.config.seed).encode(), digest_size=4).digest(), "big")
        return torch.Generator(device).manual_seed(_scramble((4 * index + stream) ^ key))

    def _sample(self, rows: int, keep: int, generator: torch.Generator) -> Codes:
        """Codes of the first ``keep`` of ``rows`` rows, drawn chunk by chunk."""
        drawn = []
        for start in range(0, rows, CHUNK):
            row, feature, value = self._chunk(min(CHUNK, rows - start), generator)
            drawn.append((row + start, feature, value))
        row, feature, value = (torch.cat(part) for part in zip(*drawn, strict=True))
        order = (row * self.config.n_features + feature).argsort()
        row, feature, value = row[order], feature[order], value[order]
        offsets = torch.zeros(keep + 1, dtype=torch.int64, device=self.device)
        offsets[1:] = torch.bincount(row, minlength=rows)[:keep].cumsum(0)
        nnz = int(offsets[-1])
        return Codes(offsets, feature[:nnz].int(), value[:nnz], self.config.n_features, (keep,))

    def _chunk(self, rows: int, generator: torch.Generator) -> Entries:
        """Active cells of a chunk: features without a parent first, then level by level."""
        shared = None
        if self.config.correlated:
            shared = torch.randn(rows, self.config.rank, generator=generator, device=self.device)
        row, feature = self._parentless(rows, shared, generator)
        frontier = self._with_values(row, feature, 1.0, generator)
        found = [frontier]
        for _ in range(self.config.depth):
            frontier = self._children(frontier, shared, generator)
            found.append(frontier)
        row, feature, value = (torch.cat(part) for part in zip(*found, strict=True))
        return row, feature, value

    def _with_values(self, row, feature, scale, generator) -> Entries:
        """Draw magnitudes and keep the cells that ReLU leaves positive."""
        noise = torch.randn(len(feature), generator=generator, device=self.device)
        value = (self.magnitude_mean[feature] + self.magnitude_std[feature] * noise) * scale
        kept = value > 0
        return row[kept], feature[kept], value[kept]

    def _parentless(self, rows, shared, generator) -> tuple[Tensor, Tensor]:
        """Row and feature of the firing roots and free features."""
        if shared is None:
            row, column = sparse_bernoulli(self._draw[self._top], rows, generator)
            return row, self._top[column]
        loadings, found = self.loadings[self._top].T, []
        step = max(1, BLOCK // len(self._top))
        for start in range(0, rows, step):
            factors = shared[start : start + step]
            latent = torch.randn(len(factors), len(self._top), generator=generator, device=self.device)
            latent.addmm_(factors, loadings, beta=self._noise)
            row, column = (latent > self._threshold).nonzero(as_tuple=True)
            found.append((row + start, self._top[column]))
        row, feature = (torch.cat(part) for part in zip(*found, strict=True))
        return row, feature

    def _children(self, parents: Entries, shared, generator) -> Entries:
        """At most one child for each firing parent, by an exponential race.

        Child c arrives after Exponential(1) / P(c | parent) and "no child" after Exponential(1) /
        P(none | parent): the first is c with exactly its probability. With correlations, c's
        exponential is a falling function of its copula latent, so a high latent arrives early.
        """
        row, parent, value = parents
        branching = self._first_child[parent] >= 0
        row, parent, value = row[branching], parent[branching], value[branching]
        children = self._first_child[parent, None] + torch.arange(self.config.branching, device=self.device)
        if shared is None:
            clock = torch.empty(children.shape, device=self.device).exponential_(generator=generator)
        else:
            latent = torch.randn(children.shape, generator=generator, device=self.device) * self._noise
            latent += (self.loadings[children] * shared[row, None]).sum(-1)
            clock = -torch.special.log_ndtr(latent)
        weight = self._draw[children]
        spare = (1 - weight.sum(1, keepdim=True)).clamp(min=0)
        idle = torch.empty(len(row), 1, device=self.device).exponential_(generator=generator)
        idle = torch.where(spare > 0, idle / spare, math.inf)
        first = torch.cat([clock / weight, idle], 1).argmin(1)
        won = first < self.config.branching
        child = children[won].gather(1, first[won, None])[:, 0]
        scale = value[won] / self.magnitude_mean[parent[won]]
        return self._with_values(row[won], child, scale, generator)


def sparse_bernoulli(
    p: Float[Tensor, " feature"], rows: int, generator: torch.Generator
) -> tuple[Int[Tensor, " nnz"], Int[Tensor, " nnz"]]:
    """Row and column of the ones in a [rows, feature] table of independent Bernoulli(p) cells.

    Work and memory are of the order of the number of ones: columns are grouped by the power of two
    above their p, geometric jumps of that rate visit candidate cells, and a candidate stays with
    probability p / rate (at least a half).
    """
    octave = torch.frexp(p).exponent.clamp(max=0)
    rows_found, columns_found = [], []
    for exponent in octave.unique().tolist():
        columns = (octave == exponent).nonzero()[:, 0]
        rate, cells = 2.0**exponent, rows * len(columns)
        log_miss = math.log1p(-rate) if rate < 1 else -math.inf
        at, last = [], -1
        while last < cells:
            expected = (cells - last) * rate
            size = int(expected + 6 * math.sqrt(expected)) + 16
            uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=p.device)
            jumps = (torch.log1p(-uniform) / log_miss).floor().long() + 1
            at.append(jumps.cumsum(0) + last)
            last = int(at[-1][-1])
        cell = torch.cat(at)
        cell = cell[cell < cells]
        row, column = cell // len(columns), columns[cell % len(columns)]
        kept = torch.rand(len(cell), generator=generator, dtype=p.dtype, device=p.device) * rate < p[column]
        rows_found.append(row[kept])
        columns_found.append(column[kept])
    return torch.cat(rows_found), torch.cat(columns_found)


def _scramble(x: int) -> int:
    """A bijection of the 32-bit integers that scatters neighbours (MurmurHash3's finaliser)."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x


def _unit_directions(c: PlantedConfig, generator: torch.Generator, device: torch.device) -> Tensor:
    """Unit rows [n_features, d_in], pushed apart by Adam on the sum of squared cosines.

    For unit rows V, the sum over pairs of cos^2 is ||V^T V||_F^2 - n_features, so a [d_in, d_in]
    product gives the gradient of all n_features^2 cosines. With many more features than dimensions
    random rows are already near the Welch bound, and the steps change little.
    """
    raw = torch.randn(c.n_features, c.d_in, generator=generator).to(device)
    raw = F.normalize(raw, dim=1)
    if c.orthogonal_steps:
        with torch.enable_grad():
            raw.requires_grad_()
            optimizer = torch.optim.Adam([raw], lr=ORTHOGONAL_LR)
            for _ in range(c.orthogonal_steps):
                unit = F.normalize(raw, dim=1)
                optimizer.zero_grad()
                (unit.T @ unit).square().sum().backward()
                optimizer.step()
    return F.normalize(raw.detach(), dim=1)


def _forest(c: PlantedConfig) -> tuple[Tensor, Tensor]:
    """Parent and first child of every feature, int64 [n_features], -1 where there is none."""
    parent = torch.full((c.n_features,), -1)
    first_child = parent.clone()
    start = 0
    for size, below in zip(c.level_sizes, c.level_sizes[1:], strict=False):
        nodes = torch.arange(start, start + size)
        first_child[nodes] = start + size + torch.arange(size) * c.branching
        start += size
        parent[start : start + below] = nodes.repeat_interleave(c.branching)
    return parent, first_child


def _zipf(c: PlantedConfig) -> Tensor:
    """Firing rates by the law, float64 [n_features], falling from p_max to p_min."""
    power = torch.arange(1, c.n_features + 1, dtype=torch.float64) ** -c.exponent
    spread = (power - power[-1]) / (power[0] - power[-1]) if c.n_features > 1 else power
    return c.p_min + (c.p_max - c.p_min) * spread


def _rates(c: PlantedConfig, law: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Exact firing rates, and the probabilities to draw with (given the parent, for children).

    ``positive`` is the chance that a magnitude survives its ReLU. Drawing probabilities are raised
    to make up for it, for the parent's silence and for the siblings, up to what a parent can share.
    """
    rates = torch.minimum(law, positive)
    draw = rates / positive
    above, start = slice(0, c.roots), c.roots
    for size in c.level_sizes[1:]:
        level = slice(start, start + size)
        reach = rates[above].repeat_interleave(c.branching) * positive[level]
        wanted = (law[level] / reach).view(-1, c.branching)
        draw[level] = (wanted / wanted.sum(1, keepdim=True).clamp(min=1)).view(-1)
        rates[level] = reach * draw[level]
        above, start = level, start + size
    return rates, draw


def _loadings(c: PlantedConfig, generator: torch.Generator) -> Tensor:
    """The copula's factor [n_features, rank]: rows of norm correlation * sqrt(rank).

    In a tree, siblings are made orthogonal to each other, to their ancestors and to their
    ancestors' siblings: those latents are then independent, which keeps the children's rates exact.
    """
    unit = F.normalize(torch.randn(c.n_features, c.rank, generator=generator), dim=1)
    if c.correlated and c.roots:
        family, start = unit[: c.roots, None], c.roots  # [parents, directions so far, rank]
        for size in c.level_sizes[1:]:
            level = slice(start, start + size)
            siblings = unit[level].view(-1, c.branching, c.rank)
            family = torch.linalg.qr(torch.cat([family, siblings], 1).mT).Q.mT
            unit[level] = family[:, -c.branching :].reshape(-1, c.rank)
            family, start = family.repeat_interleave(c.branching, 0), start + size
    return unit * c.correlation * math.sqrt(c.rank)
