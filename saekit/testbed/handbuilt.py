"""Transformers by hand: named parts of the residual stream, and heads and neurons that read and write them.

Everything is written down in features, of which each has a row of a frame: the identity, a rotation, or more unit rows
than dimensions (superposition).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.dictionaries import Dictionary, create
from saekit.models import Model, load_model
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import SaekitError

SHARP = 32.0  # of scores: all but e^-16 of the attention is where it should be
SMALL = 0.01  # of what a distractor adds to each feature, about, where its input has norm 1
D_DISTRACTOR = 4  # dimensions of a distractor head

# ("token", position), ("position", position), ("bias", layer), ("head", layer, head, position),
# ("neuron", layer, neuron, position), ("feature", layer, feature, position), ("target", token)
Node = tuple[str | int, ...]
Moves = Sequence[tuple[Float[Tensor, "_ feature"], Float[Tensor, "_ feature"]]]


class Edge(NamedTuple):
    """``source`` adds ``weight`` to the value of ``target`` (to the sum of its dimensions, if that is a head)."""

    source: Node
    target: Node
    weight: float


class Pair(NamedTuple):
    """``query`` and ``key`` together add ``weight`` to the score that ``head`` gives position ``at``."""

    query: Node
    key: Node
    head: Node
    at: int
    weight: float


@dataclass(frozen=True)
class Prompt:
    """A prompt with its right ``answers``, and the circuit that finds them.

    ``totals``: the exact effect of nodes on targets over all paths, with attention as it is. ``path``: the features of
    the residual streams that carry the answer, from its token to its logit.
    """

    tokens: Int[Tensor, " seq"]
    answers: tuple[int, ...]
    edges: tuple[Edge, ...]
    pairs: tuple[Pair, ...] = ()
    totals: Mapping[tuple[Node, Node], float] = field(default_factory=dict)
    path: tuple[Node, ...] = ()

    @property
    def roles(self) -> set[tuple[Node, Node, str]]:
        """Every link with what it is for: "V" moves values, "Q" and "K" say where a head looks."""
        links = {(edge.source, edge.target, "V") for edge in self.edges}
        links |= {(pair.query, pair.head, "Q") for pair in self.pairs}
        return links | {(pair.key, pair.head, "K") for pair in self.pairs}


@dataclass(frozen=True)
class Known:
    """A model whose circuit is known: ``prompts(n, generator)`` draws prompts, ``outputs`` are the tokens that may answer.

    ``frame`` has the direction of every feature; ``spaces`` names them.
    """

    model: Model
    prompts: Callable[[int, torch.Generator], list[Prompt]]
    outputs: Int[Tensor, " output"]
    frame: Float[Tensor, "feature d"]
    spaces: Mapping[str, range]

    @torch.no_grad()
    def logits(self, prompts: Sequence[Prompt]) -> Float[Tensor, "prompt vocabulary"]:
        """Of the last position of each prompt."""
        out: list[Tensor] = [torch.zeros(0)] * len(prompts)
        lengths = [len(prompt.tokens) for prompt in prompts]
        for length in set(lengths):
            chosen = [i for i, own in enumerate(lengths) if own == length]
            made = self.model.module(torch.stack([prompts[i].tokens for i in chosen]))[:, -1]
            for i, row in zip(chosen, made, strict=True):
                out[i] = row
        return torch.stack(out)

    def solved(self, prompts: Sequence[Prompt]) -> Bool[Tensor, " prompt"]:
        """Whether every right answer's logit is above that of every other output."""
        right = torch.zeros(len(prompts), len(self.outputs), dtype=torch.bool)
        for row, prompt in zip(right, prompts, strict=True):
            row |= torch.isin(self.outputs, torch.tensor(prompt.answers))
        logits = self.logits(prompts)[:, self.outputs]
        lowest = logits.masked_fill(~right, math.inf).amin(1)
        return lowest > logits.masked_fill(right, -math.inf).amax(1)

    def dictionary(self, layer: int, threshold: float = 0.5) -> Dictionary:
        """The right dictionary of the stream behind a layer: the frame, read and written by the same rows."""
        n, d = self.frame.shape
        out = create("jumprelu", d_in=d, n_features=n, normalise="none", start=threshold)
        with torch.no_grad():
            out.encoder.copy_(self.frame)
            out.atoms.weight.copy_(self.frame)
        out.reads = out.writes = (f"layers.{layer}",)
        return out.eval()


@dataclass(frozen=True)
class _Head:
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class _Neuron:
    read: Tensor
    bias: float
    write: Tensor


class Builder:
    """Collects what is embedded, read and written, in features; :meth:`finish` makes a model of it.

    ``spaces``: names and sizes of the parts of the stream. ``W_E`` [vocabulary, feature], ``W_pos`` [context, feature],
    ``W_U`` [vocabulary, feature] and ``b_U`` are zero and for the caller to fill.
    """

    def __init__(self, spaces: Mapping[str, int], vocabulary: int, context: int, layers: int):
        ends = [sum(list(spaces.values())[: i + 1]) for i in range(len(spaces))]
        self.spaces = {
            name: range(end - size, end) for end, (name, size) in zip(ends, spaces.items(), strict=True)
        }
        self.n = ends[-1]
        self.W_E, self.W_U = torch.zeros(vocabulary, self.n), torch.zeros(vocabulary, self.n)
        self.W_pos, self.b_U = torch.zeros(context, self.n), torch.zeros(vocabulary)
        self.heads: list[list[_Head]] = [[] for _ in range(layers)]
        self.neurons: list[list[_Neuron]] = [[] for _ in range(layers)]

    def rows(self, space: str, *which: int) -> Float[Tensor, "row feature"]:
        """Unit rows of some features of a space, by their numbers in it; without numbers, of all."""
        numbers = self.spaces[space]
        return torch.eye(self.n)[[numbers[i] for i in which] if which else list(numbers)]

    def head(self, layer: int, looks: Moves, moves: Moves) -> None:
        """A head: ``looks`` pairs what queries read with what keys read, ``moves`` what is read with what is written."""
        (q, k), (v, o) = ([torch.cat(side) for side in zip(*pairs, strict=True)] for pairs in (looks, moves))
        self.heads[layer].append(_Head(q, k, v, o))

    def neuron(
        self, layer: int, read: Float[Tensor, " feature"], bias: float, write: Float[Tensor, " feature"]
    ) -> None:
        """A neuron, ``ReLU(read x + bias)`` times ``write``."""
        self.neurons[layer].append(_Neuron(read, bias, write))

    def finish(self, prompts: Callable[[int, torch.Generator], list[Prompt]], outputs: Sequence[int], *,
               distractors: int = 0, rotate: bool = False, width: int | None = None, norm: str = "none",
               seed: int = 0) -> Known:  # fmt: skip
        """The model; logits of tokens that are no outputs lie 1 lower.

        ``distractors``: so many heads and neurons in each layer that read anything and write little.

        ``rotate``: the features' directions are rotated, which leaves the function as it is. ``width``: of the stream;
        below the number of features they are superposed.
        """
        if norm == "layer":
            raise SaekitError(
                "norm = 'layer' takes a mean over dimensions that are features here; choose 'rms' or 'none'"
            )
        self.b_U += torch.isin(torch.arange(len(self.b_U)), torch.tensor(outputs)).float() - 1
        frame = directions(self.n, width, rotate, seed)
        g = torch.Generator().manual_seed(seed)
        heads = [[*own, *(self._distractor_head(g) for _ in range(distractors))] for own in self.heads]
        neurons = [[*own, *(self._distractor_neuron(g) for _ in range(distractors))] for own in self.neurons]
        positions = bool(self.W_pos.any())
        dims = [max(len(h.q), len(h.v)) for own in heads for h in own]
        config = TransformerConfig(
            vocabulary=len(self.W_E), context=len(self.W_pos), d_model=frame.shape[1], n_layers=len(heads),
            n_heads=max(1, *(len(own) for own in heads)), d_head=max(1, 1, *dims), norm=norm,
            d_mlp=max(0, *(len(own) for own in neurons)), positions="learned" if positions else "none",
        )  # fmt: skip
        module = Transformer(config)
        _write(self, module, frame, heads, neurons)
        model = load_model(module, name="hand-built")
        return Known(model, prompts, torch.tensor(outputs), frame, self.spaces)

    def _distractor_head(self, g: torch.Generator) -> _Head:
        q, k, v, o = (
            torch.randn(D_DISTRACTOR, self.n, generator=g) / math.sqrt(D_DISTRACTOR) for _ in range(4)
        )
        return _Head(q, k, v, SMALL * math.sqrt(D_DISTRACTOR) * o)

    def _distractor_neuron(self, g: torch.Generator) -> _Neuron:
        read, write = (torch.randn(self.n, generator=g) for _ in range(2))
        return _Neuron(read, 0.1 * float(torch.randn((), generator=g)), SMALL * write)


def directions(n: int, width: int | None, rotate: bool, seed: int) -> Float[Tensor, "feature d"]:
    """Unit rows for features: the identity, a random rotation, or in fewer dimensions a random tight frame, normalised."""
    if width is not None and not 1 <= width <= n:
        raise SaekitError(f"width = {width} must be at least 1 and at most the number of features, {n}")
    if width is None and not rotate:
        return torch.eye(n)
    g = torch.Generator().manual_seed(seed + 1)
    basis = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64)).Q
    return torch.nn.functional.normalize(basis[:, :width], dim=1).float()


@torch.no_grad()
def _write(
    b: Builder, module: Transformer, frame: Tensor, heads: Sequence[Sequence[_Head]], neurons: Sequence[Sequence[_Neuron]]
) -> None:  # fmt: skip
    """Fill a module's weights with those of the builder, in the frame."""
    for name, parameter in module.named_parameters():
        if "norm" not in name:  # those keep their gain of 1
            parameter.zero_()
    module.embed_tokens.weight.copy_(b.W_E @ frame)
    if module.embed_positions is not None:
        module.embed_positions.weight.copy_(b.W_pos @ frame)
    module.lm_head.weight.copy_(b.W_U @ frame)
    module.lm_head.bias.copy_(b.b_U)
    for layer, own_heads, own_neurons in zip(module.layers, heads, neurons, strict=True):
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        size = module.shape.d_head
        for i, head in enumerate(own_heads):
            at = i * size
            attention.q_proj.weight[at : at + len(head.q)] = head.q @ frame * math.sqrt(size)
            attention.k_proj.weight[at : at + len(head.k)] = head.k @ frame
            attention.v_proj.weight[at : at + len(head.v)] = head.v @ frame
            attention.o_proj.weight[:, at : at + len(head.o)] = (head.o @ frame).T
        for i, neuron in enumerate(own_neurons):
            mlp.up_proj.weight[i], mlp.up_proj.bias[i] = neuron.read @ frame, neuron.bias
            mlp.down_proj.weight[:, i] = neuron.write @ frame
