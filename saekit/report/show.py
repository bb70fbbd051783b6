"""Features in a notebook: one feature's card, and what is active on a prompt or on inputs of any model."""

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor

from saekit.autointerp.explanation import Explanation, Score
from saekit.dictionaries import Dictionary
from saekit.harvest import harvest
from saekit.hub import dictionary_of
from saekit.models import Model, load_model
from saekit.report import inline
from saekit.report.cards import cards, codes_of, explained, reading, speller
from saekit.report.charts import number, percent
from saekit.report.inline import MONO, SOFT, escaped, tag
from saekit.report.page import FeatureCard, Window
from saekit.trainers import read_config
from saekit.types import SaekitError

Image = UInt8[ndarray, "height width channels"]
Given = Sequence[Explanation] | str | Path | None
IMAGE_HEIGHT = 64  # pixels, as shown


@dataclass(frozen=True, repr=False)
class Shown:
    """A feature's card: printed it is text, in a notebook HTML without script."""

    card: FeatureCard
    title: str

    def __repr__(self) -> str:
        card = self.card
        lines = [
            f"feature {card.index} of {self.title}: fires on {percent(card.density)} of {card.n_tokens:,} tokens, "
            f"at most {number(card.max_activation)}"
        ]
        for said in card.explanations:
            lines.append(f"{said.method}: {said.text}")
            lines += [f"  {_scored(score)}" for score in said.scores]
        for name, pairs in (("promotes", card.promoted), ("suppresses", card.suppressed)):
            if pairs:
                lines.append(f"{name}: " + ", ".join(f"{text!r} {value:+.3g}" for text, value in pairs[:5]))
        for name, alike in (("writes like", card.nearest), ("fires with", card.together)):
            if alike:
                lines.append(f"{name}: " + ", ".join(f"{other} ({value:.2f})" for other, value in alike))
        lines += [f"{_peak(one):8.3g}  {_around(one)}" for one in card.top]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        card = self.card
        facts = f"density {percent(card.density)} · max activation {number(card.max_activation)} · {card.n_tokens:,} tokens read"
        out = [
            tag("div", tag("b", f"Feature {card.index}") + " " + tag("span", escaped(self.title), SOFT)),
            tag("div", facts, SOFT),
        ]
        for said in card.explanations:
            label = tag("small", escaped(said.method), "border:1px solid;border-radius:1em;padding:0 .5em;margin-right:.5em")  # fmt: skip
            out.append(tag("div", label + escaped(said.text), "margin-top:.5em"))
            out += [tag("div", escaped(_scored(score)), f"margin-left:1em;{SOFT}") for score in said.scores]
        edges = card.histogram_edges or (0.0,)
        columns = [inline.histogram(card.histogram_counts, edges[0], edges[-1])]
        for name, pairs in (("Promotes", card.promoted), ("Suppresses", card.suppressed)):
            rows = [(tag("span", escaped(text), MONO), f"{value:+.3g}") for text, value in pairs]
            columns.append(_column(name, rows))
        for name, alike in (("Writes alike", card.nearest), ("Fires together", card.together)):
            columns.append(_column(name, [(str(other), f"{value:.2f}") for other, value in alike]))
        out.append(tag("div", columns, "display:flex;flex-wrap:wrap;gap:0 2em;margin:.6em 0"))
        largest = abs(card.max_activation)
        groups = [("Top", card.top)] + [
            (f"{100 * band.lower:.0f} to {100 * band.upper:.0f} %", band.windows) for band in card.bands
        ]
        for name, windows in groups:
            out.append(tag("div", name, f"margin-top:.4em;{SOFT}"))
            out += [_context(one, largest) for one in windows]
        return tag("div", out, "text-align:left;line-height:1.5")


def show(
    dictionary: "Dictionary | str | Path",
    feature: int,
    *,
    model: Any = None,
    text: Any = None,
    tokens: int = 50_000,
    explanations: Given = None,
    device: "str | torch.device | None" = None,
    seed: int = 0,
) -> Shown:
    """One feature's card, for a notebook or a terminal: densities, contexts, tokens, neighbours, explanations.

    ``dictionary`` is a folder (a finished run, too) or a dictionary that knows its hook points. Contexts are from
    ``tokens`` tokens of ``text``; model and text are by default those it was trained on. ``explanations`` are by
    default those that lie beside a folder's dictionary.
    """
    d, folder = _dictionary(dictionary, device)
    if not isinstance(feature, numbers.Integral) or not 0 <= feature < d.n_features:
        raise SaekitError(f"feature {feature!r} is not in a dictionary of {d.n_features} features")
    said = explained(explanations, folder, d)
    file = folder / "config.json" if folder is not None else None
    config = read_config(file) if file is not None and file.is_file() else {}
    source = reading(d, model, text, tokens, config, device)
    found, _ = cards(source, [feature], seed, said)
    return Shown(found[0], _title(d, source.view))


@dataclass(frozen=True, repr=False)
class Fires:
    """What is active on each token of a prompt, or on each input: the strongest features, of largest magnitude first.

    ``names`` are texts of tokens, labels, or images; ``found`` holds (feature, activation, position) of each, where
    ``position`` is the input's position at which it is strongest; ``masked`` says which tokens don't count.
    """

    title: str
    names: tuple[Any, ...]
    found: tuple[tuple[tuple[int, float, int], ...], ...]
    masked: tuple[bool, ...]
    explanations: Mapping[int, str]

    def rows(self) -> list[dict[str, Any]]:
        """The table as plain data: per row ``name`` (None for an image), ``masked``, and ``features``."""
        return [
            {
                "row": row,
                "name": name if isinstance(name, str) else None,
                "masked": masked,
                "features": [
                    {"feature": f, "value": v, "position": at, "explanation": self.explanations.get(f)}
                    for f, v, at in found
                ],
            }
            for row, (name, found, masked) in enumerate(zip(self.names, self.found, self.masked, strict=True))
        ]

    def __repr__(self) -> str:
        names = [_printed(name) for name in self.names]
        width = max(map(len, names))
        digits = max((len(str(f)) for found in self.found for f, _, _ in found), default=1)
        columns = max(map(len, self.found))
        lines = [self.title]
        for name, found, masked in zip(names, self.found, self.masked, strict=True):
            cells = [f"{f:>{digits}} {v:<7.3g}" for f, v, _ in found]
            cells += [" " * (digits + 8)] * (columns - len(cells))
            meaning = self.explanations.get(found[0][0], "") if found else "masked" if masked else ""
            lines.append("  ".join([f"{name:<{width}}", *cells, _short(meaning, 48)]).rstrip())
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        largest = max((abs(v) for found in self.found for _, v, _ in found), default=0.0)

        def cell(feature: int, value: float, position: int) -> str:
            meaning = self.explanations.get(feature, "")
            content = f"{feature} {tag('b', f'{value:.3g}')}"
            content += f" {escaped(_short(meaning, 40))}" if meaning else ""
            style = f"{inline.shade(value, largest)};padding:.1em .5em;text-align:left;white-space:nowrap"
            return tag("td", content, style, f"feature {feature}: {value:.6g}\n{meaning}".strip())

        rows = []
        for name, found, masked in zip(self.names, self.found, self.masked, strict=True):
            shown = tag("span", escaped(name), MONO) if isinstance(name, str) else inline.picture(name, IMAGE_HEIGHT)  # fmt: skip
            style = "text-align:left;padding-right:1em" + (";text-decoration:line-through;opacity:.6" if masked else "")  # fmt: skip
            rows.append(tag("tr", [tag("th", shown, style), *(cell(*one) for one in found)]))
        return tag("div", tag("div", escaped(self.title), SOFT) + tag("table", rows), "overflow-x:auto")


def fires(
    model: Any,
    dictionary: "Dictionary | str | Path",
    prompt: Any,
    top: int = 5,
    *,
    labels: Any = None,
    explanations: Given = None,
    device: "str | torch.device | None" = None,
) -> Fires:
    """The ``top`` strongest features on each token of a prompt, as a table.

    ``prompt`` is text or token ids, one sequence, read as it is: nothing is put before it. Special tokens are masked.
    For other models it is a batch of what the model takes (a float tensor or a mapping of keyword arguments), of which
    each row is one input: ``labels`` names them, by texts or by images ([height, width] or [height, width, 3]); where
    the model has several positions per input, a feature counts with its strongest. ``explanations`` are by default
    those that lie beside the dictionary, if it is given as a folder.
    """
    d, folder = _dictionary(dictionary, device)
    said = explained(explanations, folder, d)
    if top < 1:
        raise SaekitError(f"top = {top} must be at least 1")
    if not d.reads:
        raise SaekitError("the dictionary names no hook point; set its reads and writes")
    view = load_model(model, device=device)
    ids = _ids(prompt, view)
    meanings = {feature: listed[0].label or listed[0].text for feature, listed in said.items()}
    if ids is not None:
        if labels is not None:
            raise SaekitError(
                "labels name the rows of inputs that are not tokens, and prompt is tokens; leave them out"
            )
        spell = speller(view.tokenizer) if view.tokenizer is not None else str
        names = [spell(token) for token in ids.tolist()]
        entries, kept = _entries(d, view, ids[None])
        kept = kept.reshape(-1)
        entries = {**entries, "row": entries["position"]}
    else:
        names = _names(labels, _length(prompt))
        entries, _ = _entries(d, view, prompt)
        kept = torch.ones(len(names), dtype=torch.bool).numpy()
    found = _strongest(entries, len(names), top)
    found = [listed if keep else () for listed, keep in zip(found, kept, strict=True)]
    title = f"{_title(d, view)}: the {top} strongest features on {len(names)} {'tokens' if ids is not None else 'inputs'}"
    return Fires(title, tuple(names), tuple(found), tuple((~kept).tolist()), meanings)


def _dictionary(
    given: "Dictionary | str | Path", device: "str | torch.device | None"
) -> tuple[Dictionary, Path | None]:
    return dictionary_of(given, device), Path(given) if isinstance(given, str | Path) else None


def _ids(prompt: Any, view: Model) -> Tensor | None:
    """Token ids of a prompt, None where it is inputs of another kind."""
    if isinstance(prompt, str):
        if view.tokenizer is None:
            raise SaekitError(
                f"prompt is text, and model {view.name!r} has no tokenizer; give what the model takes"
            )
        prompt = view.tokenizer(prompt)["input_ids"]
    if isinstance(prompt, Mapping) or (isinstance(prompt, Tensor | ndarray) and prompt.ndim != 1):
        return None
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError):
        raise SaekitError(
            f"prompt {prompt!r} is none; give text, token ids, or inputs of the model"
        ) from None
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise SaekitError(
            f"prompt has shape {tuple(ids.shape)} and numbers of type {ids.dtype}; give text, at least one token's id, or a batch of inputs"
        )
    if view.context is not None and len(ids) > view.context:
        raise SaekitError(
            f"prompt has {len(ids)} tokens and model {view.name!r} reads {view.context}; give fewer"
        )
    return ids.long()


def _length(inputs: Any) -> int:
    first = next(iter(inputs.values()), ()) if isinstance(inputs, Mapping) else inputs
    n = len(first) if np.ndim(first) else 0
    if not n:
        raise SaekitError("prompt holds no input; give text, token ids, or a batch of inputs of the model")
    return n


def _names(labels: Any, n: int) -> list[Any]:
    if labels is None:
        return [f"input {row}" for row in range(n)]
    if len(labels) != n:
        raise SaekitError(f"labels are {len(labels)} and the inputs {n}; give one label for each input")
    return [
        one if isinstance(one, str) else inline.pixels_of(one, f"labels[{i}]") for i, one in enumerate(labels)
    ]


@torch.no_grad()
def _entries(d: Dictionary, view: Model, inputs: Any) -> tuple[dict[str, ndarray], ndarray]:
    """Input, position, feature and activation of all that is active, and which positions [rows, seq] count."""
    parts, masks, start = [], [], 0
    for batch in harvest(view, inputs, d.reads, tokens=None):
        codes, (rows, seq) = codes_of(d, batch), batch.mask.shape
        on = codes.values != 0
        place = codes.row_ids()[on].cpu().numpy()
        parts.append((place // seq + start, place % seq, codes.indices[on].cpu().numpy(), codes.values[on].float().cpu().numpy()))  # fmt: skip
        masks.append(batch.mask.numpy())
        start += rows
    row, position, feature, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    # a pursuit may choose a unit twice for one token: what it contributes is the sum
    keys, inverse = np.unique(np.stack([row, position, feature]), axis=1, return_inverse=True)
    total = np.zeros(keys.shape[1])
    np.add.at(total, inverse.reshape(-1), value)
    return dict(zip(("row", "position", "feature"), keys, strict=True), value=total), np.concatenate(masks)


def _strongest(entries: dict[str, ndarray], n: int, top: int) -> list[tuple[tuple[int, float, int], ...]]:
    """Of each row the features of largest magnitude, each at the position where it is strongest."""
    size = np.abs(entries["value"])
    order = np.lexsort((entries["position"], -size, entries["feature"], entries["row"]))
    row, feature = entries["row"][order], entries["feature"][order]
    best = order[np.flatnonzero(np.diff(row, prepend=-1) | np.diff(feature, prepend=-1))]
    best = best[np.lexsort((entries["feature"][best], -size[best], entries["row"][best]))]
    cuts = np.searchsorted(entries["row"][best], np.arange(n + 1))
    columns = [entries[name] for name in ("feature", "value", "position")]
    return [
        tuple(zip(*(column[best[low:high]].tolist() for column in columns), strict=True))
        for low, high in zip(cuts[:-1], np.minimum(cuts[1:], cuts[:-1] + top), strict=True)
    ]


def _title(d: Dictionary, view: Model) -> str:
    return f"{d.config.selection[0]} dictionary of {', '.join(d.reads)} in {view.name}"


def _scored(score: Score) -> str:
    if score.value is None:
        return f"{score.scorer}: not scored"
    interval = (
        f" ({number(score.low)} to {number(score.high)})" if None not in (score.low, score.high) else ""
    )
    controls = "".join(f", {name} {number(value)}" for name, value in score.controls.items())
    failed = sum(score.failures.values())
    return (
        f"{score.scorer}: {score.metric} {number(score.value)}{interval}, n {score.n}{controls}"
        + (f", {failed} failed" if failed else "")
        + "".join(f"; {note}" for note in score.notes)
    )


def _peak(window: Window) -> float:
    return window.activations[window.peak] or 0.0


def _around(window: Window, reach: int = 8) -> str:
    """Text around the peak, which stands in brackets."""
    before = "".join(window.tokens[max(0, window.peak - reach) : window.peak])
    after = "".join(window.tokens[window.peak + 1 : window.peak + 1 + reach])
    parts = (repr(part)[1:-1] for part in (before, window.tokens[window.peak], after))
    return "{}[{}]{}".format(*parts)


def _context(window: Window, largest: float) -> str:
    words = [
        inline.token(text, value, largest, at == window.peak)
        for at, (text, value) in enumerate(zip(window.tokens, window.activations, strict=True))
    ]
    amount = tag("span", f"{_peak(window):.3g}", f"{SOFT};display:inline-block;min-width:3.5em")
    return tag("div", amount + tag("span", words, MONO), title=window.source)


def _column(name: str, rows: Sequence[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [tag("div", f"<span>{left}</span><span>{right}</span>", "display:flex;justify-content:space-between;gap:1em") for left, right in rows]  # fmt: skip
    return tag("div", tag("div", name, SOFT) + "".join(lines))


def _printed(name: Any) -> str:
    if isinstance(name, str):  # one backslash for one: bytes are spelled out already
        return repr(name).replace("\\\\", "\\")
    return f"image {name.shape[0]}x{name.shape[1]}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
