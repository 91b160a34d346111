"""What of a request a vLLM server is told, and how.

Stop strings are not among it: `service.vllm_engine_stream` ends answers there, because vLLM takes
four of them at most and looks for none within the first `min_tokens`.
"""

from __future__ import annotations

import json
from typing import Any

from core.errors import InvalidInput
from core.inference.engine import SamplingParams
from core.inference.response_format import (
    JsonObjectFormat,
    JsonSchemaFormat,
    RegexFormat,
    ResponseFormat,
)

# vLLM raises what lies between 0 and this.
LEAST_TEMPERATURE = 0.01


def completion_body(
    *,
    model: str,
    ids: list[int],
    max_new_tokens: int,
    end_ids: list[int],
    sampling: SamplingParams,
    cache_salt: str,
) -> dict[str, Any]:
    """Return the body of `POST /v1/completions` for a streamed answer.

    Every field has a value, so that the defaults in a model's `generation_config.json`, which vLLM
    would apply, do not.

    Args:
        model: Name of the adapter or the base model at the server.
        ids: The prompt.
        max_new_tokens: Tokens that may follow.
        end_ids: Tokens that end an answer, besides `stop_token_ids`.
        sampling: How tokens are chosen.
        cache_salt: Prompts share what is computed of them only under the same one.

    Raises:
        InvalidInput: Code `not_honoured`; the server cannot do what a field asks for.
    """
    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        raise InvalidInput(
            f"a vLLM server draws with temperatures of at least {LEAST_TEMPERATURE}",
            code="not_honoured",
            field="temperature",
            hint="Use 0 for the most probable tokens.",
        )
    greedy = sampling.temperature == 0
    return {
        "model": model,
        # vLLM refuses several greedy answers to one prompt, but not several prompts.
        "prompt": [ids] * sampling.n if greedy else ids,
        "n": 1 if greedy else sampling.n,
        "max_tokens": max_new_tokens,
        "min_tokens": sampling.min_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "stop": [],
        "stop_token_ids": sorted({*end_ids, *sampling.stop_token_ids}),
        "ignore_eos": False,
        "skip_special_tokens": True,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
        "cache_salt": cache_salt,
        "stream": True,
        "stream_options": {"include_usage": True},
        **_optional(sampling),
    }


def effect_body(model: str, ids: list[int]) -> dict[str, Any]:
    """Return the body of a request for the log-probabilities that follow parts of a text.

    Of generated tokens: asked for those of a prompt, vLLM 0.32 dies when it has an adapter and
    another request in the same batch.

    Args:
        model: Name of the adapter or the base model at the server.
        ids: The text; it is cut after each of four quarters.
    """
    lengths = sorted({max(1, len(ids) * quarter // 4) for quarter in range(1, 5)})
    return {
        "model": model,
        "prompt": [ids[:length] for length in lengths],
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": 20,
        "return_tokens_as_token_ids": True,
    }


def _optional(sampling: SamplingParams) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if sampling.logit_bias:
        fields["logit_bias"] = {str(id_): bias for id_, bias in sampling.logit_bias.items()}
    if sampling.seed is not None:
        fields["seed"] = sampling.seed
    if sampling.logprobs is not None:
        fields["logprobs"] = sampling.logprobs
        fields["return_tokens_as_token_ids"] = True
    form = _structure(sampling.response_format)
    if form is not None:
        fields["structured_outputs"] = form
    return fields


def _structure(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    match wanted:
        case JsonObjectFormat():
            return {"json": json.dumps({"type": "object"})}
        case JsonSchemaFormat():
            return {"json": json.dumps(wanted.json_schema.json_schema)}
        case RegexFormat():
            return {"regex": wanted.regex}
        case _:
            return None
