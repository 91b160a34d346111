"""What each adapter answers to each prompt, by transformers and PEFT alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.artifacts import read_manifest
from core.data.rendering import encode_text
from core.inference.engine import AdapterRef, BaseModelRef
from tests.support.adapters import ALL_LINEAR, AdapterMaker
from tests.support.engine_world import World

# All but the last share a beginning that is longer than what prompts take over at once.
_BEGINNING = "the quick brown fox jumps over the lazy dog and then the other dog jumps " * 2
PROMPTS = (f"{_BEGINNING} Paris", f"{_BEGINNING} over the fox", "Hello there")
TOKENS = 16
# Where the two best tokens are closer, either may come.
_CERTAIN = {"float32": 1e-3, "fp16": 0.05}
_TARGETS = (ALL_LINEAR, ("q_proj", "v_proj"), ("down_proj",))
_MOST_TRIES = 20


@dataclass(frozen=True)
class Subject:
    """Weights that requests ask for, and their greedy answers.

    Attributes:
        base: The base model.
        adapter: On top of it, if any.
        answers: For each prompt its first tokens, as far as they are certain. Requests have
            only such prompts for which these are the answer of nobody else.
    """

    base: BaseModelRef
    adapter: AdapterRef | None
    answers: tuple[tuple[int, ...], ...]

    @property
    def prompts(self) -> list[int]:
        """The prompts by which it is known."""
        return [prompt for prompt, answer in enumerate(self.answers) if answer]


def make_subjects(
    world: World, adapters: int, *, ranks: Sequence[int], precision: str
) -> list[Subject]:
    """Return both base models of a world and so many adapters of the first one.

    Args:
        world: Where they are kept.
        adapters: How many.
        ranks: Of the adapters, in turn.
        precision: Of the engine that they are for, which decides what is certain.
    """
    judge = Judge(_CERTAIN[precision])
    known = [_Known() for _ in PROMPTS]
    subjects = []
    for base in (world.base, world.twin):
        other = AdapterMaker(Path(base.path))
        subjects.append(Subject(base, None, judge.answers(other.model, other.tokenizer)))
        for one, answer in zip(known, subjects[-1].answers, strict=True):
            one.add(answer)
    maker = AdapterMaker(Path(world.base.path))
    published = world.data_dir / "adapters"
    published.mkdir(parents=True, exist_ok=True)
    tried = 0
    while len(subjects) < adapters + 2:
        number = len(subjects) - 2
        rank = ranks[number % len(ranks)]
        found: list[tuple[tuple[int, ...], ...]] = []
        path = maker.make(
            world.root / f"adapter-{tried}",
            r=rank,
            targets=_TARGETS[number % len(_TARGETS)],
            seed=1000 + tried,
            # Each of them moves the base model as far.
            scale=0.3 * (4 / rank) ** 0.25,
            look=lambda tuned, found=found: found.append(judge.answers(tuned, maker.tokenizer)),
        )
        tried += 1
        assert tried < _MOST_TRIES * (adapters + 1), "adapters answer alike"
        [answers] = found
        pairs = list(zip(known, answers, strict=True))
        if not any(answers) or any(one.has_alike(answer) for one, answer in pairs):
            # It could not be told from another one.
            shutil.rmtree(path)
            continue
        for one, answer in pairs:
            one.add(answer)
        digest = read_manifest(path).digest
        path.rename(published / digest)
        subjects.append(Subject(world.base, AdapterRef(digest=digest), answers))
    return subjects


class _Known:
    """Answers to one prompt, of which none begins like the whole of another one."""

    def __init__(self) -> None:
        self._whole: set[tuple[int, ...]] = set()
        self._beginnings: set[tuple[int, ...]] = set()

    def has_alike(self, answer: tuple[int, ...]) -> bool:
        """Tell whether an answer could be taken for one of them, or one of them for it."""
        beginnings = {answer[:length] for length in range(1, len(answer) + 1)}
        return answer in self._beginnings or not self._whole.isdisjoint(beginnings)

    def add(self, answer: tuple[int, ...]) -> None:
        """Remember an answer; an empty one says nothing."""
        if answer:
            self._whole.add(answer)
            self._beginnings.update(answer[:length] for length in range(1, len(answer) + 1))


class Judge:
    """Computes the greedy answers to all prompts in one batch.

    Args:
        certain: Distance of the two best logits from which on the best one must come.
    """

    def __init__(self, certain: float) -> None:
        self._certain = certain

    @torch.inference_mode()
    def answers(self, model: Any, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
        """Return for each prompt the first tokens, as far as they are certain."""
        prompts = [encode_text(prompt, tokenizer).ids for prompt in PROMPTS]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(one)) + one for one in prompts])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts])
        # The requests ask for at least so many tokens, which rules the end out.
        ends = torch.tensor(sorted({tokenizer.eos_token_id}))
        answers: list[list[int]] = [[] for _ in prompts]
        certain = [True] * len(prompts)
        cache = None
        for _ in range(TOKENS):
            output = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.size(1) :],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].index_fill(1, ends, float("-inf"))
            best = torch.topk(logits, 2)
            for row, (first, second) in enumerate(best.values.tolist()):
                certain[row] = certain[row] and first - second >= self._certain
                if certain[row]:
                    answers[row].append(int(best.indices[row, 0]))
            if not any(certain):
                break
            ids = best.indices[:, :1]
            mask = torch.cat([mask, torch.ones(len(prompts), 1, dtype=mask.dtype)], dim=1)
        return tuple(tuple(answer) for answer in answers)
