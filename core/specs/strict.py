"""What all parts of a spec have in common."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

ADAPTER_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"

AdapterName = Annotated[
    str,
    StringConstraints(pattern=ADAPTER_NAME_PATTERN),
    Field(description="Lower-case letters, digits, `.`, `_` and `-`; at most 63 characters."),
]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Role = Literal["system", "user", "assistant"]


class StrictSpec(BaseModel):
    """Strict input: unknown fields, other types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
