"""All pairs of saekit and other tools that can be run here, in both directions: a table in Markdown, docs/formats.md.

    SAEKIT_PEERS=PYTHON SAEKIT_PEERS2=PYTHON SAEKIT_OPENMOSS=PYTHON SAEKIT_TRACER=PYTHON \
        python -P tests/peers/table.py > docs/formats.md

``SAEKIT_PEERS`` names the python of an environment with sae-lens, ``SAEKIT_PEERS2`` of one with dictionary_learning,
eai-sparsify and overcomplete, ``SAEKIT_OPENMOSS`` of one with llamascopium, ``SAEKIT_TRACER`` of one with circuit-tracer;
pairs whose variable isn't set are left out. What the last two wrote is under golden/. Files whose writers are no packages are
written and read by documented.py. A row is an architecture over all its normalisations and dtypes.
"""

import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

import test_hub_circuit_tracer as circuit_tracer
import test_hub_openmoss as openmoss
import torch
from exports import (
    ARCHITECTURES,
    DTYPES,
    NORMALISE,
    OPTIONS,
    RULES,
    SCRIPTS,
    difference,
    exported,
    given,
    held,
    label_of,
    made,
    run,
    untold,
)
from safetensors.torch import load_file
from torch import Tensor

import saekit
from saekit import SaekitError

HEAD = """# Formats

What saekit makes of files of other tools, and they of its files: the largest difference over {rows} rows of inputs whose
mean is three standard deviations off zero, in fp32 from the stored weights; outputs as a share of the largest. Made by
`tests/peers/table.py`. "peer → saekit": files as the peer's own code writes them, read by saekit and by the peer.
"saekit → peer": files that saekit writes, read by both; those in fp32 are also held against the dictionary itself.
Files of Gemma Scope, Llama Scope, OpenAI, Goodfire, DeepSeek-R1, Qwen Scope and hook_z have no package that writes
them: there the peer is a second reading of their documents, in numpy.

| format | architecture | direction | compared | codes | outputs | supports |
|---|---|---|---|---|---|---|"""
Found = tuple[str, str, str, float, float, bool]
Ran = tuple[Tensor, Tensor]  # codes and outputs


def python_of(script: str) -> str | None:
    """The python of a script's environment; None where no variable names it."""
    variable = dict(SCRIPTS.values())[script]
    return sys.executable if variable is None else os.environ.get(variable)


def imported(script: str, python: str, folder: Path) -> Iterator[Found]:
    """What the peer writes."""
    run(script, "write", folder, *(["all"] if script == "saelens" else []), python=python)
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        d = saekit.load(case, **OPTIONS.get(case.name, {}))
        format = case.name.split("-")[0] if script == "documented" else script
        label = case.name.removeprefix(f"{format}-") if script == "documented" else label_of(case.name)
        yield (format, label, "peer → saekit", *difference(d, held(folder, case.name)))


def opened(format: str, python: str, folder: Path) -> Iterator[Found]:
    """What the peer reads."""
    written = exported(format, folder, everything=True) if format in RULES else tried(format, folder)
    run(SCRIPTS[format][0], "open", folder, python=python)
    for case, d in written.items():
        theirs, again = held(folder, case), saekit.load(folder / case, **untold(format, d))
        architecture = case.split("-")[0]
        # SAELens' atoms have norm 1 in a pursuit, whose codes are divided by the scale
        itself = case.endswith("float32") and not (format == "saelens" and architecture == "pursuit")
        for mine in (again, *([d] if itself else [])):
            yield (format, architecture, "saekit → peer", *difference(mine, theirs))


def tried(format: str, folder: Path) -> dict[str, saekit.Dictionary]:
    """Every dictionary that a writer takes, in each dtype."""
    out = {}
    for i, architecture in enumerate(ARCHITECTURES):
        for normalise in NORMALISE:
            for dtype in DTYPES:
                case, d = f"{architecture}-{normalise}-{dtype}", made(architecture, normalise, seed=i)
                try:
                    saekit.save(d, folder / case, format=format, dtype=dtype)
                except SaekitError:
                    continue
                given(folder, case, seed=i)
                out[case] = d
    return out


def apart(mine: Ran, theirs: Ran) -> tuple[float, float, bool]:
    """As ``difference``, of codes and outputs that are there."""
    codes, out = (
        theirs[0][..., : mine[0].shape[-1]],
        theirs[1],
    )  # the codes of a crosscoder's heads are the same
    return (
        float((mine[0] - codes).abs().max()),
        float((mine[1] - out).abs().max() / out.abs().max()),
        torch.equal(mine[0] != 0, codes != 0),
    )


def sets(format: str, variable: str, folder: Path) -> Iterator[Found]:
    """Formats of more than dictionaries of one place: files that the peer wrote, and what it reads."""
    if format == "openmoss":
        for case in openmoss.CASES:
            x, theirs = openmoss.golden(case)
            mine = openmoss.run(openmoss.read(case), x)
            yield (format, "-".join(case.split("-")[:2]), "peer → saekit", *apart(mine, theirs))
    else:
        for case in circuit_tracer.CASES:
            x, theirs = circuit_tracer.beside(case)
            mine = circuit_tracer.made_of(circuit_tracer.read(circuit_tracer.GOLDEN / case), x)
            yield (format, case, "peer → saekit", *apart(mine, theirs))
    if os.environ.get(variable):
        written = (openmoss if format == "openmoss" else circuit_tracer).ours(folder)
        run(format, "open", folder, python=os.environ[variable])
        for case, mine in written.items():
            held = load_file(folder / f"{case}.safetensors")
            parts = case.removeprefix("own-").split("-")
            label = parts[0] if case.startswith("own-") else "-".join(parts[:2])
            yield (format, label, "saekit → peer", *apart(mine, (held["codes"], held["out"])))


def main() -> None:
    """Print the table; how far it is goes to stderr."""
    rows: dict[tuple[str, str, str], list[tuple[float, float, bool]]] = defaultdict(list)
    jobs = [(script, "write") for script in dict.fromkeys(script for script, _ in SCRIPTS.values())]
    jobs += [(format, "open") for format in ("saelens", *RULES)]
    for name, mode in jobs:
        script = name if mode == "write" else SCRIPTS[name][0]
        python = python_of(script)
        print(f"{name}: {mode if python else 'left out'}", file=sys.stderr)
        if python is None:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            side = imported if mode == "write" else opened
            for format, label, direction, *measured in side(name, python, Path(scratch)):
                rows[format, label, direction].append(tuple(measured))
    for format, variable in (("openmoss", "SAEKIT_OPENMOSS"), ("circuit_tracer", "SAEKIT_TRACER")):
        print(format, file=sys.stderr)
        with tempfile.TemporaryDirectory() as scratch:
            for _, label, direction, *measured in sets(format, variable, Path(scratch)):
                rows[format, label, direction].append(tuple(measured))
    print(HEAD.format(rows=16))
    for (format, label, direction), found in sorted(rows.items()):
        codes, outputs = (max(row[i] for row in found) for i in (0, 1))
        same = "same" if all(row[2] for row in found) else f"differ in {sum(not row[2] for row in found)}"
        print(f"| {format} | {label} | {direction} | {len(found)} | {codes:.1e} | {outputs:.1e} | {same} |")


if __name__ == "__main__":
    main()
