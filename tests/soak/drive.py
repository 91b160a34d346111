"""Clients that ask an engine at random and check every answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import pairwise

import psutil

from core.errors import TunesmithError
from core.inference.engine import AdapterRef, Delta, Done, Engine, Finished, Started
from tests.soak.fingerprints import PROMPTS, TOKENS, Subject
from tests.support.engine_limits import is_idle, wait_for
from tests.support.engine_world import make_request

_PROJECTS = ("red", "green", "blue")
_MIB = 1024**2
# Of ten thousand requests: how often something other than asking is done.
_CANCELLED, _LOADED, _UNLOADED, _KEPT, _MOVED, _TWIN = 1000, 100, 300, 50, 100, 20
_OF = 10_000


@dataclass
class Outcome:
    """What became of all requests.

    Attributes:
        counts: By what happened.
        wrong: Answers that did not come from the weights that they name; must stay empty.
        rss_mib: Size of this process every so often.
        seconds: Time it took.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_mib: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth_mib(self) -> int:
        """How much larger the last quarter's least is than the second quarter's most."""
        quarter = len(self.rss_mib) // 4
        return min(self.rss_mib[-quarter:]) - max(self.rss_mib[quarter : 2 * quarter])


class Drive:
    """One run.

    Args:
        subjects: What to ask for; those without an adapter first.
        requests: How many.
        seed: Of all choices.
        clients: Requests at a time.
    """

    def __init__(self, subjects: list[Subject], requests: int, seed: int, clients: int) -> None:
        self._bases = [subject for subject in subjects if subject.adapter is None]
        self._tuned = [subject for subject in subjects if subject.adapter is not None]
        self._left = self._all = requests
        self._random = random.Random(seed)
        self._clients = clients
        # Names that move from one adapter to another while requests are under way.
        self._aliases = self._tuned[:4]
        self.outcome = Outcome()

    async def run(self, engine: Engine) -> Outcome:
        """Ask until all requests are done, and see that nothing is left over."""
        started = time.monotonic()
        await asyncio.gather(*(self._client(engine) for _ in range(self._clients)))
        await wait_for(lambda: is_idle(engine), "requests are left over")
        status = await engine.status()
        assert status.row_bytes == 0, "keys and values are left over"
        self.outcome.seconds = time.monotonic() - started
        for name in ("loads", "evictions", "base_loads", "reused_prompt_tokens"):
            self.outcome.counts[name] = getattr(status, name)
        return self.outcome

    async def _client(self, engine: Engine) -> None:
        while self._left > 0:
            self._left -= 1
            if self._left % max(1, self._all // 100) == 0:
                self.outcome.rss_mib.append(psutil.Process().memory_info().rss // _MIB)
            await self._disturb(engine)
            try:
                await self._ask(engine, self._choose())
            except TunesmithError as error:
                self.outcome.counts[f"refused: {error.code}"] += 1

    def _often(self, times: int) -> bool:
        return self._random.randrange(_OF) < times

    def _choose(self) -> Subject:
        if self._often(_TWIN):
            return self._bases[1]
        pool = self._random.choice((self._bases[:1], self._aliases, self._tuned, self._tuned))
        return self._random.choice(pool)

    async def _disturb(self, engine: Engine) -> None:
        subject = self._random.choice(self._tuned)
        assert subject.adapter is not None
        try:
            if self._often(_UNLOADED):
                await engine.unload(subject.adapter.digest)
            if self._often(_LOADED):
                await engine.load(subject.base, subject.adapter)
            if self._often(_KEPT):
                await engine.load(subject.base, subject.adapter, keep=True)
                await engine.release(self._random.choice(self._tuned).adapter.digest)  # type: ignore[union-attr]
        except TunesmithError as error:
            self.outcome.counts[f"load refused: {error.code}"] += 1
        if self._often(_MOVED):
            self._aliases[self._random.randrange(len(self._aliases))] = subject

    async def _ask(self, engine: Engine, subject: Subject) -> None:
        prompt = self._random.randrange(len(PROMPTS))
        tokens = self._random.randint(1, TOKENS)
        request = make_request(
            subject.base,
            subject.adapter,
            prompt=PROMPTS[prompt],
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            logprobs=0,
            n=self._random.choice((1, 1, 1, 1, 2, 3)),
        ).model_copy(update={"project_id": self._random.choice(_PROJECTS)})
        events = self._random.randrange(tokens) if self._often(_CANCELLED) else None
        seen: dict[int, list[int]] = {index: [] for index in range(request.sampling.n)}
        complete = False
        async with aclosing(await engine.generate(request)) as stream:
            async for event in stream:
                match event:
                    case Started():
                        self._check_digest(event.adapter_digest, subject.adapter)
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
        expected = subject.answers[prompt]
        for ids in seen.values():
            certain = min(len(ids), len(expected))
            if tuple(ids[:certain]) != expected[:certain]:
                self.outcome.wrong.append(f"{subject.adapter}: {ids} instead of {expected}")
            if complete and len(ids) != tokens:
                self.outcome.wrong.append(f"{len(ids)} tokens instead of {tokens}")

    def _check_digest(self, digest: str | None, adapter: AdapterRef | None) -> None:
        if digest != (adapter.digest if adapter else None):
            self.outcome.wrong.append(f"answered with {digest} instead of {adapter}")


def curve(rss_mib: list[int], points: int = 10) -> list[int]:
    """Return some of the sizes, from the first to the last."""
    if len(rss_mib) <= points:
        return rss_mib
    places = [round(index * (len(rss_mib) - 1) / (points - 1)) for index in range(points)]
    assert all(one < other for one, other in pairwise(places))
    return [rss_mib[place] for place in places]
