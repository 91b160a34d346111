"""The JobSpec: one model for the request, the stored JSON and the input of the pipeline.

Field names follow TRL and PEFT where those have one. Every default is resolved at submission and
stored, so that a spec of today means the same after the defaults have changed.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from core.specs.data import HUB_PREFIX, DatasetReference, DataSpec, SourceSpec, Split
from core.specs.evaluation import EvaluationSpec
from core.specs.lora import LoraSpec
from core.specs.methods import DEFAULT_LEARNING_RATES, Method, SftMethod
from core.specs.strict import AdapterName, ModelName, StrictSpec
from core.specs.training import ADAM_OPTIMIZERS, TrainingSpec

SPEC_VERSION: Final = 1
MAX_INLINE_ROWS = 10_000
MAX_METADATA_ENTRIES = 16
MAX_SOURCES = 16
_HALF_PRECISION_EPSILON = 1e-4
_FULL_PRECISION_EPSILON = 1e-8


class ResourceSpec(StrictSpec):
    """What a job needs of a worker, and how long it may have it."""

    device: Literal["any", "cpu", "cuda", "mps"] = "any"
    time_limit_seconds: int | None = Field(
        None,
        ge=1,
        le=31_536_000,
        description="Time under work, over all attempts, after which the job fails.",
    )


class JobSpec(StrictSpec):
    """A fine-tuning job."""

    spec_version: Literal[1] = SPEC_VERSION
    base_model: ModelName = Field(description="A name from `GET /models`.")
    dataset: DatasetReference | None = Field(
        None, description="Id from `POST /datasets`, or `hf:OWNER/NAME@REVISION`."
    )
    split: Split | None = Field(
        None, description="Of a Hugging Face data set: `train`, `train[:1%]`, `train[10:200]`."
    )
    datasets: list[SourceSpec] | None = Field(
        None, min_length=1, max_length=MAX_SOURCES, description="Several data sets, mixed."
    )
    rows: list[dict[str, Any]] | None = Field(
        None,
        description="Inline rows instead of `dataset`; stored as a data set of their own.",
        max_length=MAX_INLINE_ROWS,
    )
    adapter: AdapterName | None = Field(
        None, description="Name to publish under; derived from the job's id by default."
    )
    continue_from: Annotated[str, StringConstraints(max_length=192)] | None = Field(
        None,
        description="Adapter whose weights training begins with: NAME, NAME@VERSION or"
        " NAME:alias. It must have the rank, scale and targets of `lora`.",
    )
    promote: Literal["always", "if_better", "manual"] = Field(
        "always",
        description="When `latest` moves to the new version; one that `if_better` finds no better"
        " is quarantined.",
    )
    method: Method = SftMethod()
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
        if sum(source is not None for source in (self.dataset, self.datasets, self.rows)) != 1:
            raise ValueError("give one of 'dataset', 'datasets' or 'rows'")
        if self.rows is not None and not self.rows:
            raise ValueError("'rows' is empty; give at least one row")
        return self

    @model_validator(mode="after")
    def _splits_of_hub_datasets(self) -> Self:
        named = [
            ("split", self.dataset, self.split),
            ("data.validation_split", self.data.validation_dataset, self.data.validation_split),
        ]
        for index, source in enumerate(self.datasets or []):
            named.append((f"datasets.{index}.split", source.dataset, source.split))
        for field, reference, split in named:
            if split is not None and not (reference or "").startswith(HUB_PREFIX):
                raise ValueError(f"{field!r} is only for data sets of the Hugging Face Hub")
        return self

    @model_validator(mode="after")
    def _rows_to_validate_on(self) -> Self:
        wanted = {
            "eval_steps": self.training.eval_steps is not None,
            "eval_seconds": self.training.eval_seconds is not None,
            "load_best_model_at_end": self.training.load_best_model_at_end,
            "early_stopping_patience": self.training.early_stopping_patience is not None,
        }
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "validation_rows_needed",
                    "this needs validation rows: set data.validation_fraction above 0, or"
                    " data.validation_dataset",
                ),
                loc=("training", name),
                input=getattr(self.training, name),
            )
            for name, is_wanted in wanted.items()
            if is_wanted
        ]
        if errors and not self.data.validates:
            raise ValidationError.from_exception_data("JobSpec", errors)
        return self

    @model_validator(mode="after")
    def _fp16_needs_an_accelerator(self) -> Self:
        precisions = {
            ("training", "dtype"): self.training.dtype,
            ("lora", "dtype"): self.lora.dtype,
        }
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "fp16_needs_accelerator",
                    "fp16 is not trained on CPUs: set resources.device to 'cuda' or 'mps', or use"
                    " bf16",
                ),
                loc=loc,
                input=dtype,
            )
            for loc, dtype in precisions.items()
            if dtype == "fp16" and self.resources.device not in ("cuda", "mps")
        ]
        if errors:
            raise ValidationError.from_exception_data("JobSpec", errors)
        return self

    @model_validator(mode="after")
    def _packing_groups(self) -> Self:
        if self.training.packing and not self.data.group_by_length:
            raise ValueError("'packing' is done by length: leave 'data.group_by_length' at true")
        return self

    @model_validator(mode="after")
    def _fit_for_pairs(self) -> Self:
        refused = {
            ("training", "packing"): self.training.packing,
            ("data", "train_on"): self.data.train_on == "all",
        }
        errors = [
            InitErrorDetails(
                type=PydanticCustomError(
                    "unfit_for_dpo", "dpo learns pairs of answers only; leave this out"
                ),
                loc=loc,
                input=getattr(getattr(self, loc[0]), loc[1]),
            )
            for loc, is_refused in refused.items()
            if is_refused and self.method.type == "dpo"
        ]
        if errors:
            raise ValidationError.from_exception_data("JobSpec", errors)
        return self

    @model_validator(mode="after")
    def _one_validation_source(self) -> Self:
        if self.data.validation_fraction > 0 and self.data.validation_dataset is not None:
            raise ValueError("give 'validation_fraction' or 'validation_dataset', not both")
        return self

    @model_validator(mode="after")
    def _evidence_to_promote(self) -> Self:
        bounded = self.data.validation_fraction > 0 and self.evaluation.max_forgetting is not None
        if self.promote == "if_better" and self.data.validation_dataset is None and not bounded:
            error = PydanticCustomError(
                "promotion_needs_evidence",
                "if_better needs data.validation_dataset, or data.validation_fraction together"
                " with evaluation.max_forgetting",
            )
            raise ValidationError.from_exception_data(
                "JobSpec", [InitErrorDetails(type=error, loc=("promote",), input=self.promote)]
            )
        return self

    @model_validator(mode="after")
    def _resolve_defaults(self) -> Self:
        training = self.training
        resolved: dict[str, Any] = {}
        if training.learning_rate is None:
            resolved["learning_rate"] = DEFAULT_LEARNING_RATES[self.method.type]
        if training.adam_epsilon is None and training.optim in ADAM_OPTIMIZERS:
            half = self.lora.dtype in ("bf16", "fp16")
            resolved["adam_epsilon"] = _HALF_PRECISION_EPSILON if half else _FULL_PRECISION_EPSILON
        if resolved:
            object.__setattr__(self, "training", training.model_copy(update=resolved))
        return self
