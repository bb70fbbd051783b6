"""Fixtures of a loopback Hub; a test module asks for them with ``pytest_plugins = ["hub_fixtures"]``."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client, made, up
from hub_server import Served, serving

from saekit.hub import native


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """The Hub's process, one for a module."""
    with serving() as running:
        yield running


@pytest.fixture
def hub(served: Served) -> Served:
    """The Hub, without faults."""
    served.calm()
    return served


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's cache, and all else that huggingface_hub writes."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def owner(served: Served, home: Path) -> Iterator[Client]:
    """The process of a user who may write."""
    client = Client(served, home)
    yield client
    client.end()


@pytest.fixture(scope="module")
def pair(served: Served, owner: Client, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two dictionaries in the repository ``owner/pair``, which came by two calls."""
    folder = tmp_path_factory.mktemp("pair")
    for i, name in enumerate(("a", "b")):
        native.save(made(seed=20 + i), folder / name)
        up(owner, {name: str(folder / name)}, "owner/pair", layouts=None if name == "a" else ["native"])
    return folder
