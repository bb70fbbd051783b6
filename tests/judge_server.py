"""A server that speaks OpenAI's chat completions and judges by rules: it sees the prompt's text and nothing else.

``python -P tests/judge_server.py --port 0`` prints its port. In a test, ``with serving("--latency", "0.2") as judge``.
``GET /v1/counts`` tells what it served: {"total": {kind: n}, "keys": {key of the messages: {kind: n}}, "flying": the most
requests at once, "waits": seconds between a 429 and the next request of the same key, with what was asked for}.
"""

import argparse
import asyncio
import functools
import hashlib
import importlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REFUSAL = "I'm sorry, but I can't help with that."
TRANSIENT = (
    "429",
    "500",
    "503",
    "slow",
    "reset",
    "truncated",
    "empty",
)  # of the connection; the others are replies
REPLIES = ("short", "prose", "fenced", "nan", "refusal")
Predicate = Callable[[list[str]], list[bool]]


def draw(*parts: Any) -> random.Random:
    """A generator that the parts decide, in every process."""
    return random.Random("|".join(map(str, parts)))


def key_of(messages: list[dict[str, str]]) -> str:
    """What names a prompt in the counts."""
    pairs = [[m["role"], m["content"]] for m in messages]
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:16]


def unmarked(text: str) -> str:
    return " ".join(text.replace("«", "").replace("»", "").split())


class Example:
    """One ``Example <i>: <text>`` of a prompt; ``words`` without marks, ``marks`` says which words hold one."""

    def __init__(self, number: int, text: str):
        self.number, self.text = number, unmarked(text)
        self.words, self.marks, inside = [], [], False
        for piece in text.split():
            word = piece.replace("«", "").replace("»", "")
            marked = inside or "«" in piece
            inside = piece.rfind("«") > piece.rfind("»") or (inside and "»" not in piece)
            if word:
                self.words.append(word)
                self.marks.append(marked)


class Prompt:
    """What can be read from the messages: kind, explanation, examples, tokens."""

    def __init__(self, body: dict[str, Any]):
        messages = body["messages"]
        users = [m["content"] for m in messages if m["role"] == "user"]
        text = next(
            (u for u in reversed(users) if "Example " in u or "Explanation:" in u), users[-1] if users else ""
        )
        every = "\n".join(m["content"] for m in messages)
        self.explains = messages[0]["role"] == "system" and messages[0]["content"].startswith("You explain")
        schema = (body.get("response_format") or {}).get("json_schema", {}).get("schema", {})
        self.fields = list(schema.get("properties", {}))
        asked = {f for f in ("answers", "activations", "intruder") if f in self.fields or f'"{f}"' in every}
        self.kind = "explain" if self.explains else next(iter(sorted(asked)), "text")
        found = re.search(r"^Explanation:[ \t]*(.*)$", text, re.MULTILINE)
        self.explanation = found.group(1).strip() if found else ""
        parts = re.split(r"^Example (\d+):", text, flags=re.MULTILINE)
        bodies = [re.split(r"\n\s*\n|^Tokens:", part, flags=re.MULTILINE)[0] for part in parts[2::2]]
        self.examples = [Example(int(n), body) for n, body in zip(parts[1::2], bodies, strict=True)]
        tokens = text.split("Tokens:\n", 1)[1] if "Tokens:\n" in text else ""
        self.tokens = [(int(i), token) for i, token in re.findall(r"^(\d+)\t(.*)$", tokens, re.MULTILINE)]
        self.again = sum(m["role"] == "user" for m in messages) > 1 and text != users[-1]


class Judge:
    """A personality: what it answers to a prompt, in words."""

    def __init__(self, personality: str, concepts: dict[str, Predicate], seed: int):
        self.name, _, share = personality.partition(":")
        self.noise = float(share or 0)
        self.concepts, self.seed, self.seen = concepts, seed, set[str]()

    def fires(self, explanation: str, example: Example) -> list[bool]:
        predicate = self.concepts.get(explanation)
        return predicate(example.words) if predicate else [False] * len(example.words)

    def perfect(self, explanation: str, example: Example) -> bool:
        """Whether any word fires; where words are marked, whether all of them do."""
        fires = self.fires(explanation, example)
        if any(example.marks):
            return all(on for on, marked in zip(fires, example.marks, strict=True) if marked)
        return any(fires)

    def verdict(self, prompt: Prompt, example: Example) -> bool:
        coin = draw(self.seed, prompt.explanation, example.text, example.marks)
        match self.name:
            case "yes" | "no":
                return self.name == "yes"
            case "coin":
                return coin.random() < 0.5
            case "noisy":
                return self.perfect(prompt.explanation, example) != (coin.random() < self.noise)
            case "memoriser":
                return example.text in self.seen
            case "position" | "count" | "length":
                return self.cheat(prompt, example, coin)
            case _:
                return self.perfect(prompt.explanation, example)

    def cheat(self, prompt: Prompt, example: Example, coin: random.Random) -> bool:
        """Above or below the prompt's median: where the first mark is, how many there are, how long the text is."""
        if self.name != "length" and not any(example.marks):
            return coin.random() < 0.5
        measure: Callable[[Example], float] = {
            "position": lambda e: e.marks.index(True) if True in e.marks else len(e.marks),
            "count": lambda e: -sum(e.marks),
            "length": lambda e: -len(e.text),
        }[self.name]
        middle = statistics.median(map(measure, prompt.examples))
        mine = measure(example)
        return coin.random() < 0.5 if mine == middle else mine < middle

    def activations(self, prompt: Prompt) -> list[dict[str, Any]]:
        """10 for every token of a word that fires."""
        example = prompt.examples[0]
        fires, ends = self.fires(prompt.explanation, example), []
        for word in example.words:
            ends.append((ends[-1] if ends else 0) + len(word))
        out, at = [], 0
        for i, token in prompt.tokens:
            size = len(re.sub(r"\s", "", token.replace("Ġ", "")))
            word = next((w for w, end in enumerate(ends) if at < end), len(ends) - 1)
            out.append({"id": i, "value": 10 if size and fires and fires[word] else 0})
            at += size
        return out

    def intruder(self, prompt: Prompt) -> int:
        """The one example in which the explanation fails; without one, the one that a concept of the others fails in."""
        for explanation in [prompt.explanation] if prompt.explanation in self.concepts else self.concepts:
            silent = [e.number for e in prompt.examples if not self.perfect(explanation, e)]
            if len(silent) == 1:
                return silent[0]
        return draw(self.seed, *(e.text for e in prompt.examples)).choice(prompt.examples).number

    def explain(self, prompt: Prompt) -> str:
        """The concept that agrees best with the marks."""

        def agreement(explanation: str) -> float:
            both = either = 0
            for example in prompt.examples:
                for on, marked in zip(self.fires(explanation, example), example.marks, strict=True):
                    both, either = both + (on and marked), either + (on or marked)
            return both / max(1, either)

        return max(self.concepts, key=agreement, default="nothing in particular")

    def reply(self, prompt: Prompt) -> dict[str, Any] | str:
        if self.name == "refuser":
            return REFUSAL
        if prompt.explains:
            self.seen |= {example.text for example in prompt.examples}
            words = self.explain(prompt)
            return dict.fromkeys(prompt.fields, words) if prompt.fields else words
        if prompt.kind == "activations":
            return {"activations": self.activations(prompt)}
        if prompt.kind == "intruder":
            return {"intruder": self.intruder(prompt)}
        if prompt.kind == "answers":
            verdicts = [(e.number, self.verdict(prompt, e)) for e in prompt.examples]
            return {"answers": [{"id": i, "fires": on, "p": 0.95 if on else 0.05} for i, on in verdicts]}
        return "an answer of a few words"

    def words(self, prompt: Prompt) -> str:
        reply = self.reply(prompt)
        if isinstance(reply, str):
            return reply
        if self.name != "chatty":
            return json.dumps(reply)
        if not prompt.again and "answers" in reply and draw(self.seed, json.dumps(reply)).random() < 0.3:
            reply = {"answers": [{**a, "id": a["id"] - 1} for a in reply["answers"]]}  # counts from 0
        return f"Sure! Let me look at [each] example.\n\n```json\n{json.dumps(reply, indent=1)}\n```\nHope this helps."


def spoilt(kind: str, text: str) -> str:
    """A reply with a fault; kinds that the reply has no room for become prose."""
    try:
        data: Any = json.loads(text)
    except ValueError:
        data = None
    rows = (
        next((v for v in data.values() if isinstance(v, list) and v), None)
        if isinstance(data, dict)
        else None
    )
    if kind == "refusal":
        return REFUSAL
    if kind == "fenced" and data is not None:
        return f"```json\n{text}\n```"
    if kind == "short" and rows:
        rows.pop()
        return json.dumps(data)
    if kind == "nan" and rows:
        rows[-1] = {name: float("nan") if isinstance(value, float | int) and name in ("p", "value") else value for name, value in rows[-1].items()}  # fmt: skip
        return json.dumps(data)
    return "" if data is None else "Most of them do fire, I would say."


class Server:
    def __init__(self, options: argparse.Namespace, judge: Judge):
        self.options, self.judge = options, judge
        self.keys: dict[str, Counter[str]] = defaultdict(Counter)
        self.now = self.most = self.tokens = self.served = 0
        self.told: dict[str, tuple[float, float]] = {}  # when to come back, as it was said
        self.waits: list[tuple[float, float]] = []

    def fault(self, key: str, prompt: Prompt) -> str:
        """The fault of this request, or nothing: transient ones spare the second request of a key, and re-asks' replies."""
        chance = draw(self.options.fault_seed, key)
        before = sum(self.keys[key].values())
        if chance.random() >= self.options.faults or (before and not self.options.persistent):
            return ""
        kinds = self.options.kinds.split(",")
        kind = chance.choice(kinds)
        return "" if prompt.again and kind in REPLIES and not self.options.persistent else kind

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                headers = await self.headers(reader)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if not await self.respond(line.decode().split()[1], headers, body, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client is gone, or this server ends
        finally:
            writer.close()

    async def headers(self, reader: asyncio.StreamReader) -> dict[str, str]:
        found = {}
        while (line := await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            found[name.lower()] = value.strip()
        return found

    def send(self, writer: asyncio.StreamWriter, data: Any, status: str = "200 OK", more: str = "", cut: bool = False) -> None:  # fmt: skip
        body = json.dumps(data).encode()
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n{more}Content-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + (body[: len(body) // 2] if cut else body))

    async def respond(
        self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer one request; whether the connection goes on."""
        if path == "/v1/models":
            self.send(writer, {"object": "list", "data": [{"id": "judge", "object": "model"}]})
        elif path == "/v1/served":
            self.send(writer, self.served)
        elif path == "/v1/counts":
            total = Counter[str]()
            for kinds in self.keys.values():
                total.update(kinds)
            self.send(
                writer,
                {
                    "total": total,
                    "keys": self.keys,
                    "flying": self.most,
                    "tokens": self.tokens,
                    "waits": self.waits,
                },
            )
        elif path != "/v1/chat/completions":
            self.send(writer, {"error": {"message": f"no {path} here"}}, "404 Not Found")
        elif self.options.key and headers.get("authorization") != f"Bearer {self.options.key}":
            said = f"Incorrect API key provided: {headers.get('authorization', '').removeprefix('Bearer ')}"
            self.keys["-"]["401"] += 1
            self.send(writer, {"error": {"message": said}}, "401 Unauthorized")
        else:
            self.now, self.served = self.now + 1, self.served + 1
            self.most = max(self.most, self.now)
            try:
                return await self.complete(json.loads(body), writer)
            finally:
                self.now -= 1
        return True

    async def complete(self, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        prompt, key = Prompt(body), key_of(body["messages"])
        if key in self.told:
            said, asked = self.told.pop(key)
            self.waits.append((time.monotonic() - said, asked))
        if refused := self.options.unknown and next(
            (f for f in self.options.unknown.split(",") if f in body), None
        ):
            self.keys[key]["400"] += 1
            hint = "use max_completion_tokens" if refused == "max_tokens" else "unsupported"
            self.send(
                writer, {"error": {"message": f"{refused} is not known here: {hint}"}}, "400 Bad Request"
            )
            return True
        kind = self.fault(key, prompt)
        self.keys[key][kind or "served"] += 1
        latency = self.options.latency * (
            draw(key, self.options.shuffle).random() if self.options.shuffle else 1
        )
        await asyncio.sleep(latency)
        if kind.isdigit() or kind == "quota":
            asked = 0.05 + 0.2 * draw(key).random()
            more = f"Retry-After: {asked:.3f}\r\n" if kind == "429" else ""
            if more:
                self.told[key] = (time.monotonic(), asked)
            error = {"message": "not now", "code": "insufficient_quota" if kind == "quota" else None}
            self.send(writer, {"error": error}, f"{429 if kind == 'quota' else kind} Busy", more)
        elif kind == "reset":
            writer.transport.abort()
            return False
        else:
            if kind == "slow":
                await asyncio.sleep(self.options.slow)
            text = self.judge.words(prompt)
            reply = self.completion(body, spoilt(kind, text) if kind in REPLIES else text, kind == "empty")
            self.send(writer, reply, cut=kind == "truncated")
            await writer.drain()
            return kind != "truncated"
        return True

    def completion(self, body: dict[str, Any], text: str, empty: bool) -> dict[str, Any]:
        pieces = re.findall(r"\s*\w+|\s*[^\w\s]", text)
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
        }
        if body.get("logprobs"):
            tokens = [{"token": p, "logprob": -0.05, "bytes": None, "top_logprobs": []} for p in pieces]
            choice["logprobs"] = {"content": tokens}
        spent = sum(len(re.findall(r"\w+|[^\w\s]", m["content"])) + 4 for m in body["messages"])
        usage = {
            "prompt_tokens": spent,
            "completion_tokens": len(pieces),
            "total_tokens": spent + len(pieces),
        }
        self.tokens += usage["total_tokens"]
        choices = [] if empty else [choice]
        return {"id": "0", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices, "usage": usage}  # fmt: skip


async def main(options: argparse.Namespace) -> None:
    module, _, attribute = options.concepts.partition(":")
    concepts = getattr(importlib.import_module(module), attribute) if module else {}
    server = Server(options, Judge(options.personality, concepts, options.seed))
    running = await asyncio.start_server(server.connection, "127.0.0.1", options.port, backlog=1024)
    print(running.sockets[0].getsockname()[1], flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--personality", default="perfect")
    parser.add_argument("--concepts", default="", metavar="MODULE:ATTR")
    parser.add_argument("--seed", type=int, default=0, help="of coins and noise")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds")
    parser.add_argument("--shuffle", type=int, default=0, help="seed of latencies between 0 and --latency")
    parser.add_argument("--faults", type=float, default=0.0, help="share of prompts that have one")
    parser.add_argument("--kinds", default=",".join(TRANSIENT + REPLIES))
    parser.add_argument("--fault-seed", type=int, default=0)
    parser.add_argument("--slow", type=float, default=5.0, help="seconds that a slow reply takes")
    parser.add_argument(
        "--persistent", action="store_true", help="faults that retries and re-asks meet again"
    )
    parser.add_argument("--key", default="", help="the only key it takes")
    parser.add_argument("--unknown", default="", help="parameters, by commas, that it answers 400 to")
    return parser.parse_args(argv)


class Judged:
    """A running server, as a test sees it."""

    def __init__(self, process: "subprocess.Popen[str]", port: int):
        self.process, self.base_url = process, f"http://127.0.0.1:{port}/v1"

    def get(self, what: str) -> Any:
        """The JSON of a page of the server's."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.base_url}/{what}", timeout=30) as reply:
            return json.load(reply)

    def counts(self) -> dict[str, Any]:
        """See the module's words."""
        return self.get("counts")

    def served(self) -> int:
        """How many completions were asked for."""
        return self.get("served")

    @functools.cached_property
    def endpoint(self) -> Any:
        """An ``OpenAIEndpoint`` to it, of the name ``judge``."""
        from saekit.autointerp.endpoint import OpenAIEndpoint

        return OpenAIEndpoint(
            "judge", base_url=self.base_url, api_key_env="SAEKIT_TEST_KEY", price=(1.0, 4.0)
        )


@contextmanager
def serving(*argv: str) -> Iterator[Judged]:
    """The server in a process of its own, ended at the end."""
    command = [sys.executable, "-P", str(Path(__file__)), "--port", "0", *argv]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        assert process.stdout is not None
        yield Judged(process, int(process.stdout.readline()))
    finally:
        process.terminate()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


if __name__ == "__main__":
    asyncio.run(main(parsed()))
