"""The command line: a table of verbs, and one way to answer bad input."""

import importlib
import signal
import sys

import typer
from typer.exceptions import Abort, TyperException

from saekit.errors import SaekitError
from saekit.verbs.memory import steady_malloc

VERBS = {
    "demo": "saekit.verbs.demo:demo",
    "plan": "saekit.verbs.plan:plan",
    "harvest": "saekit.verbs.harvest:harvest",
    "train": "saekit.verbs.train:train",
    "eval": "saekit.verbs.evaluate:evaluate",
    "diff": "saekit.verbs.diff:diff",
    "explain": "saekit.verbs.explain:explain",
    "trace": "saekit.verbs.trace:trace",
    "steer": "saekit.verbs.steer:steer",
    "dashboard": "saekit.verbs.dashboard:dashboard",
    "convert": "saekit.verbs.convert:convert",
    "publish": "saekit.verbs.publish:publish",
    "released": "saekit.verbs.released:released",
    "reproduce": "saekit.verbs.reproduce:reproduce",
    "bench": "saekit.verbs.bench:bench",
    "doctor": "saekit.verbs.doctor:doctor",
}

INTERRUPTED = 130

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


def main() -> None:
    """Run a verb; a mistake of the user's is one sentence on stderr and exit code 2."""
    steady_malloc()
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # schedulers end jobs by it, and it is told as Ctrl-C is
    try:
        code = app(standalone_mode=False)
        if (
            code == INTERRUPTED
        ):  # Ctrl-C, which typer turns into a code; training says itself where it stopped
            raise KeyboardInterrupt
        sys.exit(code)
    except TyperException as error:
        message = error.format_message().strip()  # empty where the help has been printed instead
        if message:
            print(f"error: {message.rstrip('.')}; --help lists what there is", file=sys.stderr)
        sys.exit(2)
    except (Abort, KeyboardInterrupt):
        print(
            "stopped; harvest, train, explain and reproduce go on where they were when the same command is run again",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    except SaekitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        why = str(error).strip().splitlines()[0][:200] if str(error).strip() else "none is left"
        print(
            f"error: memory ran out ({why}); choose a smaller batch or dictionary: `saekit plan` says what a job takes",
            file=sys.stderr,
        )
        sys.exit(2)


def _out_of_memory(error: Exception) -> bool:
    """torch raises a plain RuntimeError where the CPU's memory ends, and its own kinds on a GPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
        or "Storage size calculation overflowed" in str(error)
    )


if __name__ == "__main__":
    main()
