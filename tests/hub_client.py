"""Users of the loopback Hub, each a process of its own with a cache of its own: ``huggingface_hub`` reads its settings once."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the process of a client imports saekit when it is told to
    from hub_server import Served

    import saekit

POINT = "blocks.1.hook_resid_post"
TOKEN = "hf_owner"
SETTLED = {"licence": "mit", "layouts": ["native"]}
CALL = """
from saekit.hub.publish import publish
done = publish({source!r}, {repo!r}, **{options!r})
result = [done.commit, list(done.addresses), done.files]
"""
FETCH = """
from saekit.hub import native, remote
found = remote.fetch({address!r}, {format!r})
result = [str(found), sorted(f.name for f in found.rglob("*")) if found.is_dir() else []]
"""


class Client:
    """A process that has the Hub for its endpoint, an empty cache of its own, and runs what it is told."""

    def __init__(self, hub: "Served", home: Path, token: str | None = "hf_owner", **more: str):
        self.home = home
        env = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        env |= {
            "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "*", "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", **more,
        }  # fmt: skip
        if token:
            env["HF_TOKEN"] = token
        self.env, self.said = env, ""
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__))], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._listen, daemon=True)
        self.reader.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said += line

    def send(self, code: str) -> None:
        """Begin to run code; what it assigns to ``result`` is the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """{"result", "error", "kind", "warnings"} of the code that was sent."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def run(self, code: str) -> Any:
        """The result of code; its SaekitError is raised here, another error is a failed test."""
        from saekit.errors import SaekitError

        self.send(code)
        told = self.answer()
        self.warnings = told["warnings"]
        if told["kind"] == "SaekitError":
            raise SaekitError(told["error"])
        assert told["kind"] is None, f"{told['kind']}: {told['error']}\n{self.said}"
        return told["result"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self.reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


def client() -> None:
    """The other end of a Client: code by lines on stdin, answers on stdout."""
    import warnings

    out, scope = os.fdopen(os.dup(1), "w"), dict[str, Any]()
    os.dup2(2, 1)
    for line in sys.stdin:
        told: dict[str, Any] = {"result": None, "error": None, "kind": None}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                scope["result"] = None
                exec(json.loads(line), scope)
                told["result"] = scope["result"]
            except BaseException as error:
                told |= {"error": str(error), "kind": type(error).__name__}
        told["warnings"] = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
        print(json.dumps(told), file=out, flush=True)


def forget(client: Client) -> None:
    shutil.rmtree(client.home / "hub", ignore_errors=True)


def up(client: Client, source: Any, repo: str, **options: Any) -> list[Any]:
    source = str(source) if isinstance(source, Path) else source
    return client.run(CALL.format(source=source, repo=repo, options={**SETTLED, **options}))


def down(client: Client, address: str, format: str | None = None) -> tuple[Path, list[str]]:
    folder, names = client.run(FETCH.format(address=address, format=format))
    return Path(folder), names


def made(seed: int = 0, **card: Any) -> "saekit.Dictionary":
    """A dictionary with all that a card needs."""
    import saekit

    d = saekit.create("topk", d_in=16, n_features=64, k=4, seed=seed)
    d.reads = d.writes = (POINT,)
    data = {"model": {"name": "tiny-gpt2"}, "text": {"name": "stdlib"}, "rows": 100}
    d.card = {
        "licence": "mit",
        "data": data,
        "metrics": {"fvu": {"value": 0.5, "n": 10, "unit": "1"}},
        **card,
    }
    return d


def same(a: "saekit.Dictionary", b: "saekit.Dictionary") -> bool:
    import torch

    one, other = a.state_dict(), b.state_dict()
    return (
        one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one) and a.reads == b.reads
    )


def said_or_written(client: Client, text: str) -> list[str]:
    """Where a text is: files under the client's home, and what it wrote to stderr."""
    files = [f for f in client.home.rglob("*") if f.is_file() and text.encode() in f.read_bytes()]
    return [*map(str, files), *(["stderr"] if text in client.said else [])]


if __name__ == "__main__":
    client()
