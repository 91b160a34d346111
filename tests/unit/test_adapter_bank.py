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


def test_bytes_bound_the_bank_as_slots_do(clock: Clock, evicted: list[AdapterKey]) -> None:
    bank = AdapterBank(10, evicted.append, max_bytes=100, clock=clock)
    for key, size in ((A, 40), (B, 50)):
        assert bank.pin(key)
        assert bank.make_room(size)
        bank.loaded(key, bytes=size, load_ms=1.0)
    assert bank.pin(C)
    assert not bank.make_room(20)
    bank.unpin(B)
    assert bank.make_room(20)
    assert (evicted, bank.bytes) == ([B], 40)
    with pytest.raises(Conflict) as refused:
        bank.make_room(101)
    assert refused.value.code == "adapter_too_large"


def test_what_took_long_to_load_stays_longer(
    bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]
) -> None:
    for key, load_ms in ((A, 100.0), (B, 10.0)):
        clock.now += 1
        assert bank.pin(key)
        bank.loaded(key, bytes=10, load_ms=load_ms)
        bank.unpin(key)
    clock.now += 1
    assert bank.pin(C)
    assert evicted == [B]
    bank.loaded(C, bytes=10, load_ms=1000.0)
    bank.unpin(C)
    # But not for ever.
    clock.now += 10
    for _ in range(20):
        clock.now += 10
        assert bank.pin(C)
        bank.unpin(C)
    assert bank.pin(B)
    assert evicted == [B, A]


def test_kept_adapters_stay_and_never_fill_the_bank(
    clock: Clock, evicted: list[AdapterKey]
) -> None:
    bank = AdapterBank(4, evicted.append, max_bytes=100, clock=clock)
    load(bank, clock, A)
    bank.keep(A)
    for number in range(20):
        load(bank, clock, AdapterKey("base", f"other-{number}"))
    assert bank.is_resident(A)
    assert bank.describe(A).kept
    load(bank, clock, B)
    bank.keep(B)
    load(bank, clock, C)
    with pytest.raises(Conflict) as refused:
        bank.keep(C)
    assert refused.value.code == "kept_adapters_full"
    # What fits in no other way is more important than keeping.
    large = AdapterKey("base", "large")
    assert bank.pin(large)
    assert bank.make_room(85)
    assert not (bank.is_resident(A) and bank.is_resident(B))
    bank.loaded(large, bytes=85, load_ms=1.0)
    bank.unpin(large)
    assert bank.release("b")
    assert not bank.release("b")


def test_adapters_that_have_left_are_told_and_a_small_bank_is_warned_of(
    bank: AdapterBank, clock: Clock
) -> None:
    load(bank, clock, A)
    load(bank, clock, B)
    assert bank.warning() is None
    load(bank, clock, C)
    assert [(gone.digest, gone.tier, gone.evictions) for gone in bank.evicted()] == [
        ("a", "disk", 1)
    ]
    assert "3 adapters" in str(bank.warning())
    clock.now += 700
    load(bank, clock, C)
    assert bank.warning() is None


def test_a_base_model_leaves_with_its_adapters(
    bank: AdapterBank, clock: Clock, evicted: list[AdapterKey]
) -> None:
    other = AdapterKey("other base", "b")
    load(bank, clock, A)
    load(bank, clock, other)
    bank.drop_base("base")
    assert evicted == [A]
    assert bank.bytes == 10
