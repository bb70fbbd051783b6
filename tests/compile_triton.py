"""Compile every Triton kernel for a GPU, which needs none: run by test_triton.py, outside the interpreter."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from saekit.kernels.adam import triton as adam
from saekit.kernels.encode import triton as encode
from saekit.kernels.error import triton as error
from saekit.kernels.product import triton as product

TARGET = GPUTarget("cuda", 90, 32)
SIZES = {"DEAD": (False, True), "ABSOLUTE": (False, True), "ROOM": (64,), "PIECE": (32,), "K": (8,)}
SIZES |= {"ENTRIES": (2,), "WIDTH": (512,), "UNIT": (False, True)}
INTEGERS = {"n", "group", "groups", "k", "width", "levels", "rows", "seed"}
KEPT = {"fp32": "*fp32", "bf16": "*bf16"}
# kernel -> arguments that are not of the dtype of the weights
KERNELS = {
    encode._bounds: {"products": "*fp32", "dead": "*i1", "bounds": "*i64"},
    encode._append: {"products": "*fp32", "dead": "*i1", "bounds": "*i64", "found": "*i64", "counts": "*i32"},
    encode._select: {"products": "*fp32", "dead": "*i1", "found": "*i64", "counts": "*i32", "indices": "*i32"},
    product._sum_segments: {"starts": "*i64", "rows": "*i32"},
    product._dots: {"starts": "*i64", "rows": "*i32", "at": "*i64"},
    error._errors: {"offsets": "*i64", "indices": "*i32", "ends": "*i32", "shares": "*fp32", "squares": "*fp32"},
    adam._row: {"starts": "*i64", "rows": "*i32"},
}  # fmt: skip
FLOATS = {"rate", "idle", "scale", "beta1", "beta2", "eps", "correct1", "correct2"}


def cases(kernel):
    """Every combination of the constants that a kernel has."""
    found = [{}]
    for name in kernel.arg_names:
        if name in SIZES:
            found = [case | {name: value} for case in found for value in SIZES[name]]
    if "SHORT_W" in kernel.arg_names:
        bits = [(32, 32, 32), (32, 16, 16), (32, 8, 8), (16, 16, 16)]
        found = [
            case | dict(zip(("SHORT_W", "SHORT_M", "SHORT_V"), b, strict=True))
            for case in found
            for b in bits
        ]
    return found


def signature(kernel, given, dtype, case):
    """Types of the arguments of a kernel."""
    moments = {8: "*u8", 16: "*bf16", 32: "*fp32"}
    found = {}
    for name in kernel.arg_names:
        if name in case or (name == "dead" and not case.get("DEAD")):
            found[name] = "constexpr"
        elif name in given:
            found[name] = given[name]
        elif name in INTEGERS:
            found[name] = "i32"
        elif name in FLOATS:
            found[name] = "fp32"
        elif name in ("m", "v") and "SHORT_W" in case:
            found[name] = moments[case[f"SHORT_{name.upper()}"]]
        else:
            found[name] = KEPT[dtype]
    return found


done = 0
for kernel, given in KERNELS.items():
    for case in cases(kernel):
        for dtype in KEPT:
            if "SHORT_W" in case and (case["SHORT_W"] == 16) != (dtype == "bf16"):
                continue
            types = signature(kernel, given, dtype, case)
            constants = case | {
                name: None for name in types if types[name] == "constexpr" and name not in case
            }
            triton.compile(ASTSource(kernel, types, constants), target=TARGET)
            done += 1
print(f"{done} kernels compiled")
