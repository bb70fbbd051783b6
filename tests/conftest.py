"""What many tests share: tiny models made from their configs, a small store, the shipped model."""

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from browser import Browser
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whomever

import saekit
from saekit.activations import Store
from saekit.harvest import harvest
from saekit.models import Model, load_model


@pytest.fixture(scope="session")
def code_lm() -> Model:
    """The language model that ships with saekit."""
    return load_model("code-lm")


@pytest.fixture(scope="session")
def tiny_gpt2(code_lm) -> Model:
    """A fresh 3-layer GPT-2, 32 wide, with code-lm's tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return load_model(GPT2LMHeadModel(config).eval(), tokenizer=code_lm.tokenizer, name="tiny-gpt2")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    """Chromium, for one test; skipped where there is none."""
    if shutil.which("chromium") is None:
        pytest.skip("no chromium here: apt-get install chromium")
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.fixture
def mlp() -> nn.Module:
    """A plain module without any transformer in it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="session")
def small_store(tiny_gpt2, tmp_path_factory):
    """A store of about 4000 rows of the tiny GPT-2's middle residual stream, in two shards or more."""
    path = tmp_path_factory.mktemp("store") / "acts"
    return harvest(
        tiny_gpt2, "stdlib", ["blocks.1.hook_resid_post"], out=path, tokens=4096, context=64, batch_rows=8
    )


@pytest.fixture
def planted_rows() -> torch.Tensor:
    """2000 rows in 16 dimensions, each the sum of 3 of 48 planted directions, off-centre."""
    g = torch.Generator().manual_seed(77)
    atoms = nn.functional.normalize(torch.randn(48, 16, generator=g), dim=-1)
    chosen = torch.rand(2000, 48, generator=g).topk(3).indices
    size = 1 + torch.rand(2000, 3, generator=g)
    return (atoms[chosen] * size[..., None]).sum(1) + 5.0


@pytest.fixture
def small_dictionary() -> "saekit.Dictionary":
    """A fresh TopK dictionary, 16 -> 64, k 4."""
    return saekit.create("topk", d_in=16, n_features=64, k=4, seed=0)


# tests run two at a time, and tiny tensors on two threads wait for each other, for milliseconds
THREADS = torch.get_num_threads()
torch.set_num_threads(1)
THREADED = (
    "test_kernels",
    "test_sparse_products",
    "test_adam",
    "test_train",
)  # what several threads do is of their business


@pytest.fixture(scope="module", autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.path.stem in THREADED:
        torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def good(tiny_gpt2: Model, small_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good input: ``model``, ``store``, ``run`` (with its dictionary) and ``text.py``."""
    root = tmp_path_factory.mktemp("good")
    tiny_gpt2.module.save_pretrained(root / "model")
    tiny_gpt2.tokenizer.save_pretrained(root / "model")
    shutil.copytree(small_store.path, root / "store")
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    saekit.train(dictionary, root / "store", steps=2, batch_size=64, out=root / "run")
    nan = copy.deepcopy(tiny_gpt2.module)
    nan.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    harvest(
        load_model(nan, tokenizer=tiny_gpt2.tokenizer, name="nan"),
        "stdlib",
        "blocks.1.hook_resid_post",
        out=root / "nan_store",
        tokens=512,
        context=64,
    )
    saekit.save(saekit.create("topk", d_in=16, n_features=64, k=4), root / "narrow")
    (root / "text.py").write_text("import os\n" * 50)
    (root / "long.py").write_text("\n".join(f"def f{i}(x):\n    return x + {i * i}\n" for i in range(1500)))
    (root / "empty.py").write_text("")
    (root / "blank.py").write_text("\n \n")
    (root / "empty_folder").mkdir()
    (root / "pictures").mkdir()
    (root / "pictures" / "a.png").write_bytes(b"\x89PNG\xff\xfe\xfa")
    (root / "latin.py").write_bytes("é".encode("latin-1") * 9)
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "numbers.jsonl").write_text('{"n": 1}\n{"n": 2}\n')
    return root


@pytest.fixture
def here(good: Path, tmp_path: Path) -> Path:
    """A copy of the good input that a test may damage (the model is shared)."""
    for name in ("store", "run", "nan_store", "narrow"):
        shutil.copytree(good / name, tmp_path / name)
    for path in good.iterdir():
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def rows() -> torch.Tensor:
    """4000 rows in 32 dimensions, sums of about 4 of 64 directions, far off-centre."""
    g = torch.Generator().manual_seed(3)
    atoms = nn.functional.normalize(torch.randn(64, 32, generator=g), dim=-1)
    on = torch.rand(4000, 64, generator=g) < 1 / 16
    return (on * (1 + torch.rand(4000, 64, generator=g))) @ atoms + 30.0
