"""Loading from a Hub on loopback: only what is meant, whole or refused, from the cache where there is no network."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_client import POINT, TOKEN, Client, down, forget, made, said_or_written, same, up
from hub_server import Served

from saekit.errors import SaekitError
from saekit.hub import native, remote

pytest_plugins = ["hub_fixtures"]


@pytest.fixture(scope="module")
def offline(served: Served, owner: Client) -> Iterator[Client]:
    """A process with the owner's cache, that was told to ask no network."""
    client = Client(served, owner.home, HF_HUB_OFFLINE="1")
    yield client
    client.end()


# addresses

LAYOUTS: dict[str, tuple[str, list[str], str | None, set[str]]] = {
    "native before saelens": ("r/a", ["a/card.json", "a/dictionary.safetensors", "a/cfg.json", "a/sae_weights.safetensors"], None, {"a/card.json", "a/dictionary.safetensors"}),
    "saelens where asked": ("r/a", ["a/card.json", "a/dictionary.safetensors", "a/cfg.json", "a/sae_weights.safetensors"], "saelens", {"a/cfg.json", "a/sae_weights.safetensors"}),
    "the only one": ("r", ["README.md", "layers.3/cfg.json", "layers.3/sae.safetensors"], None, {"layers.3/cfg.json", "layers.3/sae.safetensors"}),
    "deep": ("r/layer_1/width_16k", ["layer_1/width_16k/params.npz", "layer_2/width_16k/params.npz"], None, {"layer_1/width_16k/params.npz"}),
    "a set in one folder": ("r", ["config.yaml", "layer_0.safetensors", "layer_1.safetensors"], None, {"config.yaml", "layer_0.safetensors", "layer_1.safetensors"}),
    "inner folder": ("r/x", ["x/hyperparams.json", "x/checkpoints/final.safetensors", "y/checkpoints/final.safetensors"], None, {"x/hyperparams.json", "x/checkpoints/final.safetensors"}),
    "one file": ("r/layer0.sae.pt", ["layer0.sae.pt", "layer1.sae.pt", "config.json"], None, {"layer0.sae.pt", "config.json"}),
    "folders beside the top": ("r", ["ae.pt", "config.json", "other/ae.pt"], None, {"ae.pt", "config.json"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_files_of_one_dictionary_are_wanted(name: str) -> None:
    path, files, format, expected = LAYOUTS[name]
    assert set(remote.wanted(remote.parse(f"hf://o/{path}"), files, format)[1]) == expected


@pytest.mark.parametrize(
    "path",
    [
        "hf://",
        "hf://o",
        "hf://o/r/../x",
        "hf://o/r//x",
        "hf://o/r/*",
        "hf://o/r@",
        "https://o/r",
        "hf://o/r/a\\b",
        "hf://-/r",
    ],
)
def test_an_address_of_another_form_is_refused(path: str) -> None:
    with pytest.raises(SaekitError, match=r"hf://owner/repo|owner/name"):
        remote.parse(path)


def test_an_address_says_its_parts() -> None:
    assert remote.parse("hf://o/r/a/b@v1.0") == remote.Address("o/r", "a/b", "v1.0")
    assert str(remote.parse("hf://o/r/a/b@main")) == "hf://o/r/a/b" == str(remote.parse("hf://o/r/a/b"))


def test_one_repository_holds_several_and_each_loads_alone(hub: Served, owner: Client, pair: Path) -> None:
    forget(owner)
    readme = owner.run(
        "from huggingface_hub import hf_hub_download as get\nresult = open(get('owner/pair', 'README.md')).read()"
    )
    assert "`a`" in readme and "`b`" in readme and "2 dictionaries" in readme
    for name in ("a", "b"):
        folder, names = down(owner, f"hf://owner/pair/{name}")
        assert same(native.load(folder), native.load(pair / name)) and names == [
            "card.json",
            "dictionary.safetensors",
        ]
    told = owner.run(
        "import contextlib, io\nfrom saekit.verbs.doctor import doctor\nwith contextlib.redirect_stdout(io.StringIO()) as told:\n    doctor('hf://owner/pair/a', as_json=True)\nresult = told.getvalue()"
    )
    assert json.loads(told)["hash"] == "matches the card"
    _, names = down(owner, "hf://owner/pair/a", "saelens")
    assert "sae_weights.safetensors" in names and "cfg.json" in names


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("hf://owner/pair", "; there are a, b"),
        ("hf://owner/pair/c", "known: a, b"),
        ("hf://owner/pair/a@v9", "known: main"),
        ("hf://owner/pairs/a", "did you mean 'owner/pair'"),
        ("hf://nobody/pair/a", "isn't there"),
    ],
)
def test_what_is_missing_is_answered_with_what_there_is(
    address: str, said: str, owner: Client, pair: Path
) -> None:
    with pytest.raises(SaekitError) as told:
        down(owner, address)
    assert said in str(told.value) and "\n" not in str(told.value)


DOWNLOADS = {
    "drop large": ("drop", "GET /_large", 1, None),
    "half large": ("half", "GET /_large", 1, None),
    "429 large": ("429", "GET /_large", 1, None),
    "spoilt large": ("spoil", "GET /_large", 1, "hash"),
    "spoilt card": ("spoil", "GET .*card.json", 1, "hash"),
    "500 large": ("500", "GET /_large", 99, "500"),
    "401 info": ("401", "GET /api/models", 99, "401"),
    "403 info": ("403", "GET /api/models", 99, "403"),
    "403 large": ("403", "GET /_large", 99, "403"),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_is_whole_or_refused_and_then_goes_on(
    name: str, hub: Served, owner: Client, pair: Path
) -> None:
    forget(owner)
    kind, match, times, said = DOWNLOADS[name]
    hub.fault(kind, match, times)
    if said:
        with pytest.raises(SaekitError) as told:
            down(owner, "hf://owner/pair/a")
        assert said in str(told.value) and TOKEN not in str(told.value)
        hub.calm()
    folder, _ = down(owner, "hf://owner/pair/a")
    assert same(native.load(folder), native.load(pair / "a"))


def test_offline_the_cache_answers_and_says_so(
    hub: Served, owner: Client, offline: Client, pair: Path
) -> None:
    forget(owner)
    folder, _ = down(owner, "hf://owner/pair/a")
    assert not owner.warnings
    commit = folder.parent.name
    assert down(offline, "hf://owner/pair/a")[0] == folder
    assert "HF_HUB_OFFLINE is set" in offline.warnings[0] and commit[:12] in offline.warnings[0]
    assert (
        down(offline, f"hf://owner/pair/a@{commit}")[0] == folder and not offline.warnings
    )  # it can't have changed
    for address, said in (
        ("hf://owner/pair/b", "known: a"),
        ("hf://owner/never", "the cache doesn't hold it"),
    ):
        with pytest.raises(SaekitError, match=said):
            down(offline, address)
    hub.fault("drop", "GET /api/models", 99)
    assert (
        down(owner, "hf://owner/pair/a")[0] == folder and "connection to the Hub failed" in owner.warnings[0]
    )
    served = len(hub.state()["served"])
    down(owner, f"hf://owner/pair/a@{commit}")
    assert len(hub.state()["served"]) == served  # and isn't asked for


LIST = "from saekit.hub.index import released\nresult = [row.address for row in released({model!r}, {hook_point!r})]"


def test_the_listing_is_by_model_and_hook_point(
    hub: Served, owner: Client, offline: Client, pair: Path, tmp_path: Path
) -> None:
    forget(owner)
    d = made(seed=50)
    d.reads, d.writes, d.card["data"]["model"] = (
        ("blocks.0.mlp:in",),
        ("blocks.0.mlp:out",),
        {"name": "a/big"},
    )
    native.save(d, tmp_path / "d")
    _, (address,), _ = up(owner, tmp_path / "d", "owner/listed")
    assert address == "hf://owner/listed/blocks.0.mlp-in"

    def rows(client: Client, model: str | None = None, hook_point: str | None = None) -> list[str]:
        return client.run(LIST.format(model=model, hook_point=hook_point))

    assert {address, "hf://owner/pair/a", "hf://owner/pair/b"} <= set(rows(owner))
    assert (
        rows(owner, "a/*")
        == [address]
        == rows(owner, None, "blocks.0.mlp:out")
        == rows(owner, "a/big", "*:in")
    )
    assert rows(owner, "a/big", POINT) == []
    assert rows(offline, "a/big") == [address] and "HF_HUB_OFFLINE is set" in offline.warnings[0]
    owner.run(
        "import huggingface_hub as h\nh.HfApi().create_commit('owner/listed', [h.CommitOperationAdd('saekit-index.json', b'{}')], commit_message='m')"
    )
    assert "hf://owner/pair/a" in rows(owner) and rows(owner, "a/big") == []
    assert any("owner/listed is left out" in said for said in owner.warnings)


def test_no_token_was_written_or_said(hub: Served, owner: Client, pair: Path) -> None:
    """After all of the above, in which the server repeated it in its messages."""
    assert any(owner.home.rglob("*.json")) and owner.said
    assert said_or_written(owner, TOKEN) == []


def test_load_takes_an_address_in_either_layout(
    hub: Served, owner: Client, pair: Path, tmp_path: Path
) -> None:
    """``saekit.load`` itself; what comes in SAELens's layout is the same function."""
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    torch.save(x, tmp_path / "x.pt")
    out = owner.run(
        "import torch, saekit\n"
        f"x = torch.load({str(tmp_path / 'x.pt')!r})\n"
        "result = [saekit.load('hf://owner/pair/a', format)(x).tolist() for format in (None, 'native', 'saelens')]"
    )
    expected = native.load(pair / "a")(x)
    for found in out:
        assert (torch.tensor(found) - expected).abs().max() <= 1e-5 * expected.abs().max()
