"""The before/after report: the same prompts, answered by the base model and by the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from core.data.rendering import RenderedPrompt, encode_text, end_token_ids, render_prompt
from core.data.schema import Example
from core.specs import EvaluationSpec
from core.training.monitor import Monitor


def answer_samples(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    spec: EvaluationSpec,
    monitor: Monitor,
    *,
    batch_rows: int = 8,
) -> list[dict[str, Any]]:
    """Answer the examples' prompts greedily, without and with the adapter.

    Args:
        model: The base model with its adapter.
        tokenizer: Its tokenizer.
        examples: Where prompts come from.
        spec: How many, and how long the answers may be.
        monitor: Asked whether to stop before each token.
        batch_rows: Prompts answered at a time.

    Returns:
        For each example `prompt` (the last question, or the plain text), `messages` (what came
        before the answer, for conversations), `reference`, `base` and `adapter`.

    Raises:
        Stopped: The monitor asked for it.
    """
    chosen = examples[: spec.samples]
    prompts = [_prompt_of(example, tokenizer) for example in chosen]
    answers: dict[str, list[str]] = {"base": [], "adapter": []}
    for start in range(0, len(prompts), batch_rows):
        batch = prompts[start : start + batch_rows]
        with model.disable_adapter():
            answers["base"] += _generate(model, tokenizer, batch, spec.max_new_tokens, monitor)
        answers["adapter"] += _generate(model, tokenizer, batch, spec.max_new_tokens, monitor)
    return [
        _describe(example) | {"base": base, "adapter": adapter}
        for example, base, adapter in zip(chosen, answers["base"], answers["adapter"], strict=True)
    ]


def _prompt_of(example: Example, tokenizer: Any) -> RenderedPrompt:
    if example.messages is None:
        return encode_text(example.prompt, tokenizer)
    return render_prompt(example.messages[:-1], tokenizer)


def _describe(example: Example) -> dict[str, Any]:
    if example.messages is None:
        return {"prompt": example.prompt, "reference": example.completion}
    *messages, answer = example.messages
    return {
        "prompt": messages[-1]["content"],
        "messages": messages,
        "reference": answer["content"],
    }


@torch.inference_mode()
def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[RenderedPrompt],
    max_new_tokens: int,
    monitor: Monitor,
) -> list[str]:
    from transformers import GenerationConfig

    def check_stop(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        monitor.check_stop()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    longest = max(len(prompt.ids) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt.ids) :] = torch.tensor(prompt.ids)
        attention_mask[row, longest - len(prompt.ids) :] = 1
    output = model.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(end_token_ids(tokenizer)),
            pad_token_id=tokenizer.pad_token_id,
        ),
        stopping_criteria=[check_stop],
    )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, longest:]]
