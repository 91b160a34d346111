"""The Engine protocol and its values: what the API and an engine say to each other.

Owns the request and event models, which are also the wire format between the processes. Knows no
torch, no HTTP and no database, so that the API can import it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Protocol
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from core.errors import InvalidInput, Unavailable
from core.inference.response_format import ResponseFormat

ENGINE_SECRET_HEADER: Final = "x-tunesmith-engine-secret"

FinishReason = Literal["stop", "length", "cancelled"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Message(_Value):
    """One chat turn; of an assistant that calls tools, `content` may be empty."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[dict[str, JsonValue]] | None = None
    tool_call_id: str | None = None
    name: str | None = None


class BaseModelRef(_Value):
    """A base model on this machine's disk.

    Attributes:
        name: The configured name.
        digest: SHA-256 over its files; what adapters are matched against.
        path: Directory with config, safetensors and tokenizer.
    """

    name: str
    digest: str
    path: str


class AdapterRef(_Value):
    """A published adapter, which each engine finds in the artifact store by itself.

    Attributes:
        digest: Content digest; every cache is keyed by it.
    """

    digest: str


class SamplingParams(_Value):
    """How tokens are chosen. `temperature=0` is greedy.

    `core.inference.sampling` says in which order the fields apply.
    """

    max_new_tokens: int = Field(128, ge=1, le=131_072)
    min_new_tokens: int = Field(0, ge=0, le=131_072)
    temperature: float = Field(0.0, ge=0, le=10, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=1_000_000, description="0 considers all tokens.")
    min_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Rule out tokens less probable than this share of the best one; 0 is off.",
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        le=10,
        description="For tokens of prompt and answer; 1 is none (Keskar et al., 2019).",
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logit of each token that the answer has."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="The same, for every time that the answer has the token."
    )
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=1024, description="Token id → what its logit is raised by."
    )
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        default_factory=list, max_length=16
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list,
        max_length=64,
        description="Tokens that end the answer, besides the model's own end tokens.",
    )
    seed: int | None = Field(None, ge=0, lt=2**63)
    n: int = Field(1, ge=1, le=16, description="Independent answers.")
    logprobs: int | None = Field(
        None, ge=0, le=20, description="Report each token's log-probability and this many best."
    )
    response_format: ResponseFormat | None = Field(
        None, description="What form the answer must have. An answer cut by a limit may not."
    )


class GenerateRequest(_Value):
    """One request; exactly one of `prompt` and `messages` is set."""

    request_id: str
    project_id: str
    base_model: BaseModelRef
    adapter: AdapterRef | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[dict[str, JsonValue]] | None = None
    sampling: SamplingParams = SamplingParams()
    stream: bool = Field(
        True, description="Deliver text as it comes; otherwise each answer in one piece."
    )
    deadline_seconds: float | None = Field(
        None, gt=0, description="Give up on the request after this time."
    )


class LoadRequest(_Value):
    """A wish to make an adapter resident."""

    base_model: BaseModelRef
    adapter: AdapterRef
    keep: bool = False


class TokenLogprob(_Value):
    """Log-probabilities at one generated position, from the raw logits before any sampling change.

    Attributes:
        token: The token's own text.
        token_id: Its id.
        logprob: Natural logarithm of its probability.
        top: (token id, token text, logprob) of the most probable tokens, best first.
    """

    token: str
    token_id: int
    logprob: float
    top: list[tuple[int, str, float]] = []


class Started(_Value):
    """First event: a piece of the prompt is computed, with an adapter that passed every gate.

    Attributes:
        prompt_tokens: Length of the rendered prompt.
        adapter_digest: What the answer is computed with; `None` is the base.
        base_digest: Digest of the base weights.
        precision: Precision of the weights, such as `float32`.
    """

    type: Literal["started"] = "started"
    prompt_tokens: int
    base_digest: str
    adapter_digest: str | None
    precision: str


class Delta(_Value):
    """More text of answer `index`; text may be empty while a character is incomplete."""

    type: Literal["delta"] = "delta"
    index: int = 0
    text: str
    logprobs: list[TokenLogprob] = []


class Finished(_Value):
    """Answer `index` is complete."""

    type: Literal["finished"] = "finished"
    index: int = 0
    finish_reason: FinishReason
    completion_tokens: int


class Timings(_Value):
    """Milliseconds of one request inside the engine."""

    queue_ms: float
    load_ms: float
    first_token_ms: float
    total_ms: float


class Done(_Value):
    """Last event of a request that succeeded."""

    type: Literal["done"] = "done"
    prompt_tokens: int
    completion_tokens: int
    timings: Timings


class Failed(_Value):
    """Last event of a request that failed after `Started`; `error` as `core.errors.to_wire`."""

    type: Literal["failed"] = "failed"
    error: dict[str, Any]


EngineEvent = Annotated[Started | Delta | Finished | Done | Failed, Field(discriminator="type")]


class ResidentAdapter(_Value):
    """An adapter that is, or lately was, in the engine's memory.

    Attributes:
        tier: Where it is: in memory, or on this node's disk only.
        kept: Whether it shall stay in memory when nobody uses it.
        requests: Those that use it now.
        evictions: How often it has left memory.
    """

    digest: str
    base_digest: str
    tier: Literal["memory", "disk"] = "memory"
    kept: bool = False
    requests: int = 0
    bytes: int
    hits: int
    load_ms: float
    last_used_seconds_ago: float
    evictions: int = 0


class EngineStatus(_Value):
    """What an engine holds and has done since it started."""

    ready: bool
    device: str
    base_models: list[str] = Field(description="Digests of the loaded base models.")
    precision: dict[str, str] = Field(description="Precision by base digest.")
    adapters: list[ResidentAdapter]
    evicted: list[ResidentAdapter] = Field([], description="Adapters that left memory lately.")
    warnings: list[str] = []
    running: int
    waiting: int
    loads: int
    evictions: int
    load_failures: int
    base_loads: int = 0
    base_evictions: int = 0
    prompt_tokens: int
    reused_prompt_tokens: int = Field(
        0, description="Prompt tokens taken over from a prompt that began in the same way."
    )
    completion_tokens: int
    resident_bytes: int
    resident_limit_bytes: int = 0
    base_bytes: int = 0
    base_limit_bytes: int = 0
    row_bytes: int = Field(0, description="Keys and values of the rows that are computed.")
    row_limit_bytes: int = 0
    prefix_bytes: int = 0
    prefix_limit_bytes: int = 0


class EventStream(Protocol):
    """The events of one request; `contextlib.aclosing` makes sure that an early end cancels it."""

    def __aiter__(self) -> AsyncIterator[EngineEvent]:
        """Return the events."""
        ...

    async def __anext__(self) -> EngineEvent:
        """Return the next event."""
        ...

    async def aclose(self) -> None:
        """Cancel the request unless it has ended; closing twice changes nothing."""
        ...


class Engine(Protocol):
    """Computes answers. One implementation runs in this process, another is a client of one."""

    async def generate(self, request: GenerateRequest) -> EventStream:
        """Start a request and return its events, once the engine has accepted it.

        The returned iterator yields `Started`, then `Delta`s and one `Finished` per answer, then
        `Done` or `Failed`. Closing it early cancels the request.

        Raises:
            InvalidInput: The prompt does not fit the context, or a field cannot be honoured.
            NotFound: The adapter's files are gone.
            Conflict: The adapter does not belong to this base model or failed a gate.
            Unavailable: The engine is starting, full or gone, or cannot reach the artifact store.
        """
        ...

    async def load(
        self, base_model: BaseModelRef, adapter: AdapterRef, *, keep: bool = False
    ) -> ResidentAdapter:
        """Make an adapter resident, through all gates.

        Args:
            base_model: The base model that it belongs to.
            adapter: The adapter.
            keep: Let it stay in memory when nobody uses it, until `release` or `unload`.

        Raises:
            NotFound: The adapter's files are gone.
            Conflict: A gate refused it; the code and hint name which and why. Or, code
                `kept_adapters_full`, too many are kept already.
            Unavailable: The engine is starting, full or gone, or cannot reach the artifact store.
        """
        ...

    async def unload(self, digest: str) -> int:
        """Forget an adapter as soon as no request uses it.

        Returns:
            The bytes that this frees; 0 when it was not resident.
        """
        ...

    async def release(self, digest: str) -> bool:
        """Let an adapter leave when nobody uses it; return whether it had been kept."""
        ...

    async def status(self) -> EngineStatus:
        """Return residency and counters.

        Raises:
            Unavailable: The engine is gone.
        """
        ...


def engine_lost() -> Unavailable:
    """Return the error of a stream that an engine has begun and will not end."""
    return Unavailable(
        "the engine was lost while it answered", code="engine_lost", hint="Send the request again."
    )


def too_late() -> Unavailable:
    """Return the error of a request whose deadline has passed."""
    return Unavailable(
        "the request was not complete within its deadline",
        code="deadline_exceeded",
        hint="Allow more time, ask for fewer tokens, or send the request again later.",
    )


def parse_engine_address(address: str) -> Path | tuple[str, int]:
    """Return where an engine is: the path of its socket, or host and port.

    Raises:
        InvalidInput: It is neither `unix:PATH` nor `http://HOST:PORT`.
    """
    if address.startswith("unix:/"):
        return Path(address.removeprefix("unix:"))
    try:
        parts = urlsplit(address)
        if parts.scheme == "http" and parts.hostname and parts.port and parts.path in ("", "/"):
            return parts.hostname, parts.port
    except ValueError:
        pass
    raise InvalidInput(
        f"{address!r} is not the address of an engine",
        code="invalid_engine_address",
        field="TUNESMITH_ENGINE_URLS",
        hint="Give unix:/ABSOLUTE/PATH or http://HOST:PORT.",
    )
