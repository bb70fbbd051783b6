"""Circuits of ReLU neurons that are known because they are built: booleans, greater-than, amplification."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.dictionaries import Dictionary, create
from saekit.testbed.handbuilt import SHARP, Builder, Edge, Known, Node, Prompt

BITS = 4  # in a prompt, of which the first two count
OPERATIONS = {"and": (0.0, 1.0), "or": (1.0, -1.0), "xor": (1.0, -2.0)}  # of relu(a + b) and relu(a + b - 1)
YEARS, STEP = 24, 0.25  # how many, and by how much an embedding rises from one to the next
CHAINS, LAYERS = 8, 3
GAIN, SIZES = 2.0, (1.0, 1.5, 2.0)  # of each layer's amplification, and of the tokens of a chain


def boolean(**options: Any) -> Known:
    """AND, OR and XOR of two bits, by the same two neurons: ``relu(a + b)`` and ``relu(a + b - 1)``.

    Two heads bring the bits to the last position. Every operation has two answers, 2i (yes) and 2i + 1 (no) behind the
    tokens of the prompts. In ``xor`` of two ones, 2 and -2 cancel; in ``or`` each bit's two ways to the logit do.
    """
    begin, bit, equals, first = 0, 1, 3, 4
    n = len(OPERATIONS)
    b = Builder(
        {"bit": 1, "kind": 3, "pos": BITS + 2, "a": 1, "b": 1, "out": n}, first + 2 * n, BITS + 2, layers=1
    )
    is_begin, is_bit, is_equals = (b.rows("kind", i) for i in range(3))
    out = b.rows("out")
    b.W_E[begin], b.W_E[bit : bit + 2], b.W_E[equals] = is_begin, is_bit, is_equals
    b.W_E[bit + 1] += b.rows("bit")[0]
    b.W_pos += b.rows("pos")
    b.W_U[first::2], b.W_U[first + 1 :: 2], b.b_U[first + 1 :: 2] = out, -out, 1.0
    rest = (SHARP * (is_begin + is_bit), is_begin)
    for i, side in enumerate("ab"):
        b.head(0, [(SHARP * is_equals, b.rows("pos", i + 1)), rest], [(b.rows("bit"), b.rows(side))])
    both = (b.rows("a") + b.rows("b"))[0]
    for i, weights in enumerate(zip(*OPERATIONS.values(), strict=True)):
        b.neuron(0, both, -float(i), torch.tensor(weights) @ out)

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        drawn = torch.randint(2, (count, BITS), generator=g).tolist()
        return [_bits(bits, first) for bits in drawn]

    return b.finish(prompts, range(first, first + 2 * n), **options)


def _bits(bits: list[int], first: int) -> Prompt:
    q = BITS + 1
    neurons: list[Node] = [("neuron", 0, i, q) for i in range(2)]
    bias: Node = ("bias", 0)
    values = [max(bits[0] + bits[1] - i, 0) for i in range(2)]
    edges: list[Edge] = []
    totals: dict[tuple[Node, Node], float] = {}
    for i, on in enumerate(bits[:2]):
        head: Node = ("head", 0, i, q)
        edges += [Edge(("token", i + 1), head, 1.0)] * on
        edges += [
            Edge(head, neuron, 1.0) for neuron, value in zip(neurons, values, strict=True) if on and value
        ]
    if values[1]:
        edges.append(Edge(bias, neurons[1], -1.0))
    answers = []
    for i, weights in enumerate(OPERATIONS.values()):
        made = [w * value for w, value in zip(weights, values, strict=True)]
        answers.append(first + 2 * i + (sum(made) == 0))
        target: Node = ("target", first + 2 * i)
        edges += [Edge(neuron, target, m) for neuron, m in zip(neurons, made, strict=True) if m]
        slope = sum(w for w, value in zip(weights, values, strict=True) if value)
        totals |= {(neuron, target): m for neuron, m in zip(neurons, made, strict=True) if m}
        totals |= {(("token", j + 1), target): on * slope for j, on in enumerate(bits[:2])}
        totals[bias, target] = -weights[1] * (values[1] > 0)
    tokens = torch.tensor([0, *(1 + bit for bit in bits), 3])
    return Prompt(tokens, tuple(answers), tuple(edges), totals=totals)


def greater_than(**options: Any) -> Known:
    """Which years come after this one (Hanna et al. 2023, 2305.00586): a head brings the year, neurons are ramps.

    Neuron k is ``relu(year - k + 1/2)`` and takes as much off the logit of year k, so that later ones are left at 0.
    """
    ask, first_word, years = 1, 2, range(5, 5 + YEARS)
    b = Builder({"year": 1, "kind": 4, "seen": 1, "out": YEARS}, years[-1] + 1, 12, layers=1)
    is_begin, is_ask, is_word, is_year = (b.rows("kind", i) for i in range(4))
    out = b.rows("out")
    b.W_E[0], b.W_E[ask], b.W_E[first_word : years[0]] = is_begin, is_ask, is_word
    b.W_E[years[0] :] = is_year + STEP * torch.arange(YEARS)[:, None] * b.rows("year")
    b.W_U[years[0] :] = out
    rest = (SHARP * (is_begin + is_word + is_year), is_begin)
    b.head(0, [(SHARP * is_ask, is_year), rest], [(b.rows("year"), b.rows("seen"))])
    for k in range(YEARS):
        b.neuron(0, b.rows("seen")[0] / STEP, 0.5 - k, -out[k])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        return [_war(years, g) for _ in range(count)]

    return b.finish(prompts, years, **options)


def _war(years: range, g: torch.Generator) -> Prompt:
    year = int(torch.randint(YEARS - 1, (), generator=g))
    before, after = (torch.randint(2, 5, (int(n),), generator=g).tolist() for n in torch.randint(1, 5, (2,), generator=g))  # fmt: skip
    tokens = [0, *before, years[year], *after, 1]
    at, q = 1 + len(before), len(tokens) - 1
    head = ("head", 0, 0, q)
    edges = [Edge(("token", at), head, STEP * year)] * (year > 0)
    for k in range(year + 1):
        neuron, target = ("neuron", 0, k, q), ("target", years[k])
        edges += [Edge(head, neuron, float(year))] * (year > 0)
        edges += [Edge(("bias", 0), neuron, 0.5 - k), Edge(neuron, target, k - year - 0.5)]
    return Prompt(torch.tensor(tokens), tuple(years[year + 1 :]), tuple(edges))


def amplification(**options: Any) -> Known:
    """What a token writes is doubled by one neuron in each of three layers, and ends as a logit.

    The chains of :mod:`saekit.testbed.chain`, in a model and with a gain. With neurons or transcoders of one layer the
    path from the token to the logit has a feature in each layer, with a cross-layer transcoder one in all
    (:func:`transcoders`; Ameisen et al. 2025).
    """
    tokens = CHAINS * len(SIZES)
    b = Builder({f"stage{i}": CHAINS for i in range(LAYERS + 1)}, tokens + CHAINS, 8, LAYERS)
    stages = [b.rows(f"stage{i}") for i in range(LAYERS + 1)]
    b.W_E[:tokens] = torch.cat([size * stages[0] for size in SIZES])
    b.W_U[tokens:] = stages[-1]
    for layer in range(LAYERS):
        for chain in range(CHAINS):
            b.neuron(layer, stages[layer][chain], 0.0, GAIN * stages[layer + 1][chain])

    def prompts(count: int, g: torch.Generator) -> list[Prompt]:
        drawn = torch.randint(tokens, (count, 4), generator=g)
        return [_chain(row, tokens) for row in drawn]

    return b.finish(prompts, range(tokens, tokens + CHAINS), **options)


def _chain(row: Int[Tensor, " seq"], first: int) -> Prompt:
    q = len(row) - 1
    chain, size = int(row[-1]) % CHAINS, SIZES[int(row[-1]) // CHAINS]
    nodes: list[Node] = [("token", q), *(("neuron", layer, chain, q) for layer in range(LAYERS))]
    target: Node = ("target", first + chain)
    made = [size * GAIN**i for i in range(LAYERS + 1)]
    edges = [Edge(a, b, m) for a, b, m in zip(nodes, [*nodes[1:], target], made, strict=True)]
    totals = {(node, target): made[-1] for node in nodes}
    return Prompt(row, (first + chain,), tuple(edges), totals=totals)


@torch.no_grad()
def transcoders(known: Known) -> tuple[list[Dictionary], Dictionary]:
    """The exact dictionaries of :func:`amplification`: a transcoder of each layer, and a cross-layer transcoder.

    Features are the chains; those of the cross-layer transcoder's later layers never fire.
    """
    stages = [known.frame[list(numbers)] for numbers in known.spaces.values()]
    d = known.frame.shape[1]
    plain: dict[str, Any] = {"selection": "relu", "atoms": "free", "objective": ("reconstruction",), "normalise": "none"}  # fmt: skip
    single = []
    for layer in range(LAYERS):
        one = create("transcoder", d_in=d, n_features=CHAINS, **plain)
        one.encoder.copy_(stages[layer])
        one.atoms.weight.copy_(GAIN * stages[layer + 1])
        one.reads, one.writes = (f"layers.{layer}.mlp:in",), (f"layers.{layer}.mlp:out",)
        single.append(one.eval())
    across = create("clt", d_in=d, n_layers=LAYERS, n_features=LAYERS * CHAINS, **plain)
    parts: Any = across.parts
    for part in parts:
        part.encoder.zero_()
        part.atoms.weight.zero_()
    parts[0].encoder.copy_(stages[0])
    written = [GAIN ** (i + 1) * stages[i + 1] for i in range(LAYERS)]
    parts[0].atoms.weight.copy_(torch.cat(written, 1))
    across.reads, across.writes = (
        tuple(f"layers.{i}.mlp:{side}" for i in range(LAYERS)) for side in ("in", "out")
    )
    return single, across.eval()
