"""Where requests go: any server that speaks OpenAI's chat completions, or a model on this machine.

Neither openai nor torch is loaded before an endpoint needs it.
"""

import asyncio
import email.utils
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

from saekit.autointerp.requests import Completion, Request, schema_json
from saekit.errors import SaekitError

TRANSIENT = {408, 409, 425, 429}  # and all from 500 on
MESSAGE_TOKENS, CHAT_TOKENS = 16, 64  # no template known here adds more to a message, and to a chat


class Retry(Exception):
    """A try that gave no reply where another may: what happened, and how many seconds the server asks to wait.

    ``billed``: the server may have worked, and charged, for it. ``counts``: it is one of the tries that are allowed.
    """

    def __init__(self, kind: str, after: float | None = None, billed: bool = False, counts: bool = True):
        super().__init__(kind)
        self.kind, self.after, self.billed, self.counts = kind, after, billed, counts


@runtime_checkable
class Endpoint(Protocol):
    """A model that can be asked.

    ``name`` identifies the model and not where it runs: replies are kept under it. ``complete`` raises ``Retry`` for a
    try that another may follow, and SaekitError for what makes more tries useless. An endpoint may also have a ``price``
    (money per million prompt tokens and per million completion tokens) and an ``async close()``, called in the event
    loop that the calls were made in.
    """

    name: str

    async def complete(self, request: Request, timeout: float) -> Completion:
        """The reply to a request, within ``timeout`` seconds."""
        ...


def most_tokens(request: Request) -> tuple[int, int]:
    """Upper bounds on (prompt, completion) tokens: no tokenizer in use makes more tokens than bytes."""
    size = sum(len(m.content.encode()) + MESSAGE_TOKENS for m in request.messages)
    if request.schema is not None:
        size += len(schema_json(request.schema).encode())  # servers put it into the prompt, or into a grammar
    return size + CHAT_TOKENS, request.max_tokens


class OpenAIEndpoint:
    """A server with ``/chat/completions``: OpenAI, vLLM, SGLang, Ollama, llama.cpp, OpenRouter and others.

    The key is read from the environment when the first call is made, and is kept nowhere; with a ``base_url`` it may be
    missing. A server that doesn't know ``response_format`` (or ``max_tokens``) is asked without it (or with
    ``max_completion_tokens``) from then on. ``price`` is (prompt, completion) per million tokens.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        price: tuple[float, float] | None = None,
    ):
        if price is not None and not min(price) >= 0:
            raise SaekitError(
                f"price = {price} must be two numbers from 0 up, per million prompt and completion tokens"
            )
        if base_url is not None and not re.fullmatch(r"https?://\S+", base_url):
            raise SaekitError(f"base_url {base_url!r} is no address; give one as http://127.0.0.1:8000/v1")
        self.name, self.base_url, self.api_key_env, self.price = model, base_url, api_key_env, price
        self._structured, self._limit = True, "max_tokens"
        self._clients: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def __repr__(self) -> str:
        return f"OpenAIEndpoint({self.name!r}, base_url={self.base_url!r}, api_key_env={self.api_key_env!r}, price={self.price!r})"

    def ready(self) -> str:
        """The key; raises unless the client is installed and a key is set where one is needed."""
        try:
            import openai  # noqa: F401
        except ImportError:
            raise SaekitError("the package openai is not installed; pip install 'saekit[llm]'") from None
        key = os.environ.get(self.api_key_env, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise SaekitError(
                f"api_key_env = {self.api_key_env!r} holds characters that no key has; set it again"
            )
        if not key and self.base_url is None:
            raise SaekitError(
                f"api_key_env = {self.api_key_env!r} is not set in the environment; export the key under that name"
            )
        return key

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            key = self.ready()
            import openai

            self._clients[loop] = openai.AsyncOpenAI(
                api_key=key or "none", base_url=self.base_url, timeout=None, max_retries=0
            )
        return self._clients[loop]

    async def close(self) -> None:
        """Close this event loop's connections."""
        if client := self._clients.pop(asyncio.get_running_loop(), None):
            await client.close()

    def _wire(self, request: Request) -> dict[str, Any]:
        wire: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": request.temperature,
            self._limit: request.max_tokens,
        }
        if request.seed is not None:
            wire["seed"] = request.seed
        if request.schema is not None and self._structured:
            schema = json.loads(schema_json(request.schema))
            name = re.sub(r"[^a-zA-Z0-9_-]", "_", request.schema.__name__)[:64]
            form = {"name": name, "schema": schema, "strict": _is_closed(schema)}
            wire["response_format"] = {"type": "json_schema", "json_schema": form}
        return wire

    async def complete(self, request: Request, timeout: float) -> Completion:
        """See ``Endpoint``."""
        client = self._client()
        import openai

        wire = self._wire(request)
        try:
            async with asyncio.timeout(timeout):
                # not chat.completions.create, whose types take a third of a call's time
                reply = await client.post("/chat/completions", body=wire, cast_to=object)
        except TimeoutError:
            raise Retry("timeout", billed=True) from None
        except openai.APIConnectionError:
            raise Retry("connection", billed=True) from None
        except openai.APIStatusError as error:
            raise self._refused(error, wire) from None
        except (openai.APIError, ValueError):
            raise Retry("truncated", billed=True) from None
        return _completion(reply, request)

    def _refused(self, error: Any, wire: Mapping[str, Any]) -> Exception:
        """What to raise for a status that isn't 200."""
        said = " ".join(str(error.message).split())[:300]
        if key := os.environ.get(self.api_key_env, ""):
            said = said.replace(key, "***")  # some servers quote it
        status = error.status_code
        if status in (400, 422):
            if "response_format" in wire and re.search(r"response_format|json_schema|structured", said):
                self._structured = False
                return Retry("no response_format", after=0.0, counts=False)
            if "max_tokens" in wire and "max_completion_tokens" in said:
                self._limit = "max_completion_tokens"
                return Retry("no max_tokens", after=0.0, counts=False)
        if (status in TRANSIENT and error.code != "insufficient_quota") or status >= 500:
            return Retry(str(status), after=retry_after(error.response.headers))
        fix = {
            401: f"set the right key in {self.api_key_env}",
            403: f"use a key (in {self.api_key_env}) that may use this model",
            404: "check model and base_url",
            429: "pay, or wait until the quota is renewed",
        }.get(status, "change what the server names")
        return SaekitError(f"model {self.name!r} answered {status} ({said}); {fix}, then run again")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from ``retry-after-ms`` or ``Retry-After`` (seconds or a date)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name, "")
        if re.fullmatch(r"\s*\d{1,9}(\.\d+)?\s*", text):
            return float(text) * unit
    try:
        return max(
            0.0, email.utils.parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time()
        )
    except ValueError:
        return None


def _is_closed(schema: Any) -> bool:
    """Whether every object in a schema requires all its fields and no others, as strict decoding wants."""
    if isinstance(schema, list):
        return all(_is_closed(part) for part in schema)
    if not isinstance(schema, dict):
        return True
    if "properties" in schema and (
        schema.get("additionalProperties") is not False
        or set(schema["properties"]) != set(schema.get("required", ()))
    ):
        return False
    return all(_is_closed(part) for part in schema.values())


def _completion(reply: Any, request: Request) -> Completion:
    try:
        choice = reply["choices"][0]
        message = dict(choice["message"])
    except (TypeError, KeyError, IndexError, ValueError):  # a body that isn't JSON comes as text
        raise Retry("empty", billed=True) from None
    usage = reply.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    prompt, completion = (
        n if isinstance(n := counted.get(name), int) and n >= 0 else worst
        for name, worst in zip(("prompt_tokens", "completion_tokens"), most_tokens(request), strict=True)
    )
    content, refusal = (
        m if isinstance(m := message.get(name), str) else "" for name in ("content", "refusal")
    )
    text = (
        (content or refusal).encode(errors="replace").decode()
    )  # half a surrogate pair can't be kept, nor sent back
    return Completion(text, prompt, completion, str(choice.get("finish_reason") or "stop"), bool(refusal))


class LocalEndpoint:
    """A causal language model on this machine, greedily decoded, one request at a time in a thread.

    ``model``: what ``load_model`` takes; it must have a tokenizer. Its chat template is used where it has one. A reply
    is bounded by ``max_tokens`` and the model's context; the timeout isn't applied, since what was slow once is slow again.
    """

    price = (0.0, 0.0)

    def __init__(self, model: Any):
        from saekit.models import load_model

        self.model = load_model(model)
        if self.model.tokenizer is None or not hasattr(self.model.module, "generate"):
            raise SaekitError(
                f"model {self.model.name!r} has no tokenizer or doesn't generate; give a causal language model's folder"
            )
        known = self.model.identity()
        self.name = f"local {known['class']} {known['digest']}"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saekit-local")

    async def complete(self, request: Request, timeout: float) -> Completion:
        """See ``Endpoint``."""
        if request.temperature:
            raise SaekitError(
                f"temperature = {request.temperature} of {request.unit!r} must be 0: a LocalEndpoint decodes greedily"
            )
        stop = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._generate, request, stop
            )
        finally:
            stop.set()  # where this was cancelled, the thread ends at the next token

    def _prompt(self, request: Request) -> Any:
        tokenizer = self.model.tokenizer
        chat = [{"role": m.role, "content": m.content} for m in request.messages]
        if getattr(tokenizer, "chat_template", None):
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            return tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        text = "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in chat) + "assistant:"
        return tokenizer(text, return_tensors="pt")["input_ids"]

    def _generate(self, request: Request, stop: threading.Event) -> Completion:
        import torch

        ids = self._prompt(request)
        n, context = ids.shape[1], self.model.context
        if context is not None and n + request.max_tokens > context:
            raise SaekitError(
                f"{request.unit!r} takes {n} tokens and max_tokens = {request.max_tokens}, and model {self.model.name!r} has {context} "
                "positions; show fewer examples, or choose a model with more"
            )

        def stopped(tokens: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(tokens),), stop.is_set(), device=tokens.device)

        with torch.no_grad():
            out = self.model.generate(ids, max_new_tokens=request.max_tokens, stopping_criteria=[stopped])
        new = out[0, n:].tolist()
        ended = len(new) < request.max_tokens or new[-1] in self._ends()
        text = self.model.tokenizer.decode(new, skip_special_tokens=True)
        return Completion(text, n, len(new), "stop" if ended else "length")

    def _ends(self) -> set[int | None]:
        ends: Any = getattr(self.model.module.generation_config, "eos_token_id", None)
        return set(ends) if isinstance(ends, list) else {ends}
