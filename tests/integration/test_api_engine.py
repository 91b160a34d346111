"""Names over HTTP with a real engine behind them: what answers is what the name says."""

from __future__ import annotations

import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

import httpx2
from peft import PeftModel
from starlette.testclient import TestClient

from core import base_models
from core.artifacts import CONFIG_FILE, WEIGHTS_FILE
from core.config import Settings
from core.queue import NullQueue
from migrations import upgrade
from service.app import create_app
from tests.soak.fingerprints import PROMPTS, Judge
from tests.support.adapters import AdapterMaker
from tests.support.api import Api, live_server, pack
from tests.support.engine_harness import LocalHarness
from tests.support.engine_world import World

_CLIENTS = 6
_REQUESTS = 300
_TOKENS = 8
_VERSIONS = 4
# So many answers between two changes, however fast answers or changes are here.
_REQUESTS_PER_MOVE = 8
_MOVES_PER_IMPORT = 8


class _Names:
    """What names have stood for, and when.

    Attributes:
        answers: By digest, for each prompt the first tokens that are certain.
        wrong: What must not happen.
        complete: Set while every name stands for something.
    """

    def __init__(self) -> None:
        self.answers: dict[str, tuple[tuple[int, ...], ...]] = {}
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.complete = threading.Event()
        self._lock = threading.Lock()
        # By name: from when, until when, and what.
        self._history: dict[str, list[tuple[float, float, str]]] = {}

    @contextmanager
    def moving(self, name: str, digest: str) -> Iterator[None]:
        """Note that a name stands for an adapter, from some moment within this context on."""
        with self._lock:
            history = self._history.setdefault(name, [])
            history.append((time.monotonic(), inf, digest))
        yield
        now = time.monotonic()
        with self._lock:
            history[:-1] = [(start, min(end, now), known) for start, end, known in history[:-1]]

    def meant(self, name: str, start: float, end: float) -> set[str]:
        """Return what a name may have stood for in a time."""
        with self._lock:
            history = list(self._history[name])
        return {digest for since, until, digest in history if since <= end and until >= start}


def test_names_that_move_and_are_given_anew_never_stand_for_other_weights(tmp_path: Path) -> None:
    world = World(tmp_path)
    maker = AdapterMaker(Path(world.base.path))
    names, judge, archives = _Names(), Judge(1e-3), []
    for seed in range(_VERSIONS + 2):
        path = maker.make(tmp_path / f"adapter-{seed}", seed=seed)
        archives.append(
            pack({name: (path / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)})
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            tuned = PeftModel.from_pretrained(maker.model, path).eval()
        names.answers[f"seed {seed}"] = judge.answers(tuned, maker.tokenizer)
        maker.take_back(tuned)
    for prompt in range(len(PROMPTS)):
        first = [answers[prompt][:_TOKENS] for answers in names.answers.values()]
        assert len(set(first)) == len(first), "two adapters answer alike"

    settings = Settings(data_dir=world.data_dir)
    settings.root.mkdir(parents=True)
    upgrade(settings.resolved_database_url)
    # Less room than there are adapters, so that they come and go.
    harness = LocalHarness(world, max_adapters=3, max_waiting=100)
    app = create_app(settings, engine=harness.engine, queue=NullQueue())
    api: Any = Api(app, TestClient(app), harness.engine, NullQueue(), settings)  # type: ignore[arg-type]
    base_models.add(api.database, settings, "tiny", world.base.path)
    try:
        with live_server(api) as url:
            _run(url, archives, names)
    finally:
        harness.engine.stop()
    assert names.wrong == []
    assert names.counts["answered"] > 0.9 * _REQUESTS
    # Only of the name that is deleted and given anew.
    assert names.counts["gone"] < 0.1 * _REQUESTS
    assert names.counts["moved"] > 10
    assert names.counts["given anew"] > 3


def _run(url: str, archives: list[bytes], names: _Names) -> None:
    with httpx2.Client(base_url=url, timeout=60) as client:

        def take_in(name: str, seed: int) -> str:
            answer = client.post(
                "/adapters/import",
                params={"name": name, "base_model": "tiny"},
                files={"file": ("adapter.tar.gz", archives[seed], "application/gzip")},
            )
            assert answer.status_code == 201, answer.text
            version = answer.json()
            names.answers[version["digest"]] = names.answers[f"seed {seed}"]
            return str(version["digest"])

        def move(version: int) -> None:
            with names.moving("red:prod", digests[version]):
                answer = client.put("/adapters/red/aliases/prod", json={"version": version})
                assert answer.status_code == 200, answer.text
            names.counts["moved"] += 1

        digests = {seed + 1: take_in("red", seed) for seed in range(_VERSIONS)}
        for name, version in (("red", _VERSIONS), ("red@2", 2), ("red@3", 3)):
            with names.moving(name, digests[version]):
                pass
        move(1)
        take_in("blue", _VERSIONS + 1)
        client.delete("/adapters/blue", params={"force": True})
        take_in("blue", _VERSIONS)
        names.complete.set()

        left = iter(range(_REQUESTS))
        with ThreadPoolExecutor(_CLIENTS) as pool:
            clients = [
                pool.submit(_ask_until_none_is_left, url, left, names, number)
                for number in range(_CLIENTS)
            ]
            turn = 0
            while not all(done.done() for done in clients):
                if names.counts["answered"] < turn * _REQUESTS_PER_MOVE:
                    time.sleep(0.005)
                    continue
                turn += 1
                move(turn % _VERSIONS + 1)
                if turn % _MOVES_PER_IMPORT == 0:
                    names.complete.clear()
                    client.delete("/adapters/blue", params={"force": True})
                    take_in("blue", _VERSIONS + turn // _MOVES_PER_IMPORT % 2)
                    names.complete.set()
                    names.counts["given anew"] += 1
            for done in clients:
                done.result()


def _ask_until_none_is_left(url: str, left: Any, names: _Names, number: int) -> None:
    chance = random.Random(number)
    references = ["red", "red:prod", "red:prod", "red@2", "red@3", "blue", "blue@1"]
    with httpx2.Client(base_url=url, timeout=60) as client:
        for _ in left:
            reference, prompt = chance.choice(references), chance.randrange(len(PROMPTS))
            started = time.monotonic()
            answer = client.post(
                "/generate",
                params={"adapter": reference},
                json={
                    "prompt": PROMPTS[prompt],
                    "max_new_tokens": _TOKENS,
                    "min_new_tokens": _TOKENS,
                    "logprobs": 0,
                },
            )
            ended = time.monotonic()
            if answer.status_code == 404 and reference.startswith("blue"):
                names.counts["gone"] += 1
                # Once for each time that it is gone, however long that takes.
                assert names.complete.wait(60)
                continue
            if answer.status_code != 200:
                names.wrong.append(f"{reference}: {answer.text}")
                continue
            found = answer.json()
            digest = found["adapter"]["digest"]
            names.counts["answered"] += 1
            if reference.startswith("red") and digest not in (
                meant := names.meant(reference, started, ended)
            ):
                names.wrong.append(f"{reference} was answered by {digest}, not one of {meant}")
            expected = names.answers[digest][prompt][:_TOKENS]
            ids = tuple(entry["token_id"] for entry in found["choices"][0]["logprobs"])
            if ids[: len(expected)] != expected or not expected:
                names.wrong.append(f"{reference} as {digest}: {ids}, not {expected}")
