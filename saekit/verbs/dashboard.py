"""``saekit dashboard``: the HTML report of a run."""

from typing import Annotated

import typer

from saekit.verbs.console import Device, Json, Seed, progress, result


def dashboard(
    path: Annotated[str, typer.Argument(help="Finished run, or folder of a dictionary.", metavar="RUN")],
    out: Annotated[str | None, typer.Option(help="HTML file; default: report.html in the run.")] = None,
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was harvested from.")] = None,
    text: Annotated[str | None, typer.Option(help="Text; default: the one it was harvested from.")] = None,
    features: Annotated[
        int, typer.Option(help="Features to show at most, explained ones first, spread over their densities.")
    ] = 1000,
    feature: Annotated[
        list[int] | None, typer.Option(help="Show this feature; may be given more than once.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to search for contexts.")] = 200_000,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML file that shows the run, its metrics and its features.

    Example: `saekit dashboard run --out report.html`
    """
    from saekit.report import dashboard as run

    with progress("dashboard", "tokens") as draw:
        target = run(
            path, out, model=model, text=text, n_features=features, features=feature, tokens=tokens, device=device, seed=seed,
            on_batch=lambda done, total: draw(done, total, ""),
        )  # fmt: skip
    result({"report": str(target.resolve()), "bytes": target.stat().st_size}, as_json, str(target.resolve()))
