"""Whether the configured engines could serve what a job would train."""

from __future__ import annotations

from core.config import Settings
from core.errors import InvalidInput
from core.specs import JobSpec


def check_servable(spec: JobSpec, settings: Settings) -> None:
    """Refuse what would be refused when it is loaded, before it is trained.

    Raises:
        InvalidInput: Code `rank_not_servable`.
    """
    highest = settings.vllm_max_lora_rank
    if highest and settings.uses_vllm and spec.lora.r > highest:
        raise InvalidInput(
            f"the engine serves adapters up to rank {highest}, not {spec.lora.r}",
            code="rank_not_servable",
            field="lora.r",
            hint=f"Train with lora.r of {highest} at most.",
        )
