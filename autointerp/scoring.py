"""Explanations put to the test: each scorer's trials on the scoring side, with controls that can't read the explanation.

Beside each explanation stand the same trials with no explanation (``empty``), with another feature's (``shuffled``), and
judged by marks and lengths alone. Where explanations can be executed, the judge is audited for nothing: what the rule says
of an example is what the text says of it.
"""

import dataclasses
import numbers
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from saekit.autointerp import stats
from saekit.autointerp.ask import ask
from saekit.autointerp.budget import Budget, estimate
from saekit.autointerp.endpoint import Endpoint
from saekit.autointerp.explanation import Explanation, Score
from saekit.autointerp.ledger import Ledger
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Answer, Request
from saekit.autointerp.scorers import SCORERS
from saekit.autointerp.scorers.binary import FEWEST, Binary
from saekit.autointerp.windows import Windows
from saekit.types import SaekitError

N = 40  # firing windows, and as many silent ones
OWN, EMPTY, SHUFFLED = "", "empty", "shuffled"
VARIANTS = (OWN, EMPTY, SHUFFLED)


@dataclass
class Judge:
    """A language model that answers scorers' questions: where it is asked, what keeps its answers, and within what limits."""

    endpoint: Endpoint
    ledger: Ledger
    budget: Budget = field(default_factory=Budget)
    concurrency: int = 16
    rate: float | None = None
    timeout: float = 60
    retries: int = 5
    progress: Any = True
    tell: "Callable[[str], None] | None" = None  # is told the estimate before any call
    used: Counter[str] = field(default_factory=Counter)  # questions and tokens so far, recorded ones too

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Answers in the order of the requests."""
        if self.tell is not None:
            self.tell(f"{self.endpoint.name}: {estimate(requests, self.endpoint, self.ledger)}")
        answers = ask(
            requests, self.endpoint, self.ledger, self.budget, self.concurrency, self.rate, self.timeout, self.retries,
            self.progress,
        )  # fmt: skip
        for answer in answers:
            self.used.update(
                questions=1, prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens
            )
        return answers


@dataclass
class _Job:
    """One feature's trials by one scorer, and what is guessed in each variant."""

    explanation: Explanation
    trials: Any
    learnt: Any
    texts: dict[str, str]
    rules: dict[str, Any]
    guesses: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    executed: Any = None  # what the own rule guesses, where it isn't what is scored


def score(
    explanations: Sequence[Explanation],
    windows: Windows,
    reader: Reader,
    scorers: "Iterable[Any]" = ("detection", "fuzzing"),
    judge: "Judge | None" = None,
    n: int = N,
    controls: bool = True,
    seed: int = 0,
    side: str = "score",
    on_feature: "Callable[[int, int], None] | None" = None,
) -> list[Explanation]:
    """The explanations with scores by each scorer (a name, or a scorer) beside those that they have.

    Without a ``judge``, scorers that would ask one execute the explanations' rules, and leave out what has none. ``n``:
    firing windows of each feature, and as many silent ones. ``side``: the documents they are of.
    """
    if not isinstance(n, numbers.Integral) or n < FEWEST:
        raise SaekitError(f"n = {n!r} must be a whole number from {FEWEST}")
    if judge is not None and not isinstance(judge, Judge):
        raise SaekitError(
            f"judge is a {type(judge).__name__}; give saekit.autointerp.scoring.Judge(endpoint, ledger)"
        )
    out, n = list(explanations), int(n)
    for given in scorers:
        scorer = SCORERS[given]() if isinstance(given, str) else given
        jobs = _jobs(scorer, out, windows, n, controls, seed, side, on_feature)
        if scorer.by == "judge" and judge is not None:
            _asked(scorer, jobs, judge, reader)
        else:
            for job in jobs:
                _executed(scorer, job, reader)
        audit = _audit(jobs)
        found = {id(job.explanation): _score(scorer, job, reader, seed, audit) for job in jobs}
        out = [
            dataclasses.replace(
                one, scores=(*(s for s in one.scores if s.scorer != scorer.name), found[id(one)])
            )
            for one in out
        ]
    return out


def _jobs(
    scorer: Any, explanations: list[Explanation], windows: Windows, n: int, controls: bool, seed: int, side: str,
    on_feature: "Callable[[int, int], None] | None",
) -> list[_Job]:  # fmt: skip
    other = "explain" if side == "score" else "score"
    partners = shuffled(explanations, seed)
    jobs, drawn = [], {}
    for i, (one, partner) in enumerate(zip(explanations, partners, strict=True)):
        if one.feature not in drawn:  # several explanations of one feature are tried on the same windows
            drawn[one.feature] = tuple(scorer.trials(windows, one.feature, s, n, seed) for s in ((side, other) if controls else (side,)))  # fmt: skip
        found = drawn[one.feature]
        texts, rules = {OWN: one.text}, {OWN: one.rule}
        if controls:
            texts |= {EMPTY: ""} | ({} if partner is None else {SHUFFLED: partner.text})
            rules |= {EMPTY: None} | ({} if partner is None else {SHUFFLED: partner.rule})
        jobs.append(_Job(one, found[0], found[1] if controls else None, texts, rules))
        if on_feature is not None:
            on_feature(i + 1, len(explanations))
    return jobs


def shuffled(explanations: Sequence[Explanation], seed: int) -> list["Explanation | None"]:
    """For each explanation one of another feature that says something else; None where there is none."""
    order = np.random.default_rng([seed, 8]).permutation(len(explanations))
    place = np.argsort(order)
    out: list[Explanation | None] = []
    for i, one in enumerate(explanations):
        ring = (explanations[order[(place[i] + step) % len(order)]] for step in range(1, len(order)))
        out.append(next((o for o in ring if o.feature != one.feature and o.text != one.text), None))
    return out


def _asked(scorer: Any, jobs: list[_Job], judge: Judge, reader: Reader) -> None:
    """All questions of all features at once, so that no server waits."""
    requests: list[Request] = []
    spans: list[tuple[_Job, str, slice]] = []
    for job in jobs:
        for variant, text in job.texts.items() if job.trials is not None else ():
            unit = f"feature {job.explanation.feature}{' ' + variant if variant else ''}"
            own = scorer.requests(job.trials, text, unit, reader)
            spans.append((job, variant, slice(len(requests), len(requests) + len(own))))
            requests += own
    answers = judge.ask(requests)
    if answers and all(answer.status == "error" for answer in answers):
        raise SaekitError(
            f"model {judge.endpoint.name!r} gave no reply to any of {len(answers)} questions: {answers[0].reason}; check that it is there"
        )
    for job, variant, span in spans:
        own_answers = answers[span]
        job.guesses[variant] = scorer.read(
            job.trials, [a.value if a.status == "ok" else None for a in own_answers]
        )
        for status in (a.status for a in own_answers if a.status != "ok"):
            kind = f"{variant} {status}".strip()
            job.failures[kind] = job.failures.get(kind, 0) + 1
        if variant == OWN and job.explanation.rule is not None:
            job.executed = scorer.execute(job.trials, job.explanation.rule)


def _executed(scorer: Any, job: _Job, reader: Reader) -> None:
    if job.trials is None:
        return
    for variant, text in job.texts.items():
        if scorer.by == "model":
            job.guesses[variant] = scorer.compute(job.trials, text, reader)
        elif job.rules[variant] is not None:
            job.guesses[variant] = scorer.execute(job.trials, job.rules[variant])


def _audit(jobs: list[_Job]) -> "tuple[float, float] | None":
    """Sensitivity and specificity of the judge, by what rules say of the examples that it judged."""
    said, judged = [], []
    for job in jobs:
        if job.executed is not None and isinstance(job.trials, Binary):
            known = np.isfinite(job.guesses[OWN])
            said.append(job.executed[known] >= 0.5)
            judged.append(job.guesses[OWN][known] >= 0.5)
    if not said:
        return None
    truth, found = np.concatenate(said), np.concatenate(judged)
    if truth.all() or not truth.any():
        return None
    return float(found[truth].mean()), float((~found[~truth]).mean())


def _score(scorer: Any, job: _Job, reader: Reader, seed: int, audit: "tuple[float, float] | None") -> Score:
    if job.trials is None:
        why = getattr(scorer, "untried", "fires too rarely on this side to be scored")
        return Score(
            scorer.name, scorer.metric, None, None, None, 0, failures={"feature untried": 1}, notes=(why,)
        )
    if OWN not in job.guesses:
        why = "has no rule to execute, and no judge was given"
        return Score(
            scorer.name,
            scorer.metric,
            None,
            None,
            None,
            0,
            failures={"feature without a rule": 1},
            notes=(why,),
        )
    found = scorer.measure(job.trials, job.guesses[OWN], seed)
    controls: dict[str, float | None] = {
        variant: scorer.measure(job.trials, guesses, seed).value
        for variant, guesses in job.guesses.items()
        if variant != OWN
    }
    if EMPTY in job.texts or SHUFFLED in job.texts:
        controls |= scorer.blind(job.learnt, job.trials, reader)
    skill = None if audit is None else sum(audit) - 1
    return dataclasses.replace(found, controls=controls, failures=job.failures, skill=skill)


@dataclass(frozen=True)
class Summary:
    """A scorer over many explanations: mean, Student's interval over features, how many were scored, means of controls.

    ``corrected`` is the mean without the judge's own errors, where these are known.
    """

    scorer: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    wrong: float | None
    corrected: float | None
    controls: Mapping[str, float]
    failures: Mapping[str, int]


def summaries(explanations: Sequence[Explanation]) -> list[Summary]:
    """One for each scorer that any explanation has."""
    names = dict.fromkeys(s.scorer for one in explanations for s in one.scores)
    out = []
    for name in names:
        own = [s for one in explanations for s in one.scores if s.scorer == name]
        values = np.array([s.value for s in own if s.value is not None])
        skill = next((s.skill for s in own if s.skill is not None), None)
        wrongs = [s.wrong for s in own if s.wrong is not None]
        low, high = stats.mean_interval(values) if len(values) > 2 else (None, None)  # of two it says nothing
        if low is not None and high is not None:
            least = -1.0 if own[0].metric == "correlation" else 0.0
            low, high = max(least, low), min(1.0, high)
        controls: dict[str, list[float]] = {}
        for key, value in ((k, v) for s in own for k, v in s.controls.items()):
            controls.setdefault(key, []).extend([] if value is None else [value])
        failures: dict[str, int] = {}
        for s in own:
            for kind, count in s.failures.items():
                failures[kind] = failures.get(kind, 0) + count
        out.append(
            Summary(
                name, own[0].metric, float(values.mean()) if len(values) else None, low, high, len(values),
                float(np.mean(wrongs)) if wrongs else None,
                stats.corrected(float(values.mean()), skill) if len(values) and skill is not None else None,
                {key: float(np.mean(found)) for key, found in controls.items() if found}, failures,
            )
        )  # fmt: skip
    return out
