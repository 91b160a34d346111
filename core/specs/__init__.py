"""The JobSpec and its parts: pydantic only, so that every process may read a spec."""

from core.specs.data import (
    HUB_PREFIX,
    DataSpec,
    HubReference,
    RowField,
    SourceSpec,
    parse_hub_reference,
)
from core.specs.evaluation import EvaluationSpec
from core.specs.job import (
    MAX_INLINE_ROWS,
    MAX_METADATA_ENTRIES,
    SPEC_VERSION,
    JobSpec,
    ResourceSpec,
)
from core.specs.lora import MAX_RANK, LoraSpec
from core.specs.methods import DpoMethod, Method, SftMethod
from core.specs.strict import ADAPTER_NAME_PATTERN, AdapterName, ModelName, Role
from core.specs.training import LAST_RUNG, TrainingSpec

__all__ = [
    "ADAPTER_NAME_PATTERN",
    "HUB_PREFIX",
    "LAST_RUNG",
    "MAX_INLINE_ROWS",
    "MAX_METADATA_ENTRIES",
    "MAX_RANK",
    "SPEC_VERSION",
    "AdapterName",
    "DataSpec",
    "DpoMethod",
    "EvaluationSpec",
    "HubReference",
    "JobSpec",
    "LoraSpec",
    "Method",
    "ModelName",
    "ResourceSpec",
    "Role",
    "RowField",
    "SftMethod",
    "SourceSpec",
    "TrainingSpec",
    "parse_hub_reference",
]
