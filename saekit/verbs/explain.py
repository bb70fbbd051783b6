"""``saekit explain``: features in words, scored on text that the words weren't made from."""

from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Json, Seed, progress, result, say

WORDS = {"record": "tokens", "explain": "features", "score": "features", "ask": "calls"}


def explain(
    path: Annotated[str, typer.Argument(help="Finished run, or folder of a dictionary.", metavar="RUN")],
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was harvested from.")] = None,
    text: Annotated[str | None, typer.Option(help="Text; default: the one it was harvested from.")] = None,
    features: Annotated[
        int | None,
        typer.Option(help="How many, spread over their densities; default: all that fire often enough."),
    ] = None,
    feature: Annotated[list[int] | None, typer.Option(help="This one; again for more.")] = None,
    method: Annotated[
        str, typer.Option(help="statistics (no language model), llm or contrastive.")
    ] = "statistics",
    given: Annotated[
        str | None,
        typer.Option(
            help="Score these explanations and make none: explanations.json, or another tool's folder."
        ),
    ] = None,
    given_format: Annotated[
        str | None, typer.Option(help="Of --given, where it isn't ours: delphi or neuronpedia.")
    ] = None,
    given_name: Annotated[
        str | None,
        typer.Option(help="Of the dictionary there: a hook point (delphi), MODEL/SOURCE (neuronpedia)."),
    ] = None,
    scorer: Annotated[
        list[str] | None,
        typer.Option(
            help="detection, fuzzing, rule, simulation, intruder, surprisal, embedding or intervention; again for more; default: the first three."
        ),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible server, as http://127.0.0.1:8000/v1.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="Name of the language model that explains and judges; a path or local:NAME runs here."
        ),
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the server's key; the key is kept nowhere.")
    ] = "OPENAI_API_KEY",
    price: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Money for a million prompt tokens and a million completion tokens."),
    ] = None,
    max_requests: Annotated[int | None, typer.Option(help="Never more requests than this.", min=0)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Never more tokens than this.", min=0)] = None,
    max_money: Annotated[float | None, typer.Option(help="Never more money than this.", min=0)] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Never longer than this.", min=0)] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 16,
    rate: Annotated[
        float | None, typer.Option(help="Requests begun in a second; default: no limit.", min=0.001)
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            help="File that keeps every reply, by the model's name and not by its address; default: calls.sqlite in the run."
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="cache (asks what isn't kept), live (asks all) or replay (asks nothing).")
    ] = "cache",
    tokens: Annotated[int, typer.Option(help="Tokens of text to record firings on.", min=1)] = 200_000,
    n: Annotated[
        int, typer.Option(help="Firing windows shown of a feature by a scorer, and as many silent.", min=1)
    ] = 40,
    controls: Annotated[bool, typer.Option(help="Also judges that can't read the explanation.")] = True,
    out: Annotated[str | None, typer.Option(help="File; default: explanations.json in the run.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Explain a dictionary's features, and score the explanations on documents that they weren't made from.

    Without --judge nothing is asked: statistics explain, and scorers execute the rules that they found. With it, an estimate
    is shown before any call; a run that was stopped goes on where it was.

    Example: `saekit explain run --features 500`
    """
    from saekit.autointerp.explain import DEFAULT
    from saekit.autointerp.explain import explain as run
    from saekit.autointerp.ledger import MODES
    from saekit.harvest import check_writable
    from saekit.hub import dictionary_of

    folder = Path(path) if Path(path).is_dir() else Path()
    if out is None and folder != Path(path):
        raise SaekitError(
            f"out is missing: {path!r} is no folder to write explanations.json to; name a file with --out"
        )
    target = Path(out) if out else folder
    check_writable(target if target.is_dir() else target.parent)
    if mode not in MODES:
        raise SaekitError(f"mode {mode!r} is none of {', '.join(MODES)}")
    dictionary = dictionary_of(path)
    kept = _kept(dictionary, target)
    limits = {"requests": max_requests, "tokens": max_tokens, "money": max_money, "seconds": max_seconds}
    asked = _judge(
        judge, endpoint, key_env, price, limits, Path(ledger) if ledger else folder / "calls.sqlite", mode
    )
    bars = _Bars()
    if asked is not None:
        asked.concurrency, asked.rate = concurrency, rate
        asked.progress = lambda done, total, note: bars("ask", done, total, note)
    elif endpoint is not None:
        raise SaekitError("endpoint is given without the name of a model; name it with --judge")
    try:
        found = run(
            dictionary, model, text, list(feature) if feature else features, method=method, given=_given(given, given_format, given_name), judge=asked, scorers=scorer or DEFAULT,
            tokens=tokens, n=n, controls=controls, seed=seed, draw=bars,
        )  # fmt: skip
    finally:
        bars.close()
    if asked is not None:
        say(f"{asked.endpoint.name}: {asked.budget.spent.requests:,} requests were sent")
        if cut := sum(found.about["failures"].get(kind, 0) for kind in ("budget", "not_run")):
            say(f"the budget is used up: {cut} features are not explained; the same command with a larger one goes on from here")  # fmt: skip
    file = _beside(found, kept).save(target)
    result(_data(found, file), as_json, f"{found!r}\n{_examples(found)}\n{file.resolve()}")


class _Bars:
    """A progress bar for each thing that is done, one after the other."""

    def __init__(self) -> None:
        self.what, self.done = "", 0
        self.bar: Any = None
        self.draw: Any = None

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Draw how far a thing is."""
        if what != self.what or done < self.done:
            self.close()
            self.what = what
            self.bar = progress(what, WORDS[what])
            self.draw = self.bar.__enter__()
        self.done = done
        if self.bar is not None:
            self.draw(done, total, note)
            if done >= total:
                self.close()

    def close(self) -> None:
        """End the bar that is drawn."""
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
        self.bar = None


def _given(path: str | None, kind: str | None, name: str | None) -> Any:
    """Explanations that there are, of our file or of another tool's."""
    from saekit.autointerp.explanation import load
    from saekit.autointerp.formats import READERS

    if path is None:
        if kind or name:
            raise SaekitError("given_format and given_name are of explanations; name them with --given")
        return None
    if kind is None:
        return load(path)[0]
    if kind not in READERS:
        raise SaekitError(f"given_format {kind!r} is none of {', '.join(READERS)}")
    if name is None:
        raise SaekitError(f"given_name is missing; say which dictionary of {path!r} is meant")
    return READERS[kind](path, name)


def _judge(
    name: str | None, endpoint: str | None, key_env: str, price: tuple[float, float] | None, limits: dict[str, Any],
    ledger: Path, mode: str,
) -> Any:  # fmt: skip
    """The language model that is asked, or None."""
    from saekit.autointerp.budget import Budget
    from saekit.autointerp.endpoint import LocalEndpoint, OpenAIEndpoint
    from saekit.autointerp.ledger import Ledger
    from saekit.autointerp.scoring import Judge

    if name is None:
        return None
    if limits["money"] is not None and price is None:
        raise SaekitError("max_money can't be kept to without a price; give --price, or limit --max-tokens")
    local = name.startswith("local:") or (endpoint is None and Path(name).is_dir())
    server: Any = (
        LocalEndpoint(name.removeprefix("local:"))
        if local
        else OpenAIEndpoint(name, endpoint, key_env, price)
    )
    if not local and not ledger.is_file():  # what is kept may answer all
        server.ready()
    return Judge(server, Ledger(ledger, mode), Budget(**limits), tell=say)


def _kept(dictionary: Any, target: Path) -> list[Any]:
    """The explanations that the file to be written holds already; raises where they are not of this dictionary."""
    from saekit.autointerp.explanation import FILE, load_of

    file = target / FILE if target.is_dir() else target
    return load_of(dictionary, file) if file.is_file() else []


def _beside(found: Any, kept: list[Any]) -> Any:
    """What was found, and what was there already of other features, or by other methods."""
    from saekit.autointerp.explain import Explanations

    new = {(one.feature, one.method) for one in found}
    old = [one for one in kept if (one.feature, one.method) not in new]
    return Explanations((*found, *old), {**found.about, "kept": len(old)}) if kept else found


def _data(found: Any, file: Path) -> dict[str, Any]:
    from dataclasses import asdict

    return {"explanations": str(file.resolve()), "n": len(found), "summaries": [asdict(one) for one in found.summaries()], "about": found.about}  # fmt: skip


def _examples(found: Any, n: int = 5) -> str:
    """A few explanations, spread over the list."""
    n = min(n, len(found))
    some = [found[i * len(found) // n] for i in range(n)]
    return "\n".join(f"  feature {one.feature}: {one.text}" for one in some)
