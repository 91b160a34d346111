from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest
from kombu import Connection

from core import file_broker
from core.config import Settings
from core.queue import QUEUES, CeleryQueue, JobQueue, NullQueue

QUEUE = QUEUES["train"]


@pytest.fixture
def broker(tmp_path: Path) -> Path:
    file_broker.register()
    return tmp_path / "broker"


def channel(broker: Path) -> Any:
    options = file_broker.transport_options(broker)
    return Connection(f"{file_broker.SCHEME}://localhost", transport_options=options).channel()


def test_concurrent_readers_get_every_message_once(broker: Path) -> None:
    writing = threading.Event()
    writing.set()
    received: list[int] = []

    def write(first: int) -> None:
        writer = channel(broker)
        for number in range(first, first + 100):
            writer._put(QUEUE, {"number": number})

    def read() -> None:
        reader = channel(broker)
        while True:
            done = not writing.is_set()
            try:
                received.append(reader._get(QUEUE)["number"])
            except Empty:
                if done:
                    return

    readers = [threading.Thread(target=read) for _ in range(3)]
    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 100)]
    for thread in [*readers, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    writing.clear()
    for thread in readers:
        thread.join()
    assert sorted(received) == list(range(200))
    assert list((broker / "messages").iterdir()) == []


def test_no_message_is_ever_seen_half_written(broker: Path) -> None:
    writer, large = channel(broker), {"text": "x" * 5_000_000}
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for path in (broker / "messages").glob(f"*.{QUEUE}.msg"):
                seen.append(len(json.loads(path.read_bytes())["text"]))

    watching = threading.Thread(target=watch)
    watching.start()
    for _ in range(10):
        writer._put(QUEUE, large)
    done.set()
    watching.join()
    assert set(seen) == {5_000_000}


def test_queues_do_not_mix_and_messages_come_in_order(broker: Path) -> None:
    both = channel(broker)
    for number in range(3):
        both._put(QUEUE, {"number": number})
        both._put(QUEUES["light"], {"number": -number})
    assert (both._size(QUEUE), both._purge(QUEUES["light"])) == (3, 3)
    assert [both._get(QUEUE)["number"] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(Empty):
        both._get(QUEUE)


def test_a_damaged_message_is_dropped_and_a_wiped_directory_made_again(broker: Path) -> None:
    both = channel(broker)
    for content in (b"", b"{", b"[]"):
        (broker / "messages" / f"{len(content):05d}.{QUEUE}.msg").write_bytes(content)
    both._put(QUEUE, {"number": 1})
    assert both._get(QUEUE) == {"number": 1}
    (broker / "messages").rmdir()
    with pytest.raises(Empty):
        both._get(QUEUE)
    (broker / "messages").rmdir()
    both._put(QUEUE, {"number": 2})
    assert both._get(QUEUE) == {"number": 2}


def test_the_broker_is_private_to_its_user(broker: Path) -> None:
    channel(broker)._put(QUEUE, {})
    for path in (broker, *broker.rglob("*")):
        assert path.is_file() or path.stat().st_mode & 0o077 == 0, path


@pytest.fixture(params=["refusing", "silent"])
def dead_broker(request: pytest.FixtureRequest) -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "silent":
            server.listen(8)
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


def test_a_dead_broker_neither_fails_nor_delays_whoever_wakes(
    dead_broker: str, tmp_path: Path
) -> None:
    queue = CeleryQueue(Settings(data_dir=tmp_path, broker_url=dead_broker, idle_poll_seconds=60))
    try:
        started = time.monotonic()
        queue.wake("train")
        first = time.monotonic() - started
        for _ in range(100):
            queue.wake("light")
        others = time.monotonic() - started - first
    finally:
        queue.close()
    assert first < 3
    assert others < 0.1


def test_the_null_queue_remembers_who_was_woken() -> None:
    null = NullQueue()
    queue: JobQueue = null
    queue.wake("light")
    queue.wake("train")
    assert null.woken == ["light", "train"]
