"""A corpus of damaged and hostile files, made by code from seeds: what :mod:`test_hub_hostile` reads."""

import io
import json
import os
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save as to_bytes

CANARY = Path("/tmp") / f"saekit-canary-{os.getpid()}"
STATE = {
    "W_enc": torch.randn(24, 8, generator=torch.Generator().manual_seed(0)),
    "b_enc": torch.randn(24, generator=torch.Generator().manual_seed(1)),
    "k": torch.tensor(4),
}
Case = tuple[str, bytes, bool]  # how the file's name ends, what is in it, and whether it is harmless
NAN, INF = float("nan"), float("inf")


class Runs:
    """What a pickle makes of this: a file, if anything calls what it names."""

    def __init__(self, how: Callable[..., Any] = os.system, what: str = f"touch {CANARY}"):
        self.how, self.what = how, what

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return self.how, (self.what,)


# safetensors


def header(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The intact file with another header."""
    data = to_bytes(STATE)
    n = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + n])
    return raw(json.dumps(change(entries) or entries).encode(), data[8 + n :])


def raw(text: bytes, numbers: bytes = b"", n: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if n is None else n) + text + numbers


def entry(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries[name].update(fields)


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda entries: entries.update({name: entries.pop("b_enc")})


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "over each other": entry("b_enc", data_offsets=[8, 104]),
    "a gap": entry("b_enc", data_offsets=[20, 116]),
    "turned round": entry("b_enc", data_offsets=[104, 8]),
    "beyond the end": entry("W_enc", data_offsets=[104, 1 << 40]),
    "below 0": entry("b_enc", data_offsets=[-8, 88]),
    "no numbers for places": entry("b_enc", data_offsets=["8", "104"]),
    "parts of places": entry("b_enc", data_offsets=[8.0, 104.0]),
    "three places": entry("b_enc", data_offsets=[8, 104, 104]),
    "no list of places": entry("b_enc", data_offsets=None),
    "a trillion numbers": entry("b_enc", shape=[10**12]),
    "sizes that multiply to the right one": entry("W_enc", shape=[24, 8, 1 << 60, 0]),
    "a size below 0": entry("b_enc", shape=[-24]),
    "two sizes below 0": entry("W_enc", shape=[-24, -8]),
    "a size that is true": entry("b_enc", shape=[True] * 24),
    "a size in words": entry("b_enc", shape=["24"]),
    "no list of sizes": entry("b_enc", shape=24),
    "very many sizes": entry("b_enc", shape=[24] + [1] * 100),
    "an unknown dtype": entry("b_enc", dtype="F31"),
    "a dtype of 8 bits": entry("b_enc", dtype="F8_E4M3"),
    "a wider dtype": entry("b_enc", dtype="F64"),
    "a narrower dtype": entry("b_enc", dtype="BF16"),
    "no dtype": lambda e: e["b_enc"].pop("dtype") and None,
    "a dtype that is a list": entry("b_enc", dtype=["F32"]),
    "a field too many": entry("b_enc", code="import os"),
    "an entry that is a list": lambda e: e.update(b_enc=[1, 2]),
    "an entry that is null": lambda e: e.update(b_enc=None),
    "a tensor taken out": lambda e: e.pop("b_enc") and None,
    "a list": lambda e: [e],
    "a number": lambda e: 3,
    "a name that leaves the folder": renamed("../../W"),
    "a name from the root": renamed("/etc/passwd"),
    "a name with a line break": renamed("b\nenc"),
    "a name with a null byte": renamed("b\0enc"),
    "an empty name": renamed(""),
    "a long name": renamed("b" * 2000),
}


def safetensors() -> Iterator[tuple[str, Case]]:
    data, rng = to_bytes(STATE), random.Random(0)
    n = int.from_bytes(data[:8], "little")
    yield "intact", (".safetensors", data, True)
    for i in range(16):
        yield f"cut short {i}", (".safetensors", data[: rng.randrange(len(data))], False)
    for name, change in HEADERS.items():
        yield name, (".safetensors", header(change), False)
    for size in (1 << 30, (1 << 63) - 1, (1 << 64) - 1, len(data), n + 1, n - 1, 0):
        yield f"a header of {size}", (".safetensors", struct.pack("<Q", size) + data[8:], False)
    yield "a header too long", (".safetensors", raw(b" " * (5 << 20)), False)
    texts = [
        b"{",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b"NaN",
        b'{"a": 1e999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 2}',
    ]
    for i, text in enumerate(texts):
        yield f"a header that is no JSON {i}", (".safetensors", raw(text), False)
    yield "bytes at the end", (".safetensors", data + b"1234", False)
    for i, content in enumerate((b"", b"1234567", b"not this" * 40, pickle.dumps(Runs()), npz(STATE))):
        yield f"something else {i}", (".safetensors", content, False)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for value in (NAN, INF):
            bad = {"a": torch.ones(2000, dtype=dtype), "b": torch.tensor([1.0, value], dtype=dtype)}
            yield f"{value} of {dtype}", (".safetensors", to_bytes(bad), False)
    yield (
        "bools of 2",
        (
            ".safetensors",
            to_bytes({"a": torch.tensor([2], dtype=torch.uint8)})
            .replace(b'"U8"', b'"BOOL"')
            .replace(b" ", b"", 2),
            False,
        ),
    )


# JSON and YAML

JSONS = {
    "cut short": b'{"a": [1, 2', "NaN": b'{"a": NaN}', "infinity": b'{"a": -Infinity}', "beyond numbers": b'{"a": 1e400}',
    "a key twice": b'{"a": 1, "a": 2}', "nested": b"[" * 200_000, "nested and closed": b"[" * 90_000 + b"]" * 90_000,
    "digits": b'{"a": ' + b"7" * 6000 + b"}", "no text": b"\xff\xfe\x00\x01", "empty": b"", "two": b"{} {}",
    "a comment": b"{} // no", "single quotes": b"{'a': 1}", "half a surrogate cut": b'{"a": "\\ud83', "long": b'"' + b" " * (5 << 20) + b'"',
    "a pickle": pickle.dumps({"a": 1}), "a zip": b"PK\x03\x04" + b"0" * 40, "a trailing comma": b'{"a": 1,}',
    "python": b"__import__('os').system('true')", "a control character": b'{"a": "\x01"}',
}  # fmt: skip
TOUCH = f"touch {CANARY}"
YAMLS = {
    "code": f"a: !!python/object/apply:os.system ['{TOUCH}']", "new code": f"!!python/object/new:os.system ['{TOUCH}']",
    "a name": "a: !!python/name:os.system", "a module": "a: !!python/module:os", "an object": "a: !!python/object:os.Thing {}",
    "an alias": "a: &x [1]\nb: *x", "laughs": "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]),
    "itself": "a: &a [*a]", "a merge": "a: &a {x: 1}\nb: {<<: *a}", "an unknown tag": "a: !thing 3", "nested": "[" * 500,
    "nested and closed": "[" * 400 + "]" * 400, "a tab": "a:\n\t- b", "a brace": "a: {b: 1", "two": "a: 1\n---\nb: 2", "digits": "a: " + "7" * 6000,
    "long": "a: " + "x" * (1 << 19), "a list for a key": "? [1, 2]\n: 3", "a mapping for a key": "? {a: 1}\n: 3",
}  # fmt: skip


def texts() -> Iterator[tuple[str, Case]]:
    plain = json.dumps({"a": [1, 2.5, None, True, "é"]}).encode()
    for end in (".json", ".yaml"):
        yield f"intact {end}", (end, plain, True)
        yield f"with a byte order mark {end}", (end, b"\xef\xbb\xbf" + plain, True)
    for name, content in JSONS.items():
        yield f"JSON, {name}", (".json", content, False)
    for name, text in YAMLS.items():
        yield f"YAML, {name}", (".yaml", text.encode(), False)
    yield "YAML, no text", (".yaml", b"\xff\xfe\x00\xd8", False)


# npz


def npy(
    array: Any, shape: str | None = None, descr: str | None = None, version: bytes = b"\x01\x00"
) -> bytes:
    """A .npy, with other words in its header if they are given."""
    if shape is None and descr is None and version == b"\x01\x00":
        buffer = io.BytesIO()
        np.save(buffer, array, allow_pickle=True)
        return buffer.getvalue()
    text = f"{{'descr': {descr or repr(array.dtype.str)}, 'fortran_order': False, 'shape': {shape or array.shape}, }}"
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text.encode() + array.tobytes()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def npz(state: dict[str, torch.Tensor]) -> bytes:
    return zipped({f"{name}.npy": npy(value.numpy()) for name, value in state.items()})


def twice(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is there twice
        archive.writestr(name, content)
        archive.writestr(name, content)
    return buffer.getvalue()


def overlapping(content: bytes, copies: int) -> bytes:
    """An archive whose directory points to one entry under many names."""
    whole = zipped({"a000.npy": content})
    at = whole.index(b"PK\x01\x02")
    line = whole[at : whole.index(b"PK\x05\x06")]
    lines = b"".join(line.replace(b"a000", f"a{i:03}".encode()) for i in range(copies))
    return (
        whole[:at] + lines + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, copies, copies, len(lines), at, 0)
    )


def archives() -> Iterator[tuple[str, Case]]:
    data, rng, one = npz(STATE), random.Random(1), np.ones(24, np.float32)
    yield "intact", (".npz", data, True)
    yield (
        "compressed",
        (".npz", zipped({f"{k}.npy": npy(v.numpy()) for k, v in STATE.items()}, zipfile.ZIP_DEFLATED), True),
    )
    turned = {
        f"{k}.npy": npy(np.asarray(v.numpy(), v.numpy().dtype.newbyteorder(">"), order="F"))
        for k, v in STATE.items()
    }
    yield "by columns, the other byte first", (".npz", zipped(turned), True)
    for i in range(16):
        yield f"cut short {i}", (".npz", data[: rng.randrange(len(data))], False)
    for i in range(12):  # an entry's checksum tells
        at = data.index(b"NUMPY") + 128 + rng.randrange(24 * 8 * 4 - 8)
        yield (
            f"a flipped bit {i}",
            (".npz", data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :], False),
        )
    words = {
        "a trillion": {"shape": "(1000000000000,)"}, "sizes that multiply to 0": {"shape": "(24, 0)"}, "a size below 0": {"shape": "(-24,)"},
        "code for a shape": {"shape": f"(__import__('os').system('{TOUCH}'),)"}, "digits": {"shape": f"({'9' * 9000},)"},
        "nesting": {"shape": "(" * 300 + ")" * 300}, "objects": {"descr": "'|O'"}, "a record": {"descr": "[('a', '<f4')]"},
        "a void": {"descr": "'|V4'"}, "texts": {"descr": "'<U1'"}, "complex numbers": {"descr": "'<c8'"}, "dates": {"descr": "'<M8[s]'"},
        "a dtype of another size": {"descr": "'<f8'"}, "code for a dtype": {"descr": "__import__('os')"}, "version 3": {"version": b"\x03\x00"},
    }  # fmt: skip
    for name, given in words.items():
        yield name, (".npz", zipped({"a.npy": npy(one, **given)}), False)
    yield "a pickle of code", (".npz", zipped({"a.npy": npy(np.array([Runs()], dtype=object))}), False)
    yield "a .npy that is a pickle", (".npz", zipped({"a.npy": pickle.dumps(Runs())}), False)
    for name in ("../a.npy", "/a.npy", "a/../../b.npy", "a\n.npy", "\\a.npy", "a.txt", "a.py"):
        yield f"an entry {name!r}", (".npz", zipped({name: npy(one)}), False)
    yield "an entry twice", (".npz", twice("a.npy", npy(one)), False)
    yield "entries over each other", (".npz", overlapping(npy(np.zeros(1 << 16, np.float32)), 300), False)
    bomb = npy(np.zeros(1 << 24, np.float32))
    yield "a bomb", (".npz", zipped({"a.npy": bomb}, zipfile.ZIP_DEFLATED), False)
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        yield f"packed by {name}", (".npz", zipped({"a.npy": npy(one)}, method), False)
    for i, value in enumerate((NAN, INF, -INF)):
        yield f"no number {i}", (".npz", npz({"a": torch.tensor([1.0, value])}), False)
    for i, content in enumerate((b"", b"PK", npy(one), pickle.dumps(Runs()), to_bytes(STATE))):
        yield f"something else {i}", (".npz", content, False)


# what torch.save writes


def saved(held: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    return buffer.getvalue()


def torched(
    pickled: bytes, storages: dict[str, bytes] | None = None, method: int = zipfile.ZIP_STORED, **more: bytes
) -> bytes:
    entries = {"archive/data.pkl": pickled, "archive/byteorder": b"little", **more}
    return zipped(entries | {f"archive/data/{k}": v for k, v in (storages or {}).items()}, method)


def tensor(
    numel: int,
    offset: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    kind: str = "FloatStorage",
    key: str = "0",
) -> bytes:
    """The opcodes of one tensor."""

    def number(i: int) -> bytes:
        return pickle.dumps(i, 2)[2:-1]

    def numbers(given: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, given)) + b"t"

    pid = (
        b"(X\x07\0\0\0storagectorch\n"
        + kind.encode()
        + b"\n"
        + pickle.dumps(key, 2)[2:-3]
        + b"X\x03\0\0\0cpu"
        + number(numel)
        + b"tQ"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + number(offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def state_of(*opcodes: bytes) -> bytes:
    return (
        b"\x80\x02}("
        + b"".join(b"X\x01\0\0\0" + bytes([97 + i]) + code for i, code in enumerate(opcodes))
        + b"u."
    )


FOUR = {"0": b"\0\0\x80\x3f" * 4}
VIEWS = {
    "a trillion numbers": tensor(10**12, 0, (10**12,), (1,)), "more numbers than there are": tensor(4, 0, (5,), (1,)),
    "an offset beyond": tensor(4, 4, (1,), (1,)), "a stride beyond": tensor(4, 0, (2,), (4,)), "one number as many": tensor(4, 0, (10**9,), (0,)),
    "a size below 0": tensor(4, 0, (-4,), (1,)), "an offset below 0": tensor(4, -1, (4,), (1,)), "a stride below 0": tensor(4, 3, (4,), (-1,)),
    "sizes without strides": tensor(4, 0, (4,), ()), "fewer numbers than there are": tensor(3, 0, (3,), (1,)),
    "a wider dtype": tensor(4, 0, (4,), (1,), "DoubleStorage"), "an unknown dtype": tensor(4, 0, (4,), (1,), "QInt8Storage"),
    "numbers that aren't there": tensor(4, 0, (4,), (1,), key="7"), "a key that leaves the folder": tensor(4, 0, (4,), (1,), key="../data.pkl"),
}  # fmt: skip
CODE = {
    "REDUCE": b"cposix\nsystem\n(X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode() + b"tR", "INST": b"(X" + struct.pack("<I", len(TOUCH)) + TOUCH.encode() + b"iposix\nsystem\n",
    "OBJ": b"(cposix\nsystem\nX" + struct.pack("<I", len(TOUCH)) + TOUCH.encode() + b"o", "STACK_GLOBAL": b"X\x08\0\0\0builtinsX\x04\0\0\0eval\x93(X\x03\0\0\x001+1tR",
    "NEWOBJ": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ft\x81", "a large bytearray": b"cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR", "BUILD": b"}}X\x01\0\0\0a}sb",
    "EXT": b"\x82\x01", "getattr": b"cbuiltins\ngetattr\n(ctorch\nfloat32\nX\x09\0\0\0__class__tR", "a device that calls": b"ctorch\ndevice\n(cposix\nsystem\ntR",
    "a memo of billions": b"N" + b"r\xff\xff\xff\x7f", "what no memo has": b"h\x07", "a long text that isn't there": b"\x8d" + struct.pack("<Q", 1 << 40),
    "a long number": b"\x8b" + struct.pack("<I", 1 << 30), "no mark": b"t", "an empty stack": b"R", "a frame of billions": b"\x95" + struct.pack("<Q", 1 << 62) + b"R",
    "a name that is a list": b"](]]e]\x93", "a storage alone": b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x04tQ", "a function alone": b"ctorch._utils\n_rebuild_tensor_v2\n",
}  # fmt: skip


IGNORED = ("BUILD", "a memo of billions")  # what they ask for is not done, and the tensor beside them is read


class Module(torch.nn.Module):
    """What torch.save writes whole, class and all, where people are careless."""


def pickles() -> Iterator[tuple[str, Case]]:
    data, rng = saved({"sae": STATE}), random.Random(2)
    yield "intact", (".pt", data, True)
    yield (
        "an OrderedDict of parameters",
        (
            ".pth",
            saved(torch.nn.ParameterDict({k: v for k, v in STATE.items() if v.ndim}).state_dict()),
            True,
        ),
    )
    yield "by hand", (".pt", torched(state_of(tensor(4, 0, (2, 2), (1, 2))), FOUR), True)
    for i in range(16):
        yield f"cut short {i}", (".pt", data[: rng.randrange(len(data))], False)
    for name, code in VIEWS.items():
        yield name, (".pt", torched(state_of(code), FOUR), False)
    for name, code in CODE.items():
        yield name, (".pt", torched(state_of(code, tensor(4, 0, (4,), (1,))), FOUR), name in IGNORED)
    for i, held in enumerate(
        (
            Runs(),
            {"a": Runs()},
            {"a": [Runs(eval, "1 + 1")]},
            [STATE["W_enc"]],
            {"a": Module()},
            {"a": {1, 2}},
            {"a": np.ones(3)},
            {("a",): STATE["k"]},
            {"a": b"x" * 100},
        )
    ):
        yield f"an object {i}", (".pt", saved(held), False)


def odd_archives() -> Iterator[tuple[str, Case]]:
    shared = b"]" + b"".join(
        b"q" + bytes([i]) + b"0](" + b"h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"e" for i in range(30)
    )
    yield "a list that holds itself many times over", (".pt", torched(state_of(shared)), False)
    yield "a list that holds itself", (".pt", torched(state_of(b"]q\0h\0a")), False)
    yield (
        "two dtypes of one storage",
        (
            ".pt",
            torched(state_of(tensor(4, 0, (4,), (1,)), tensor(4, 0, (4,), (1,), "IntStorage")), FOUR),
            False,
        ),
    )
    yield (
        "compressed",
        (
            ".pt",
            torched(
                state_of(tensor(1 << 22, 0, (1 << 22,), (1,))), {"0": bytes(4 << 22)}, zipfile.ZIP_DEFLATED
            ),
            False,
        ),
    )
    yield (
        "of another byte order",
        (
            ".pt",
            zipped(
                {
                    "archive/data.pkl": state_of(tensor(4, 0, (4,), (1,))),
                    "archive/byteorder": b"big",
                    "archive/data/0": FOUR["0"],
                }
            ),
            False,
        ),
    )
    yield "two pickles", (".pt", torched(state_of(), **{"other/data.pkl": state_of()}), False)
    yield "an entry that leaves the folder", (".pt", torched(state_of(), **{"../evil": b"x"}), False)
    yield (
        "a pickle too long",
        (".pt", torched(state_of(b"X" + struct.pack("<I", 5 << 20) + b" " * (5 << 20))), False),
    )
    old = io.BytesIO()
    torch.save(STATE, old, _use_new_zipfile_serialization=False)
    for i, content in enumerate(
        (b"", old.getvalue(), pickle.dumps(Runs()), to_bytes(STATE), npz(STATE), b"PK\x03\x04")
    ):
        yield f"something else {i}", (".pt", content, False)
    for i, value in enumerate((NAN, INF)):
        yield f"no number {i}", (".pt", saved({"a": torch.tensor([1.0, value])}), False)


SOURCES = {"safetensors": safetensors, "text": texts, "npz": archives, "torch": pickles, "odd": odd_archives}
MADE = [(f"{kind}: {name}", case) for kind, source in SOURCES.items() for name, case in source()]
CORPUS = dict(MADE)
