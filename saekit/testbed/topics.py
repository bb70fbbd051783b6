"""A language of two topics, and a dictionary whose features are known: words, aspects of topics, and places in a sentence.

A document is about one of two topics and names the other one in passing: ``the whale near a harbour . each sail with the
judge .`` Its reader keeps, for each of a topic's aspects, how lately its words came, and writes that, the word and the place
in the sentence along planted directions that are nearly orthogonal; a small network, which is trained, foretells the next word from that. So the
truth is exact: the features of a topic are its words and its aspects, and what comes next depends on them.
"""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.dictionaries import Dictionary, create
from saekit.models import Model, load_model

TOPICS = {
    "sea": {
        "ships": ("sail", "mast", "anchor", "harbour", "captain", "deck"),
        "animals": ("whale", "shark", "seal", "gull", "crab", "squid"),
        "weather": ("storm", "tide", "wave", "current", "gale", "swell"),
        "shores": ("beach", "reef", "cliff", "lagoon", "island", "bay"),
    },
    "court": {
        "people": ("judge", "lawyer", "jury", "witness", "clerk", "defendant"),
        "papers": ("verdict", "contract", "warrant", "statute", "petition", "affidavit"),
        "acts": ("trial", "appeal", "hearing", "oath", "sentence", "plea"),
        "crimes": ("theft", "fraud", "perjury", "bribery", "arson", "murder"),
    },
}
ASPECTS = [(topic, aspect) for topic, aspects in TOPICS.items() for aspect in aspects]
# a sentence: classes of words by place; content words come where None stands
DETERMINERS, LINKS, STOP = ("the", "a", "each", "this"), ("with", "near", "from", "against"), (".",)
SENTENCE = (DETERMINERS, None, LINKS, DETERMINERS, None, STOP)
CONTENT = [word for topic, aspect in ASPECTS for word in TOPICS[topic][aspect]]
EACH = len(CONTENT) // len(ASPECTS)  # words of an aspect
VOCABULARY = ["<start>", *CONTENT, *DETERMINERS, *LINKS, *STOP]
FIRST_CONTENT = 1
SENTENCES = 8
LENGTH = 1 + SENTENCES * len(SENTENCE)
MAIN, STICKY = (
    0.85,
    0.7,
)  # share of content words of the document's topic, and of those of its favoured aspects
DECAY = 0.85  # of an aspect, from token to token
FEATURES = len(VOCABULARY) + len(ASPECTS) + len(SENTENCE)
D_MODEL, HIDDEN, K = 128, 128, 3
NOISE = 0.02
HOOK_POINT = "stream"  # the model's only one that a dictionary is for


_ASPECT_TOPIC = torch.tensor([list(TOPICS).index(topic) for topic, _ in ASPECTS])
WORD_TOPIC = torch.full((len(VOCABULARY),), -1)  # the topic (0, 1) of each token, -1 for grammar
WORD_TOPIC[FIRST_CONTENT : FIRST_CONTENT + len(CONTENT)] = _ASPECT_TOPIC.repeat_interleave(EACH)
# of each feature: words, then aspects, then places in a sentence
FEATURE_TOPIC = torch.cat([WORD_TOPIC, _ASPECT_TOPIC, torch.full((len(SENTENCE),), -1)])


def documents(topics: Int[Tensor, " n"], generator: torch.Generator) -> Int[Tensor, "n seq"]:
    """A document about each topic (0, 1): ``SENTENCES`` sentences behind a start token."""
    n, half = len(topics), len(ASPECTS) // 2

    def random(high: int) -> Tensor:
        return torch.randint(high, (n,), generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(n, generator=generator) < p

    favoured = torch.stack([random(half), random(half)])  # an aspect of each topic
    tokens = [torch.zeros(n, dtype=torch.int64)]
    for _ in range(SENTENCES):
        for words in SENTENCE:
            if words is not None:
                tokens.append(VOCABULARY.index(words[0]) + random(len(words)))
                continue
            topic = topics.where(chance(MAIN), 1 - topics)
            aspect = favoured[topic, torch.arange(n)].where(chance(STICKY), random(half))
            tokens.append(FIRST_CONTENT + EACH * (half * topic + aspect) + random(EACH))
    return torch.stack(tokens, 1)


def words(tokens: Int[Tensor, "n seq"]) -> list[str]:
    """Documents as text, without the start token."""
    return [" ".join(VOCABULARY[i] for i in row[1:]) for row in tokens.tolist()]


class TopicReader(nn.Module):
    """Tokens [n, seq] to next-token logits, by way of a stream of planted features."""

    def __init__(self, seed: int):
        super().__init__()
        self.config = SimpleNamespace(n_ctx=LENGTH)
        # another stream than that of a random dictionary of this seed and shape, which would have the same directions
        g = torch.Generator().manual_seed(2**31 + seed)
        directions = nn.functional.normalize(torch.randn(FEATURES, D_MODEL, generator=g), dim=1)
        self.directions = nn.Parameter(directions, requires_grad=False)
        self.noise = nn.Parameter(NOISE * torch.randn(len(VOCABULARY), D_MODEL, generator=g), requires_grad=False)  # fmt: skip
        self.stream = nn.Identity()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.readout = nn.Sequential(
                nn.Linear(D_MODEL, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, len(VOCABULARY))
            )

    def magnitudes(self, input_ids: Int[Tensor, "n seq"]) -> Float[Tensor, "n seq feature"]:
        """How much each feature writes: 1 for the word and the place, and at most about 2 for an aspect."""
        content = (input_ids >= FIRST_CONTENT) & (input_ids < FIRST_CONTENT + len(CONTENT))
        aspect = ((input_ids - FIRST_CONTENT) // EACH).where(content, len(ASPECTS))
        named = nn.functional.one_hot(aspect, len(ASPECTS) + 1)[..., :-1].float()
        recent = [named[:, 0]]
        for now in named.unbind(1)[1:]:
            recent.append(DECAY * recent[-1] + now)
        place = (torch.arange(input_ids.shape[1]) - 1) % len(SENTENCE)
        parts = [
            nn.functional.one_hot(input_ids, len(VOCABULARY)).float(), torch.stack(recent, 1),
            nn.functional.one_hot(place, len(SENTENCE)).float().expand(len(input_ids), -1, -1),
        ]  # fmt: skip
        return torch.cat(parts, -1)

    def forward(self, input_ids: Int[Tensor, "n seq"]) -> Float[Tensor, "n seq vocabulary"]:
        """Logits behind each token."""
        return self.readout(self.stream(self.magnitudes(input_ids) @ self.directions + self.noise[input_ids]))


@dataclass(frozen=True)
class TopicWorld:
    """A trained model, and the dictionary of its planted features: feature i is of topic ``FEATURE_TOPIC[i]``."""

    model: Model
    dictionary: Dictionary


def world(seed: int = 0, steps: int = 300, rows: int = 64) -> TopicWorld:
    """The world of a seed; its readout is trained on fresh documents, by AdamW in a one-cycle."""
    reader, g = TopicReader(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(reader.readout.parameters(), 5e-3, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps, cycle_momentum=False)
    for _ in range(steps):
        tokens = documents(torch.randint(2, (rows,), generator=g), g)
        loss = nn.functional.cross_entropy(reader(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    d = create("topk", d_in=D_MODEL, n_features=FEATURES, k=K, normalise="none")
    with torch.no_grad():
        d.W_enc.copy_(reader.directions.T)
        d.W_dec.copy_(reader.directions)
        bias: Any = d.b_enc
        bias.zero_()
    d.reads = d.writes = (HOOK_POINT,)
    return TopicWorld(load_model(reader, name="topics"), d.eval())
