"""A mixture of ReLU experts that is routed to those that will be sparsest, and a task of conjunctions for it (MoE-X, 2503.07639).

Experts have no biases: a constant coordinate of the input stands in for them, so that the router's estimate counts it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.errors import SaekitError

TOPICS, FACTORS = 8, 8  # factors of each
BITS, WORDS, WIDTH = 16, 24, 24
STEPS, ROWS, RATE, BALANCE = 1500, 256, 5e-3, 0.1
STRENGTH = 2.0  # of a factor, in nats of the next word's logit


def active_share(
    w_in: Float[Tensor, "experts units d"], x: Float[Tensor, "rows d"]
) -> Float[Tensor, "rows experts"]:
    """Predicted share of each expert's units that are above 0, in [0, 1]: Phi(mu x / sqrt(sigma^2 . x^2)) (2503.07639).

    mu and sigma^2 are the mean and variance of an expert's rows: exact in expectation where these are N(mu, diag sigma^2).
    An input of zeros gives 1/2.
    """
    deviation = (w_in.var(1, correction=0) @ x.T.square()).clamp(min=1e-12).sqrt()
    return torch.special.ndtr(w_in.mean(1) @ x.T / deviation).T


@dataclass(frozen=True)
class Drawn:
    """``seen`` are the bits and which topic it is, ``factors`` which conjunctions hold, ``words`` what follows."""

    seen: Float[Tensor, "rows seen"]
    factors: Bool[Tensor, "rows factors"]
    words: Int[Tensor, " rows"]


class World:
    """Conjunctions of two bits within a topic; those that hold add to the logits of the next word. Drawn by ``seed``.

    A row is of one of ``topics``, and each of these has ``factors`` conjunctions of its own.
    """

    def __init__(self, seed: int, topics: int = TOPICS, factors: int = FACTORS):
        g = torch.Generator().manual_seed(seed)
        pairs = torch.combinations(torch.arange(BITS))
        drawn = [pairs[torch.randperm(len(pairs), generator=g)[:factors]] for _ in range(topics)]
        self.pairs = torch.stack(drawn)
        self.logits = STRENGTH * torch.randn(topics * factors, WORDS, generator=g)

    def draw(self, n: int, g: torch.Generator) -> Drawn:
        """``n`` rows of independent bits, each 1 with probability 0.4, of topics as frequent."""
        bits = (torch.rand(n, BITS, generator=g) < 0.4).float()
        topic = nn.functional.one_hot(torch.randint(len(self.pairs), (n,), generator=g), len(self.pairs))
        factors = (bits[:, self.pairs].bool().all(3) & topic.bool()[..., None]).flatten(1)
        p = (factors.float() @ self.logits).softmax(1)
        words = torch.multinomial(p, 1, generator=g)[:, 0]
        return Drawn(torch.cat([bits, topic.float()], 1), factors, words)

    def entropy(self, drawn: Drawn) -> float:
        """Cross-entropy of the true distribution in nats: what no model is below, but by chance."""
        return nn.functional.cross_entropy(drawn.factors.float() @ self.logits, drawn.words).item()


class Mixture(nn.Module):
    """One layer of ``experts``, each of ``units``, of which ``k`` are routed to; one expert is a dense layer.

    ``router``: "sparsity" (those whose predicted active share is least) or "softmax" (learnt logits). ``gelu``: in place of ReLU.
    """

    def __init__(
        self,
        seed: int,
        experts: int,
        units: int,
        k: int,
        router: str,
        gelu: bool = False,
        topics: int = TOPICS,
    ):
        if router not in ("sparsity", "softmax"):
            raise SaekitError(f"router is {router!r}: give 'sparsity' or 'softmax'")
        if not 1 <= k <= experts:
            raise SaekitError(f"k is {k} of {experts} experts: give 1 to {experts}")
        super().__init__()
        g = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g) / shape[-1] ** 0.5)

        self.k, self.router, self.act = k, router, nn.functional.gelu if gelu else nn.functional.relu
        self.embed, self.unembed = drawn(WIDTH, BITS + topics + 1), drawn(WORDS, WIDTH)
        self.w_in, self.w_out = drawn(experts, units, WIDTH), drawn(WIDTH, experts * units)
        self.gate = drawn(experts, WIDTH) if router == "softmax" else None

    def stream(self, seen: Float[Tensor, "rows seen"]) -> Float[Tensor, "rows d"]:
        """What the layer reads: what is seen, embedded, and a constant."""
        return torch.cat([seen, torch.ones(len(seen), 1)], 1) @ self.embed.T

    def route(
        self, x: Float[Tensor, "rows d"]
    ) -> tuple[Float[Tensor, "rows experts"], Float[Tensor, "rows experts"]]:
        """Weights of the experts, 0 but for the ``k`` of the largest logits, whose sum is 1; and all logits."""
        logits = -active_share(self.w_in, x) if self.gate is None else x @ self.gate.T
        top = logits.topk(self.k, 1)
        return torch.zeros_like(logits).scatter(1, top.indices, top.values.softmax(1)), logits

    def hidden(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, "rows neurons"]:
        """All experts' weighted units side by side: those of experts not routed to are 0."""
        z = self.act(torch.einsum("rd,eud->reu", x, self.w_in))
        return (z * self.route(x)[0][..., None]).flatten(1)

    def forward(self, seen: Float[Tensor, "rows seen"]) -> Float[Tensor, "rows words"]:
        """Logits of the next word."""
        x = self.stream(seen)
        return (x + self.hidden(x) @ self.w_out.T) @ self.unembed.T

    def balance(self, seen: Float[Tensor, "rows seen"]) -> Float[Tensor, ""]:
        """The usual loss of unbalanced experts: their number times the sum of share routed and mean probability; 1 at best."""
        weights, logits = self.route(self.stream(seen))
        return len(self.w_in) * ((weights > 0).float().mean(0) / self.k * logits.softmax(1).mean(0)).sum()


def learn(model: Mixture, world: World, seed: int, steps: int = STEPS) -> None:
    """Train in place, with Adam, on rows that never come twice; the same for the same seed and thread count."""
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        drawn = world.draw(ROWS, g)
        loss = nn.functional.cross_entropy(model(drawn.seen), drawn.words)
        if len(model.w_in) > 1:
            loss = loss + BALANCE * model.balance(drawn.seen)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
