"""A Hugging Face Hub on loopback: the part of its API that ``huggingface_hub`` uses for models, with faults.

``python -P tests/hub_server.py --port 0`` prints its port; in a test, ``with serving(root) as hub``. It keeps everything in
memory: repositories as commits (path to content), branches, and large files by their SHA-256. Uploads go by the LFS protocol
(with ``HF_HUB_DISABLE_XET=1``); tokens are ``hf_owner`` (writes under ``owner/``), ``hf_reader`` (reads) and others (401).

``POST /_fault`` with {"match": regex on "METHOD path", "kind": one of KINDS, "times": n, "skip": n} makes the next ``times``
requests that match fail, after ``skip`` that don't: a status is answered, "drop" cuts the connection before an answer,
"lost" does what was asked and then cuts, "half" sends half of the body, "stall" never answers, "spoil" changes a byte of what
is sent or received. ``GET /_state`` tells what it holds and served. A flag ``--fault KIND:TIMES:REGEX`` does the same.
"""

import argparse
import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KINDS = ("401", "403", "429", "500", "503", "drop", "lost", "half", "stall", "spoil")
TOKENS = {"hf_owner": "owner", "hf_reader": "reader"}
LARGE = (".safetensors", ".pt", ".npz")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


class Hub:
    """What the server holds."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[dict[str, Any]] = []
        self.served: list[str] = []
        self.received = 0  # bytes of large files
        self.lock = threading.RLock()

    def create(self, repo: str, private: bool) -> None:
        self.repos[repo] = {"private": private, "branches": {}}
        self.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, repo: str, branch: str, tree: dict[str, bytes]) -> str:
        parent = self.repos[repo]["branches"].get(branch, "")
        listing = json.dumps([repo, parent, sorted((name, git_hash(c)) for name, c in tree.items())])
        sha = hashlib.sha1(listing.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = tree
        self.repos[repo]["branches"][branch] = sha
        return sha

    def resolve(self, repo: str, revision: str) -> str | None:
        return self.repos[repo]["branches"].get(revision) or (revision if revision in self.commits else None)

    def fault(self, line: str) -> str:
        with self.lock:
            self.served.append(line)
            for fault in self.faults:
                if re.search(fault["match"], line) and fault["times"]:
                    if fault.get("skip", 0):
                        fault["skip"] -= 1
                        continue
                    fault["times"] -= 1
                    return fault["kind"]
        return ""

    def state(self) -> dict[str, Any]:
        trees = {
            repo: {branch: sorted(self.commits[sha]) for branch, sha in held["branches"].items()}
            for repo, held in self.repos.items()
        }
        return {"repos": trees, "heads": {r: h["branches"] for r, h in self.repos.items()}, "private": {r: h["private"] for r, h in self.repos.items()},
                "served": self.served, "received": self.received, "large": sorted(self.large)}  # fmt: skip


class Cut(Exception):
    """The connection ends here."""


class Handler(BaseHTTPRequestHandler):
    """One connection; a route is a method ``on_...`` and its pattern in ROUTES."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, data: Any, status: int = 200, **headers: str) -> None:
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        if self.kind == "lost":
            raise Cut
        if self.kind == "spoil" and len(content) > 100:
            content = content[:50] + bytes([content[50] ^ 255]) + content[51:]
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(content)),
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if self.kind == "half" else content)
        if self.kind == "half":
            raise Cut

    def refuse(self, status: int, said: str, code: str = "", **headers: str) -> None:
        more = {"X-Error-Message": said, **({"X-Error-Code": code} if code else {}), **headers}
        self.answer({"error": said}, status, **more)

    @property
    def user(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def handle_any(self) -> None:
        path = urllib.parse.urlsplit(self.path)
        self.query = dict(urllib.parse.parse_qsl(path.query))
        self.sent = self.body()
        line = f"{self.command} {path.path}"
        if path.path.startswith("/_fault") or path.path == "/_state":
            self.kind = ""
            return self.control(path.path)
        self.kind = self.hub.fault(line)
        try:
            if self.kind == "drop":
                raise Cut
            if self.kind == "stall":
                time.sleep(600)
            if self.kind.isdigit():
                # a server that repeats the token, as some do: it must not reach a message or a file
                said = (
                    f"not now, {self.headers.get('Authorization', '')}"
                    if self.kind != "401"
                    else "Invalid credentials in Authorization header"
                )
                more = {"Retry-After": "1"} if self.kind == "429" else {}
                return self.refuse(int(self.kind), said, **more)
            if self.headers.get("Authorization") and self.user is None:
                return self.refuse(401, "Invalid credentials in Authorization header")
            for pattern, name in ROUTES:
                if found := re.fullmatch(pattern, line):
                    with self.hub.lock:
                        return self.routed(
                            name, {k: urllib.parse.unquote(v) for k, v in found.groupdict().items() if v}
                        )
            self.refuse(404, f"no {line} here")
        except Cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def routed(self, name: str, parts: dict[str, str]) -> None:
        repo = parts.get("repo")
        if repo is not None:
            held = self.hub.repos.get(repo)
            if held is None or (held["private"] and self.user is None):
                return self.refuse(404 if self.user else 401, "Repository not found", "RepoNotFound")
            if name.startswith("write_") and self.user != repo.split("/")[0]:
                return self.refuse(403, "You don't have the rights to write here")
            if name.endswith("_at"):
                commit = self.hub.resolve(repo, parts.get("revision", "main"))
                if commit is None:
                    return self.refuse(404, f"Invalid rev id: {parts['revision']}", "RevisionNotFound")
                parts = {**parts, "commit": commit}
        getattr(self, f"on_{name}")(**parts)

    def control(self, path: str) -> None:
        if path == "/_state":
            self.answer(self.hub.state())
        else:
            self.hub.faults = [json.loads(self.sent), *self.hub.faults] if self.sent else []
            self.hub.served = []
            self.answer({})

    # accounts and repositories
    def on_whoami(self) -> None:
        self.answer({"name": self.user, "type": "user", "orgs": []}) if self.user else self.refuse(
            401, "no token"
        )

    def on_create(self) -> None:
        asked = json.loads(self.sent)
        owner = asked.get("organization") or self.user
        repo = f"{owner}/{asked['name']}"
        if self.user is None or owner != self.user:
            return self.refuse(
                403 if self.user else 401, "You don't have the rights to create a model under this namespace"
            )
        if repo in self.hub.repos:
            return self.refuse(409, "You already created this model repo")
        self.hub.create(repo, asked.get("visibility") == "private" or asked.get("private") is True)
        self.answer({"url": f"{self.origin}/{repo}", "id": repo, "name": repo})

    def on_validate(self) -> None:
        import yaml

        front = re.match(r"---\n(.*?)\n---\n", json.loads(self.sent)["content"], re.S)
        data = yaml.safe_load(front[1]) if front else {}
        wrong = [
            {"message": f'"{key}" is required'}
            for key in ("license", "tags", "base_model")
            if not data.get(key)
        ]
        self.answer({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def on_list(self) -> None:
        rows = []
        for repo, held in self.hub.repos.items():
            card = self.hub.commits[held["branches"]["main"]].get("README.md", b"").decode()
            tags = re.findall(r'^- "([\w-]+)"$', card.split("\n---\n")[0], re.M)
            shown = not held["private"] or self.user == repo.split("/")[0]
            if (
                shown
                and self.query.get("author") in (None, repo.split("/")[0])
                and self.query.get("filter") in (None, *tags)
            ):
                rows.append({"id": repo, "modelId": repo, "tags": tags, "private": held["private"]})
        self.answer(rows)

    def on_info_at(self, repo: str, commit: str, revision: str = "main") -> None:
        files = [{"rfilename": name} for name in sorted(self.hub.commits[commit])]
        self.answer({"id": repo, "modelId": repo, "sha": commit, "private": self.hub.repos[repo]["private"], "siblings": files, "tags": []})  # fmt: skip

    def on_refs(self, repo: str) -> None:
        branches = [
            {"name": b, "ref": f"refs/heads/{b}", "targetCommit": sha}
            for b, sha in self.hub.repos[repo]["branches"].items()
        ]
        self.answer({"branches": branches, "converts": [], "tags": []})

    def on_write_branch(self, repo: str, branch: str) -> None:
        branches = self.hub.repos[repo]["branches"]
        if branch in branches:
            return self.refuse(409, "Reference already exists")
        branches[branch] = branches["main"]
        self.answer({})

    def on_tree_at(self, repo: str, commit: str, revision: str = "main") -> None:
        rows = []
        for name, content in sorted(self.hub.commits[commit].items()):
            row = {"type": "file", "path": name, "size": len(content), "oid": git_hash(content)}
            if name.endswith(LARGE):
                row["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            rows.append(row)
        self.answer(rows)

    # files
    def on_resolve_at(self, repo: str, commit: str, path: str, revision: str = "main") -> None:
        content = self.hub.commits[commit].get(path)
        if content is None:
            return self.refuse(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"'}
        if path.endswith(LARGE):
            sha = hashlib.sha256(content).hexdigest()
            self.hub.large.setdefault(sha, content)
            linked = {
                "X-Linked-Etag": f'"{sha}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"/_large/{sha}?commit={commit}",
            }
            return self.answer(b"", 302, **headers, **linked)
        self.deliver(content, headers)

    def on_large(self, sha: str) -> None:
        # the client follows a redirect to the same host before it looks at the headers
        self.deliver(self.hub.large[sha], {"ETag": f'"{sha}"', "X-Repo-Commit": self.query.get("commit", "")})

    def deliver(self, content: bytes, headers: dict[str, str]) -> None:
        begin = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        if begin:
            at = int(begin[1])
            return self.answer(
                content[at:],
                206,
                **headers,
                **{"Content-Range": f"bytes {at}-{len(content) - 1}/{len(content)}"},
            )
        self.answer(content, 200, **headers)

    # uploads
    def on_write_preupload_at(self, repo: str, commit: str, revision: str = "main") -> None:
        tree, rows = self.hub.commits[commit], []
        for file in json.loads(self.sent)["files"]:
            name, large = file["path"], file["path"].endswith(LARGE)
            held = tree.get(name)
            oid = None if held is None else hashlib.sha256(held).hexdigest() if large else git_hash(held)
            rows.append(
                {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}
            )
        self.answer({"files": rows})

    def on_write_batch(self, repo: str) -> None:
        rows = []
        for asked in json.loads(self.sent)["objects"]:
            actions = {
                "upload": {"href": f"{self.origin}/_large/{asked['oid']}"},
                "verify": {"href": f"{self.origin}/_verify"},
            }
            rows.append({**asked, **({} if asked["oid"] in self.hub.large else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": rows})

    def on_put(self, sha: str) -> None:
        content = self.sent
        self.hub.received += len(content)
        if self.kind == "spoil":
            self.kind, content = "", content[:-1] + bytes([content[-1] ^ 255])
        if hashlib.sha256(content).hexdigest() != sha:
            return self.refuse(400, "the content's hash is not the one stated")
        self.hub.large[sha] = content
        self.answer({})

    def on_verify(self) -> None:
        asked = json.loads(self.sent)
        good = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self.answer({}) if good else self.refuse(404, "no such object")

    def on_write_commit_at(self, repo: str, commit: str, revision: str = "main") -> None:
        lines = [json.loads(line) for line in self.sent.splitlines()]
        if lines[0]["value"].get("parentCommit", commit) != commit:
            return self.refuse(412, "A commit has happened since. Please refresh and try again.")
        tree = dict(self.hub.commits[commit])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.refuse(400, f"the large file {value['path']} was not uploaded")
                tree[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del tree[value["path"]]
        sha = self.hub.commit(repo, revision, tree)
        self.answer({"commitUrl": f"{self.origin}/{repo}/commit/{sha}", "commitOid": sha, "hookOutput": ""})

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


API = f"/api/models/{REPO}"
ROUTES = [
    ("GET /api/whoami-v2", "whoami"),
    ("POST /api/repos/create", "create"),
    ("POST /api/validate-yaml", "validate"),
    ("GET /api/models", "list"),
    (f"GET {API}/refs", "refs"),
    (f"GET {API}/revision/(?P<revision>[^/]+)", "info_at"),
    (f"GET {API}/tree/(?P<revision>[^/]+)", "tree_at"),
    (f"POST {API}/branch/(?P<branch>[^/]+)", "write_branch"),
    (f"POST {API}/preupload/(?P<revision>[^/]+)", "write_preupload_at"),
    (f"POST {API}/commit/(?P<revision>[^/]+)", "write_commit_at"),
    (f"GET {API}", "info_at"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "write_batch"),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve_at"),
    (r"(GET|HEAD) /_large/(?P<sha>\w+)", "large"),
    (r"PUT /_large/(?P<sha>\w+)", "put"),
    ("POST /_verify", "verify"),
]


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | OSError):  # the client is gone
            super().handle_error(request, client_address)


class Served:
    """A running Hub, as a test sees it."""

    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"

    def _ask(self, path: str, data: bytes | None = None) -> Any:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(urllib.request.Request(f"{self.url}{path}", data), timeout=30) as reply:
            return json.load(reply)

    def state(self) -> dict[str, Any]:
        """See the module's words."""
        return self._ask("/_state")

    def fault(self, kind: str, match: str, times: int = 1, skip: int = 0) -> None:
        """Make the next requests that match fail; clears the list of what was served."""
        assert kind in KINDS
        self._ask(
            "/_fault", json.dumps({"kind": kind, "match": match, "times": times, "skip": skip}).encode()
        )

    def calm(self) -> None:
        """Forget all faults, and what was served."""
        self._ask("/_fault", b"")


@contextmanager
def serving(*argv: str) -> Iterator[Served]:
    """The Hub in a process of its own, ended at the end."""
    command = [sys.executable, "-P", str(Path(__file__)), "--port", "0", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield Served(int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--fault", action="append", default=[], metavar="KIND:TIMES:REGEX")
    options = parser.parse_args()
    Handler.hub = Hub()
    for text in options.fault:
        kind, times, match = text.split(":", 2)
        Handler.hub.faults.append({"kind": kind, "times": int(times), "match": match})
    server = Server(("127.0.0.1", options.port), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()
