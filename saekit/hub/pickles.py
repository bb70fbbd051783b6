"""What ``torch.save`` wrote, read without unpickling: a few dozen opcodes are understood, and none can run code.

A ``.pt`` file since torch 1.6 is a zip archive, not compressed: ``NAME/data.pkl``, a pickle whose tensors point to
storages, and ``NAME/data/KEY``, the bytes of each. Here the pickle is walked as a list of opcodes by a small stack
machine of our own. The few names that a state dict needs stand in a table; any other is refused, by its name.
What the pickle promises is compared with the bytes that are there before anything is allocated.
"""

import pickletools
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

MOST = 10_000  # values
LONGEST = 1 << 22  # bytes of a pickle that is read; that of a state dict has some kB
STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
DTYPES = set(map(str, STORAGES.values()))  # a dtype by itself is read as its name


class Refused(Exception):
    """Why a file isn't read, as the end of a sentence that begins with its name."""


@dataclass(frozen=True)
class Storage:
    """Bytes of an archive that tensors look at: ``numel`` numbers of a dtype."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor that is not read yet: where it lies in its storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A name that the pickle mentions, and what applying it does."""

    name: str
    apply: Callable[[tuple], Any]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _view(given: tuple) -> View:
    """The arguments of torch's ``_rebuild_tensor_v2``, checked: what is looked at lies inside, and is no larger."""
    if len(given) not in (6, 7) or not isinstance(given[0], Storage):
        raise Refused("holds a tensor that torch.save wouldn't write")
    storage, offset, shape, stride = given[:4]
    sides = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 16
    if not sides or not all(map(_whole, (offset, *shape, *stride))):
        raise Refused(
            "holds a tensor whose shape is none"
        )  # it is not printed: a nested one prints without end
    numel, last = 1, offset
    for size, step in zip(shape, stride, strict=True):
        numel *= size
        last += max(size - 1, 0) * step
    # a stride of 0 would make many numbers of one
    if numel and (last >= storage.numel or numel > storage.numel):
        raise Refused(f"holds a tensor of shape {shape} and only {storage.numel} numbers for it")
    return View(storage, offset, shape, stride)


def _first(kind: type) -> Callable[[tuple], Any]:
    def apply(given: tuple) -> Any:
        if not given or not isinstance(given[0], kind):
            raise Refused("holds a value that torch.save wouldn't write")
        return given[0]

    return apply


def _nothing(given: tuple) -> dict:
    if given:
        raise Refused("holds an OrderedDict that torch.save wouldn't write")
    return {}


def _never(given: tuple) -> None:
    raise Refused("applies a name that is no function")


NAMES = {
    "collections OrderedDict": _nothing,
    "torch Size": _first(tuple),
    "torch device": _first(str),
    "torch._utils _rebuild_tensor_v2": _view,
    "torch._utils _rebuild_parameter": _first(View),
}
PLAIN = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
VALUES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


class _Machine:
    """The stack and the memo of a pickle; each opcode that is understood is a branch of :meth:`step`."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise Refused("is no intact pickle")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise Refused("is no intact pickle")
        return self.stack[-1]

    def marked(self) -> list[Any]:
        out = []
        while self.stack and self.stack[-1] is not _MARK:
            out.append(self.stack.pop())
        if not self.stack:
            raise Refused("is no intact pickle")
        self.stack.pop()
        return out[::-1]

    def name(self, module: Any, name: Any) -> Any:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("is no intact pickle")
        whole = f"{module} {name}"
        if whole in NAMES:
            return Name(whole, NAMES[whole])
        if module == "torch" and name in STORAGES:
            return Name(name, _never)
        if module == "torch" and f"torch.{name}" in DTYPES:
            return f"torch.{name}"
        raise Refused(
            f"names {'.'.join(whole.split(' '))[:80]!r} in its pickle, which is not read because it may run code"
        )

    def storage(self, given: Any) -> Storage:
        whole = isinstance(given, tuple) and len(given) == 5 and given[0] == "storage"
        if not whole or not isinstance(given[1], Name) or given[1].name not in STORAGES:
            raise Refused("points to something that is no storage of a dtype that is read")
        if not isinstance(given[2], str) or not given[2].isdigit() or not _whole(given[4]):
            raise Refused("points to a storage without a number or a size")
        return Storage(given[2], STORAGES[given[1].name], given[4])

    def items(self, given: list[Any]) -> None:
        target = self.top(dict)
        keys = given[::2]
        if len(given) % 2 or not all(isinstance(key, (str, int)) for key in keys):
            raise Refused("holds a mapping whose keys are no names")
        target.update(zip(keys, given[1::2], strict=True))

    def step(self, op: str, value: Any) -> None:
        stack = self.stack
        if op in ("PROTO", "FRAME"):
            return
        if op in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if op == "MEMOIZE" else value] = self.top(object)
        elif op in ("BINGET", "LONG_BINGET"):
            if value not in self.memo:
                raise Refused("is no intact pickle")
            stack.append(self.memo[value])
        elif op in VALUES:
            stack.append(value)
        elif op in PLAIN:
            stack.append(PLAIN[op])
        elif op in EMPTY:
            stack.append(EMPTY[op]())
        elif op == "MARK":
            stack.append(_MARK)
        elif op == "TUPLE":
            stack.append(tuple(self.marked()))
        elif op in TUPLES:
            stack.append(tuple(self.pop() for _ in range(TUPLES[op]))[::-1])
        elif op in ("APPEND", "APPENDS"):
            given = self.marked() if op == "APPENDS" else [self.pop()]
            self.top(list).extend(given)
        elif op in ("SETITEM", "SETITEMS"):
            self.items(self.marked() if op == "SETITEMS" else [self.pop(), self.pop()][::-1])
        else:
            self.apply(op, value)

    def apply(self, op: str, value: Any) -> None:
        if op == "GLOBAL":
            self.stack.append(self.name(*value.split(" ", 1)))
        elif op == "STACK_GLOBAL":
            name = self.pop()
            self.stack.append(self.name(self.pop(), name))
        elif op == "BINPERSID":
            self.stack.append(self.storage(self.pop()))
        elif op == "REDUCE":
            given, what = self.pop(), self.pop()
            if not isinstance(what, Name) or not isinstance(given, tuple):
                raise Refused("applies a name that is no function")
            self.stack.append(what.apply(given))
        elif op == "BUILD":  # of an OrderedDict: the modules' versions, which nothing here needs
            self.pop()
            self.top(dict)
        else:
            raise Refused(f"uses the pickle opcode {op}, which torch.save doesn't write for tensors")


def walk(data: bytes) -> Any:
    """What a pickle of torch holds: dicts, lists, tuples, numbers, texts, and a :class:`View` for each tensor."""
    machine = _Machine()
    try:
        for opcode, value, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                out = machine.pop()
                if machine.stack:
                    break
                return out
            machine.step(opcode.name, value)
    except ValueError:
        pass  # genops names bytes, which says little to a reader
    raise Refused("is no intact pickle")


def leaves(held: Any) -> Iterator[tuple[str, Any]]:
    """Everything that a walked pickle holds, by names joined with dots.

    A pickle may hold one list many times over; so what is seen again is counted, and more than :data:`MOST` is refused.
    """
    todo, seen = [("", held)], 0
    while todo:
        name, value = todo.pop()
        seen += 1
        if seen > MOST or len(name) > 1000:
            raise Refused("nests its values beyond measure")
        if isinstance(value, dict):
            inside = list(value.items())
        elif isinstance(value, (list, tuple)):
            inside = list(enumerate(value))
        else:
            yield name, value
            continue
        todo += [(f"{name}.{key}" if name else str(key), item) for key, item in reversed(inside)]


def root(archive: zipfile.ZipFile) -> str:
    """The name in front of all entries of an archive of torch."""
    found = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") == 1]
    if len(found) != 1:
        raise Refused("is a zip archive, but not of torch.save")
    start = found[0].removesuffix("data.pkl")
    order = f"{start}byteorder"
    if order in archive.namelist() and (
        archive.getinfo(order).file_size > 9 or archive.read(order) != b"little"
    ):
        raise Refused("was written on a machine of another byte order")
    return start
