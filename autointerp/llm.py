"""Explanations by a language model, from texts in which a feature fires (and, contrastive, from texts in which it doesn't)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from saekit.autointerp import prompts
from saekit.autointerp.explanation import Explanation
from saekit.autointerp.negatives import silent
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Answer, Request
from saekit.autointerp.scorers.binary import STRONG
from saekit.autointerp.windows import Examples, Windows
from saekit.types import SaekitError

SHOWN, QUIET = 20, 10  # windows in which it fires, and silent ones
LEVELS = 10
LONGEST = 400  # characters of an explanation
SYSTEM = (
    "You explain what a feature of a language model responds to. You are shown texts in which it is active; the words on "
    "which it is active stand between « and », and a list says how strongly, from 1 to 10. Say in one short, concrete "
    "sentence what these words, or what stands before them, have in common. Don't mention the marks or the numbers, and "
    'don\'t list guesses. Answer with JSON: {"explanation": "..."}.'
)
SILENT = "Texts in which it is not active, which the explanation must leave out:"


@cache
def _schema() -> type:
    from pydantic import BaseModel, ConfigDict, Field

    class Explained(BaseModel):
        model_config = ConfigDict(extra="forbid")
        explanation: str = Field(min_length=1, max_length=LONGEST)

    return Explained


def request(examples: Examples, quiet: "Examples | None", reader: Reader, unit: str) -> Request:
    """The question about one feature."""
    strong = (examples.values > 0) & (examples.values >= STRONG * examples.values.max(1, keepdims=True))
    pairs = zip(examples.tokens, strong, strict=True)
    parts = [prompts.numbered([reader.line(tokens, marks) for tokens, marks in pairs])]
    levels = np.ceil(LEVELS * examples.values / max(examples.values.max(initial=0), 1e-30)).astype(int)
    listed = []
    for i, (tokens, own, marks) in enumerate(zip(examples.tokens, levels, strong, strict=True), 1):
        words = (
            f"{prompts.seen(prompts.shown(reader.texts[t]))} {level}"
            for t, level in zip(tokens[marks], own[marks], strict=True)
        )
        listed.append(f"{i}: {', '.join(words)}")
    parts.append("How strongly:\n" + "\n".join(listed))
    if quiet is not None and len(quiet):
        parts.append("\n".join([SILENT, *(f"- {reader.line(tokens)}" for tokens in quiet.tokens)]))
    return Request(f"{unit} explanation", prompts.chat(SYSTEM, *parts), _schema(), max_tokens=200)


def explain(
    windows: Windows,
    features: Sequence[int],
    reader: Reader,
    judge: Any,
    seed: int = 0,
    contrastive: bool = False,
) -> tuple[list[Explanation], dict[str, int]]:
    """Explanations of features, and how many failed by kind: what failed has no explanation, and isn't scored.

    ``judge`` is the language model (:class:`saekit.autointerp.scoring.Judge`). Texts are of the explaining side only.
    """
    requests = []
    for feature in features:
        on = windows.firing(feature, "explain", SHOWN, "quantiles", seed)
        off = silent(windows, feature, "explain", QUIET, seed=seed) if contrastive else None
        requests.append(request(on, off, reader, f"feature {feature}"))
    answers: list[Answer] = judge.ask(requests)
    if answers and all(answer.status == "error" for answer in answers):
        raise SaekitError(
            f"model {judge.endpoint.name!r} gave no reply to any of {len(answers)} questions: {answers[0].reason}; check that it is there"
        )
    out: list[Explanation] = []
    failures: dict[str, int] = {}
    for feature, answer in zip(features, answers, strict=True):
        if answer.status == "ok":
            about = {"model": judge.endpoint.name, "contrastive": contrastive, "repaired": answer.repaired}
            out.append(Explanation(feature, " ".join(answer.value.explanation.split()), "llm", None, about))
        else:
            failures[answer.status] = failures.get(answer.status, 0) + 1
    if answers and not out:
        counts = ", ".join(f"{n} {status}" for status, n in failures.items())
        raise SaekitError(
            f"model {judge.endpoint.name!r} explained none of {len(answers)} features ({counts}; the first: {answers[0].reason}); ask another model, or allow it more requests"
        )
    return out, failures
