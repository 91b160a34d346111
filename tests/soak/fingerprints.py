"""What each adapter answers to each prompt, by transformers and PEFT alone."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from core.data.rendering import encode_text
from core.data.tokenizer import load_tokenizer
from core.inference.engine import AdapterRef, BaseModelRef
from tests.support.adapters import ALL_LINEAR, make_adapter
from tests.support.engine_world import World

# All but the last share a beginning that is longer than what prompts take over at once.
_BEGINNING = "the quick brown fox jumps over the lazy dog and then the other dog jumps " * 2
PROMPTS = (f"{_BEGINNING} Paris", f"{_BEGINNING} over the fox", "Hello there")
TOKENS = 16
# Where the two best tokens are closer, either may come.
_CERTAIN = 1e-3


@dataclass(frozen=True)
class Subject:
    """Weights that requests ask for, and their greedy answers.

    Attributes:
        base: The base model.
        adapter: On top of it, if any.
        answers: For each prompt its first tokens, as far as they are certain.
    """

    base: BaseModelRef
    adapter: AdapterRef | None
    answers: tuple[tuple[int, ...], ...]


def make_subjects(world: World, root: Path, adapters: int) -> list[Subject]:
    """Return both base models of a world and so many adapters of the first one."""
    subjects = [_subject(base, None, None) for base in (world.base, world.twin)]
    for number in range(adapters):
        path = make_adapter(
            root / f"adapter-{number}",
            Path(world.base.path),
            r=(1, 2, 4, 8, 16)[number % 5],
            targets=(ALL_LINEAR, ("q_proj", "v_proj"), ("down_proj",))[number % 3],
            seed=1000 + number,
            scale=0.5,
        )
        subjects.append(_subject(world.base, world.keep(path), path))
    for prompt in range(len(PROMPTS)):
        found = {subject.answers[prompt] for subject in subjects}
        assert len(found) == len(subjects), "two adapters answer alike; choose other seeds"
    return subjects


@torch.inference_mode()
def _subject(base: BaseModelRef, adapter: AdapterRef | None, path: Path | None) -> Subject:
    model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32).eval()
    if path is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model = PeftModel.from_pretrained(model, path).eval()
    tokenizer = load_tokenizer(base.path)
    ends = {tokenizer.eos_token_id, model.generation_config.eos_token_id}
    answers = []
    for prompt in PROMPTS:
        ids = encode_text(prompt, tokenizer).ids
        answer: list[int] = []
        for _ in range(TOKENS):
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
            # The requests ask for at least so many tokens, which rules the end out.
            logits[list(ends)] = float("-inf")
            best = torch.topk(logits, 2)
            if best.values[0] - best.values[1] < _CERTAIN:
                break
            answer.append(int(best.indices[0]))
        answers.append(tuple(answer))
    return Subject(base, adapter, tuple(answers))
