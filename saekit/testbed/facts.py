"""Entities with attributes, a model that knows them, and dictionaries that can or can't swap one attribute by itself.

A prompt is an entity and what is asked of it: ``e17 a2``, answered by a value of attribute 2. The model is made by hand: at an
entity stands the sum of its values' directions and of one of its own, and behind a question the values that it is about are read
off all that came before.
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.dictionaries import create
from saekit.dictionaries.rows import Rows
from saekit.testbed.corpus import Tokenizer

ATTRIBUTES, VALUES, ENTITIES = 3, 4, 40
OWN = 0.5  # of what stands at an entity: its own direction, of a value's
FLOOR = 0.1  # below it a feature is silent
POINT = "stream"


class FactsForCausalLM(nn.Module):
    """Tokens [batch, seq] to logits of the next ones, of which only answers to questions mean something."""

    def __init__(self, embedding: Tensor, readout: Tensor, answers: Tensor):
        super().__init__()
        self.embedding, self.readout = nn.Embedding.from_pretrained(embedding), nn.Parameter(readout, False)
        self.answers = nn.Parameter(answers, False)
        self.stream, self.config = nn.Identity(), SimpleNamespace(n_ctx=8)

    def forward(
        self, input_ids: Int[Tensor, "batch seq"], attention_mask: Int[Tensor, "batch seq"] | None = None
    ) -> Float[Tensor, "batch seq vocabulary"]:
        """The values' directions, read off the sum of the stream so far; others than the asked attribute's are ruled out."""
        told = self.stream(self.embedding(input_ids)).cumsum(1)
        return 10 * told @ self.readout.T + self.answers[input_ids]


@dataclass(frozen=True)
class Facts:
    """``values`` of each entity's attributes; ``stands`` at an entity, by entity, along ``directions`` of the values."""

    model: FactsForCausalLM
    tokenizer: Tokenizer
    values: Int[Tensor, "entity attribute"]
    stands: Float[Tensor, "entity d"]
    directions: Float[Tensor, "attribute value d"]

    def lines(self) -> list[dict[str, str]]:
        """Every entity's prompts, as suites read them."""
        return [
            {"text": f"e{i} a{k}", "entity": f"e{i}", "asked": f"a{k}", "answer": f" v{k}{value}"}
            for i, own in enumerate(self.values.tolist())
            for k, value in enumerate(own)
        ]

    def of_values(self) -> Rows:
        """A feature for each value: attributes can be swapped one by one."""
        rows = self.directions.flatten(0, 1)
        return _relu(rows, rows)

    def of_entities(self) -> Rows:
        """A feature for each entity, which writes all that is known of it: attributes can be swapped together only."""
        return _relu(torch.linalg.pinv(self.stands).T, self.stands)


def facts(seed: int, entities: int = ENTITIES) -> Facts:
    """A world of some entities; directions are orthonormal."""
    g = torch.Generator().manual_seed(seed)
    d = ATTRIBUTES * VALUES + entities
    basis = torch.linalg.qr(torch.randn(d, d, generator=g))[0]
    directions = basis[: ATTRIBUTES * VALUES].view(ATTRIBUTES, VALUES, d)
    values = torch.randint(VALUES, (entities, ATTRIBUTES), generator=g)
    stands = directions[torch.arange(ATTRIBUTES), values].sum(1) + OWN * basis[ATTRIBUTES * VALUES :]
    words = [f"e{i}" for i in range(entities)] + [f"a{k}" for k in range(ATTRIBUTES)]
    words += [f"v{k}{v}" for k in range(ATTRIBUTES) for v in range(VALUES)]
    tokenizer = Tokenizer(words)
    embedding, readout = torch.zeros(2, len(tokenizer), d)
    answers = torch.full((len(tokenizer), len(tokenizer)), -100.0)
    for i in range(entities):
        embedding[tokenizer.encode(f"e{i}")[0]] = stands[i]
    for k in range(ATTRIBUTES):
        own = [tokenizer.encode(f"v{k}{v}")[0] for v in range(VALUES)]
        readout[own] = directions[k]
        answers[tokenizer.encode(f"a{k}")[0], own] = 0.0
    return Facts(FactsForCausalLM(embedding, readout, answers), tokenizer, values, stands, directions)


@torch.no_grad()
def _relu(encoder: Float[Tensor, "feature d"], atoms: Float[Tensor, "feature d"]) -> Rows:
    """A ReLU dictionary that has what it reads above ``FLOOR``, and writes it again."""
    d = create("relu", d_in=atoms.shape[1], n_features=len(atoms), normalise="none", atoms="free")
    assert isinstance(d, Rows) and d.encoder is not None
    d.encoder.copy_(encoder / (1 - FLOOR))
    d.atoms.weight.copy_(atoms)
    d.b_enc.fill_(-FLOOR / (1 - FLOOR))
    d.reads = d.writes = (POINT,)
    return d
