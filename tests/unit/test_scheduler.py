from __future__ import annotations

import itertools

import pytest

from core.errors import Unavailable
from core.inference.engine import BaseModelRef, GenerateRequest, SamplingParams
from core.inference.scheduler import Scheduler
from core.inference.work import Work

BASE = BaseModelRef(name="base", digest="0" * 64, path="/nowhere")
_ids = itertools.count()


class Complete(Work):
    """A request that has computed what was expected of it whenever it ends."""

    @property
    def computed_tokens(self) -> int:
        return self.expected_tokens


def work(project: str = "a", *, n: int = 1, tokens: int = 100) -> Work:
    request = GenerateRequest(
        request_id=f"gen_{next(_ids)}",
        project_id=project,
        base_model=BASE,
        prompt="",
        sampling=SamplingParams(n=n, max_new_tokens=tokens),
    )
    return Complete(BASE, None, request, lambda outcome: None)


def scheduler(*, waiting: int = 1000, rows: int = 4) -> Scheduler:
    return Scheduler(max_waiting=waiting, max_rows=rows)


def fill(one: Scheduler, *works: Work) -> None:
    for each in works:
        assert one.enqueue(each) is None


def admit_all(one: Scheduler) -> list[Work]:
    return list(iter(lambda: one.admit(lambda _: True), None))


def test_a_project_goes_on_in_order_as_rows_allow() -> None:
    one = scheduler(rows=4)
    works = [work() for _ in range(6)]
    fill(one, *works)
    assert admit_all(one) == works[:4]
    assert one.remove(works[1])
    assert admit_all(one) == [works[4]]
    assert (one.waiting, len(one.admitted)) == (1, 4)


def test_a_lone_request_beside_a_hundred_is_next() -> None:
    one = scheduler(rows=4)
    fill(one, *(work("many") for _ in range(100)))
    busy = admit_all(one)
    lone = work("lone")
    fill(one, lone)
    # It need not even wait for a row: one is spare for who has none.
    assert admit_all(one) == [lone]
    again = work("lone")
    fill(one, again)
    next_ones = []
    for each in busy:
        one.remove(each)
        next_ones += admit_all(one)
    assert again in next_ones[:2]


def test_turns_go_by_tokens_not_by_requests() -> None:
    one = scheduler(rows=1)
    fill(one, *(work("short", tokens=10) for _ in range(100)))
    fill(one, *(work("long", tokens=50) for _ in range(100)))
    served = []
    for _ in range(60):
        (admitted,) = admit_all(one)
        served.append(admitted.project_id)
        one.remove(admitted)
    # A tenth of the requests would be unfair, and so would half of them.
    assert 8 <= served.count("long") <= 12


def test_who_comes_back_has_saved_nothing_up() -> None:
    one = scheduler(rows=1)
    fill(one, *(work("steady") for _ in range(50)))
    for _ in range(20):
        (admitted,) = admit_all(one)
        one.remove(admitted)
    fill(one, *(work("late") for _ in range(50)))
    served = []
    for _ in range(20):
        (admitted,) = admit_all(one)
        served.append(admitted.project_id)
        one.remove(admitted)
    assert 9 <= served.count("late") <= 11


def test_what_lacks_something_is_overtaken_but_not_for_ever() -> None:
    one = scheduler(rows=4)
    stuck = work()
    fill(one, stuck)
    admitted = 0
    while True:
        other = work()
        fill(one, other)
        found = one.admit(lambda each: each is not stuck)
        if found is None:
            break
        assert found is not stuck
        admitted += 1
        one.remove(found)
        assert admitted < 1000, "it is overtaken for ever"
    assert admitted > 4
    assert one.admit(lambda each: True) is stuck
    assert one.admit(lambda each: True) is other


def test_many_rows_get_their_turn_beside_a_stream_of_few() -> None:
    one = scheduler(rows=4)
    fill(one, work())
    running = admit_all(one)
    wide = work(n=4)
    fill(one, wide)
    turns = 0
    while wide not in running:
        turns += 1
        one.remove(running.pop(0))
        fill(one, work())
        running += admit_all(one)
    assert turns < 100


def test_memory_for_rows_goes_by_the_same_rule() -> None:
    one = scheduler(rows=4)
    big, small = work(), work()
    fill(one, big, small)
    for each in admit_all(one):
        one.prepared(each)
    assert one.start(lambda each: each is small) is small
    assert one.running == [small]
    assert one.start(lambda each: True) is big
    assert one.start(lambda each: True) is None


def test_a_full_queue_refuses_who_has_most_in_it() -> None:
    one = scheduler(waiting=4, rows=1)
    mine = [work("mine") for _ in range(4)]
    fill(one, *mine)
    with pytest.raises(Unavailable) as refused:
        one.enqueue(work("mine"))
    assert refused.value.code == "engine_full"
    assert one.enqueue(work("yours")) is mine[3]
    assert one.enqueue(work("yours")) is mine[2]
    with pytest.raises(Unavailable):
        one.enqueue(work("yours"))
    assert one.waiting == 4


def test_everything_is_forgotten_at_the_end() -> None:
    one = scheduler(rows=4)
    works = [work(f"project-{number}") for number in range(200)]
    fill(one, *works)
    while one.waiting or one.admitted:
        for each in admit_all(one):
            one.prepared(each)
            assert one.start(lambda _: True) is each
            one.decoding.append(each)
            assert one.remove(each)
            assert not one.remove(each)
    assert one._given_tokens == {}
    assert one._rows_by_project == {}
    assert one._rows == 0
