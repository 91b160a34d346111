from __future__ import annotations

import pytest

from core.errors import Conflict
from core.inference.adapter_bank import AdapterBank, AdapterKey

A, B, C = (AdapterKey("base", name) for name in "abc")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def evicted() -> list[AdapterKey]:
    return []


@pytest.fixture
def bank(clock: Clock, evicted: list[AdapterKey]) -> AdapterBank:
    return AdapterBank(2, evicted.append, failure_memory_seconds=30, clock=clock)


def load(bank: AdapterBank, clock: Clock, key: AdapterKey) -> None:
    clock.now += 1
    assert bank.pin(key)
    if not bank.is_resident(key):
        bank.loaded(key, bytes=10, load_ms=1.0)
    bank.unpin(key)


def test_the_longest_unused_leaves(
    bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]
) -> None:
    for key in (A, B, A, C):
        load(bank, clock, key)
    assert evicted == [B]
    assert [adapter.digest for adapter in bank.residents()] == ["c", "a"]
    assert (bank.loads, bank.evictions) == (3, 1)
    assert bank.describe(A).hits == 1


def test_what_is_in_use_stays(bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]) -> None:
    for key in (A, B):
        load(bank, clock, key)
        assert bank.pin(key)
    assert not bank.pin(C)
    assert evicted == []
    bank.unpin(B)
    assert bank.pin(C)
    assert evicted == [B]


def test_a_slot_is_taken_while_its_adapter_loads(bank: AdapterBank) -> None:
    assert bank.pin(A)
    assert bank.pin(B)
    assert not bank.is_resident(A)
    assert not bank.pin(C)
    # Whoever waited for A has left before it was there.
    bank.unpin(A)
    assert bank.pin(C)


def test_a_failed_load_frees_its_slot_and_is_remembered_for_a_while(
    bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]
) -> None:
    refusal = Conflict("no", code="adapter_has_no_effect")
    assert bank.pin(A)
    assert bank.pin(A)
    bank.failed(A, refusal, remember=True)
    bank.unpin(A)
    bank.unpin(A)
    assert bank.pin(B)
    assert bank.pin(C)
    assert evicted == []
    assert bank.load_failures == 1
    clock.now += 29
    assert bank.recent_failure(A) is refusal
    assert bank.recent_failure(AdapterKey("other base", "a")) is None
    clock.now += 2
    assert bank.recent_failure(A) is None


def test_a_failure_of_the_moment_is_not_remembered(bank: AdapterBank) -> None:
    assert bank.pin(A)
    bank.failed(A, Conflict("no"), remember=False)
    assert bank.recent_failure(A) is None


def test_unloading_takes_effect_when_the_last_user_leaves(
    bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]
) -> None:
    load(bank, clock, A)
    assert bank.pin(A)
    assert bank.unload("a")
    assert evicted == []
    assert bank.is_resident(A)
    bank.unpin(A)
    assert evicted == [A]
    assert not bank.unload("a")


def test_one_adapter_on_two_bases_is_two(bank: AdapterBank, clock: Clock) -> None:
    other = AdapterKey("other base", "a")
    load(bank, clock, A)
    assert bank.pin(other)
    assert not bank.is_resident(other)
