"""A paper's row that costs nothing, for the frame's tests: processes of their own import it by its name."""

import os
import time
from pathlib import Path

from saekit.papers.claims import Claim, Reproduction, Tell
from saekit.papers.row import Found, Row
from saekit.types import SaekitError


def measure(seed: int, tell: Tell) -> Found:
    """Notes that it ran; seed 2 fails, and seed 3 waits, while the folder says so."""
    folder = Path(os.environ["TOY_ROW"])
    with (folder / "ran").open("a") as log:
        log.write(f"{seed} {os.getpid()}\n")
    tell(1, 2, "half")
    if seed == 2 and (folder / "fail").exists():
        raise SaekitError("seed = 2 fails; remove the file")
    while seed == 3 and (folder / "wait").exists():
        time.sleep(0.05)
    return {"nested": {"squares": seed**2}, "row": [seed, -seed]}


def judge(found: Found) -> Reproduction:
    """All that was found, in a note."""
    claim = Claim("square", "none", found["nested"]["squares"], ">=", 0.0)
    return Reproduction("toy", "none", "none", [claim], {}, [repr(found["row"])])


ROW = Row(measure, judge)
