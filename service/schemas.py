"""Bodies and answers that exist only over HTTP; what the domain returns is in `core.reads`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from core.exports import ExportDtype, ExportFormat
from core.inference.engine import (
    EngineStatus,
    FinishReason,
    Message,
    ResidentAdapter,
    SamplingParams,
    Timings,
    TokenLogprob,
)
from core.webhooks import EVENTS

MAX_MESSAGES = 2048

_PROMPT_EXAMPLE: dict[str, JsonValue] = {
    "messages": [{"role": "user", "content": "Where is my parcel?"}],
    "max_new_tokens": 64,
    "temperature": 0,
}


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class GenerateBody(SamplingParams):
    """A request for text: exactly one of `prompt` and `messages`, and how to choose tokens."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [_PROMPT_EXAMPLE]}
    )

    prompt: Annotated[str, Field(min_length=1)] | None = Field(
        None, description="Text that is continued as it is."
    )
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = Field(
        None, description="Turns that are rendered with the model's chat template."
    )
    tools: Annotated[list[dict[str, JsonValue]], Field(min_length=1, max_length=128)] | None = (
        Field(
            None,
            description="Functions the assistant may call, as OpenAI spells them; a call is part of"
            " the text that is answered.",
        )
    )
    base_model: Annotated[str, Field(max_length=128)] | None = Field(
        None, description="A name from `GET /models`; needed only if several are configured."
    )
    stream: bool = Field(False, description="Answer with server-sent events while generating.")
    deadline_seconds: float | None = Field(
        None,
        gt=0,
        le=86_400,
        description="Give up with `deadline_exceeded` when the answer is not complete by then.",
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.tools is not None and self.messages is None:
            raise ValueError("'tools' needs 'messages'")
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("'min_new_tokens' is larger than 'max_new_tokens'")
        return self

    def sampling(self) -> SamplingParams:
        """Return the sampling fields alone; those that were not given stay unset."""
        given = self.model_fields_set & SamplingParams.model_fields.keys()
        return SamplingParams(**{name: getattr(self, name) for name in given})


class Choice(_Answer):
    """One of `n` independent answers."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None = None


class Usage(_Answer):
    """Tokens of one request; the prompt counts once, whatever `n` is."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class BaseModelName(_Answer):
    """The base model that answered."""

    name: str
    digest: str


class AdapterVersionName(_Answer):
    """The adapter version that answered."""

    name: str
    version: int
    digest: str


class Summary(_Answer):
    """What an answer was computed with, and its cost; the data of the last event of a stream."""

    id: str
    usage: Usage
    timings: Timings
    base_model: BaseModelName
    adapter: AdapterVersionName | None = Field(description="`null` when the base model answered.")
    precision: str = Field(description="Precision of the base weights.")


class StreamSummary(Summary):
    """Data of the event `done`."""

    finish_reason: FinishReason
    finish_reasons: list[FinishReason] = Field(description="By index of the answer.")


class GenerateAnswer(Summary):
    """A whole answer; `text` and `finish_reason` are those of the first choice."""

    text: str
    finish_reason: FinishReason
    choices: list[Choice]


class StreamDelta(_Answer):
    """Data of the event `delta`: more text of answer `index`."""

    index: int
    text: str
    logprobs: list[TokenLogprob] | None = None


class AliasBody(BaseModel):
    """Where an alias shall point."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"version": 2}]}
    )
    version: int = Field(ge=1, le=2**31 - 1)


class ExportBody(BaseModel):
    """What to make of a version."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"format": "merged", "dtype": "bf16"}]},
    )
    format: ExportFormat = Field(
        description="`merged`: a tar of a model directory in safetensors; `gguf`: one file for "
        "llama.cpp."
    )
    dtype: ExportDtype = Field("fp16", description="Of the weights; `q8_0` in GGUF only.")


_WEBHOOK_EXAMPLE: dict[str, JsonValue] = {
    "url": "https://example.com/tunesmith",
    "events": ["job.succeeded", "job.failed"],
}
EventNames = Annotated[list[str], Field(max_length=32)]


class WebhookBody(BaseModel):
    """A webhook to add."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [_WEBHOOK_EXAMPLE]}
    )
    url: str = Field(description="An https URL on the public internet.")
    events: EventNames | None = Field(
        None, description=f"Some of {', '.join(EVENTS)}; all of them by default."
    )


class WebhookChanges(BaseModel):
    """What shall be different about a webhook."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra={"examples": [{"enabled": False}]}
    )
    url: str | None = None
    events: EventNames | None = None
    enabled: bool | None = None


class JobChange(BaseModel):
    """What may change of a job that has not ended."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra={"examples": [{"priority": 10}]}
    )
    priority: int = Field(ge=-100, le=100, description="Higher runs first.")


class RowRead(_Answer):
    """One row of a data set; `line` counts from 1."""

    line: int
    row: dict[str, Any]


class EngineAdapter(ResidentAdapter):
    """An adapter in the engine's memory, or that has left it lately.

    `names` are the caller's versions with these weights.
    """

    names: list[str]


class EngineRead(_Answer):
    """What the engine holds: the caller's adapters, and the sums over all callers."""

    ready: bool
    device: str
    base_models: list[str]
    precision: dict[str, str]
    adapters: list[EngineAdapter] = Field(description="In memory, or on disk since not long ago.")
    warnings: list[str]
    resident: int = Field(description="Adapters in memory, those of other projects included.")
    resident_bytes: int
    resident_limit_bytes: int
    base_bytes: int
    base_limit_bytes: int
    row_bytes: int = Field(description="Keys and values of what is computed.")
    row_limit_bytes: int
    prefix_bytes: int
    prefix_limit_bytes: int
    running: int
    waiting: int
    loads: int
    evictions: int
    load_failures: int
    base_loads: int
    base_evictions: int
    prompt_tokens: int
    reused_prompt_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, status: EngineStatus, adapters: list[EngineAdapter]) -> Self:
        """Return the view of a caller who may see `adapters`."""
        counters = status.model_dump(exclude={"adapters", "evicted"})
        return cls(**counters, adapters=adapters, resident=len(status.adapters))


class Check(_Answer):
    """One condition of readiness; the service also works without those not `required`."""

    ok: bool
    required: bool = True
    reason: str | None = None


class Readiness(_Answer):
    """Whether the service can do its work, and what is missing."""

    ready: bool
    checks: dict[str, Check]


class Health(_Answer):
    """Liveness of this process."""

    status: Literal["ok"] = "ok"
    version: str


class Problem(BaseModel):
    """An error, as RFC 9457 describes it; `code` is what programs branch on."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:tunesmith:problem:unknown_field",
                    "title": "Unprocessable Content",
                    "status": 422,
                    "detail": "lora.rank: there is no such field",
                    "code": "unknown_field",
                    "field": "lora.rank",
                    "hint": "Known fields: alpha, dropout, r, target_modules, use_rslora.",
                    "errors": [
                        {
                            "field": "lora.rank",
                            "message": "there is no such field",
                            "code": "unknown_field",
                        }
                    ],
                    "instance": "/jobs",
                    "request_id": "req-01k9x3s0q5m1v8t2w4y6z7abcd",
                }
            ]
        }
    )
    type: str
    title: str
    status: int
    detail: str
    code: str
    field: str | None = None
    line: int | None = None
    hint: str | None = None
    errors: list[dict[str, Any]] | None = None
    limit: dict[str, Any] | None = Field(
        None, description="Of `quota_exceeded`: the quota's name, its value and what is used."
    )
    instance: str
    request_id: str | None
