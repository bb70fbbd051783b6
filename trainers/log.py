"""The training log: JSON lines always, wandb where it is wanted."""

import json
import os
from pathlib import Path
from typing import Any

from saekit.types import SaekitError


class Log:
    """Appends records to ``log.jsonl``; a resumed run first drops the lines it will write again."""

    def __init__(self, folder: Path, step: int, wandb: str | None, config: dict[str, Any]):
        self.path = folder / "log.jsonl"
        kept = [line for line in _lines(self.path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
        self.file = self.path.open("a", buffering=1)
        self.run = None
        if wandb:
            import wandb as client

            try:
                self.run = client.init(
                    project=wandb, dir=str(folder), config=config, resume="allow", id=_run_id(folder)
                )
            except Exception as error:  # no key, no network, ...: it raises what its parts raise
                self.file.close()
                raise SaekitError(
                    f"wandb = {wandb!r} can't be logged to ({' '.join(str(error).split())[:200]}); log in, or set WANDB_MODE=offline"
                ) from None

    def write(self, record: dict[str, Any]) -> None:
        """One line, on disk at once."""
        self.file.write(json.dumps(record) + "\n")
        if self.run is not None:
            self.run.log(record, step=record["step"])

    def close(self) -> None:
        """Finish the file and the wandb run."""
        self.file.close()
        if self.run is not None:
            self.run.finish()


def _run_id(folder: Path) -> str:
    path = folder / "wandb-id"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a log; a last line cut short by a crash is dropped."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        out.append(record)
    return out


def read(folder: Path) -> list[dict[str, Any]]:
    """The records of a run's log."""
    return _lines(folder / "log.jsonl")
