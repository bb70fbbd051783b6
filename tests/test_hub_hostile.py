"""Files of strangers: more than 200 damaged or hostile ones, made from seeds. Each is refused in one sentence or read as it was.

None of the code in them runs, and memory stays near the size of the files, which is measured in a process of its own.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import CANARY, CORPUS, IGNORED, INF, MADE, STATE, Runs, npz, saved
from safetensors.torch import save as to_bytes

from saekit.hub.files import Files
from saekit.types import SaekitError


def opened(file: Path) -> Any:
    """What a file holds, by what its name ends with."""
    files = Files(file.parent)
    if file.suffix in (".json", ".yaml"):
        return getattr(files, file.suffix[1:])(file.name)
    heads, tensors = files.heads(file.name), files.tensors(file.name)
    assert {k: (h.shape, h.dtype) for k, h in heads.items()} == {
        k: (tuple(t.shape), t.dtype) for k, t in tensors.items()
    }
    return tensors


def test_there_are_more_than_200_of_them_and_their_names_differ() -> None:
    assert sum(not harmless for _, _, harmless in CORPUS.values()) > 200
    names = [name for name, _ in MADE]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", CORPUS)
def test_each_is_refused_in_one_sentence_or_read_as_it_was(name: str, tmp_path: Path) -> None:
    end, content, harmless = CORPUS[name]
    file = tmp_path / f"given{end}"
    file.write_bytes(content)
    if not harmless:
        with pytest.raises(SaekitError) as caught:
            opened(file)
        said = str(caught.value)
        assert f"given{end}" in said and "\n" not in said and len(said) < 400 + len(str(tmp_path)), said
    else:
        found = opened(file)
        if end in (".json", ".yaml"):
            assert found == {"a": [1, 2.5, None, True, "é"]}
        elif name.removeprefix("torch: ") in ("by hand", *IGNORED):
            assert all(torch.equal(value, torch.ones_like(value)) for value in found.values()) and found
        else:
            for key, value in found.items():
                assert torch.equal(value, STATE[key.removeprefix("sae.")])
    assert not CANARY.exists()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_the_code_in_these_files_would_run_elsewhere(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    try:
        pickle.loads(pickle.dumps(Runs()))
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


NAMES = (
    "../up",
    "a/../../up",
    "/etc/passwd",
    "",
    ".",
    "a//b",
    "a\\..\\b",
    "C:/x",
    "a\0b",
    "./a",
    "a/.",
    "x" * 2000,
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("what", ["has", "json", "yaml", "tensors", "heads", "state", "at"])
def test_names_that_leave_the_folder_are_refused(name: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "up").write_text("{}")
    (tmp_path / "in").mkdir()
    if what == "at" and not name:
        return  # the folder itself
    with pytest.raises(SaekitError, match="leaves the folder or is none"):
        getattr(Files(tmp_path / "in"), what)(name)


def test_folders_and_single_files_list_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("x.json", "a/y.json", "a/b/z.pt"):
        (tmp_path / name).write_text("{}")
    os.mkfifo(tmp_path / "pipe.json")  # reading one would never end
    files = Files(tmp_path)
    assert files.names() == ["a/b/z.pt", "a/y.json", "x.json"]
    assert files.glob("*.json") == ["a/y.json", "x.json"]
    assert files.has("a/y.json") and not files.has("a") and not files.has("pipe.json")
    assert files.at("a").names() == ["b/z.pt", "y.json"] and files.at("") is files
    single = Files(tmp_path / "x.json")
    assert single.names() == ["x.json"] and single.json("x.json") == {} and not single.has("a/y.json")
    for wanted, words in (
        ("gone.json", ["gone.json", "is not there", "a/b/z.pt"]),
        ("pipe.json", ["pipe.json", "is not there"]),
    ):
        with pytest.raises(SaekitError) as caught:
            files.json(wanted)
        assert all(word in str(caught.value) for word in words)
    for path in (tmp_path / "nothing", tmp_path / "pipe.json"):
        with pytest.raises(SaekitError, match=path.name):
            Files(path)
    with pytest.raises(SaekitError, match="no file of tensors"):
        files.tensors("x.json")


def test_names_of_unchecked_tensors_may_hold_what_is_no_number(tmp_path: Path) -> None:
    held = {"mask.IGNORE": torch.tensor(-INF), "W": torch.ones(3)}
    for end, content in ((".safetensors", to_bytes(held)), (".npz", npz(held)), (".pt", saved(held))):
        (tmp_path / f"x{end}").write_bytes(content)
        with pytest.raises(SaekitError, match=r"NaN or Inf in 'mask\.IGNORE'"):
            Files(tmp_path).tensors(f"x{end}")
        found = Files(tmp_path).tensors(f"x{end}", unchecked=("*IGNORE",))
        assert found["mask.IGNORE"] == -INF and torch.equal(found["W"], held["W"])


def test_settings_beside_tensors_of_torch_save_are_read(tmp_path: Path) -> None:
    held = {
        "activation": "TopK",
        "activation_state_dict": {"k": 32, "postact_fn": "ReLU"},
        "step": None,
        "pair": (1, [2.5, True]),
    }
    (tmp_path / "x.pt").write_bytes(
        saved({**held, "W": STATE["W_enc"], "W.T": STATE["W_enc"].T, "dtype": torch.float32})
    )
    found = Files(tmp_path).state("x.pt")
    assert torch.equal(found.pop("W"), STATE["W_enc"]) and torch.equal(found.pop("W.T"), STATE["W_enc"].T)
    assert found == {
        "activation": "TopK", "activation_state_dict.k": 32, "activation_state_dict.postact_fn": "ReLU", "step": None,
        "pair.0": 1, "pair.1.0": 2.5, "pair.1.1": True, "dtype": "torch.float32",
    }  # fmt: skip


SPARE = 24  # MB; the bombs among them want 64 MB to 8 TB
MEASURE = """
import resource, sys
from pathlib import Path
from saekit.hub.files import Files
from saekit.types import SaekitError

def read(file):
    files = Files(file)
    if file.suffix in (".json", ".yaml"):
        return getattr(files, file.suffix[1:])(file.name)
    return files.heads(file.name), files.tensors(file.name)

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) >> 10 for line in lines if line.startswith(name))  # MB

files, refused = sorted(Path(sys.argv[1]).iterdir()), 0
for file in files:
    if file.name.startswith("intact"):
        read(file)  # what is imported on the way is none of the files'
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
before, used = memory("VmRSS"), memory("VmSize")
resource.setrlimit(resource.RLIMIT_AS, ((used << 20) + (256 << 20),) * 2)  # what is only promised counts here
for file in files:
    try:
        read(file)
    except SaekitError:
        refused += 1
print(memory("VmHWM") - before, refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits its own address space")
def test_memory_stays_near_the_size_of_the_files(tmp_path: Path) -> None:
    for i, (end, content, harmless) in enumerate(CORPUS.values()):
        (tmp_path / f"{'intact' if harmless else 'bad'}{i}{end}").write_bytes(content)
    command = (sys.executable, "-P", "-c", MEASURE, str(tmp_path))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    grown, refused = map(int, ran.stdout.split())
    print(f"{refused} refused within {grown} MB")
    assert refused == sum(not harmless for _, _, harmless in CORPUS.values())
    assert grown < SPARE
