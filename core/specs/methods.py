"""How an adapter learns: a union with one member for each method."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from core.specs.strict import StrictSpec


class SftMethod(StrictSpec):
    """Supervised fine-tuning on the assistant's turns."""

    type: Literal["sft"] = "sft"


class DpoMethod(StrictSpec):
    """Direct preference optimization (Rafailov et al., 2023) on chosen and rejected answers.

    The reference is the model without the adapter, or with the one that training goes on from.
    """

    type: Literal["dpo"] = "dpo"
    beta: float = Field(
        0.1, gt=0, le=100, description="Higher keeps the answers nearer to the reference's."
    )
    loss_type: Literal["sigmoid", "hinge", "ipo", "robust"] = Field(
        "sigmoid", description="`robust` is `sigmoid` for pairs some of which are wrong."
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="For `robust`: share of pairs believed to be the wrong way round.",
    )

    @model_validator(mode="after")
    def _smoothed_loss(self) -> Self:
        if (self.loss_type == "robust") != (self.label_smoothing > 0):
            raise ValueError("'label_smoothing' above 0 and the loss type 'robust' need each other")
        return self


Method = Annotated[SftMethod | DpoMethod, Field(discriminator="type")]

# Preference pairs are learnt with steps an order of magnitude smaller than answers.
DEFAULT_LEARNING_RATES: Final = {"sft": 2e-4, "dpo": 2e-5}
