"""The command line: a table of verbs, and one way to answer bad input."""

import ctypes
import importlib
import sys

import typer

from saekit.types import SaekitError

VERBS = {
    "demo": "saekit.verbs.demo:demo",
    "plan": "saekit.verbs.plan:plan",
    "harvest": "saekit.verbs.harvest:harvest",
    "train": "saekit.verbs.train:train",
    "eval": "saekit.verbs.evaluate:evaluate",
    "dashboard": "saekit.verbs.dashboard:dashboard",
    "doctor": "saekit.verbs.doctor:doctor",
}

M_ARENA_MAX = -8  # of malloc.h

app = typer.Typer(
    name="saekit",
    help="Sparse dictionaries for mechanistic interpretability: harvest, train, evaluate, inspect.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for _name, _place in VERBS.items():
    _module, _attr = _place.split(":")
    app.command(_name)(getattr(importlib.import_module(_module), _attr))


def _one_arena() -> None:
    """Keep glibc to one arena: what one per thread holds back grows with time, not with need."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # musl has none
            mallopt(M_ARENA_MAX, 1)


def main() -> None:
    """Run a verb; a mistake of the user's is one sentence on stderr and exit code 2."""
    _one_arena()
    try:
        app()
    except SaekitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
