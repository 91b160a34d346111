from __future__ import annotations

import itertools

import pytest

from core.errors import Conflict
from core.inference.base_shelf import BaseShelf


@pytest.fixture
def evicted() -> list[str]:
    return []


@pytest.fixture
def shelf(evicted: list[str]) -> BaseShelf:
    return BaseShelf(100, evicted.append, clock=lambda ticks=itertools.count(): next(ticks))


def use(shelf: BaseShelf, digest: str, size: int) -> None:
    assert shelf.pin(digest, lambda: size)
    shelf.loaded(digest, size)
    shelf.unpin(digest)


def test_the_longest_unused_leave_until_there_is_room(shelf: BaseShelf, evicted: list[str]) -> None:
    for digest in "abc":
        use(shelf, digest, 30)
    use(shelf, "a", 30)
    use(shelf, "d", 65)
    assert evicted == ["b", "c"]
    assert (shelf.bytes, shelf.loads, shelf.evictions) == (95, 5, 2)


def test_what_is_in_use_stays_and_nobody_leaves_in_vain(
    shelf: BaseShelf, evicted: list[str]
) -> None:
    use(shelf, "a", 30)
    assert shelf.pin("b", lambda: 60)
    assert not shelf.pin("c", lambda: 50)
    assert evicted == []
    shelf.loaded("b", 20)
    assert shelf.pin("c", lambda: 50)
    assert evicted == []


def test_a_model_larger_than_the_shelf_is_refused(shelf: BaseShelf) -> None:
    with pytest.raises(Conflict) as refused:
        shelf.pin("a", lambda: 101)
    assert refused.value.code == "base_model_too_large"


def test_a_failed_load_gives_its_memory_back(shelf: BaseShelf) -> None:
    assert shelf.pin("a", lambda: 100)
    assert not shelf.pin("b", lambda: 1)
    shelf.failed("a")
    shelf.unpin("a")
    assert shelf.pin("b", lambda: 100)
