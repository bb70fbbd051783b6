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


def common(folder: Path) -> None:
    """A file that all seeds read."""
    folder.mkdir(exist_ok=True)
    with (folder / "read").open("a") as file:
        file.write("once\n")


def measure_common(seed: int, tell: Tell, folder: Path) -> Found:
    """As above, and what the file says."""
    assert (folder / "read").read_text() == "once\n"
    return measure(seed, tell)


ROW = Row(measure, judge)
SHARED = Row(measure_common, judge, common=common)
BROKEN = Row(lambda seed, tell: {"a": 1 / 0}, judge)
PAIR = Row(measure, judge, least=2)
HOURS = Row(measure, judge, slow=True)
