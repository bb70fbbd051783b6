"""Publishing to a Hub on loopback, with faults: complete in one commit or not at all, and the same call goes on."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_client import CALL, POINT, SETTLED, TOKEN, Client, down, made, said_or_written, same, up
from hub_server import Served

from saekit.errors import SaekitError
from saekit.hub import native

pytest_plugins = ["hub_fixtures"]


@pytest.fixture(scope="module")
def other(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Another process, with a cache of its own; it loses its token in the test of private repositories."""
    client = Client(served, tmp_path_factory.mktemp("other"))
    yield client
    client.end()


def test_what_was_published_is_loaded_bit_for_bit_after_one_commit(
    hub: Served, owner: Client, tmp_path: Path
) -> None:
    native.save(made(seed=1), tmp_path / "d")
    commit, addresses, files = up(owner, tmp_path / "d", "owner/first")
    state = hub.state()
    assert state["heads"]["owner/first"] == {"main": commit}
    assert sum("/commit/" in line for line in state["served"]) == 1
    assert set(state["repos"]["owner/first"]["main"]) == {*files, ".gitattributes"}
    folder, names = down(owner, addresses[0])
    assert names == ["card.json", "dictionary.safetensors"]
    assert same(native.load(folder), made(seed=1)) and native.load(folder).card["licence"] == "mit"
    again, _, _ = up(owner, tmp_path / "d", "owner/first")
    assert again == commit  # nothing has changed, so nothing is committed


# what fails, on what, how often: in passing it ends complete; else nothing is seen, and the same call ends it
PASSING = {
    "drop info": ("drop", "GET /api/models/owner", 1),
    "drop create": ("drop", "POST /api/repos/create", 1),
    "lost create": ("lost", "POST /api/repos/create", 1),
    "500 card": ("500", "validate-yaml", 1),
    "503 preupload": ("503", "/preupload/", 1),
    "429 batch": ("429", "objects/batch", 1),
    "429 commit": ("429", "/commit/", 1),
    "drop put": ("drop", "PUT", 1),
    "500 put": ("500", "PUT", 1),
    "drop commit": ("drop", "/commit/", 1),
    "lost commit": ("lost", "/commit/", 1),
    "500 commit": ("500", "/commit/", 1),
    "drop tree": ("drop", "GET .*/tree/", 1),
}
LASTING = {
    "401 info": ("401", "GET /api/models/owner", 99, "401"),
    "401 commit": ("401", "/commit/", 99, "401"),
    "403 commit": ("403", "/commit/", 99, "403"),
    "403 create": ("403", "POST /api/repos/create", 99, "403"),
    "403 batch": ("403", "objects/batch", 99, "403"),
    "500 commit": ("500", "/commit/", 99, "500"),
    "429 commit": ("429", "/commit/", 99, "429"),
    "drop commit": ("drop", "/commit/", 99, "connection"),
    "spoilt put": ("spoil", "PUT", 1, "hash"),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_ends_in_one_complete_commit(
    name: str, hub: Served, owner: Client, tmp_path: Path
) -> None:
    kind, match, times = PASSING[name]
    native.save(made(seed=200 + list(PASSING).index(name)), tmp_path / "d")
    repo = f"owner/passing-{name.replace(' ', '-')}"
    hub.fault(kind, match, times)
    commit, _, files = up(owner, tmp_path / "d", repo)
    state = hub.state()
    assert state["heads"][repo]["main"] == commit
    assert set(state["repos"][repo]["main"]) == {*files, ".gitattributes"}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_leaves_nothing_and_the_same_call_goes_on(
    name: str, hub: Served, owner: Client, tmp_path: Path
) -> None:
    kind, match, times, said = LASTING[name]
    native.save(made(seed=100 + list(LASTING).index(name)), tmp_path / "d")
    repo = f"owner/lasting-{name.replace(' ', '-')}"
    hub.fault(kind, match, times)
    before = hub.state()
    with pytest.raises(SaekitError) as told:
        up(owner, tmp_path / "d", repo)
    assert (
        said in str(told.value) and "run the same again" in str(told.value) and TOKEN not in str(told.value)
    )
    after = hub.state()
    assert after["repos"].get(repo, {}).get("main", [".gitattributes"]) == [".gitattributes"]
    hub.calm()
    _, _, files = up(owner, tmp_path / "d", repo)
    final = hub.state()
    assert set(final["repos"][repo]["main"]) == {*files, ".gitattributes"}
    sent_again = final["received"] - after["received"]
    arrived = len(after["large"]) > len(before["large"])
    assert arrived == (sent_again == 0)  # what had arrived isn't sent twice
    assert arrived == (match == "/commit/")


def test_an_upload_that_was_killed_goes_on(hub: Served, owner: Client, tmp_path: Path) -> None:
    native.save(made(seed=7), tmp_path / "d")
    hub.fault("stall", "/commit/owner|/commit/main")
    other = Client(hub, tmp_path / "home")
    other.send(CALL.format(source=str(tmp_path / "d"), repo="owner/killed", options=SETTLED))
    deadline = time.monotonic() + 60
    while not any("/commit/" in line for line in hub.state()["served"]):
        assert time.monotonic() < deadline and other.process.poll() is None, other.said
        time.sleep(0.05)
    other.end()
    state = hub.state()
    assert state["repos"]["owner/killed"]["main"] == [".gitattributes"]
    hub.calm()
    _, _, files = up(owner, tmp_path / "d", "owner/killed")
    assert set(hub.state()["repos"]["owner/killed"]["main"]) == {*files, ".gitattributes"}
    assert hub.state()["received"] == state["received"]


def test_a_new_version_leaves_no_file_of_the_old(hub: Served, owner: Client, tmp_path: Path) -> None:
    native.save(made(seed=30), tmp_path / "d")
    up(owner, {"x": str(tmp_path / "d")}, "owner/newer", layouts=None)
    native.save(made(seed=31), tmp_path / "d")
    _, _, files = up(owner, {"x": str(tmp_path / "d")}, "owner/newer")
    assert set(hub.state()["repos"]["owner/newer"]["main"]) == {*files, ".gitattributes"}
    assert "x/sae_weights.safetensors" not in files
    folder, _ = down(owner, "hf://owner/newer/x")
    assert same(native.load(folder), made(seed=31))


def test_a_commit_that_came_in_between_is_kept(
    hub: Served, owner: Client, other: Client, tmp_path: Path
) -> None:
    native.save(made(seed=40), tmp_path / "mine")
    native.save(made(seed=41), tmp_path / "theirs")
    up(other, {"first": str(tmp_path / "mine")}, "owner/both")
    hub.fault(
        "lost", "PUT"
    )  # the first try ends after it has read the repository's state; then come the others
    hub.fault("503", "objects/batch", 1)  # and waits a second here
    other.send(CALL.format(source={"mine": str(tmp_path / "theirs")}, repo="owner/both", options=SETTLED))
    while not any("objects/batch" in line for line in hub.state()["served"]):
        time.sleep(0.02)
    up(owner, {"theirs": str(tmp_path / "mine")}, "owner/both")
    told = other.answer()
    assert told["kind"] is None, told
    names = {name.split("/")[0] for name in hub.state()["repos"]["owner/both"]["main"] if "/" in name}
    assert names == {"first", "mine", "theirs"}


def test_a_repository_that_others_made_is_refused(hub: Served, owner: Client, tmp_path: Path) -> None:
    native.save(made(), tmp_path / "d")
    owner.run(
        "import huggingface_hub as h\nh.create_repo('owner/model')\n"
        "h.HfApi().create_commit('owner/model', [h.CommitOperationAdd('README.md', b'---\\nlicense: mit\\ntags: [x]\\nbase_model: y\\n---\\n')], commit_message='m')"
    )  # fmt: skip
    before = hub.state()["heads"]["owner/model"]
    with pytest.raises(SaekitError, match=r"README.md.*didn't make it"):
        up(owner, tmp_path / "d", "owner/model")
    assert hub.state()["heads"]["owner/model"] == before


def test_private_is_private_and_never_turns_public(
    hub: Served, owner: Client, other: Client, pair: Path
) -> None:
    with pytest.raises(SaekitError, match="public already"):
        up(owner, pair / "a", "owner/pair", private=True)
    up(owner, pair / "a", "owner/hidden", private=True)
    assert hub.state()["private"]["owner/hidden"]
    other.run("import os; del os.environ['HF_TOKEN']")
    with pytest.raises(SaekitError, match=r"hidden.*HF_TOKEN"):
        down(other, f"hf://owner/hidden/{POINT}")
    with pytest.raises(SaekitError, match="there is no token"):
        up(other, pair / "a", "owner/hidden")


def test_another_licence_in_one_repository_is_refused(owner: Client, pair: Path) -> None:
    with pytest.raises(SaekitError, match=r"licence 'apache-2\.0' is not the 'mit'"):
        up(owner, {"c": str(pair / "a")}, "owner/pair", licence="apache-2.0")


def test_a_branch_is_made_and_the_main_one_stays(hub: Served, owner: Client, pair: Path) -> None:
    before = hub.state()["heads"]["owner/pair"]["main"]
    _, addresses, _ = up(owner, {"a": str(pair / "b")}, "owner/pair", revision="v2")
    assert hub.state()["heads"]["owner/pair"]["main"] == before and addresses == ["hf://owner/pair/a@v2"]
    assert same(native.load(down(owner, addresses[0])[0]), native.load(pair / "b"))
    assert same(native.load(down(owner, "hf://owner/pair/a")[0]), native.load(pair / "a"))


def test_no_token_was_written_or_said(hub: Served, owner: Client) -> None:
    """After all of the above, in which the server repeated it in its messages."""
    assert any(owner.home.rglob("*.json")) and owner.said  # there was something to look at
    assert said_or_written(owner, TOKEN) == []


@pytest.mark.peer
def test_saelens_loads_what_was_published(hub: Served, owner: Client, good: Path, tmp_path: Path) -> None:
    """SAELens itself, from the loopback Hub, of a dictionary that was trained: its codes are ours."""
    python = os.environ.get("SAEKIT_PEERS")
    if not python:
        pytest.skip("SAEKIT_PEERS names no python with SAELens")
    d = native.load(good / "run")
    d.card["metrics"] = made().card["metrics"]
    native.save(d, tmp_path / "run")
    up(owner, tmp_path / "run", "owner/shared", layouts=None)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + 3.0
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch; from sae_lens import SAE\n"
        f"sae = SAE.from_pretrained(release='owner/shared', sae_id={POINT!r}, device='cpu')\n"
        "sae = sae[0] if isinstance(sae, tuple) else sae\n"
        "x = torch.load(sys.argv[1]); codes = sae.encode(x)\n"
        "torch.save({'codes': codes.detach(), 'out': sae.decode(codes).detach()}, sys.argv[2])\n"
    )
    env = {**owner.env, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [python, "-P", "-c", code, str(tmp_path / "x.pt"), str(tmp_path / "y.pt")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert any("sae_weights" in line for line in hub.state()["served"])
    theirs = torch.load(tmp_path / "y.pt")
    codes = d.encode(x)
    dense = codes.to_dense()
    assert torch.equal(theirs["codes"] != 0, dense != 0)
    out = d.decode(codes, x)
    assert (theirs["out"] - out).abs().max() <= 1e-5 * out.abs().max()
    d = d.to_inference()
    assert (theirs["codes"] - d.encode(x).to_dense()).abs().max() <= 1e-5 * dense.abs().max()
