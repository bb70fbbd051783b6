"""What steering a feature does and what it costs: effect against damage, beside controls that do as much damage.

**Effect**: the probability of the target tokens (a feature's own are those that its direction promotes most), averaged over
the tokens of a neutral text, steered over unsteered; its logarithm is in nats. **Damage**: KL(original || steered) and the
next-token loss on that text, in nats per token. **Controls**: other features that fire on the text and random directions,
each as strong as moves the model by the same KL: what they do to the same targets is no merit of the feature.
"""

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit import metrics
from saekit.activations import write_atomic
from saekit.autointerp.neurons import directions_of, logits_of
from saekit.dictionaries import Dictionary
from saekit.dictionaries.cross_layer import CrossLayer
from saekit.evaluate.core import controls_for
from saekit.harvest import HarvestConfig, Stream
from saekit.interventions import Edit, written_by
from saekit.models import Model, load_model
from saekit.pages import printable
from saekit.steer import steer
from saekit.types import Codes, SaekitError

PROMOTED = 10  # tokens of a feature's own, where no target is named
CONTEXT, ROWS = 256, 4  # of the neutral text, and in a forward pass
NEAR, STEPS = 0.05, 20  # share of the KL that a control may miss it by, and tries at most
LEAST = 1e-5  # nats: less is nothing that a control could equal
WAYS = ("set", "add")
KINDS = ("random feature", "random direction")  # of controls
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True)
class Measured:
    """``kl`` and ``ce`` in nats per token; ``probability``: mean over tokens of that of all targets together."""

    kl: float
    ce: float
    probability: float


@dataclass(frozen=True)
class Control:
    """A control at a strength where it moves the model as the feature does; ``number`` is of the feature or direction."""

    kind: str
    number: int
    strength: float
    measured: Measured


@dataclass(frozen=True)
class Row:
    """One strength: what was measured, the controls that reached its KL, and how many of them were tried."""

    strength: float
    measured: Measured
    controls: tuple[Control, ...]
    tried: int


@dataclass(frozen=True)
class Sweep:
    """A feature at several strengths; ``targets`` are token ids, ``base`` what the model does by itself.

    ``largest`` is the feature's largest code on the text, ``density`` the share of its ``tokens`` that it fires on.
    """

    feature: int
    way: str
    targets: tuple[int, ...]
    base: Measured
    largest: float
    density: float
    tokens: int
    rows: tuple[Row, ...]

    def factor(self, measured: Measured) -> float:
        """By how much the targets' probability is multiplied."""
        return measured.probability / self.base.probability

    def control(self, row: Row, kind: str) -> float | None:
        """The mean factor of a row's controls of one kind; None where there are none."""
        found = [self.factor(c.measured) for c in row.controls if c.kind == kind]
        return float(np.mean(found)) if found else None

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the factors and their logarithms (effects, in nats)."""
        rows = [
            {
                **asdict(row),
                "factor": self.factor(row.measured),
                "effect": math.log(self.factor(row.measured)),
                "controls": [{**asdict(c), "factor": self.factor(c.measured)} for c in row.controls],
                "mean_factors": {kind: self.control(row, kind) for kind in KINDS},
            }
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}


@dataclass(frozen=True)
class Predicted:
    """What a model predicts on a text: ``kl`` and ``ce`` as in :class:`Measured`, the mean probability of every token."""

    kl: float
    ce: float
    chances: Float[Tensor, " vocabulary"]

    def of(self, targets: Iterable[int]) -> Measured:
        """The measures for some targets."""
        return Measured(self.kl, self.ce, float(self.chances[_tokens(targets, len(self.chances))].sum()))


def _tokens(targets: Iterable[int], vocabulary: int) -> list[int]:
    """Target tokens as ints, each once; raises where one is none of the vocabulary."""
    listed = list(dict.fromkeys(map(int, targets)))
    for token in listed:
        if not 0 <= token < vocabulary:
            raise SaekitError(f"target {token} is none of the model's {vocabulary:,} tokens; give token ids")
    return listed


class Neutral:
    """A dictionary's model on a neutral text: what it predicts by itself, and what of it edits change.

    ``counts`` and ``largest`` [n_features] say on how many tokens each feature fires and how strongly at most.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        dictionary: Dictionary,
        text: Any = "stdlib",
        *,
        tokens: int = 2048,
        split: str = "held_out",
        seed: int = 0,
    ):
        self.model, self.dictionary = load_model(model), dictionary
        if not self.model.predicts_tokens:
            raise SaekitError(
                f"model {self.model.name!r} predicts no tokens, so steering can't be measured; use steer() and look yourself"
            )
        if not dictionary.reads:
            raise SaekitError("the dictionary names no hook point; set its reads and writes")
        dictionary.to(self.model.device)
        context = min(self.model.context or CONTEXT, dictionary.context or CONTEXT, CONTEXT)
        config = HarvestConfig(dictionary.reads, tokens=tokens, context=context, batch_rows=ROWS, split=split)
        self.counts = torch.zeros(dictionary.n_features, dtype=torch.int64)
        self.largest = np.zeros(dictionary.n_features, dtype=np.float32)
        self._arms: dict[tuple[str, int, str], Arm] = {}
        self.batches: list[tuple[Any, Tensor, Tensor, Tensor]] = []  # inputs, tokens, mask, log-probabilities
        for batch, logits, given in Stream(self.model, text, config).with_logits():
            assert logits is not None and batch.tokens is not None  # asked for; of text
            codes = dictionary.codes_of(batch)
            self.counts += codes.firing_counts().cpu()
            np.maximum.at(self.largest, codes.indices.cpu().numpy(), codes.values.float().cpu().numpy())
            mask = batch.mask.to(logits.device)
            self.batches.append((given, batch.tokens.to(logits.device), mask, logits.float().log_softmax(-1)))
        self.n_tokens = sum(int(mask.sum()) for _, _, mask, _ in self.batches)
        if not self.n_tokens:
            raise SaekitError(
                f"the text gives no unmasked token on the {split!r} side of its split; give more text, or split='all' (--split all)"
            )
        # directions are those of a random dictionary in the same place, which are only ever added
        self.random = controls_for(dictionary, codes, seed)["random"]
        self.random.reads, self.random.writes, self.random.card = (
            dictionary.reads, dictionary.writes, dictionary.card,
        )  # fmt: skip

    @torch.no_grad()
    def measure(self, changes: Any = None) -> Predicted:
        """The model with changes (pairs as :func:`saekit.steer` takes them; None: as it is) beside itself."""
        total = torch.zeros(3, dtype=torch.float64)
        chances: Any = 0.0
        for given, tokens, mask, before in self.batches:
            after = before
            if changes is not None:
                with steer(self.model, changes):
                    after = self.model.logits(given).float().log_softmax(-1)
            inside = mask[:, 1:] & mask[:, :-1]
            kl = metrics.kl(before[mask], after[mask])
            ce = metrics.cross_entropy(after[:, :-1][inside], tokens[:, 1:][inside])
            total += torch.stack([part.sum().double().cpu() for part in (kl, ce, inside)])
            chances = chances + after[mask].exp().sum(0).cpu()
        kl_, ce_, pairs_ = total.tolist()
        return Predicted(max(0.0, kl_) / self.n_tokens, ce_ / max(1, pairs_), chances / self.n_tokens)

    def arms(self, feature: int, way: str, n: int, seed: int) -> "list[Arm]":
        """Controls of a feature, ``n`` of each kind; the same for all features, so that what is measured once is kept."""
        rng = np.random.default_rng(seed)
        alive = rng.permutation(np.flatnonzero(self.counts.numpy())).tolist()
        others = [f for f in alive[: n + 1] if f != feature][:n]
        directions = rng.permutation(self.random.n_features)[:n].tolist()
        drawn = [(KINDS[0], f, self.dictionary, way) for f in others]
        drawn += [(KINDS[1], f, self.random, "add") for f in directions]
        for kind, number, dictionary, how in drawn:
            key = (kind, number, how)
            if key not in self._arms:
                self._arms[key] = Arm(self, kind, number, dictionary, how)
        return [self._arms[kind, number, how] for kind, number, _, how in drawn]


class Arm:
    """A control, and what has been measured of it by strength."""

    def __init__(self, neutral: Neutral, kind: str, number: int, dictionary: Dictionary, way: str):
        self.neutral, self.kind, self.number, self.dictionary, self.way = (
            neutral,
            kind,
            number,
            dictionary,
            way,
        )
        self.curve: dict[float, Predicted] = {}

    def run(self, strength: float) -> Predicted:
        """What the model predicts at a strength."""
        return self.neutral.measure([(self.dictionary, [_edit(self.number, self.way, strength)])])

    def at(self, kl: float, guess: float) -> tuple[float, Predicted] | None:
        """A strength above 0 at which it does the damage that is wanted, and what is predicted there; None if none is found.

        Looked for by bisection of the closest bracket, at where a power law between its ends would have it.
        """
        for _ in range(STEPS):
            best = min(self.curve, key=lambda s: abs(self.curve[s].kl - kl), default=None)
            if best is not None and abs(self.curve[best].kl - kl) <= NEAR * kl:
                return best, self.curve[best]
            known = sorted(self.curve)
            high = next((s for s in known if self.curve[s].kl > kl), None)
            low = max((s for s in known if high is None or s < high), default=None)
            if low is not None and high is not None:
                ends = [math.log(max(self.curve[s].kl, 1e-12)) for s in (low, high)]
                share = min(0.9, max(0.1, (math.log(kl) - ends[0]) / (ends[1] - ends[0])))
                guess = low * (high / low) ** share
            elif high is not None:
                guess = high / min(8.0, max(2.0, math.sqrt(self.curve[high].kl / kl)))
            elif low is not None:
                if len(known) > 1 and self.curve[low].kl < 1.02 * self.curve[known[-2]].kl:
                    return None  # the model is moved as far as this can move it
                guess = low * min(8.0, max(2.0, math.sqrt(kl / max(self.curve[low].kl, 1e-12))))
            self.curve[guess] = self.run(guess)
        return None


def _edit(feature: int, way: str, strength: float) -> Edit:
    return Edit(feature, set=strength) if way == "set" else Edit(feature, add=strength)


@torch.no_grad()
def direct_effects(
    model: Model, dictionary: Dictionary, features: Sequence[int]
) -> Float[Tensor, "chosen vocabulary"]:
    """What each feature's direction adds to the logits by itself, about their mean, in logits per unit of code.

    Where a dictionary writes several places, read off where it writes last. The final norm's gain is applied and its
    division left out: a direction has no norm to divide by.
    """
    written = directions_of(dictionary, features)
    if written is None and dictionary.wiring.kind != "transforms":
        written = _written_last(dictionary, features)
    way = None if written is None else logits_of(model, written)
    if way is None:
        raise SaekitError(
            "the dictionary writes no directions that the model's unembedding reads, so features have no tokens of their own; name targets (--target)"
        )
    return way.effects(way.directions)


def _written_last(dictionary: Dictionary, features: Sequence[int]) -> Float[Tensor, "chosen d"]:
    """What features add at the last of the places that a dictionary writes."""
    d: Any = dictionary
    layered = isinstance(dictionary, CrossLayer)
    each = d.n_features // d.layers if layered else d.n_features
    rows = []
    for feature in features:
        part = feature // each
        x = torch.zeros(1, 1, d.wiring.parts_in[part], device=d.device, dtype=d.dtype)
        one = Codes.from_rectangular(
            torch.tensor([[feature % each]], device=d.device), x.new_ones(1, 1), each, (1, 1)
        )
        rows.append(written_by(d, one, x, part, len(d.wiring.parts_out) - 1, layered)[0, 0])
    return torch.stack(rows)


def promoted(model: Model, dictionary: Dictionary, feature: int, n: int = PROMOTED) -> tuple[int, ...]:
    """The ``n`` tokens that a feature's direction promotes most, strongest first."""
    return tuple(direct_effects(model, dictionary, [feature])[0].topk(n).indices.tolist())


def sweep(
    neutral: Neutral,
    feature: int,
    strengths: Iterable[float],
    targets: Iterable[int] | None = None,
    *,
    way: str = "set",
    controls: int = 4,
    seed: int = 0,
    on_row: Callable[[Row], None] | None = None,
) -> Sweep:
    """Steer a feature at each strength (a code to set, or with ``way="add"`` to add), beside controls at the same KL.

    ``targets``: token ids, of which each counts once; by default the feature's own. ``controls`` of each kind are drawn by ``seed``, the same for all
    features: others that fire on the text, which are steered the same way, and random directions, which are added.
    """
    d = neutral.dictionary
    if way not in WAYS:
        raise SaekitError(f"way = {way!r} must be one of {', '.join(WAYS)}")
    if not 0 <= feature < d.n_features:
        raise SaekitError(f"feature {feature} is none of the dictionary's {d.n_features}")
    strengths = list(strengths)
    if not strengths or not all(map(math.isfinite, strengths)):
        raise SaekitError(f"strengths = {strengths} must be finite numbers, at least one")
    base = neutral.measure()
    wanted = (
        promoted(neutral.model, d, feature) if targets is None else tuple(_tokens(targets, len(base.chances)))
    )
    if not wanted:
        raise SaekitError("targets is empty; name at least one token, or leave it out for the feature's own")
    arms, rows = neutral.arms(feature, way, controls, seed), []
    for strength in strengths:
        own = neutral.measure([(d, [_edit(feature, way, strength)])])
        tried = arms if own.kl >= LEAST else []
        reached = [(arm, arm.at(own.kl, abs(strength) or 1.0)) for arm in tried]
        found = tuple(
            Control(arm.kind, arm.number, there[0], there[1].of(wanted))
            for arm, there in reached
            if there is not None
        )
        rows.append(Row(float(strength), own.of(wanted), found, len(tried)))
        if on_row:
            on_row(rows[-1])
    return Sweep(
        feature, way, wanted, base.of(wanted), float(neutral.largest[feature]),
        float(neutral.counts[feature]) / neutral.n_tokens, neutral.n_tokens, tuple(rows),
    )  # fmt: skip


def prompt_effects(
    model: Model, ids: Int[Tensor, "one seq"], changes: Sequence[Any], targets: Iterable[int]
) -> list[float]:
    """Of each change, by how much the logarithm of the targets' probability behind a prompt rises, in nats."""
    given, targets = model.inputs(ids, torch.ones_like(ids, dtype=torch.bool)), list(targets)

    def chance() -> float:
        with torch.no_grad():
            after = model.logits(given)[0, -1].float().log_softmax(-1)
            return float(after[_tokens(targets, len(after))].logsumexp(0))

    base, out = chance(), []
    for change in changes:
        with steer(model, change):
            out.append(chance() - base)
    return out


def draw(found: Sweep, names: Sequence[str], samples: Sequence[str], title: str, path: Path) -> Path:
    """Write effect against damage, and what the model wrote at each strength, as one page that asks for nothing.

    ``names`` are the targets' texts, ``samples`` a text for each strength, or none at all.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = [row for row in found.rows if row.measured.kl >= LEAST]
    figure.add_scatter(
        x=[row.measured.kl for row in rows], y=[found.factor(row.measured) for row in rows], mode="lines+markers+text",
        name="the feature", text=[f"{row.strength:g}" for row in rows], textposition="top center",
        customdata=[row.measured.ce - found.base.ce for row in rows],
        hovertemplate="strength %{text}: KL %{x:.3g}, times %{y:.3g}, loss %{customdata:+.3g}<extra></extra>",
    )  # fmt: skip
    for kind, symbol in zip(KINDS, ("circle-open", "x-thin-open"), strict=True):
        some = [c for row in rows for c in row.controls if c.kind == kind]
        figure.add_scatter(
            x=[c.measured.kl for c in some], y=[found.factor(c.measured) for c in some], mode="markers", name=f"{kind}s",
            text=[f"{kind} {c.number}, strength {c.strength:.3g}" for c in some], marker={"symbol": symbol, "size": 9},
            hovertemplate="%{text}: KL %{x:.3g}, times %{y:.3g}<extra></extra>",
        )  # fmt: skip
    figure.add_hline(y=1.0, line_dash="dot", line_color="#888")
    figure.update_layout(
        template="plotly_white", height=520, margin={"t": 30},
        xaxis={"title": "damage: KL from the unsteered model, nats per token", "type": "log"},
        yaxis={"title": "effect: probability of the targets, times", "type": "log"},
    )  # fmt: skip
    write_atomic(path, _page(figure.to_html(full_html=False, include_plotlyjs=True), found, names, samples, title).encode("utf-8", "replace"))  # fmt: skip
    return path


def _page(chart: str, found: Sweep, names: Sequence[str], samples: Sequence[str], title: str) -> str:
    def safe(text: str) -> str:
        return html.escape(printable(text))

    body = "".join(
        f"<tr>{''.join(f'<td>{safe(cell)}</td>' for cell in cells)}<td><pre>{safe(sample)}</pre></td></tr>"
        for cells, sample in zip(
            table(found), list(samples) or [""] * len(found.rows), strict=True
        )
    )  # fmt: skip
    head = "".join(f"<th>{safe(name)}</th>" for name in (*COLUMNS, "continuation" if samples else ""))
    about = f"Targets: {', '.join(map(repr, names))}. Probability {found.base.probability:.3g} and loss {found.base.ce:.3f} nats without steering, over {found.tokens:,} tokens. The feature fires on {found.density:.2%} of them, with codes up to {found.largest:.3g}."
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{safe(title)}</title><style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:75em;padding:0 1em}}"
        "table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:left;vertical-align:top;border-top:1px solid #ddd}"
        "pre{margin:0;white-space:pre-wrap}</style></head><body>"
        f"<h1>{safe(title)}</h1><p>{safe(about)}</p>{chart}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></body></html>"
    )


COLUMNS = ("strength", "effect (nats)", "times", "KL", "loss", "random features", "random directions")


def table(found: Sweep) -> list[tuple[str, ...]]:
    """The rows as text, under ``COLUMNS``; of controls the mean factor."""
    out = []
    for row in found.rows:
        times = found.factor(row.measured)
        means = [found.control(row, kind) for kind in KINDS]
        out.append((
            f"{row.strength:g}", f"{math.log(times):+.3f}", f"{times:.3g}", f"{row.measured.kl:.4f}", f"{row.measured.ce:.4f}",
            *("" if mean is None else f"{mean:.3g}" for mean in means),
        ))  # fmt: skip
    return out
