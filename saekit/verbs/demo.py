"""``saekit demo``: from the bundled language model to an inspected dictionary, offline, on two cores."""

import time
from pathlib import Path
from typing import Annotated

import typer

from saekit.verbs.console import Device, Json, Seed, duration, progress, result, say
from saekit.verbs.evaluate import table

HOOK_POINT = "blocks.1.hook_resid_post"  # the middle of code-lm's four blocks
WIDTH = 256  # of its residual stream


def demo(
    out: Annotated[str, typer.Option(help="Folder for the store, the run and the report.")] = "demo",
    tokens: Annotated[int, typer.Option(help="Tokens to harvest.")] = 1_500_000,
    eval_tokens: Annotated[int, typer.Option(help="Held-out tokens to evaluate on.")] = 16_384,
    n_features: Annotated[int, typer.Option(help="Width of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Harvest code-lm, train a TopK dictionary, evaluate it on held-out text, write its report.

    Example: `saekit demo --out demo`
    """
    from saekit.dictionaries import create
    from saekit.evaluate import evaluate
    from saekit.harvest import harvest
    from saekit.models import load_model
    from saekit.report import dashboard
    from saekit.trainers import train

    began, folder = time.monotonic(), Path(out)
    model = load_model("code-lm", device=device)
    # before work, should they be refused
    dictionary, control = (
        create(name, d_in=WIDTH, n_features=n_features, k=k, seed=seed) for name in ("topk", "frozen")
    )
    say(f"1/4 harvest {HOOK_POINT} of code-lm over the standard library")
    with progress("harvest", "tokens") as draw:
        store = harvest(
            model, "stdlib", [HOOK_POINT], out=folder / "acts", tokens=tokens, dtype="bf16",
            on_batch=lambda done, total: draw(done, total, ""),
        )  # fmt: skip
    say(
        f"2/4 train a TopK dictionary, {WIDTH} to {n_features} features, k = {k}, and one with a frozen random decoder"
    )
    batch_size = min(4096, store.n_rows)
    steps = max(1, store.n_rows // batch_size)
    with progress("train", "steps") as draw:
        train(
            dictionary, store, steps, batch_size, folder / "run", control=control, device=device, seed=seed,
            on_step=lambda step, r: draw(step, steps, f"fvu {r['fvu']:.3f} dead {r['dead_share']:.1%}"),
        )  # fmt: skip
    say("3/4 evaluate it on held-out files, beside the controls")
    with progress("evaluate", "tokens") as draw:
        report = evaluate(
            dictionary,
            model,
            "stdlib",
            tokens=eval_tokens,
            controls={"frozen": control},
            seed=seed,
            on_batch=lambda done, total: draw(done, total, ""),
        )
    report.save(folder / "run")
    say("4/4 collect what its features fire on")
    with progress("dashboard", "tokens") as draw:
        page = dashboard(
            folder / "run",
            folder / "report.html",
            model=model,
            tokens=100_000,
            on_batch=lambda d, t: draw(d, t, ""),
        )
    seconds = time.monotonic() - began
    data = {**report.to_json(), "report": str(page.resolve()), "seconds": seconds}
    result(
        data, as_json, f"{table(report)}\n\n{page.resolve()}  (in {duration(seconds)}; open it in a browser)"
    )
