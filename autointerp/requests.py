"""What is asked of a language model, and what comes back: plain records, with the key under which a reply is kept."""

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from saekit.errors import SaekitError

ROLES = ("system", "user", "assistant")
# of an answer: a value; no value after a re-ask; the model declined; the endpoint failed; begun and cut short by the
# budget; never begun
STATUSES = ("ok", "invalid_reply", "refused", "error", "budget", "not_run")


def canonical(data: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def digest(body: str) -> str:
    """Hex SHA-256 of a request's body: the key under which its reply is kept."""
    return hashlib.sha256(body.encode()).hexdigest()


@functools.lru_cache(maxsize=256)
def schema_json(schema: type) -> str:
    """The JSON schema of a pydantic model, canonical."""
    describe: Any = schema
    return canonical(describe.model_json_schema())


@dataclass(frozen=True)
class Message:
    """One turn of a chat; ``role`` is system, user or assistant."""

    role: str
    content: str

    def __post_init__(self):
        if self.role not in ROLES:
            raise SaekitError(f"role {self.role!r} is not one of {', '.join(ROLES)}")
        try:
            self.content.encode()
        except UnicodeEncodeError:
            raise SaekitError(
                f"content {self.content[:40]!r} holds half a surrogate pair, which can't be sent; replace it"
            ) from None


@dataclass(frozen=True)
class Request:
    """One question to a model.

    ``unit`` names what is asked for in messages to people. ``schema`` is a pydantic model that the reply must hold as
    JSON, or None for free text. ``sample`` tells apart draws of the same question. ``check`` takes the value of a
    well-formed reply and says in a few words why it is wrong all the same, or returns None; its words go into the
    re-ask, so they must depend on the value alone.
    """

    unit: str
    messages: tuple[Message, ...]
    schema: type | None
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    sample: int = 0
    check: Callable[[Any], str | None] | None = None

    def __post_init__(self):
        if not self.messages:
            raise SaekitError(f"messages of {self.unit!r} are empty; give at least one")
        if self.max_tokens < 1:
            raise SaekitError(f"max_tokens = {self.max_tokens} of {self.unit!r} must be at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise SaekitError(f"temperature = {self.temperature} of {self.unit!r} must be a number from 0 up")
        if self.schema is not None and not hasattr(self.schema, "model_json_schema"):
            raise SaekitError(
                f"schema {self.schema.__name__!r} of {self.unit!r} is not a pydantic model; derive it from BaseModel"
            )

    def body(self, endpoint_name: str) -> str:
        """All that decides the reply, as canonical JSON: neither the unit nor the endpoint's address."""
        return canonical(
            {
                "endpoint": endpoint_name,
                "messages": [[m.role, m.content] for m in self.messages],
                "schema": None if self.schema is None else schema_json(self.schema),
                "max_tokens": self.max_tokens,
                "temperature": float(self.temperature),
                "seed": self.seed,
                "sample": self.sample,
            }
        )

    def key(self, endpoint_name: str) -> str:
        """The digest of the body."""
        return digest(self.body(endpoint_name))

    def again(self, text: str, reason: str) -> "Request":
        """The re-ask after a reply that can't be used: the chat so far, and why."""
        form = " with JSON of the schema asked for, and nothing else" if self.schema else ""
        told = f"This reply can't be used: {reason}. Answer the request above once more{form}."
        said = (Message("assistant", text),) if text else ()
        return Request(
            self.unit, (*self.messages, *said, Message("user", told)), self.schema,
            self.max_tokens, self.temperature, self.seed, self.sample, self.check,
        )  # fmt: skip


@dataclass(frozen=True)
class Completion:
    """What an endpoint gave for one request.

    ``finish`` is the server's word for why it stopped (``stop``, ``length``, ``content_filter``), ``refusal`` whether
    the server itself marked the reply as a refusal. Where a server counts no tokens, both counts are upper bounds.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish: str = "stop"
    refusal: bool = False


@dataclass(frozen=True)
class Answer:
    """What came of one request.

    ``status`` is one of ``STATUSES``; ``value`` the pydantic model (or text, without a schema) where it is ok, else
    None; ``text`` the last reply as it came. ``repaired``: the value stood in prose or in broken JSON. ``reasked``: a
    first reply couldn't be used. Tokens are those of the replies, the re-ask's among them, recorded or fresh; requests
    that are equal were asked once and each carry them. ``reason`` says why there is no value.
    """

    unit: str
    status: str
    value: Any
    text: str
    repaired: bool
    reasked: bool
    prompt_tokens: int
    completion_tokens: int
    reason: str


def tally(answers: Iterable[Answer]) -> dict[str, int]:
    """How many answers have each status; every status is there."""
    found = Counter(answer.status for answer in answers)
    return {status: found[status] for status in STATUSES}
