"""delphi's caches of activations: what goes out comes back, and hostile files are refused in one sentence.

``SAEKIT_DELPHI`` names the python of an environment with eai-delphi 0.1.3 in it.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from toy_firings import POINT, ROWS, SEQ, N, assert_same, codes, kept, signed

from saekit.autointerp.firings import Firings, Writer
from saekit.autointerp.formats import delphi_cache
from saekit.autointerp.formats.delphi import (
    read_cache,
    write_cache,
)
from saekit.autointerp.windows import Windows
from saekit.types import Codes, SaekitError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Firings:
    return signed(tmp_path_factory.mktemp("firings"))


@pytest.mark.parametrize("n_splits", [1, 3, 7, N])
def test_a_cache_comes_back_however_it_is_cut(
    n_splits: int, made: Firings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delphi_cache, "CHUNK", 100)  # several chunks to a shard, several blocks of rows
    folder = write_cache(made, tmp_path, POINT, n_splits)
    found = read_cache(tmp_path, POINT, tmp_path / "back")
    assert_same(found, made)
    assert found.mask.all() and (found.documents == np.arange(ROWS)[:, None]).all()
    assert found.about["model"] == {"name": "toy"} and "no documents" in found.about["note"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "latents"]
    assert {p.suffix for p in folder.iterdir()} == {".json", ".safetensors"}
    assert_same(read_cache(tmp_path, POINT), made)  # a temporary folder


@pytest.mark.parametrize("n_splits", [1, 3, 7, N])
def test_shards_are_delphis(n_splits: int, made: Firings, tmp_path: Path) -> None:
    """Bounds of its linspace, the end inclusive, no gap and no empty file; first latent by name; dtypes and tokens."""
    folder = write_cache(made, tmp_path, POINT, n_splits)
    ranges = sorted(tuple(map(int, file.stem.split("_"))) for file in folder.glob("*.safetensors"))
    bounds = set(torch.linspace(0, N, n_splits + 1).long().tolist())
    assert {first for first, _ in ranges} | {last + 1 for _, last in ranges} <= bounds
    assert ranges[0][0] == 0 and ranges[-1][1] == N - 1
    assert all(first == last + 1 for (_, last), (first, _) in pairwise(ranges))
    for first, last in ranges:
        tensors = load_file(folder / f"{first}_{last}.safetensors")
        at, values = tensors["locations"], tensors["activations"]
        assert at.dtype == np.uint16 and values.dtype == np.float16 and len(at) == len(values) > 0
        np.testing.assert_array_equal(tensors["tokens"], made.tokens)
        assert at[:, 2].max() <= last - first
        order = np.lexsort((at[:, 1], at[:, 0], at[:, 2]))
        own = slice(made.offsets[first], made.offsets[last + 1])
        place = at[order, 0].astype(np.int64) * SEQ + at[order, 1]
        np.testing.assert_array_equal(place, made.places[own])
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == SEQ and config["model_name"] == "toy" and config["n_tokens"] == ROWS * SEQ  # fmt: skip


@pytest.mark.parametrize(("rows", "n"), [(2**16 + 1, 3), (4, 2**16 + 1)])
def test_what_doesnt_fit_16_bits_is_written_with_32(rows: int, n: int, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "firings", n)
    tokens = torch.zeros((rows, 32), dtype=torch.int64)
    offsets = torch.ones(rows * 32 + 1, dtype=torch.int64)
    offsets[0], offsets[-1] = 0, 2  # fires at the first and the last token
    firing = Codes(offsets, torch.tensor([0, n - 1]), torch.tensor([1.0, 2.0]), n, (rows, 32))
    writer.add(tokens, None, torch.ones(rows, 32, dtype=torch.bool), firing)
    firings = writer.close({})
    folder = write_cache(firings, tmp_path, POINT, 1)
    assert load_file(folder / f"0_{n - 1}.safetensors")["locations"].dtype == np.uint32
    assert_same(read_cache(tmp_path, POINT), firings)


@pytest.mark.parametrize("order", ["rows", "shuffled"])
def test_a_cache_that_delphi_wrote_is_read_in_any_order(order: str, made: Firings, tmp_path: Path) -> None:
    folder = tmp_path / "latents" / POINT
    folder.mkdir(parents=True)
    latent = np.repeat(np.arange(N), made.counts)
    at = np.stack([made.places // SEQ, made.places % SEQ, latent], 1)
    chosen = np.lexsort((at[:, 2], at[:, 1], at[:, 0]))
    if order == "shuffled":
        chosen = np.random.default_rng(0).permutation(chosen)
    # a cache of latents 5 to 29 only, in files with a gap between them
    for first, last in ((5, 11), (14, 29)):
        own = chosen[(latent[chosen] >= first) & (latent[chosen] <= last)]
        half = made.values[own].astype(np.float16)
        where = (at[own] - [0, 0, first]).astype(np.uint16)
        tensors = {"locations": where, "activations": half, "tokens": made.tokens.astype(np.int64)}
        save_file(tensors, folder / f"{first}_{last}.safetensors")
    (folder / "config.json").write_text('{"model_name": "toy", "batch_size": 32}')
    found = read_cache(tmp_path, POINT)
    assert found.n_features == 30
    for feature in range(30):
        places, values = found.of(feature)
        truth, strength = made.of(feature)
        alive = (strength.astype(np.float16) != 0) & (5 <= feature <= 29) & (feature not in (12, 13))
        np.testing.assert_array_equal(places, truth[alive])
        np.testing.assert_array_equal(values, strength.astype(np.float16)[alive])


@pytest.mark.parametrize(
    ("value", "words"),
    [(65505.0, "65505"), (-7e4, "-70000"), (float("inf"), "inf"), (float("nan"), "nan")],
)
def test_a_value_beyond_float16_is_refused_before_anything_is_written(
    value: float, words: str, tmp_path: Path
) -> None:
    """Infinity would be the peak of every window, and a clipped value would change which windows are the strongest."""
    tokens, dense = codes(1, rows=2)
    dense[1, 3, 9] = value
    firings = kept(tmp_path / "firings", tokens, dense)
    with pytest.raises(SaekitError, match=words):
        write_cache(firings, tmp_path / "run", POINT)
    assert not (tmp_path / "run").exists()


def test_rows_that_dont_fit_delphis_windows_are_refused(tmp_path: Path) -> None:
    tokens, dense = codes(1, rows=2)
    firings = kept(tmp_path / "firings", tokens[:, :33], dense[:, :33])
    with pytest.raises(SaekitError, match=r"rows of 33 tokens .* multiple of 32"):
        write_cache(firings, tmp_path / "run", POINT)
    for n_splits in (0, N + 1):
        with pytest.raises(SaekitError, match=f"n_splits = {n_splits} must be from 1 to the {N} features"):
            write_cache(kept(tmp_path / str(n_splits), tokens, dense), tmp_path / "run", POINT, n_splits)
    assert not (tmp_path / "run").exists()


def shard(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def first(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def header(folder: Path) -> None:
    """A header that declares a tensor of many more entries than the file has."""
    data = first(folder).read_bytes()
    n = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + n])
    entries["activations"] = {"dtype": "F16", "shape": [10**15], "data_offsets": [0, 2 * 10**15]}
    text = json.dumps(entries).encode()
    first(folder).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


def put(name: str, at: int, value: float) -> Callable[[Path], None]:
    return shard(lambda t: t[name].reshape(-1).__setitem__(at, value))


CACHES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a shard cut short": (lambda f: first(f).write_bytes(first(f).read_bytes()[:-9]), ["not an intact safetensors file"]),
    "a shard that is text": (lambda f: first(f).write_text("hello"), ["not an intact safetensors file"]),
    "an empty shard": (lambda f: first(f).write_bytes(b""), ["not an intact safetensors file"]),
    "a pickle": (lambda f: torch.save({"locations": torch.zeros(3, 3)}, first(f)), ["not an intact safetensors file"]),
    "a header of absurd length": (lambda f: first(f).write_bytes(b"\xff" * 8 + b"{}"), ["not an intact safetensors file"]),
    "a huge declared size": (header, ["not an intact safetensors file"]),
    "no tokens": (shard(lambda t: t.pop("tokens")), ["holds no 'tokens'"]),
    "no locations": (shard(lambda t: t.pop("locations")), ["holds no 'locations'"]),
    "other tokens": (put("tokens", 3, 7777), ["different texts"]),
    "a negative token": (put("tokens", 3, -1), ["no token, -1"]),
    "fewer rows": (shard(lambda t: t.update(tokens=t["tokens"][:-1])), ["different texts"]),
    "rows that are flat": (shard(lambda t: t.update(tokens=t["tokens"].reshape(-1))), ["shapes that don't fit"]),
    "fewer values": (shard(lambda t: t.update(activations=t["activations"][:-1])), ["shapes that don't fit"]),
    "pairs for triples": (shard(lambda t: t.update(locations=t["locations"][:, :2].copy())), ["shapes that don't fit"]),
    "locations that are floats": (shard(lambda t: t.update(locations=t["locations"].astype(np.float32))), ["'locations' as F32"]),
    "values that are ints": (shard(lambda t: t.update(activations=t["activations"].astype(np.int32))), ["'activations' as I32"]),
    "NaN": (put("activations", 2, np.nan), ["NaN or infinite"]),
    "infinity": (put("activations", 2, np.inf), ["NaN or infinite"]),
    "a row beyond the text": (put("locations", 0, ROWS), [f"an entry at [{ROWS}, ", "beyond [30, 64, "]),
    "a position beyond the row": (put("locations", 1, SEQ), ["beyond [30, 64, "]),
    "a latent beyond the file": (put("locations", 2, 60000), ["60000] (row, position, latent)"]),
    "an entry that stands twice": (shard(lambda t: t["locations"].__setitem__(1, t["locations"][0])), ["twice at row"]),
    "a name without numbers": (lambda f: first(f).rename(f / "a_b.safetensors"), ["'a_b.safetensors'", "isn't called after"]),
    "a name with one number": (lambda f: first(f).rename(f / "7.safetensors"), ["isn't called after"]),
    "a name that goes down": (lambda f: first(f).rename(f / "7_2.safetensors"), ["isn't called after"]),
    "a name of absurd size": (lambda f: first(f).rename(f / "0_999999999.safetensors"), ["isn't called after"]),
    "names that overlap": (lambda f: first(f).rename(f / "0_39.safetensors"), ["share latents"]),
    "no shard": (lambda f: [file.unlink() for file in f.glob("*.safetensors")], ["no cache of delphi"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "No such file"]),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text('{"a": '), ["config.json", "not JSON"]),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), ["config.json", "expected dict"]),
    "a config of another type": (lambda f: (f / "config.json").write_text('{"model_name": 3}'), ["model_name = 3", "expected str"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CACHES)
def test_a_damaged_cache_is_refused_in_one_sentence(case: str, made: Firings, tmp_path: Path) -> None:
    damage, words = CACHES[case]
    damage(write_cache(made, tmp_path, POINT, 3))
    with pytest.raises(SaekitError) as caught:
        read_cache(tmp_path, POINT, tmp_path / "back")
    for word in (*words, ";"):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "back").exists()


def test_what_exists_is_not_written_over(made: Firings, tmp_path: Path) -> None:
    write_cache(made, tmp_path, POINT)
    (tmp_path / "back").mkdir()
    for call in (
        lambda: write_cache(made, tmp_path, POINT),
        lambda: read_cache(tmp_path, POINT, tmp_path / "back"),
    ):
        with pytest.raises(SaekitError, match="exists already"):
            call()


def test_the_firing_counts_that_delphi_pickles_are_not_read(made: Firings, tmp_path: Path) -> None:
    write_cache(made, tmp_path, POINT)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "hookpoint_firing_counts.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert_same(read_cache(tmp_path, POINT), made)


BIG = """
import resource, sys
from pathlib import Path
import torch
from saekit.autointerp.firings import Firings, Writer
from saekit.autointerp.formats.delphi import read_cache, write_cache
from saekit.types import Codes
out, stage, rows, seq, n, k = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), 256, 16384, 32
if stage == "make":
    writer, g = Writer(out / "firings", n), torch.Generator().manual_seed(0)
    for at in range(0, rows, 64):
        size = (min(64, rows - at), seq)
        # one feature of each of k ranges, so that none is drawn twice
        indices = torch.randint(0, n // k, (size[0] * seq, k), generator=g) + torch.arange(k) * (n // k)
        values = torch.rand(indices.shape, generator=g) + 0.1
        writer.add(torch.randint(0, 4096, size, generator=g), None, torch.ones(size, dtype=torch.bool), Codes.from_rectangular(indices, values, n, size))
    writer.close({})
elif stage == "write":
    write_cache(Firings(out / "firings"), out, "layers.1")
else:
    read_cache(out, "layers.1", out / "back")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_5_million_tokens_of_32_features_take_below_a_gigabyte(tmp_path: Path) -> None:
    """The process's whole resident memory, mapped files and libraries included."""
    taken = {}
    for stage in ("make", "write", "read"):
        command = (sys.executable, "-P", "-c", BIG, str(tmp_path), stage, str(5_000_000 // 256))
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-2000:]
        taken[stage] = int(ran.stdout.split()[-1]) / 1e6
    print(taken)
    assert max(taken["write"], taken["read"]) < 1.0
    back, truth = Firings(tmp_path / "back"), Firings(tmp_path / "firings")
    assert (back.places == truth.places).all() and (back.offsets == truth.offsets).all()
    assert (back.values == truth.values.astype(np.float16)).all()


@pytest.mark.peer
def test_delphi_reads_our_cache_as_its_own(tmp_path: Path) -> None:
    """Its LatentDataset gives the same windows for our cache and for the one that it writes of the same codes."""
    tokens, dense = codes(5, rows=120, density=0.02)
    firings = kept(tmp_path / "firings", tokens, dense)
    for n_splits in (1, 3, 8):
        run = tmp_path / str(n_splits)
        write_cache(firings, run, POINT, n_splits)
        save_file(
            {"tokens": tokens.numpy(), "dense": dense.numpy(), "n_splits": np.array(n_splits)}, run / "given"
        )
        command = (
            os.environ["SAEKIT_DELPHI"],
            "-P",
            str(Path(__file__).parent / "peer_delphi.py"),
            str(run),
            POINT,
        )
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        ours, theirs, some = (load_file(run / f"windows.{name}") for name in ("ours", "theirs", "some"))
        assert set(ours) == set(theirs) and len(ours) > 2 * 20
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
        assert set(some) <= set(ours) and len(some) >= 2 * 4  # read by number, over the joined ranges
        for name in some:
            np.testing.assert_array_equal(some[name], ours[name])
        # what it shows are the aligned windows that we know of
        windows = Windows(firings, 32)
        for feature in np.flatnonzero(firings.counts).tolist():
            found, peaks = windows.peaks(feature)
            np.testing.assert_allclose(
                ours[f"{feature}.activations"].max(1), np.sort(peaks)[::-1], rtol=2.0**-11
            )
            shown = {tuple(line) for line in ours[f"{feature}.tokens"].tolist()}
            assert shown == {tuple(line) for line in windows.tokens[found].tolist()}
        back = read_cache(run / "theirs", POINT)
        np.testing.assert_array_equal(back.places, firings.places)
        np.testing.assert_array_equal(back.values, firings.values.astype(np.float16))
        assert json.loads((run / "writer.json").read_text())["empty shards crash it"] or n_splits < 8
