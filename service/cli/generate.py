"""`tunesmith generate`: ask the base model or an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from core.errors import InvalidInput, TunesmithError
from service.cli.client import DEFAULT_URL, Key, ServiceClient, Url, connect
from service.cli.files import read_json
from service.cli.output import Json, note, print_json


def register(app: typer.Typer) -> None:
    """Add the command to the main application."""
    app.command("generate")(generate)


def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The user's message; with --raw, text to continue as it is."),
    ] = None,
    messages: Annotated[
        Path | None,
        typer.Option(help="JSON file with a list of messages instead of PROMPT; `-` reads stdin."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="NAME, NAME@VERSION or NAME:ALIAS; the base without it.")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="Needed where several are configured.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Use no chat template.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text as it comes.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0)] = None,
    stop: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    url: Url = DEFAULT_URL,
    key: Key = "",
    as_json: Json = False,
) -> None:
    """Print the answer of the base model or of an adapter."""
    if (prompt is None) == (messages is None):
        raise typer.BadParameter("give either PROMPT or --messages")
    body: dict[str, Any] = {
        "base_model": base_model,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
    }
    if messages is not None:
        body["messages"] = read_messages(messages)
    elif raw:
        body["prompt"] = prompt
    else:
        body["messages"] = [{"role": "user", "content": prompt}]
    request = {
        "json": {name: value for name, value in body.items() if value is not None},
        "params": {"adapter": adapter} if adapter else {},
    }

    with connect(url, key) as service:
        if stream and not as_json:
            _print_stream(service, request)
            return
        answer = service.call("POST", "/generate", **request)
    if as_json:
        print_json(answer)
        return
    typer.echo(answer["text"])
    _note_source(answer)


def read_messages(path: Path) -> list[Any]:
    """Read a list of messages, or an object with `messages`, from a JSON file or stdin.

    Raises:
        InvalidInput: Code `invalid_json` or `invalid_messages`.
    """
    value = read_json(path)
    if isinstance(value, dict):
        value = value.get("messages")
    if not isinstance(value, list):
        raise InvalidInput(
            f"{path} holds no list of messages",
            code="invalid_messages",
            hint='For example [{"role": "user", "content": "Hello"}].',
        )
    return value


def _print_stream(service: ServiceClient, request: dict[str, Any]) -> None:
    request["json"]["stream"] = True
    with service.events("POST", "/generate", **request) as events:
        for event in events:
            if event.event not in {"delta", "done", "error"}:
                continue
            data = json.loads(event.data)
            if event.event == "delta":
                typer.echo(data["text"], nl=False)
            elif event.event == "error":
                typer.echo()
                raise TunesmithError(
                    str(data.get("detail") or data.get("message")),
                    code=str(data.get("code", "error")),
                    hint=data.get("hint"),
                )
            else:
                typer.echo()
                _note_source(data)
                return
    raise TunesmithError("the answer broke off before its end", code="incomplete_answer")


def _note_source(answer: dict[str, Any]) -> None:
    adapter = answer["adapter"]
    source = (
        f"{adapter['name']}@{adapter['version']}, {adapter['digest'][:12]}"
        if adapter
        else f"base model {answer['base_model']['name']}"
    )
    note(f"[{source}, {answer['usage']['completion_tokens']} tokens, {answer['finish_reason']}]")
