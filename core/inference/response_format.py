"""What form an answer must have: the request's `response_format`.

The members follow OpenAI's chat completions; `regex` is our addition in the same style. Knows no
grammar library; `core.inference.grammar` compiles them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_REGEX_CHARACTERS = 4096
MAX_SCHEMA_CHARACTERS = 65_536
MAX_SCHEMA_DEPTH = 64


class _Format(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class TextFormat(_Format):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(_Format):
    """A JSON object, whatever its members."""

    type: Literal["json_object"]


class JsonSchema(_Format):
    """A JSON Schema and what may be said about it."""

    # Not named like the method that pydantic's models inherit.
    json_schema: dict[str, Any] = Field(
        alias="schema",
        description=f"The schema, at most {MAX_SCHEMA_CHARACTERS:,} characters of JSON; "
        "a keyword that cannot be enforced is refused.",
    )
    name: str | None = Field(None, max_length=64, description="Not used.")
    description: str | None = Field(None, max_length=4096, description="Not used.")
    strict: bool | None = Field(None, description="Not used: the schema is always enforced.")

    @field_validator("json_schema")
    @classmethod
    def _is_shallow(cls, schema: dict[str, Any]) -> dict[str, Any]:
        level: list[Any] = [schema]
        for _ in range(MAX_SCHEMA_DEPTH):
            level = [inner for value in level for inner in _containers_in(value)]
            if not level:
                return schema
        raise ValueError(f"the schema is nested more than {MAX_SCHEMA_DEPTH} levels deep")


class JsonSchemaFormat(_Format):
    """JSON that a schema accepts."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class RegexFormat(_Format):
    """Text that a regular expression matches from its first character to its last."""

    type: Literal["regex"]
    regex: str = Field(
        min_length=1,
        max_length=MAX_REGEX_CHARACTERS,
        description="Rust's syntax, without look-around and back references.",
    )


def _containers_in(container: dict[str, Any] | list[Any]) -> list[Any]:
    inner = container.values() if isinstance(container, dict) else container
    return [value for value in inner if isinstance(value, dict | list)]


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type")
]
