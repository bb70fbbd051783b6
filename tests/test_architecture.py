"""The house rules, checked from the syntax tree and from fresh processes."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"saekit": "saekit", "trainers": "saekit.trainers", "kernels": "saekit.kernels", "circuits": "saekit.circuits", "autointerp": "saekit.autointerp"}  # fmt: skip
# design §2: a module imports strictly lower ranks or its own folder; the longest prefix counts
RANKS = {
    "saekit.kernels": 0,
    "saekit.errors": 0, "saekit.types": 1, "saekit.registry": 1, "saekit.stdlib": 1,
    "saekit.records": 2, "saekit.pages": 2,
    "saekit.metrics": 3, "saekit.probes": 3, "saekit.hooks": 3, "saekit.tokens": 3, "saekit.activations": 3, "saekit.attention": 3,
    "saekit.dictionaries": 4, "saekit.images": 4, "saekit.models": 4, "saekit.code_lm": 4,
    "saekit.graph": 5, "saekit.harvest": 5, "saekit.hub": 5, "saekit.interventions": 5, "saekit.layers": 5, "saekit.replacement": 5,
    "saekit.trainers": 6, "saekit.evaluate": 6, "saekit.analyses": 6, "saekit.topics": 6, "saekit.circuits": 6, "saekit.autointerp": 6, "saekit.testbed": 6, "saekit.steer": 6, "saekit.observer": 6,
    "saekit.contract": 7, "saekit.papers": 7, "saekit.report": 7,
    "saekit.verbs": 8, "saekit": 8, "saekit.cli": 9,
}  # fmt: skip


def sources() -> dict[str, Path]:
    """Import name of every module of the package, and its file."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(p for p in parts if p != "__init__")] = path
    return found


def rank(module: str) -> tuple[str, int]:
    """``(room, rank)`` of a module."""
    room = max((r for r in RANKS if module == r or module.startswith(r + ".")), key=len)
    return room, RANKS[room]


def imports(path: Path) -> list[str]:
    """Modules of saekit that a file imports at run time, anywhere in it."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    out = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            out += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            out += names if node.module == "saekit" else [node.module]
    return [name for name in out if name.split(".")[0] == "saekit"]


@pytest.mark.parametrize("module", sorted(sources()))
def test_imports_go_down_the_ranks(module: str) -> None:
    room, own = rank(module)
    for name in imports(sources()[module]):
        other, theirs = rank(name)
        assert other == room or theirs < own, f"{module} (rank {own}) imports {name} (rank {theirs})"


def test_kernels_import_nothing_else_of_ours_nor_anything_but_torch_numba_triton() -> None:
    for module, path in sources().items():
        # peers.py runs in another environment, on what it times
        if module.startswith("saekit.kernels") and module != "saekit.kernels.peers":
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) else []
                for name in names:
                    top = ".".join(name.split(".")[:2])
                    known = top == "saekit.kernels" or name.split(".")[0] in {
                        "torch",
                        "numba",
                        "llvmlite",  # numba's own compiler
                        "triton",
                        "numpy",
                    }
                    assert known or name.split(".")[0] in sys.stdlib_module_names, f"{module} imports {name}"


def test_the_package_list_is_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {m if p.name == "__init__.py" else m.rsplit(".", 1)[0] for m, p in sources().items()}
    assert sorted(listed) == sorted(found)


def test_shapes_are_checked_everywhere_but_in_kernels() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["addopts"]
    checked = next(o for o in options if o.startswith("--jaxtyping-packages=")).split("=")[1].split(",")[:-1]
    rooms = {".".join(m.split(".")[:2]) for m in sources() if "." in m}
    assert sorted(checked) == sorted(rooms - {"saekit.kernels"})


def test_one_owner_of_forward_hooks() -> None:
    owners = [m for m, p in sources().items() if re.search(r"register_forward(_pre)?_hook\(", p.read_text())]
    assert owners == ["saekit.hooks"]


def test_no_file_is_two() -> None:
    for path in sources().values():
        assert len(path.read_text().splitlines()) <= 500, f"{path} is over 500 lines"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = (
                    node.body[0].end_lineno + 1
                    if ast.get_docstring(node) and len(node.body) > 1
                    else node.lineno
                )
                assert node.end_lineno - body <= 60, f"{path}: {node.name} is over 60 lines"


def test_public_functions_and_classes_have_docstrings() -> None:
    for module, path in sources().items():
        if module == "saekit.testbed.code_lm":
            continue
        defined = [
            n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef | ast.ClassDef)
        ]
        for node in {n.name: n for n in defined}.values():  # the last one: overloads come first
            if not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


@pytest.mark.parametrize("bare", ["kernels", "trainers", "circuits", "autointerp"])
def test_a_room_refuses_its_bare_name(bare: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {bare}"], cwd=ROOT, capture_output=True, text=True, env={"PATH": ""}
    )
    assert done.returncode == 1 and f"saekit.{bare}" in done.stderr


def test_importing_saekit_is_cheap() -> None:
    code = """
import time, sys
import torch
start = time.perf_counter()
import saekit
print(time.perf_counter() - start)
heavy = {"transformer_lens", "transformers", "datasets", "wandb", "plotly", "triton", "numba"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
saekit.create; saekit.load_model; saekit.train; saekit.harvest; saekit.evaluate
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    seconds, at_import, at_use = done.stdout.splitlines()
    assert float(seconds) <= 1.0
    assert at_import == at_use == "[]"


def test_the_facade_gives_functions_where_modules_share_the_name() -> None:
    code = "import saekit, saekit.harvest, saekit.evaluate; assert callable(saekit.harvest) and callable(saekit.evaluate)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_every_registered_row_loads() -> None:
    from saekit.dictionaries.config import CHOICES
    from saekit.evaluate import SUITES

    for table in (*CHOICES.values(), SUITES):
        for name in table:
            assert callable(table[name])


def test_a_registry_never_overwrites_and_names_the_nearest() -> None:
    from saekit.registry import Registry

    table = Registry("colour", {"green": "colorsys:rgb_to_hsv"})
    with pytest.raises(ValueError, match="exists already"):
        table.add("green", "x:y")
    with pytest.raises(ValueError, match="did you mean 'green'"):
        table["gren"]
