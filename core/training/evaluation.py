"""The same prompts, answered by the base model and by the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, RepetitionPenaltyLogitsProcessor

from core.data.rendering import RenderedPrompt, encode_text, end_token_ids, render_prompt
from core.data.schema import Example
from core.specs import EvaluationSpec
from core.training.monitor import Monitor

# Of a text without a prompt, at most this much is given to be continued.
_MOST_GIVEN_CHARS = 200


def answer_samples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    spec: EvaluationSpec,
    monitor: Monitor,
    *,
    seed: int,
    batch_rows: int = 8,
) -> list[dict[str, Any]]:
    """Answer the examples' prompts, without and with the adapter.

    Args:
        model: The base model with its adapter.
        tokenizer: Its tokenizer.
        examples: Where prompts come from.
        spec: How many, how tokens are chosen and how long the answers may be.
        monitor: Asked whether to stop before each token.
        seed: Of the draws, where tokens are drawn; base and adapter get the same ones.
        batch_rows: Prompts answered at a time.

    Returns:
        For each example `prompt` (the last question, or the plain text), `messages` (what came
        before the answer, for conversations), `reference`, `base` and `adapter`.

    Raises:
        Stopped: The monitor asked for it.
    """
    chosen = [_Question.of(example) for example in examples[: spec.samples]]
    prompts = [question.render(tokenizer) for question in chosen]
    answers: dict[str, list[str]] = {"base": [], "adapter": []}
    for start in range(0, len(prompts), batch_rows):
        batch = prompts[start : start + batch_rows]
        with model.disable_adapter():
            answers["base"] += _generate(model, tokenizer, batch, spec, monitor, seed + start)
        answers["adapter"] += _generate(model, tokenizer, batch, spec, monitor, seed + start)
    return [
        question.describe() | {"base": base, "adapter": adapter}
        for question, base, adapter in zip(chosen, answers["base"], answers["adapter"], strict=True)
    ]


class _Question:
    """What is asked of both, and the answer that the data has.

    Args:
        messages: The turns before the answer; `None` for plain text.
        prompt: The last of them, or the plain text.
        reference: The answer.
        tools: What the assistant may call.
    """

    def __init__(
        self,
        messages: list[dict[str, Any]] | None,
        prompt: str,
        reference: str,
        tools: list[dict[str, Any]] | None = None,
    ) -> None:
        self._messages = messages
        self._prompt = prompt
        self._reference = reference
        self._tools = tools

    @classmethod
    def of(cls, example: Example) -> _Question:
        if example.messages is None:
            return cls(None, *_divide(example.prompt, example.completion))
        last = max(example.trained) if example.trained else len(example.messages) - 1
        before = example.messages[:last]
        prompt = before[-1].get("content") if before else None
        # A turn that calls a tool may have no text; there is nothing to compare with then.
        reference = example.messages[last].get("content")
        return cls(before, prompt or "", reference or "", example.tools)

    def render(self, tokenizer: Any) -> RenderedPrompt:
        if self._messages is None:
            return encode_text(self._prompt, tokenizer)
        return render_prompt(self._messages, tokenizer, self._tools)

    def describe(self) -> dict[str, Any]:
        messages = {} if self._messages is None else {"messages": self._messages}
        return {"prompt": self._prompt, **messages, "reference": self._reference}


def _divide(prompt: str, completion: str) -> tuple[str, str]:
    """Return the prompt and its reference; of a text without a prompt, its beginning and rest."""
    if prompt:
        return prompt, completion
    middle = min(len(completion) // 2, _MOST_GIVEN_CHARS)
    cut = completion.rfind(" ", 1, middle + 1)
    # A text of one character is its own prompt: something has to be read.
    cut = cut if cut > 0 else max(1, middle)
    return completion[:cut], completion[cut:].strip()


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[RenderedPrompt],
    spec: EvaluationSpec,
    monitor: Monitor,
    seed: int,
) -> list[str]:
    def check_stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        monitor.check_stop()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    longest = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, longest - len(prompt.ids) :] = 1
    penalties = []
    if spec.repetition_penalty != 1:
        # The padding may be the very token that ends an answer, so it must not count as written.
        padding = longest - attention_mask.sum(dim=1)
        penalties.append(
            RepetitionPenaltyLogitsProcessor(
                float(spec.repetition_penalty), prompt_ignore_length=padding.to(model.device)
            )
        )
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(seed)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=GenerationConfig(
                **_choice_of_tokens(spec),
                max_new_tokens=spec.max_new_tokens,
                eos_token_id=sorted(end_token_ids(tokenizer)),
                pad_token_id=tokenizer.pad_token_id,
            ),
            logits_processor=penalties,
            stopping_criteria=[check_stop],
        )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, longest:]]


def _choice_of_tokens(spec: EvaluationSpec) -> dict[str, Any]:
    if spec.temperature == 0:
        return {"do_sample": False}
    # As the engine does; transformers would keep the 50 best tokens unless told otherwise.
    return {"do_sample": True, "temperature": spec.temperature, "top_p": spec.top_p, "top_k": 0}
