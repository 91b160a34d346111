from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.errors import NotFound, Unavailable
from core.storage.cache import ArtifactCache
from core.storage.disk import disk_errors


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def writing(content: bytes) -> Callable[[Path], None]:
    return lambda target: target.write_bytes(content) and None


def age(path: Path, seconds: float) -> None:
    """Have a copy unused for some time."""
    then = time.time() - seconds
    os.utime(path.parent, (then, then))


def test_a_copy_is_made_once_and_found_by_every_process(directory: Path) -> None:
    cache = ArtifactCache(directory, 100)
    path = cache.fetch("blobs", "a", writing(b"one"))
    assert path.read_bytes() == b"one"
    assert cache.fetch("blobs", "a", writing(b"two")) == path
    assert ArtifactCache(directory, 100).find("blobs", "a") == path
    assert cache.find("adapters", "a") is None
    assert path.read_bytes() == b"one"


def test_a_copy_that_cannot_be_made_leaves_nothing(directory: Path) -> None:
    def load(target: Path) -> None:
        target.write_bytes(b"half")
        raise NotFound("gone")

    cache = ArtifactCache(directory, 100)
    for _ in range(2):
        with pytest.raises(NotFound):
            cache.fetch("blobs", "a", load)
    assert cache.find("blobs", "a") is None
    assert not list((directory / "tmp").iterdir())


def test_the_longest_unused_leave_first_and_those_of_the_last_minutes_stay(directory: Path) -> None:
    cache = ArtifactCache(directory, 100)
    for name, seconds in [("old", 3000), ("older", 4000), ("used", 5000), ("new", 60)]:
        age(cache.fetch("blobs", name, writing(b"x" * 40)), seconds)
    assert cache.find("blobs", "used")

    cache.make_room(0)
    kept = {path.name for path in (directory / "blobs").iterdir()}
    assert kept == {"used", "new"}
    cache.make_room(90)
    assert {path.name for path in (directory / "blobs").iterdir()} == {"used", "new"}
    for name in ("used", "new"):
        age(directory / "blobs" / name / "content", 1000)
    cache.make_room(40)
    assert len(list((directory / "blobs").iterdir())) == 1


def test_an_open_copy_outlives_its_removal(directory: Path) -> None:
    cache = ArtifactCache(directory, 0)
    path = cache.fetch("blobs", "a", writing(b"one"))
    age(path, 4000)
    with path.open("rb") as stream:
        cache.make_room(0)
        assert cache.find("blobs", "a") is None
        assert stream.read() == b"one"


@pytest.mark.parametrize("sizes", ["", "{", "[]", "{}", '{"content": 4}', '{"other": 3}'])
def test_a_copy_of_another_size_than_noted_is_not_used(directory: Path, sizes: str) -> None:
    cache = ArtifactCache(directory, 100)
    path = cache.fetch("blobs", "a", writing(b"one"))
    (path.parent / "sizes.json").write_text(sizes)
    assert cache.find("blobs", "a") is None
    assert cache.fetch("blobs", "a", writing(b"two")).read_bytes() == b"two"


def test_a_full_disk_costs_the_unused_copies_first(directory: Path) -> None:
    cache = ArtifactCache(directory, 10**9)
    for name, seconds in [("old", 4000), ("new", 0)]:
        age(cache.fetch("blobs", name, writing(b"x")), seconds)
    tries = []

    def load(target: Path) -> None:
        tries.append(target)
        if len(tries) == 1:
            # A device that is always full.
            with Path("/dev/full").open("wb", buffering=0) as full:
                full.write(b"x")
        target.write_bytes(b"y")

    assert cache.fetch("blobs", "a", load).read_bytes() == b"y"
    assert cache.find("blobs", "old") is None
    assert cache.find("blobs", "new")
    tries.clear()
    with pytest.raises(Unavailable) as caught, disk_errors():
        load(directory)
    assert (caught.value.code, caught.value.retryable) == ("storage_full", True)
    assert caught.value.hint


def test_what_a_dead_process_left_is_swept_a_day_later(directory: Path) -> None:
    cache = ArtifactCache(directory, 100)
    with cache.temporary_file("blob") as fresh:
        fresh.write_bytes(b"x")
        old, tree = fresh.with_name("old"), fresh.with_name("tree")
        old.write_bytes(b"x")
        (tree / "below").mkdir(parents=True)
        for path in (old, tree):
            os.utime(path, (0, 0))
        cache.make_room(0)
        assert list(fresh.parent.iterdir()) == [fresh]
    assert not list(fresh.parent.iterdir())
