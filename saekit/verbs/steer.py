"""``saekit steer``: a feature at several strengths, what it makes the model say, and what that costs."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Device, Json, Seed, result, say


def _strengths(given: str) -> list[float]:
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(map(math.isfinite, found)):
        raise SaekitError(f"strengths = {given!r} must be numbers with commas between, as 0,2,4,8")
    return found


def _targets(model: Any, given: list[str]) -> list[int]:
    """Token ids of what ``--target`` names: ids, or text that is one token; quoted digits are text."""
    size = model.module.get_output_embeddings().weight.shape[0]
    out = []
    for one in given:
        if one.isdecimal():
            if int(one) >= size:
                raise SaekitError(f"target {one} is no token; the model has 0 to {size - 1}")
            out.append(int(one))
            continue
        text = one[1:-1] if len(one) > 2 and one[0] == one[-1] and one[0] in "'\"" else one
        _speaks(model, "target", text)
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise SaekitError(f"target {text!r} is {len(ids)} tokens; give text that is one token, or an id")
        out.append(int(ids[0]))
    return out


def _speaks(model: Any, option: str, text: str) -> None:
    if model.tokenizer is None:
        raise SaekitError(
            f"{option} {text!r} is text, and model {model.name!r} has no tokenizer; give a folder that has one"
        )


def steer(
    model: Annotated[str, typer.Argument(help="Model: code-lm, a folder or a hub id.", metavar="MODEL")],
    dictionary: Annotated[str, typer.Option(help="Dictionary or finished run.")],
    feature: Annotated[int, typer.Option(help="Feature to steer.")],
    strengths: Annotated[
        str, typer.Option(help="Strengths, with commas between: codes, in the units of the dictionary.")
    ] = "0,2,4,8",
    way: Annotated[
        str, typer.Option(help="What is done with a strength: 'set' the code to it, or 'add' it.")
    ] = "set",
    prompt: Annotated[
        str | None, typer.Option(help="Prompt that the model goes on from at each strength.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that it goes on for.", min=1)] = 20,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Token whose probability is the effect (id or text; digits in quotes are text); again for more; default: those that the feature promotes most."
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Neutral text; default: what the dictionary was harvested from, held-out side."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Side of the text's split; default: all of a text that is named.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of the neutral text.", min=2)] = 1024,
    controls: Annotated[
        int, typer.Option(help="Random features, and as many random directions, at equal KL.", min=0)
    ] = 4,
    out: Annotated[str | None, typer.Option(help="Folder for sweep.html and sweep.json.")] = None,
    save: Annotated[
        str | None, typer.Option(help="File for the steering at the last strength, for saekit.steer.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="Folder for an ordinary checkpoint with the last strength as a bias (--way add; special tokens are steered too)."
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Steer a feature: samples, and a table of effect against damage beside controls that do as much damage.

    The effect is by how much the target tokens' probability on a neutral text is multiplied; the damage is the KL from the
    unsteered model there, and its loss.

    Example: `saekit steer code-lm --dictionary run --feature 12 --strengths 0,2,4,8 --prompt "def main("`
    """
    from saekit.hub import load
    from saekit.hub.native import origin
    from saekit.models import load_model
    from saekit.report import steering
    from saekit.report.cards import speller
    from saekit.steer import Steering

    wanted = _strengths(strengths)
    _check_files(out, save, checkpoint, way)
    d = load(dictionary, device=device)
    own_text = origin(d.card)[1]
    if text is None and own_text is None:
        raise SaekitError(
            f"dictionary {dictionary!r} was trained on text given in Python; name a neutral one with --text"
        )
    view = load_model(model, device=device)
    if not 0 <= feature < d.n_features:
        raise SaekitError(f"feature {feature} is none of the dictionary's {d.n_features}")
    if not d.writes:
        raise SaekitError(
            f"dictionary {dictionary!r} names no hook point; train it on a store, or set reads and writes"
        )
    if prompt is not None:
        _speaks(view, "prompt", prompt)
        if not view.tokenizer(prompt)["input_ids"]:
            raise SaekitError("prompt is empty; give at least one token, or leave it out")
    ids = _targets(view, target) if target else list(steering.promoted(view, d, feature))
    edit: dict[str, Any] = (
        {"add": {feature: wanted[-1]}} if way == "add" else {"edits": {feature: wanted[-1]}}
    )
    side = split or ("held_out" if text is None else "all")
    neutral = steering.Neutral(view, d, text or own_text, tokens=tokens, split=side, seed=seed)
    if checkpoint is not None:  # refused before the work, where it can't be
        Steering.of(d, masked=False, **edit).save_pretrained(view, d, checkpoint)
    say(f"steering feature {feature} at {len(wanted)} strengths on {neutral.n_tokens:,} tokens")
    found = steering.sweep(
        neutral, feature, wanted, ids, way=way, controls=controls, seed=seed,
        on_row=lambda row: say(f"strength {row.strength:g}: KL {row.measured.kl:.4f}"),
    )  # fmt: skip
    samples, behind = _samples(view, d, feature, way, wanted, prompt, new_tokens, ids)
    spell = speller(view.tokenizer) if view.tokenizer is not None else str
    names = [spell(token) for token in ids]
    data = {
        **found.to_json(),
        "target_texts": names,
        "model": view.identity(),
        "text": text or own_text,
        "split": side,
    }
    if prompt is not None:
        data |= {"prompt": prompt, "samples": samples, "prompt_effects": behind}
    written = _write(found, names, samples, data, view.name, out)
    if save is not None:
        written["steering"] = str(Steering.of(d, **edit).save(save).resolve())
    if checkpoint is not None:
        written["checkpoint"] = str(Path(checkpoint).resolve())
    result({**data, **written}, as_json, _text(found, names, samples, behind, written))


def _check_files(out: str | None, save: str | None, checkpoint: str | None, way: str) -> None:
    """Raise before any work where something can't be written."""
    from saekit.harvest import check_writable
    from saekit.report.steering import WAYS

    if way not in WAYS:
        raise SaekitError(f"way = {way!r} must be one of {', '.join(WAYS)}")
    if checkpoint is not None and way != "add":
        raise SaekitError(
            f"--checkpoint {checkpoint!r} needs --way add: a bias adds, and what {way!r} does depends on the feature's value"
        )
    if save is not None:
        if Path(save).is_dir():
            raise SaekitError(f"--save {save!r} is a folder; name a file")
        check_writable(Path(save).absolute().parent)
    if out is not None:
        check_writable(Path(out))


def _samples(
    view: Any, d: Any, feature: int, way: str, strengths: list[float], prompt: str | None, new: int, ids: list[int],
) -> tuple[list[str], list[float]]:  # fmt: skip
    """What the model says behind the prompt at each strength, and by how much the targets rise there."""
    from saekit.interventions import Edit
    from saekit.report.steering import prompt_effects
    from saekit.steer import steer as steered

    if prompt is None:
        return [], []
    given = view.tokenizer(prompt, return_tensors="pt")["input_ids"]
    changes: list[Any] = [
        [(d, [Edit(feature, set=s) if way == "set" else Edit(feature, add=s)])] for s in strengths
    ]
    texts = []
    for change in changes:
        with steered(view, change):
            whole = view.generate(given, max_new_tokens=new)
        texts.append(view.tokenizer.decode(whole[0, given.shape[1] :]))
    return texts, prompt_effects(view, given.to(view.device), changes, ids)


def _write(
    found: Any, names: list[str], samples: list[str], data: dict[str, Any], model: str, out: str | None
) -> dict[str, str]:
    from saekit.activations import write_atomic
    from saekit.pages import finite
    from saekit.report.steering import draw

    if out is None:
        return {}
    folder = Path(out)
    write_atomic(folder / "sweep.json", json.dumps(finite(data), indent=1).encode())
    page = draw(found, names, samples, f"Feature {found.feature} in {model}", folder / "sweep.html")
    return {"page": str(page.resolve())}


def _text(
    found: Any, names: list[str], samples: list[str], behind: list[float], written: dict[str, str]
) -> str:
    from rich.console import Console
    from rich.table import Table

    from saekit.report.steering import COLUMNS, table

    columns = (*COLUMNS, *(["behind the prompt (nats)"] if behind else []))
    out = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        out.add_column(column, justify="right")
    for i, cells in enumerate(table(found)):
        out.add_row(*cells, *([f"{behind[i]:+.3f}"] if behind else []))
    console = Console(width=130)
    with console.capture() as captured:
        console.print(out)
    lines = [
        f"targets: {', '.join(map(repr, names))}",
        f"the feature fires on {found.density:.2%} of {found.tokens:,} tokens, with codes up to {found.largest:.3g}",
        "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines()),
        *(f"{row.strength:g}: {sample!r}" for row, sample in zip(found.rows, samples, strict=False)),
        *written.values(),
    ]
    return "\n".join(lines)
