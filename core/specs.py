"""The JobSpec: one model for the request, the stored JSON and the input of the pipeline.

Field names follow TRL and PEFT where those have one. Every default is resolved at submission and
stored, so that a spec of today means the same after the defaults have changed.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

SPEC_VERSION: Final = 1
ADAPTER_NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
MAX_RANK = 256
MAX_INLINE_ROWS = 10_000
MAX_METADATA_ENTRIES = 16
# Of the memory ladder: each rung but the last halves the rows of a forward pass, the last one
# recomputes activations instead of keeping them.
LAST_RUNG: Final = 4

AdapterName = Annotated[
    str,
    StringConstraints(pattern=ADAPTER_NAME_PATTERN),
    Field(description="Lower-case letters, digits, `.`, `_` and `-`; at most 63 characters."),
]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")]
Role = Literal["system", "user", "assistant"]
_MODULE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.]{0,127}$")


class _Spec(BaseModel):
    """Strict input: unknown fields, other types and non-finite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SftMethod(_Spec):
    """Supervised fine-tuning on the assistant's turns."""

    type: Literal["sft"] = "sft"


class LoraSpec(_Spec):
    """Low-rank adaptation (Hu et al., 2021), under PEFT's names."""

    r: int = Field(16, ge=1, le=MAX_RANK, description="Rank.")
    alpha: float | None = Field(
        None, gt=0, le=4096, description="Scale; twice the rank by default."
    )
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="`all-linear` (all but the output head) or a list of module names.",
    )
    use_rslora: bool = Field(False, description="Scale by alpha/sqrt(r) (Kalajdzievski, 2023).")

    @field_validator("target_modules")
    @classmethod
    def _literal_names(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list):
            if not value or len(value) > 64:
                raise ValueError("give between 1 and 64 module names, or 'all-linear'")
            for name in value:
                if not _MODULE_NAME.match(name):
                    raise ValueError(f"{name!r} is not a literal module name")
                if name.split(".")[-1] == "lm_head":
                    raise ValueError("the output head 'lm_head' cannot be adapted")
        return value

    @model_validator(mode="after")
    def _resolve_alpha(self) -> Self:
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(2 * self.r))
        return self


class TrainingSpec(_Spec):
    """How the trainer runs, under TRL's names."""

    epochs: float = Field(3.0, gt=0, le=1000)
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Overrides `epochs`.")
    batch_size: int = Field(2, ge=1, le=512, description="Rows per forward pass.")
    gradient_accumulation_steps: int = Field(2, ge=1, le=1024)
    learning_rate: float = Field(2e-4, gt=0, le=1)
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0, le=1000)
    max_length: int = Field(1024, ge=8, le=131_072, description="Tokens; a longer row is an error.")
    dtype: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Precision of the base weights; auto is bf16 on CUDA and fp32 elsewhere.",
    )
    logging_steps: int = Field(1, ge=1, le=10_000)
    eval_steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Steps between evaluations; once an epoch by default."
    )
    save_steps: int | None = Field(
        None, ge=1, le=1_000_000, description="Steps between checkpoints, besides those by time."
    )
    save_seconds: float = Field(
        600.0, gt=0, le=86_400, description="Longest time that a lost worker can cost."
    )
    save_total_limit: int = Field(2, ge=1, le=100, description="Checkpoints kept of the newest.")
    load_best_model_at_end: bool = Field(
        False, description="Publish the weights with the least evaluation loss, not the last."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, le=1000, description="Stop after this many evaluations without improvement."
    )
    seed: int = Field(0, ge=0, lt=2**32)


class DataSpec(_Spec):
    """Which rows are used, what of them is learnt, and how they become two sets."""

    skip_rows: int = Field(0, ge=0, description="Rows of the file left out at its start.")
    max_rows: int | None = Field(None, ge=1, description="Rows used of those that follow.")
    min_chars: dict[Role, Annotated[int, Field(ge=0)]] = Field(
        default_factory=dict,
        description="Role → characters; a row with a shorter text of that role is left out.",
    )
    max_chars: dict[Role, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Role → characters; a row with a longer text of that role is left out.",
    )
    system_prompt: Annotated[str, StringConstraints(min_length=1, max_length=32_768)] | None = (
        Field(None, description="System turn of conversations that have none.")
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="Learn every answer, the last one, or the whole text of a row.",
    )
    validation_fraction: float = Field(0.0, ge=0, le=0.5)
    shuffle: bool = True


class EvaluationSpec(_Spec):
    """The before/after report: the same prompts answered by the base and by the adapter."""

    samples: int = Field(3, ge=0, le=50, description="Prompts answered before and after.")
    max_new_tokens: int = Field(64, ge=1, le=1024)


class ResourceSpec(_Spec):
    """What a job needs of a worker, and how long it may have it."""

    device: Literal["any", "cpu", "cuda", "mps"] = "any"
    time_limit_seconds: int | None = Field(
        None,
        ge=1,
        le=31_536_000,
        description="Time under work, over all attempts, after which the job fails.",
    )


class JobSpec(_Spec):
    """A fine-tuning job."""

    spec_version: Literal[1] = SPEC_VERSION
    base_model: ModelName = Field(description="A name from `GET /models`.")
    dataset: str | None = Field(None, description="Id from `POST /datasets`.", max_length=64)
    rows: list[dict[str, Any]] | None = Field(
        None,
        description="Inline rows instead of `dataset`; stored as a data set of their own.",
        max_length=MAX_INLINE_ROWS,
    )
    adapter: AdapterName | None = Field(
        None, description="Name to publish under; derived from the job's id by default."
    )
    method: SftMethod = SftMethod()
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    data: DataSpec = DataSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    resources: ResourceSpec = ResourceSpec()
    priority: int = Field(0, ge=-100, le=100, description="Higher runs first.")
    metadata: dict[
        Annotated[str, StringConstraints(min_length=1, max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ] = Field(default_factory=dict, max_length=MAX_METADATA_ENTRIES)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.dataset is None) == (self.rows is None):
            raise ValueError("give either 'dataset' or 'rows'")
        if self.rows is not None and not self.rows:
            raise ValueError("'rows' is empty; give at least one row")
        return self

    @model_validator(mode="after")
    def _rows_to_validate_on(self) -> Self:
        wanted = {
            "eval_steps": self.training.eval_steps is not None,
            "load_best_model_at_end": self.training.load_best_model_at_end,
            "early_stopping_patience": self.training.early_stopping_patience is not None,
        }
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "validation_rows_needed",
                    "this needs validation rows: set data.validation_fraction above 0",
                ),
                loc=("training", name),
                input=getattr(self.training, name),
            )
            for name, is_wanted in wanted.items()
            if is_wanted
        ]
        if errors and self.data.validation_fraction == 0:
            raise ValidationError.from_exception_data("JobSpec", errors)
        return self
