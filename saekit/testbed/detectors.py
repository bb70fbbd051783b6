"""A ReLU MLP whose families of neurons are known: dead ones, detectors, positional ones, and random ones.

It reads the embeddings of a position, of the token there and of the two before, each in a rotated basis of its own, so
that a neuron's pre-activation is a sum of four entries of tables, and a bias.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor, nn

from saekit.models import Model, load_model
from saekit.types import SaekitError

SLIGHT = 0.15  # of what random neurons read of the position, over what they read of a token
LOUD, QUIET = (
    0.8,
    0.25,
)  # share of tokens at which the weak positional neuron fires, in either half of the positions
SIZES = (1, 2, 3)
PARTS = ("here", "one_back", "two_back", "position")


@dataclass(frozen=True)
class DetectorsConfig:
    """Sizes. ``random`` neurons stand beside ``dead`` ones, 4 positional ones, and detectors of tokens (two each), of
    a bigram and of a trigram. In the text each bigram and trigram is put in at a share ``inserted`` of the positions,
    and the last two tokens of a trigram, without its first, at twice as many."""

    vocabulary: int = 40
    context: int = 64
    random: int = 64
    dead: int = 3
    tokens: int = 2
    bigrams: int = 2
    trigrams: int = 5
    inserted: float = 0.008

    def __post_init__(self):
        needed = 2 * self.tokens + 2 * self.bigrams + 3 * self.trigrams
        if self.vocabulary < needed:
            raise SaekitError(
                f"vocabulary = {self.vocabulary} is too small for grams without a common token; choose {needed} or more"
            )
        if self.context < 16:
            raise SaekitError(
                f"context = {self.context} is too short for neurons that tell positions; choose 16 or more"
            )


class _Mlp(nn.Module):
    def __init__(self, d_in: int, neurons: int, d_out: int):
        super().__init__()
        self.up_proj, self.act_fn = nn.Linear(d_in, neurons), nn.ReLU()
        self.down_proj = nn.Linear(neurons, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)))


class DetectorsModel(nn.Module):
    """Token ids [batch, seq] to logits [batch, seq, vocabulary]; ``mlp`` has the neurons."""

    here: Tensor
    one_back: Tensor
    two_back: Tensor
    position: Tensor

    def __init__(self, config: DetectorsConfig, neurons: int, generator: torch.Generator):
        super().__init__()
        v, t = config.vocabulary, config.context
        for name, size in zip(PARTS, (v, v, v, t), strict=True):
            turn = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
            self.register_buffer(name, turn.float())
        with torch.random.fork_rng(devices=[]):  # what torch draws is written over
            self.mlp = _Mlp(3 * v + t, neurons, v)
            self.norm, self.lm_head = nn.LayerNorm(v), nn.Linear(v, v, bias=False)
        with torch.no_grad():
            self.norm.weight.copy_(0.5 + torch.rand(v, generator=generator))
            self.lm_head.weight.copy_(torch.randn(v, v, generator=generator) / v**0.5)

    @torch.no_grad()
    def fill(
        self,
        tables: Float[Tensor, "neuron entry"],
        bias: Float[Tensor, " neuron"],
        written: Float[Tensor, "neuron d"],
    ) -> None:
        """Set what neurons add up (entries of the parts one after another) and what they write."""
        turns = [getattr(self, name) for name in PARTS]
        parts = tables.split([len(turn) for turn in turns], 1)
        self.mlp.up_proj.weight.copy_(
            torch.cat([part @ turn for part, turn in zip(parts, turns, strict=True)], 1)
        )
        self.mlp.up_proj.bias.copy_(bias)
        self.mlp.down_proj.weight.copy_(written.T)

    def forward(self, input_ids: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq vocabulary"]:
        """Logits behind each token; nothing stands before the first."""
        seq = input_ids.shape[1]
        read = [self.here[input_ids]]
        for back, turn in ((1, self.one_back), (2, self.two_back)):
            read.append(nn.functional.pad(turn[input_ids[:, : seq - back]], (0, 0, back, 0)))
        read.append(self.position[:seq].expand(len(input_ids), -1, -1))
        return self.lm_head(self.norm(self.mlp(torch.cat(read, -1))))


@dataclass(frozen=True)
class PlantedDetectors:
    """The model, and its neurons' families by their number: ``detectors`` has the grams of each, ``positional`` what
    kind it is ("strong", "weak", with "oscillatory" or not). ``suppressing`` detectors put their trigger's logit lowest,
    the other ones highest."""

    config: DetectorsConfig
    model: Model
    dead: frozenset[int]
    detectors: Mapping[int, frozenset[tuple[int, ...]]]
    positional: Mapping[int, str]
    suppressing: frozenset[int]

    def text(self, rows: int, seed: int) -> Int64[Tensor, "rows context"]:
        """Random tokens, with grams put in."""
        g = torch.Generator().manual_seed(seed)
        t = self.config.context
        tokens = torch.randint(self.config.vocabulary, (rows, t), generator=g)
        planted = [gram for grams in self.detectors.values() for gram in sorted(grams) if len(gram) > 1]
        for gram in planted + 2 * [gram[1:] for gram in planted if len(gram) == 3]:
            begin = torch.rand(rows, t - len(gram) + 1, generator=g) < self.config.inserted
            at = begin.nonzero()
            for i, token in enumerate(gram):
                tokens[at[:, 0], at[:, 1] + i] = token
        return tokens


def planted_detectors(config: DetectorsConfig | None = None, seed: int = 0) -> PlantedDetectors:
    """A model with planted neurons among random ones, in a random order."""
    c = config or DetectorsConfig()
    g = torch.Generator().manual_seed(seed)
    grams = _grams(c, g)
    kinds = ("strong", "strong", "strong, oscillatory", "weak")
    n = c.random + c.dead + len(grams) + len(kinds)
    v, t = c.vocabulary, c.context
    model = DetectorsModel(c, n, g)
    tables = torch.randn(n, 3 * v + t, generator=g)
    tables[:, 3 * v :] *= SLIGHT
    bias = 0.5 * torch.randn(n, generator=g)
    written = torch.randn(n, v, generator=g)
    order = torch.randperm(n, generator=g).tolist()
    dead, order = order[: c.dead], order[c.dead :]
    highest = sum(part.amax(1) for part in tables[dead].split([v, v, v, t], 1))
    bias[dead] = -1 - highest
    detectors = {}
    pull = model.lm_head.weight.detach() * model.norm.weight.detach()
    for i, own in enumerate(grams):
        neuron = order.pop()
        detectors[neuron] = own
        tables[neuron], bias[neuron] = 0.0, 0.5 - len(min(own))
        for gram in own:
            for back, token in enumerate(reversed(gram)):
                tables[neuron, back * v + token] = 1.0
        written[neuron] = sum(pull[gram[-1]] for gram in own) * (-1) ** (i + 1)
    positional = {order.pop(): kind for kind in kinds}
    for neuron, table in zip(positional, _positions(c, g), strict=True):
        tables[neuron], bias[neuron] = table, 0.0
    model.fill(tables, bias, written)
    suppressing = frozenset(list(detectors)[::2])
    return PlantedDetectors(
        c, load_model(model, name="planted detectors"), frozenset(dead), detectors, positional, suppressing
    )


def _grams(c: DetectorsConfig, g: torch.Generator) -> list[frozenset[tuple[int, ...]]]:
    """What each detector fires on; no token is in two of them."""
    left = torch.randperm(c.vocabulary, generator=g).tolist()
    out = []
    for n, many in zip(SIZES, (c.tokens, c.bigrams, c.trigrams), strict=True):
        for _ in range(many):
            drawn, left = left[: max(2, n)], left[max(2, n) :]
            out.append(frozenset((one,) for one in drawn) if n == 1 else frozenset([tuple(drawn)]))
    return out


def _positions(c: DetectorsConfig, g: torch.Generator) -> Float[Tensor, "neuron entry"]:
    """Tables of neurons of the first positions, of a range, of every other stretch, and of one that half depends."""
    at, v = torch.arange(c.context), c.vocabulary
    on = [
        at < c.context // 4,
        (at >= c.context // 3) & (at < c.context // 2),
        at // (c.context // 8) % 2 == 0,
    ]
    tables = torch.zeros(4, 3 * v + c.context)
    for table, where in zip(tables, on, strict=False):
        table[3 * v :] = torch.where(where, 1.0, -1.0)
    tables[3, :v] = (torch.randperm(v, generator=g) + 0.5) / v
    tables[3, 3 * v :] = torch.where(at < c.context // 2, LOUD, QUIET) - 1.0
    return tables
