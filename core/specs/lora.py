"""The shape of an adapter."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from core.specs.strict import StrictSpec

MAX_RANK = 256
_MODULE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,127}$")


class LoraSpec(StrictSpec):
    """Low-rank adaptation (Hu et al., 2021), under PEFT's names."""

    r: int = Field(16, ge=1, le=MAX_RANK, description="Rank.")
    alpha: float | None = Field(
        None, gt=0, le=4096, description="Scale; twice the rank by default."
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["auto", "all-linear"] | list[str] = Field(
        "all-linear",
        description="`all-linear` (all but the output head), `auto` (PEFT's choice for the"
        " architecture, or else all) or a list of module names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha/sqrt(r) (Kalajdzievski, 2023).")
    use_dora: bool = Field(False, description="Not served by the engine, so always refused.")
    modules_to_save: list[str] | None = Field(
        None, description="Not served by the engine, so always refused."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="Precision of the trained weights; auto is fp32."
    )

    @field_validator("target_modules")
    @classmethod
    def _literal_names(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list):
            if not value or len(value) > 64:
                raise ValueError("give between 1 and 64 module names, 'auto' or 'all-linear'")
            for name in value:
                if not _MODULE_NAME.match(name):
                    raise ValueError(f"{name!r} is not a literal module name")
                if name.split(".")[-1] == "lm_head":
                    raise ValueError("the output head 'lm_head' cannot be adapted")
        return value

    @field_validator("use_dora")
    @classmethod
    def _no_dora(cls, value: bool) -> bool:
        if value:
            raise ValueError("the engine cannot serve DoRA adapters; leave it out")
        return value

    @field_validator("modules_to_save")
    @classmethod
    def _nothing_else_saved(cls, value: list[str] | None) -> list[str] | None:
        if value:
            raise ValueError("the engine cannot serve retrained modules; leave it out")
        return value

    @model_validator(mode="after")
    def _resolve_alpha(self) -> Self:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(2 * self.r))
        return self
