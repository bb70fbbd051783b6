"""Text to packed token rows with document ids: what the model reads, and which positions count.

A *text* is ``"stdlib"`` (the default corpus), a file, a folder, a local or hub ``datasets`` data
set (streamed), or given: a ``datasets`` object, or a list or any iterable of strings or of chats
(lists of ``{"role", "content"}``).
"""

import hashlib
import logging
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saekit import stdlib
from saekit.stdlib import Document
from saekit.types import SaekitError

Decode = Callable[[list[int]], str]

PIECE = 1 << 16  # characters; a longer text is several documents, so that one file can be split
ENCODE_AT_ONCE = 1 << 17  # characters tokenised in one call: bounds memory, keeps the cores busy
DATA_SUFFIXES = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


@dataclass(frozen=True)
class TokenRows:
    """Rows of one forward pass: ``tokens``, ``documents`` (index in the stream, -1 for padding), ``keep``.

    All are [batch, seq]; ``attention`` is false on padding; ``keep`` is false on padding, special
    tokens and, for chats, on roles that were not asked for.
    """

    tokens: np.ndarray
    documents: np.ndarray
    attention: np.ndarray
    keep: np.ndarray


def is_held_out(name: str) -> bool:
    """Whether a document or an image of this name is on the held-out side of the split."""
    return hashlib.sha256(name.encode()).digest()[0] % stdlib.HELD_OUT_SHARE == 0


def _pieces(name: str, text: str) -> Iterator[Document]:
    if len(text) <= PIECE:
        yield Document(name, text)
        return
    start = part = 0
    while start < len(text):
        end = min(len(text), start + PIECE)
        newline = text.rfind("\n", start + PIECE // 2, end)
        end = newline + 1 if newline > 0 and end < len(text) else end
        yield Document(f"{name}#{part}", text[start:end])
        start, part = end, part + 1


def _folder(path: Path) -> Iterator[Document]:
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path)
        if any(part.startswith(".") for part in relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        yield from _pieces(relative.as_posix(), text)


def _records(name: str) -> Iterator[dict[str, Any]]:
    """Rows of a ``datasets`` data set: a folder, a file, or a hub id (streamed)."""
    import datasets

    # its readers log what they raise, and what they raise is told below
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    path = Path(name)
    if not path.exists():
        probe_hub(name, "dataset")
    try:
        if path.is_dir():
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                data = data["train" if "train" in data else next(iter(data))]
        elif path.exists():
            data = datasets.load_dataset(
                DATA_SUFFIXES[path.suffix], data_files=name, split="train", streaming=True
            )
        else:
            data = datasets.load_dataset(name, split="train", streaming=True)
        yield from data
    except Exception as error:  # the library raises what its many readers raise
        why = " ".join(str(error).split())[:200]
        raise SaekitError(
            f"dataset {name!r} can't be read ({type(error).__name__}: {why}); give a data set that `datasets` loads"
        ) from error


def _dataset(name: str) -> Iterator[Document | list[dict]]:
    """Documents of a data set: its ``text`` column, else ``messages``, else the first string column.

    They are named after the data set and not the way to it, so that the split is the same from every folder.
    """
    short = Path(name).name if Path(name).exists() else name
    yield from _rows(_records(name), f"dataset {name!r}", short)


def _rows(rows: Iterable[Mapping[str, Any]], what: str, short: str) -> Iterator[Document | list[dict]]:
    column = None
    for i, row in enumerate(rows):
        column = column or _text_column(row, what)
        item: Any = row.get(column)
        if isinstance(item, str):
            yield from _pieces(f"{short}[{i}]", item)
        elif _is_chat(item):
            yield item
        elif item:  # what is missing or empty is passed over
            raise SaekitError(
                f"row {i} of {what} has a {type(item).__name__} in column {column!r}; expected a text, or a chat (messages with a role)"
            )


def _text_column(row: Mapping[str, Any], what: str) -> str:
    known = [c for c in ("text", "messages", "content") if c in row]
    strings = known or [c for c, value in row.items() if isinstance(value, str)]
    if not strings:
        raise SaekitError(f"{what} has no text column; its columns are {', '.join(row)}")
    if len(strings) > 1 and not known:
        raise SaekitError(
            f"{what} has several text columns ({', '.join(strings)}); rename the one to read 'text'"
        )
    return strings[0]


GIVEN = "given"  # in place of a name, in manifests and cards


class Given:
    """A text given as an iterable, read no further than asked for; what a generator gave is kept for the next reading."""

    def __init__(self, items: Iterable[Any], table: bool = False):
        self.table = table or hasattr(items, "column_names")  # rows with columns, as `datasets` has them
        self.keep = True  # what an iterator gave, for another reading
        one_way = iter(items) is items
        self._items: Any = [] if one_way else items
        self._left = iter(items) if one_way else iter(())

    def __iter__(self) -> Iterator[Any]:
        yield from self._items
        for item in self._left:
            if self.keep:
                self._items.append(item)
            yield item

    def identity(self) -> dict[str, Any]:
        """The data set's own fingerprint; None where there is no telling without reading it all."""
        return {"name": GIVEN, "fingerprint": getattr(self._items, "_fingerprint", None)}


def probe_hub(name: str, kind: str) -> None:
    """Raise in one sentence, after at most 3 s, when a hub id can't be had."""
    import huggingface_hub

    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        reason = "it is no hub id"
    elif os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        reason = "HF_HUB_OFFLINE is set"
    else:
        try:
            api = huggingface_hub.HfApi()
            (api.model_info if kind == "model" else api.dataset_info)(name, timeout=3)
            return
        except Exception as error:  # any failure means the same to the user: it can't be had from here
            reason = f"the hub answers {type(error).__name__}"
    local = "no such folder here" if kind == "model" else "no such file or folder here"
    raise SaekitError(
        f"{kind} {name!r} can't be found: {local}, and {reason}; give a local path or a hub id that exists"
    )


def is_dataset(path: Path) -> bool:
    """Whether a local path holds a ``datasets`` data set rather than text files."""
    return path.suffix in DATA_SUFFIXES or any(
        (path / f).exists() for f in ("dataset_info.json", "dataset_dict.json")
    )


def documents(text: "str | os.PathLike | Iterable[Any]", split: str = "train") -> Iterator[Any]:
    """The documents of a text, on one side of its split (``train``, ``held_out`` or ``all``).

    Named texts are split by a hash of the document's name, the same everywhere; given ones are
    never split.
    """
    if isinstance(text, Given) and text.table:
        yield from _rows(text, "the data set given", GIVEN)
        return
    if not isinstance(text, str | os.PathLike):
        for i, item in enumerate(text):
            if not isinstance(item, str) and not _is_chat(item):
                raise SaekitError(
                    f"text item {i} is of type {type(item).__name__}; give strings, chats (lists of messages with a role), tensors or mappings of them"
                )
            if isinstance(item, str):
                yield from _pieces(f"given[{i}]", item)
            else:
                yield item
        return
    spec = os.fspath(text)
    if spec == "stdlib":
        for document in stdlib.documents(split):
            yield from _pieces(document.name, document.text)
        return
    path = Path(spec)
    if path.exists() and not is_dataset(path):
        found: Iterator[Any] = _pieces(path.name, _read_text(path)) if path.is_file() else _folder(path)
    else:
        found = _dataset(spec)
    for i, document in enumerate(found):
        name = document.name if isinstance(document, Document) else f"{path.name}[{i}]"
        if split == "all" or is_held_out(name) == (split == "held_out"):
            yield document


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SaekitError(
            f"text {str(path)!r} is not UTF-8 text; give a text file, a folder or a data set"
        ) from None


def _is_chat(item: Any) -> bool:
    return (
        isinstance(item, Sequence)
        and len(item) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in item)
    )


def fingerprint(text: "str | os.PathLike") -> str:
    """A digest that changes when a named local text does: names, sizes and times of its files.

    The standard library counts by names, sizes and Python version; what is on the hub by its name.
    """
    path, parts = Path(text), []
    if os.fspath(text) == "stdlib":
        base = stdlib.root()
        parts = [platform.python_version()]
        parts += [f"{name} {(base / name).stat().st_size}" for name in stdlib.files("all")]
    elif path.exists():
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        parts = [f"{p.relative_to(path)} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def check_text(text: "str | os.PathLike | Iterable[Any]") -> None:
    """Raise at once when a text can't be read or holds nothing."""
    if isinstance(text, str | os.PathLike):
        spec, path = os.fspath(text), Path(text)
        if spec == "stdlib":
            return
        if not path.exists():
            probe_hub(spec, "dataset")
            return
        if path.is_file() and path.stat().st_size == 0:
            raise SaekitError(f"text {spec!r} is empty; give a text with at least one line")
        if is_dataset(path):
            return
    full = (not isinstance(d, Document) or bool(d.text.strip()) for d in documents(text, "all"))
    if not any(list(full) if isinstance(text, list | tuple) else full):  # every item of a list is checked
        shown = repr(os.fspath(text)) if isinstance(text, str | os.PathLike) else "given"
        raise SaekitError(f"text {shown} is empty: it holds no documents; give a text with at least one line")


@dataclass(frozen=True)
class Special:
    """Special token ids of a tokenizer: what begins a row, parts documents, ends a row, pads."""

    prefix: tuple[int, ...]
    separator: tuple[int, ...]
    suffix: tuple[int, ...]
    pad: int
    all: frozenset[int]

    @staticmethod
    def of(tokenizer: Any) -> "Special":
        """BOS (or CLS, or for GPT-2's kin EOS) first; EOS between documents; SEP last where there is one."""

        def some(*names: str) -> tuple[int, ...]:
            ids = [getattr(tokenizer, f"{name}_token_id", None) for name in names]
            return tuple([i for i in ids if i is not None][:1])

        pad = some("pad", "eos", "bos", "unk") or (0,)
        ids = frozenset(getattr(tokenizer, "all_special_ids", ()))
        unknown = getattr(tokenizer, "unk_token_id", None)
        # an unknown word is content, unless the tokenizer has but one special token for everything
        ids = ids - {unknown} if len(ids) > 1 else ids
        return Special(some("cls", "bos", "eos"), some("sep", "eos", "bos"), some("sep")[:1], pad[0], ids)


def in_text(decode: Decode, n_tokens: int) -> Decode:
    """Decodes token ids as they stand within a text, with the space in front that some decoders take from a text's first token.

    They are decoded behind a token of mere letters or digits, whose own text is taken off again.
    """
    alone = ((token, decode([token])) for token in range(n_tokens))
    token, before = next((one for one in alone if one[1].isascii() and one[1].isalnum()), (0, ""))

    def decoded(ids: list[int]) -> str:
        text = decode([token, *ids]) if before else ""
        # where the first token reads otherwise beside the others, as bytes of one character do, they are decoded alone
        return text[len(before) :] if before and text.startswith(before) else decode(ids)

    return decoded


def _encoded(
    docs: Iterable[Any], tokenizer: Any, roles: Sequence[str] | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """``(ids, keep)`` of each document; ``keep`` is None where every token counts."""
    waiting: list[str] = []
    size = 0

    def flush() -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        if waiting:
            encoded = tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]
            yield from ((np.asarray(ids, dtype=np.int64), None) for ids in encoded)

    for doc in docs:
        if isinstance(doc, Document):
            if roles is not None:
                raise SaekitError(
                    f"roles = {list(roles)} choose among the messages of chats, and the text holds plain text; leave them out"
                )
            waiting.append(doc.text)
            size += len(doc.text)
            if size >= ENCODE_AT_ONCE:
                yield from flush()
                waiting, size = [], 0
        else:
            yield from flush()
            waiting, size = [], 0
            yield _chat(doc, tokenizer, roles)
    yield from flush()


def _chat(
    messages: Sequence[dict], tokenizer: Any, roles: Sequence[str] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A chat through the tokenizer's template; only what the chosen roles' messages add to the text counts."""
    if getattr(tokenizer, "chat_template", None) is None:
        raise SaekitError(
            "the text holds chats and the model's tokenizer has no chat template; give plain text"
        )
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    except TemplateError as error:
        raise SaekitError(
            f"the chat template refuses a chat of the text ({error}); leave it out or change its messages"
        ) from None
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=roles is not None, verbose=False
    )
    ids = np.asarray(encoded["input_ids"], dtype=np.int64)
    if roles is None:
        return ids, None
    first = np.array([start for start, _ in encoded["offset_mapping"]])
    keep = np.zeros(len(ids), dtype=bool)
    start = 0
    for n, message in enumerate(messages, 1):
        try:
            prefix = tokenizer.apply_chat_template(list(messages[:n]), tokenize=False)
        except TemplateError:
            continue  # some templates want a user's message first: this one is part of the next
        if not text.startswith(prefix):
            raise SaekitError(
                f"roles = {list(roles)}: the chat template writes message {n} of a chat differently when more follow, "
                "so its tokens can't be told apart; harvest without roles"
            )
        keep[(first >= start) & (first < len(prefix))] = message["role"] in roles
        start = len(prefix)
    return ids, keep


def token_rows(
    docs: Iterable[Any],
    tokenizer: Any,
    *,
    context: int,
    batch_rows: int,
    isolate: bool = False,
    roles: Sequence[str] | None = None,
) -> Iterator[TokenRows]:
    """Pack documents into rows of ``context`` tokens, ``batch_rows`` rows at a time.

    Each row begins with the tokenizer's first token and, packed, goes on with documents joined by
    separators; with ``isolate`` a row holds (a part of) one document and is padded. A last row
    that a packed stream can't fill is dropped, unless it is the only one.
    """
    special = Special.of(tokenizer)
    body = context - len(special.prefix) - len(special.suffix)
    if body < 1:
        raise SaekitError(
            f"context = {context} leaves no room for text; choose at least {context - body + 1}"
        )
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def batch() -> TokenRows:
        tokens = np.full((len(rows), context), special.pad, dtype=np.int64)
        owner = np.full((len(rows), context), -1, dtype=np.int64)
        keep = np.zeros((len(rows), context), dtype=bool)
        for i, (ids, docs_, kept) in enumerate(rows):
            full = np.concatenate([special.prefix, ids, special.suffix]).astype(np.int64)
            inside = slice(len(special.prefix), len(special.prefix) + len(ids))
            # padding stands on the right whatever the tokenizer prefers: positions stay the true ones
            tokens[i, : len(full)] = full
            owner[i, : len(full)] = docs_[0]
            owner[i, inside] = docs_
            keep[i, inside] = kept
        attention = owner >= 0
        keep &= ~np.isin(tokens, np.fromiter(special.all, dtype=np.int64, count=len(special.all)))
        return TokenRows(tokens, owner, attention, keep)

    source = _isolated if isolate else _packed
    for row in source(_encoded(docs, tokenizer, roles), special, body):
        rows.append(row)
        if len(rows) == batch_rows:
            yield batch()
            rows = []
    if rows:
        yield batch()


def _isolated(encoded: Iterable, special: Special, body: int) -> Iterator[tuple]:
    for i, (ids, keep) in enumerate(encoded):
        keep = np.ones(len(ids), dtype=bool) if keep is None else keep
        for start in range(0, len(ids), body):
            part = slice(start, start + body)
            yield ids[part], np.full(len(ids[part]), i), keep[part]


def _packed(encoded: Iterable, special: Special, body: int) -> Iterator[tuple]:
    parts: list[tuple[np.ndarray, ...]] = []
    size, given = 0, False
    for i, (ids, keep) in enumerate(encoded):
        keep = np.ones(len(ids), dtype=bool) if keep is None else keep
        ids = np.concatenate([ids, special.separator]).astype(np.int64)
        keep = np.concatenate([keep, np.zeros(len(special.separator), dtype=bool)])
        parts.append((ids, np.full(len(ids), i), keep))
        size += len(ids)
        if size >= body:
            joined = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
            whole = size - size % body
            for start in range(0, whole, body):
                yield tuple(column[start : start + body] for column in joined)
            parts, size, given = [tuple(column[whole:] for column in joined)], size - whole, True
    if size and not given:
        yield tuple(np.concatenate(column) for column in zip(*parts, strict=True))
