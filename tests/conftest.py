"""What many tests share: tiny models made from their configs, a small store, the shipped model."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, by whomever

import saekit
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
