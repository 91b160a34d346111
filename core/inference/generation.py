"""The answers of one request while they grow: text, stop strings, and why each one ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from core.inference.detokenizer import Detokenizer
from core.inference.engine import (
    Delta,
    EngineEvent,
    Finished,
    FinishReason,
    SamplingParams,
    TokenLogprob,
)
from core.inference.stop_strings import StopStrings


@dataclass(frozen=True)
class TokenChoice:
    """A chosen token; the log-probabilities are set when they were asked for.

    Attributes:
        token_id: The token.
        logprob: Natural logarithm of its probability under the raw logits.
        top: (token id, log-probability) of the most probable tokens, best first.
    """

    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = field(default_factory=list)


class Answer:
    """One growing answer.

    Args:
        index: Its number among the request's answers.
        prompt_ids: The prompt, context of the first token.
        decode: Turns ids into text, special tokens left out.
        token_text: Turns one id into its own text, special or not.
        end_ids: Tokens that end the answer; their text is not shown.
        sampling: Limits and stop strings.
        max_new_tokens: The limit in force.
        stream: Return text as it comes; otherwise all of it at the end.
    """

    def __init__(
        self,
        index: int,
        *,
        prompt_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        token_text: Callable[[int], str],
        end_ids: Collection[int],
        sampling: SamplingParams,
        max_new_tokens: int,
        stream: bool = True,
    ) -> None:
        self.index = index
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._detokenizer = Detokenizer(decode, prompt_ids)
        self._stops = StopStrings(sampling.stop)
        self._token_text = token_text
        self._end_ids = end_ids
        self._max_new_tokens = max_new_tokens
        self._stream = stream
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def push(self, choice: TokenChoice) -> list[EngineEvent]:
        """Take the next token; return the events it causes, `Finished` last if it ends the answer.

        The token that ends the answer counts as one, and its log-probability is reported.
        """
        self.completion_tokens += 1
        text, stopped = "", False
        if choice.token_id in self._end_ids:
            self.finish_reason = "stop"
        else:
            text, stopped = self._stops.push(self._detokenizer.push(choice.token_id))
            if stopped:
                self.finish_reason = "stop"
            elif self.completion_tokens >= self._max_new_tokens:
                self.finish_reason = "length"
        self._text.append(text)
        self._logprobs += self._describe(choice)
        if self.finish_reason is not None and not stopped:
            self._flush()
        return self._take_events()

    def end(self, reason: FinishReason) -> list[EngineEvent]:
        """End an answer that goes on by its tokens; return the events of that."""
        self.finish_reason = reason
        self._flush()
        return self._take_events()

    def _flush(self) -> None:
        rest, stopped = self._stops.push(self._detokenizer.flush())
        self._text.append(rest if stopped else rest + self._stops.flush())
        if stopped:
            self.finish_reason = "stop"

    def _take_events(self) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        if self._stream or self.finish_reason is not None:
            events += self._take_delta()
        if self.finish_reason is not None:
            events.append(
                Finished(
                    index=self.index,
                    finish_reason=self.finish_reason,
                    completion_tokens=self.completion_tokens,
                )
            )
        return events

    def _take_delta(self) -> list[EngineEvent]:
        text, logprobs = "".join(self._text), self._logprobs
        self._text, self._logprobs = [], []
        return [Delta(index=self.index, text=text, logprobs=logprobs)] if text or logprobs else []

    def _describe(self, choice: TokenChoice) -> list[TokenLogprob]:
        if choice.logprob is None:
            return []
        return [
            TokenLogprob(
                token=self._token_text(choice.token_id),
                token_id=choice.token_id,
                logprob=choice.logprob,
                top=[(token_id, self._token_text(token_id), p) for token_id, p in choice.top],
            )
        ]
