"""``saekit publish``: dictionaries and their model card as one commit on the Hub."""

from typing import Annotated

import typer

from saekit.verbs.console import Json, result


def publish(
    path: Annotated[
        str, typer.Argument(help="Run or saved dictionary, or a folder of them.", metavar="DICTIONARY")
    ],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub.", metavar="OWNER/REPO")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folder that would be uploaded, and list it.")
    ] = False,
    out: Annotated[str | None, typer.Option(help="Folder of the dry run; default: publish_REPO.")] = None,
    licence: Annotated[
        str | None,
        typer.Option("--licence", "--license", help="An id of the Hub's list, e.g. apache-2.0."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Id of the model on the Hub; default: the one it was trained on.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="What it was trained on: an id of the Hub, or words; default: of the run."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    revision: Annotated[str, typer.Option(help="Branch; made where it isn't there.")] = "main",
    layout: Annotated[
        list[str] | None,
        typer.Option(
            help="Layout to publish in, repeatable; default: native, and saelens where that can express it."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Publish dictionaries with a model card on the Hugging Face Hub: all in one commit, or nothing.

    The token comes from HF_TOKEN or `hf auth login`. Run again after a fault: what was uploaded isn't sent twice.

    Example: `saekit publish run owner/repo --licence apache-2.0 --dry-run`
    """
    from saekit.hub.publish import publish as run

    done = run(
        path, repo, licence=licence, base_model=base_model, data=data, private=private, revision=revision,
        layouts=layout, dry_run=dry_run, out=out,
    )  # fmt: skip
    width = max(map(len, done.files))
    lines = [f"{name:{width}}  {size:>13,} bytes" for name, size in done.files.items()]
    lines += [f"{name}: without SAELens's layout, {why}" for name, why in done.left_out.items()]
    where = f"a dry run, in {done.folder}" if done.folder else f"published as commit {done.commit}"
    lines += [where, *(f'saekit.load("{address}")' for address in done.addresses)]
    shown = {
        "repo": done.repo, "addresses": done.addresses, "files": done.files, "commit": done.commit,
        "folder": str(done.folder) if done.folder else None, "left_out": done.left_out,
    }  # fmt: skip
    result(shown, as_json, "\n".join(lines))
