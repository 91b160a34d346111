"""An adapter whose files leave, or leave and come back, while an engine reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core import artifacts
from core.errors import Conflict, NotFound
from core.inference import gates
from core.inference.model_runner import ModelRunner
from core.storage import LocalStore
from tests.support.engine_world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def facts(world: World) -> gates.BaseFacts:
    return ModelRunner("cpu", threads=1, precision="float32").load_base(world.base).facts


def _as_read(weights: gates.AdapterWeights) -> gates.AdapterWeights:
    return weights


def _meanwhile(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Do something once, after the manifest was read and before the files are hashed."""
    left = [do]

    def verify(directory: Path, *rest: Any) -> None:
        if left:
            left.pop()()
        artifacts.verify_files(directory, *rest)

    monkeypatch.setattr(gates, "verify_files", verify)


def test_one_that_is_deleted_is_not_found(
    world: World, facts: gates.BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.a.digest
    path = world.locate_adapter(digest)
    _meanwhile(monkeypatch, lambda: LocalStore(world.data_dir).delete_adapter(digest))
    with pytest.raises(NotFound) as caught:
        gates.read_adapter(path, digest, facts, _as_read)
    assert caught.value.code == "adapter_files_missing"
    with pytest.raises(NotFound):
        gates.read_adapter(path, digest, facts, _as_read)


def test_one_that_is_deleted_and_published_anew_is_read(
    world: World, facts: gates.BaseFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = world.a.digest
    store = LocalStore(world.data_dir)
    path = world.locate_adapter(digest)

    def give_anew() -> None:
        # Gone for a moment that the reader notices, as its files are of the directory that left.
        path.rename(world.root / "gone")
        store.publish_adapter(world.root / "gone")
        (world.root / "gone" / artifacts.WEIGHTS_FILE).unlink()
        raise FileNotFoundError(artifacts.WEIGHTS_FILE)

    _meanwhile(monkeypatch, give_anew)
    assert gates.read_adapter(path, digest, facts, _as_read).digest == digest


@pytest.mark.parametrize("name", [artifacts.CONFIG_FILE, artifacts.WEIGHTS_FILE])
def test_one_that_has_lost_a_file_is_refused(
    world: World, facts: gates.BaseFacts, name: str
) -> None:
    path = world.locate_adapter(world.a.digest)
    (path / name).unlink()
    with pytest.raises(Conflict) as caught:
        gates.read_adapter(path, world.a.digest, facts, _as_read)
    assert caught.value.code == "digest_mismatch"
