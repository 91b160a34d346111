"""Answering: which weights a request means, the engine's events, and the two forms of an answer.

No database session is open once the engine works.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from core import base_models, registry
from core.errors import Conflict, InvalidInput, TunesmithError, from_wire
from core.ids import new_id
from core.inference.engine import (
    AdapterRef,
    BaseModelRef,
    Delta,
    Done,
    EngineEvent,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Started,
    Timings,
)
from core.inference.engine import (
    EventStream as EngineEvents,
)
from core.logging import get_logger
from core.principal import Principal
from service import metrics
from service.deps import Services
from service.errors import internal_error, problem, public_error
from service.schemas import (
    AdapterVersionName,
    BaseModelName,
    Choice,
    GenerateAnswer,
    GenerateBody,
    StreamDelta,
    StreamSummary,
    Usage,
)
from service.streaming import encode_event

log = get_logger(__name__)


@dataclass(frozen=True)
class Target:
    """The weights that a request is answered with."""

    base_model: BaseModelRef
    adapter: AdapterRef | None
    adapter_name: AdapterVersionName | None


def resolve_target(
    services: Services, principal: Principal, reference: str | None, base_model: str | None
) -> Target:
    """Find the base model and, if one is named, the adapter version.

    Args:
        services: Holds the database.
        principal: Who asks; adapters of other projects do not exist for it.
        reference: `NAME`, `NAME@VERSION` or `NAME:alias`; `None` asks for the base model.
        base_model: Name of the base model; may be `None` where it is clear.

    Raises:
        NotFound: No such adapter or base model.
        InvalidInput: No base model is named while several are configured.
        Conflict: The adapter belongs to another base model than the one named.
    """
    with services.database.session() as session:
        if reference is None:
            return Target(_choose_base(session, base_model), None, None)
        resolved = registry.resolve(session, principal, reference)
        if (
            base_model is not None
            and base_models.get_ref(session, base_model).digest != resolved.base_digest
        ):
            raise Conflict(
                f"the adapter {resolved.name} belongs to {resolved.base_model}",
                code="base_model_mismatch",
                field="base_model",
                hint="Leave base_model out, or name the adapter's own.",
            )
        base = base_models.get_ref_by_digest(session, resolved.base_digest)
    adapter = AdapterRef(digest=resolved.digest)
    name = AdapterVersionName(name=resolved.name, version=resolved.version, digest=resolved.digest)
    return Target(base, adapter, name)


def _choose_base(session: Session, name: str | None) -> BaseModelRef:
    if name is not None:
        return base_models.get_ref(session, name)
    names = [model.name for model in base_models.list_models(session)]
    if len(names) == 1:
        return base_models.get_ref(session, names[0])
    raise InvalidInput(
        "name the base model" if names else "no base model is configured",
        code="base_model_required",
        field="base_model",
        hint=f"Use one of: {', '.join(names)}."
        if names
        else "The operator adds one with `tunesmith models add`.",
    )


def engine_request(body: GenerateBody, target: Target, principal: Principal) -> GenerateRequest:
    """Return what the engine is asked; its id is that of the answer."""
    return GenerateRequest(
        request_id=new_id("gen"),
        project_id=principal.project_id,
        base_model=target.base_model,
        adapter=target.adapter,
        prompt=body.prompt,
        messages=body.messages,
        tools=body.tools,
        sampling=body.sampling(),
        stream=body.stream,
        deadline_seconds=body.deadline_seconds,
    )


@dataclass
class Tally:
    """What the events of one request have said so far."""

    request_id: str
    target: Target
    with_logprobs: bool
    started: Started | None = None
    done: Done | None = None
    finish_reasons: dict[int, FinishReason] = field(default_factory=dict)

    def add(self, event: EngineEvent) -> None:
        """Take one event in; text is not kept.

        Raises:
            TunesmithError: The event says that the request failed.
            RuntimeError: The engine answers with other weights than those asked for.
        """
        match event:
            case Started():
                wanted = self.target.adapter.digest if self.target.adapter else None
                if event.adapter_digest != wanted:
                    raise RuntimeError("the engine answers with weights that were not asked for")
                self.started = event
                metrics.count_prompt_tokens(event.prompt_tokens)
            case Finished():
                self.finish_reasons[event.index] = event.finish_reason
                metrics.count_generated_tokens(event.completion_tokens)
            case Done():
                self.done = event
            case Failed():
                raise from_wire(event.error)

    def stream_summary(self) -> StreamSummary:
        """Return the data of the event `done`."""
        reasons = [self.finish_reasons[index] for index in sorted(self.finish_reasons)]
        started, usage, timings = self._ending()
        return StreamSummary(
            id=self.request_id,
            usage=usage,
            timings=timings,
            base_model=self._base_model(),
            adapter=self.target.adapter_name,
            precision=started.precision,
            finish_reason=reasons[0],
            finish_reasons=reasons,
        )

    def answer(self, deltas: Sequence[Delta]) -> GenerateAnswer:
        """Return the whole answer, of which all text is given."""
        choices = [
            self._choice(index, [delta for delta in deltas if delta.index == index])
            for index in sorted(self.finish_reasons)
        ]
        started, usage, timings = self._ending()
        return GenerateAnswer(
            id=self.request_id,
            usage=usage,
            timings=timings,
            base_model=self._base_model(),
            adapter=self.target.adapter_name,
            precision=started.precision,
            text=choices[0].text,
            finish_reason=choices[0].finish_reason,
            choices=choices,
        )

    def _choice(self, index: int, deltas: Sequence[Delta]) -> Choice:
        logprobs = [one for delta in deltas for one in delta.logprobs]
        return Choice(
            index=index,
            text="".join(delta.text for delta in deltas),
            finish_reason=self.finish_reasons[index],
            logprobs=logprobs if self.with_logprobs else None,
        )

    def _base_model(self) -> BaseModelName:
        base = self.target.base_model
        return BaseModelName(name=base.name, digest=base.digest)

    def _ending(self) -> tuple[Started, Usage, Timings]:
        if self.started is None or self.done is None or not self.finish_reasons:
            raise RuntimeError("the engine's events ended before the answer did")
        prompt, completion = self.done.prompt_tokens, self.done.completion_tokens
        usage = Usage(
            prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
        )
        return self.started, usage, self.done.timings


async def start(services: Services, request: GenerateRequest) -> EngineEvents:
    """Hand a request to the engine; returns once it is accepted.

    Raises:
        TunesmithError: The engine refuses it, see `Engine.generate`.
    """
    return await services.engine.generate(request)


async def complete(services: Services, request: GenerateRequest, tally: Tally) -> GenerateAnswer:
    """Return the whole answer; cancelling this cancels the request in the engine."""
    deltas = []
    async with aclosing(await start(services, request)) as events:
        async for event in events:
            tally.add(event)
            if isinstance(event, Delta):
                deltas.append(event)
    return tally.answer(deltas)


async def stream(
    events: EngineEvents, tally: Tally, *, instance: str, request_id: str
) -> AsyncGenerator[bytes, None]:
    """Yield server-sent events: `delta`…, then `done`, or `error` with a problem document."""
    try:
        async with aclosing(events):
            async for event in events:
                tally.add(event)
                if isinstance(event, Delta) and (event.text or event.logprobs):
                    logprobs = event.logprobs if tally.with_logprobs else None
                    delta = StreamDelta(index=event.index, text=event.text, logprobs=logprobs)
                    yield encode_event(delta.model_dump_json(exclude_none=True), event="delta")
        yield encode_event(tally.stream_summary().model_dump_json(), event="done")
    except TunesmithError as error:
        yield _error_event(public_error(error), instance, request_id)
    except Exception:
        log.exception("stream_failed")
        yield _error_event(internal_error(), instance, request_id)


def _error_event(error: TunesmithError, instance: str, request_id: str) -> bytes:
    members = problem(error, instance=instance, request_id=request_id)
    return encode_event(json.dumps(members, default=str), event="error")
