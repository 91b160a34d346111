"""Clients that ask an engine at random and check every answer."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Literal

from core.errors import NotFound, TunesmithError
from core.inference.engine import (
    AdapterRef,
    Delta,
    Done,
    Engine,
    EventStream,
    Finished,
    GenerateRequest,
    Started,
)
from tests.soak.fingerprints import PROMPTS, TOKENS, Subject
from tests.support.engine_limits import is_idle, wait_for
from tests.support.engine_world import make_request

_PROJECTS = ("red", "green", "blue")
_MIB = 1024**2
# Of ten thousand requests: how often something other than asking is done.
_CANCELLED, _GIVEN_UP = 700, 300
_LOADED, _UNLOADED, _KEPT, _MOVED, _REGISTERED, _TWIN = 100, 300, 50, 100, 200, 20
_OF = 10_000
# Requests to the base model alone, after which memory holds all but adapters.
_WARM_UP = 200

Access = Literal["uniform", "zipf"]


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        counts: By what happened.
        wrong: Answers that did not come from the weights that they name; must stay empty.
        bare_mib: Size of the engine's process before the first adapter.
        rss_mib: Its size every so often.
        bank_mib: What the adapters in memory took at most, by the engine's own account.
        seconds: Time it took.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    bare_mib: int = 0
    rss_mib: list[int] = field(default_factory=list)
    bank_mib: float = 0.0
    seconds: float = 0.0

    @property
    def growth_mib(self) -> int:
        """How much larger the last quarter's least is than the second quarter's most."""
        quarter = max(1, len(self.rss_mib) // 4)
        return min(self.rss_mib[-quarter:]) - max(self.rss_mib[quarter : 2 * quarter])

    @property
    def asked(self) -> int:
        """Requests that came to an end, whichever."""
        ends = ("complete", "cancelled", "given up")
        return sum(self.counts[name] for name in ends) + self.failed

    @property
    def failed(self) -> int:
        """Requests that ended with an error."""
        return sum(count for name, count in self.counts.items() if name.startswith("refused"))


class Drive:
    """One run.

    Args:
        subjects: What to ask for; those without an adapter first.
        published: Where the engine finds adapters, by digest.
        resident_bytes: Returns the size of the engine's process.
        requests: How many.
        seed: Of all choices.
        clients: Requests at a time.
        access: How adapters are chosen: all alike, or by Zipf's law.
        seconds: End after this time, however many requests are left.
    """

    def __init__(
        self,
        subjects: list[Subject],
        published: Path,
        resident_bytes: Callable[[], int],
        *,
        requests: int,
        seed: int,
        clients: int,
        access: Access = "uniform",
        seconds: float = inf,
    ) -> None:
        self._bases = [subject for subject in subjects if subject.adapter is None]
        self._tuned = [subject for subject in subjects if subject.adapter is not None]
        self._published = published
        self._resident_bytes = resident_bytes
        self._left = self._all = requests
        self._seconds = seconds
        self._random = random.Random(seed)
        self._clients = clients
        weights = [1 / place if access == "zipf" else 1.0 for place in range(1, len(subjects) - 1)]
        self._weights = list(itertools.accumulate(weights))
        # Names that move from one adapter to another while requests are under way.
        self._aliases = self._tuned[:4]
        self._under_way: Counter[str] = Counter()
        self._away: set[str] = set()
        self.outcome = Outcome()

    async def run(self, engine: Engine) -> Outcome:
        """Ask until all requests are done, and see that nothing is left over."""
        await self._warm_up(engine)
        started = time.monotonic()
        end = started + self._seconds
        await asyncio.gather(*(self._client(engine, end) for _ in range(self._clients)))
        await wait_for(lambda: is_idle(engine), "requests are left over")
        status = await engine.status()
        assert status.row_bytes == 0, "keys and values are left over"
        self.outcome.seconds = time.monotonic() - started
        for name in ("loads", "evictions", "load_failures", "base_loads", "reused_prompt_tokens"):
            self.outcome.counts[name] = getattr(status, name)
        return self.outcome

    async def _warm_up(self, engine: Engine) -> None:
        for _ in range(_WARM_UP // self._clients):
            asked = (self._ask(engine, self._bases[0]) for _ in range(self._clients))
            await asyncio.gather(*asked)
        self.outcome.counts.clear()
        self.outcome.bare_mib = self._resident_bytes() // _MIB

    async def _client(self, engine: Engine, end: float) -> None:
        while self._left > 0 and time.monotonic() < end:
            self._left -= 1
            if self._left % max(1, self._all // 100) == 0:
                await self._measure(engine)
            await self._disturb(engine)
            subject = self._choose()
            try:
                await self._ask(engine, subject)
            except TunesmithError as error:
                self.outcome.counts[f"refused: {error.code}"] += 1

    async def _measure(self, engine: Engine) -> None:
        status = await engine.status()
        self.outcome.rss_mib.append(self._resident_bytes() // _MIB)
        self.outcome.bank_mib = max(self.outcome.bank_mib, status.resident_bytes / _MIB)

    def _often(self, times: int) -> bool:
        return self._random.randrange(_OF) < times

    def _choose(self) -> Subject:
        if self._often(_TWIN):
            return self._bases[1]
        while True:
            kind = self._random.randrange(4)
            if kind == 0:
                return self._bases[0]
            subject = self._random.choice(self._aliases) if kind == 1 else self._choose_tuned()
            if _digest(subject) not in self._away:
                return subject

    def _choose_tuned(self) -> Subject:
        [subject] = self._random.choices(self._tuned, cum_weights=self._weights)
        return subject

    async def _disturb(self, engine: Engine) -> None:
        subject = self._choose_tuned()
        assert subject.adapter is not None
        if _digest(subject) in self._away:
            return
        if self._often(_REGISTERED) and not self._under_way[_digest(subject)]:
            await self._register_again(engine, subject)
        if self._often(_MOVED):
            self._aliases[self._random.randrange(len(self._aliases))] = subject
        self._under_way[_digest(subject)] += 1
        try:
            if self._often(_UNLOADED):
                await engine.unload(subject.adapter.digest)
            if self._often(_LOADED):
                await engine.load(subject.base, subject.adapter)
            if self._often(_KEPT):
                await engine.load(subject.base, subject.adapter, keep=True)
                await engine.release(_digest(self._random.choice(self._tuned)))
        except TunesmithError as error:
            self.outcome.counts[f"load refused: {error.code}"] += 1
        finally:
            self._under_way[_digest(subject)] -= 1

    async def _register_again(self, engine: Engine, subject: Subject) -> None:
        """Delete an adapter, see that nothing answers in its place, and publish it again."""
        digest = _digest(subject)
        self._away.add(digest)
        files = self._published / digest
        aside = files.rename(self._published / f"{digest}.aside")
        await engine.unload(digest)
        try:
            stream = await engine.generate(self._make_request(subject, 0, 1))
        except NotFound:
            self.outcome.counts["registered again"] += 1
        else:
            await stream.aclose()
            self.outcome.wrong.append(f"{digest} was answered without its files")
        aside.rename(files)
        self._away.remove(digest)

    def _make_request(self, subject: Subject, prompt: int, tokens: int) -> GenerateRequest:
        return make_request(
            subject.base,
            subject.adapter,
            prompt=PROMPTS[prompt],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            logprobs=0,
            n=self._random.choice((1, 1, 1, 1, 2, 3)),
        ).model_copy(update={"project_id": self._random.choice(_PROJECTS)})

    async def _ask(self, engine: Engine, subject: Subject) -> None:
        self._under_way[_digest(subject)] += 1
        try:
            prompt = self._random.choice(subject.prompts)
            tokens = self._random.randint(1, TOKENS)
            request = self._make_request(subject, prompt, tokens)
            if self._often(_GIVEN_UP):
                await self._give_up(engine, request)
                return
            stream = await engine.generate(request)
            await self._follow(stream, request, subject.answers[prompt])
        finally:
            self._under_way[_digest(subject)] -= 1

    async def _give_up(self, engine: Engine, request: GenerateRequest) -> None:
        """Leave while the request waits, is prepared, or has just begun."""
        asking = asyncio.ensure_future(engine.generate(request))
        await asyncio.wait({asking}, timeout=self._random.choice((0, 0.001, 0.01)))
        asking.cancel()
        [stream] = await asyncio.gather(asking, return_exceptions=True)
        if not isinstance(stream, BaseException):
            await stream.aclose()
        self.outcome.counts["given up"] += 1

    async def _follow(
        self, stream: EventStream, request: GenerateRequest, expected: tuple[int, ...]
    ) -> None:
        """Read a stream, to its end or until the client leaves, and judge what it said."""
        tokens = request.sampling.max_new_tokens
        events = self._random.randrange(tokens) if self._often(_CANCELLED) else None
        seen: dict[int, list[int]] = {index: [] for index in range(request.sampling.n)}
        complete = False
        async with aclosing(stream):
            async for event in stream:
                match event:
                    case Started():
                        self._check_digest(event.adapter_digest, request.adapter)
                    case Delta():
                        seen[event.index] += [entry.token_id for entry in event.logprobs]
                    case Finished():
                        if event.completion_tokens != tokens:
                            self.outcome.wrong.append(f"{event} instead of {tokens} tokens")
                    case Done():
                        complete = True
                    case _:
                        self.outcome.wrong.append(str(event))
                if events is not None and (events := events - 1) < 0:
                    break
        self.outcome.counts["complete" if complete else "cancelled"] += 1
        for ids in seen.values():
            certain = min(len(ids), len(expected))
            self.outcome.counts["judged tokens"] += certain
            if tuple(ids[:certain]) != expected[:certain]:
                self.outcome.wrong.append(f"{request.adapter}: {ids} instead of {expected}")
            if complete and len(ids) != tokens:
                self.outcome.wrong.append(f"{len(ids)} tokens instead of {tokens}")

    def _check_digest(self, digest: str | None, adapter: AdapterRef | None) -> None:
        if digest != (adapter.digest if adapter else None):
            self.outcome.wrong.append(f"answered with {digest} instead of {adapter}")


def _digest(subject: Subject) -> str:
    return subject.adapter.digest if subject.adapter else ""


def curve(rss_mib: list[int], points: int = 10) -> list[int]:
    """Return some of the sizes, from the first to the last."""
    if len(rss_mib) <= points:
        return rss_mib
    places = [round(index * (len(rss_mib) - 1) / (points - 1)) for index in range(points)]
    assert all(one < other for one, other in pairwise(places))
    return [rss_mib[place] for place in places]
