"""The command line, called in this process: starting one for each call would be most of the tests' time.

That it is the same in a process of its own is shown where processes are the point: test_bad_input, test_train.
"""

import contextlib
import io
import sys
import warnings
from dataclasses import dataclass
from unittest import mock

from saekit.cli import main


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it said."""

    returncode: int
    stdout: str
    stderr: str


def saekit(*arguments: str) -> Done:
    """``saekit`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["saekit", *arguments]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")  # said, as for a user
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Done(code, out.getvalue(), err.getvalue())
