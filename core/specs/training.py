"""How the trainer runs."""

from __future__ import annotations

from typing import Any, Final, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from core.specs.strict import StrictSpec

# Of the memory ladder: each rung but the last halves the rows of a forward pass, the last one
# recomputes activations instead of keeping them.
LAST_RUNG: Final = 4

Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"]
ADAM_OPTIMIZERS: Final = ("adamw_torch", "adamw_torch_fused")
_DEFAULT_BETAS: Final = {"adam_beta1": 0.9, "adam_beta2": 0.999}


class TrainingSpec(StrictSpec):
    """How the trainer runs, under TRL's names."""

    epochs: float = Field(3.0, gt=0, le=1000)
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="Overrides `epochs`.")
    batch_size: int = Field(2, ge=1, le=512, description="Rows per forward pass.")
    gradient_accumulation_steps: int = Field(2, ge=1, le=1024)
    optim: Optimizer = "adamw_torch"
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="2e-4 for sft and 2e-5 for dpo by default."
    )
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0, le=1)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float | None = Field(
        None,
        gt=0,
        le=1,
        description="1e-8 by default, and 1e-4 where the trained weights have half precision."
        " Like the betas, of Adam only.",
    )
    max_grad_norm: float = Field(1.0, gt=0, le=1000)
    max_length: int = Field(1024, ge=8, le=131_072, description="Tokens; a longer row is an error.")
    packing: bool = Field(
        False,
        description="Several rows in one sequence. It needs attention over rows of varying length,"
        " which no device has here yet: instead, rows of similar length share a forward pass, and"
        " the dry run says so.",
    )
    neftune_noise_alpha: float | None = Field(
        None, gt=0, le=100, description="Noise on the embeddings (Jain et al., 2023)."
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the base weights; auto is bf16 on CUDA and fp32 elsewhere."
        " fp16 needs `resources.device` cuda or mps.",
    )
    load_in_4bit: bool = Field(
        False, description="Base weights as NF4 (Dettmers et al., 2023); needs bitsandbytes."
    )
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="Recompute activations instead of keeping them; auto does on an accelerator,"
        " from a billion parameters. The last rung of the memory ladder does in any case.",
    )
    logging_steps: int = Field(1, ge=1, le=10_000)
    eval_strategy: Literal["epoch", "steps", "time"] = Field(
        "epoch", description="When validation rows are measured; `eval_steps` means `steps`."
    )
    eval_steps: int | None = Field(None, ge=1, le=1_000_000, description="Of `steps`.")
    eval_seconds: float | None = Field(None, gt=0, le=86_400, description="Of `time`.")
    save_strategy: Literal["time", "steps", "epoch"] = Field(
        "time",
        description="Checkpoints besides those by time, which are always made; `save_steps` means"
        " `steps`.",
    )
    save_steps: int | None = Field(None, ge=1, le=1_000_000, description="Of `steps`.")
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
    report_to: list[Literal["mlflow", "tensorboard"]] = Field(
        default_factory=list, description="Trackers, of those that the operator has configured."
    )
    seed: int = Field(0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        """Resolve the strategies; refuse members that contradict each other or have no effect."""
        strategies = {
            "eval_strategy": {"steps": "eval_steps", "time": "eval_seconds"},
            "save_strategy": {"steps": "save_steps"},
        }
        errors: list[InitErrorDetails] = []
        for name, intervals in strategies.items():
            errors += self._resolve_strategy(name, intervals)
        if self.optim not in ADAM_OPTIMIZERS:
            given = [name for name, usual in _DEFAULT_BETAS.items() if getattr(self, name) != usual]
            if self.adam_epsilon is not None:
                given.append("adam_epsilon")
            errors += [
                self._error("not_of_optimizer", f"{self.optim} has no such setting", name)
                for name in given
            ]
        if errors:
            raise ValidationError.from_exception_data("TrainingSpec", errors)
        return self

    def _resolve_strategy(self, name: str, intervals: dict[str, str]) -> list[InitErrorDetails]:
        given = [field for field in intervals.values() if getattr(self, field) is not None]
        if name not in self.model_fields_set and len(given) == 1:
            meant = next(strategy for strategy, field in intervals.items() if field == given[0])
            object.__setattr__(self, name, meant)
        strategy = getattr(self, name)
        needed = intervals.get(strategy)
        errors = [
            self._error(
                "contradicts_strategy", f"{name} is {strategy!r} and does not use it", extra
            )
            for extra in given
            if extra != needed
        ]
        if needed is not None and needed not in given:
            errors.append(
                self._error("interval_needed", f"{name} {strategy!r} needs {needed}", needed)
            )
        return errors

    def _error(self, code: Any, message: str, field: str) -> InitErrorDetails:
        return InitErrorDetails(
            type=PydanticCustomError(code, message),
            loc=(field,),
            input=getattr(self, field),
        )
