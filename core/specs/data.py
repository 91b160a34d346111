"""Where rows come from, which of them are used, and what of them is learnt."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, StringConstraints

from core.specs.strict import Role, StrictSpec

HUB_PREFIX: Final = "hf:"
_HUB_NAME = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*/[\w.-]+)@(?P<revision>[A-Za-z0-9][\w./-]*)", re.ASCII
)


@dataclass(frozen=True)
class HubReference:
    """A data set of the Hugging Face Hub.

    Attributes:
        repository: `OWNER/NAME`.
        revision: Branch, tag or commit.
    """

    repository: str
    revision: str


def parse_hub_reference(reference: str) -> HubReference:
    """Return what `hf:OWNER/NAME@REVISION` names.

    Raises:
        ValueError: It is not of that form.
    """
    found = _HUB_NAME.fullmatch(reference)
    if found is None:
        raise ValueError("a data set of the Hugging Face Hub is written hf:OWNER/NAME@REVISION")
    return HubReference(found["repository"], found["revision"])


def _check_reference(reference: str) -> str:
    if reference.startswith(HUB_PREFIX):
        parse_hub_reference(reference)
    return reference


DatasetReference = Annotated[
    str, StringConstraints(min_length=1, max_length=256), AfterValidator(_check_reference)
]
Split = Annotated[str, StringConstraints(max_length=64, pattern=r"^\w+(\[(\d+%?)?:(\d+%?)?\])?$")]
RowField = Literal[
    "messages", "tools", "conversations", "system", "prompt", "completion", "instruction",
    "context", "input", "response", "output", "text", "chosen", "rejected",
]  # fmt: skip


class SourceSpec(StrictSpec):
    """One data set of several."""

    dataset: DatasetReference = Field(
        description="Id from `POST /datasets`, or `hf:OWNER/NAME@REVISION`."
    )
    split: Split | None = Field(
        None, description="Of a Hugging Face data set: `train`, `train[:1%]`, `train[10:200]`."
    )
    weight: float = Field(
        1.0, gt=0, le=100, description="How often an epoch sees each row; 0.5 sees half of them."
    )


class DataSpec(StrictSpec):
    """Which rows are used, what of them is learnt, and how they become two sets."""

    columns: dict[RowField, Annotated[str, StringConstraints(min_length=1, max_length=128)]] = (
        Field(
            default_factory=dict,
            description="Field of the format → column of the file, such as"
            ' `{"prompt": "question", "completion": "answer"}`.',
        )
    )
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
    validation_dataset: DatasetReference | None = Field(
        None, description="Data set of the validation rows, instead of a fraction."
    )
    validation_split: Split | None = Field(
        None, description="Of a Hugging Face data set; `validation` by default."
    )
    shuffle: bool = True
    group_by_length: bool = Field(
        True, description="Put rows of similar length into one forward pass."
    )

    @property
    def validates(self) -> bool:
        """Tell whether there will be validation rows."""
        return self.validation_fraction > 0 or self.validation_dataset is not None
