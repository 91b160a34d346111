"""Going on from an adapter: which version a spec means, and whether its shape is the spec's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.orm import Session

from core import registry
from core.artifacts import Manifest
from core.db.models import BaseModel, Job
from core.db.repositories.adapters import AdapterRepository
from core.db.repositories.dialect import lock_content
from core.errors import InvalidInput, NotFound
from core.principal import Principal
from core.specs import JobSpec
from core.target_modules import resolve_targets

_FIELD = "continue_from"


@dataclass(frozen=True)
class FirstWeights:
    """Where a job's first weights come from.

    Attributes:
        reference: `NAME@VERSION`, which means the same for ever.
        digest: Of the artifact.
    """

    reference: str
    digest: str

    def set_on(self, job: Job) -> None:
        """Store it in a new job."""
        job.continue_digest = self.digest
        job.spec = {**job.spec, "continue_from": self.reference}


def find_first_weights(
    session: Session, principal: Principal, spec: JobSpec, base: BaseModel
) -> FirstWeights | None:
    """Return what a job goes on from; nobody deletes it until the transaction ends.

    Args:
        session: Where.
        principal: Whose adapters are looked at.
        spec: The job.
        base: Its base model.

    Raises:
        InvalidInput: `unknown_adapter`, `invalid_adapter_reference`, `continue_base_mismatch` or
            `continue_shape_mismatch`.
    """
    if spec.continue_from is None:
        return None
    try:
        found = registry.resolve(session, principal, spec.continue_from)
        lock_content(session, found.digest)
        # Once more, now that no deletion can come in between.
        found = registry.resolve(session, principal, f"{found.name}@{found.version}")
    except (InvalidInput, NotFound) as error:
        raise InvalidInput(error.message, code=error.code, field=_FIELD, hint=error.hint) from error
    if found.base_digest != base.digest:
        raise InvalidInput(
            f"{found.name}@{found.version} was trained on {found.base_model!r} and the job's base "
            f"model is {base.name!r}",
            code="continue_base_mismatch",
            field=_FIELD,
            hint="An adapter fits the weights it was trained on only; give that base model.",
        )
    adapters = AdapterRepository(session, principal.project_id)
    version = adapters.find_version(found.name, found.version)
    assert version is not None
    _check_shape(spec, Manifest.model_validate(version.manifest), base.description)
    return FirstWeights(f"{found.name}@{found.version}", found.digest)


def is_there(session: Session, principal: Principal, digest: str) -> bool:
    """Tell whether a version of the project has a digest; none is deleted until the commit."""
    lock_content(session, digest)
    return AdapterRepository(session, principal.project_id).has_digest(digest)


def _check_shape(spec: JobSpec, manifest: Manifest, description: Mapping[str, Any]) -> None:
    lora = spec.lora
    auto = description.get("auto_target_modules")
    differences = {
        "lora.r": (lora.r, manifest.r),
        "lora.alpha": (lora.alpha, manifest.lora_alpha),
        "lora.use_rslora": (lora.use_rslora, manifest.use_rslora),
    }
    wrong = [
        f"{field} is {wanted} and the adapter's {has}"
        for field, (wanted, has) in differences.items()
        if wanted != has
    ]
    # What `auto` means for a model that was inspected before it was known, the trainer finds out.
    if lora.target_modules != "auto" or auto is not None:
        modules = resolve_targets(lora, description.get("linear_modules", {}), auto)
        if set(modules) != set(manifest.target_modules):
            endings = sorted({name.rsplit(".", 1)[-1] for name in manifest.target_modules})
            wrong.append(f"lora.target_modules differ from the adapter's: {', '.join(endings)}")
    if wrong:
        raise InvalidInput(
            f"the adapter has another shape: {'; '.join(wrong)}",
            code="continue_shape_mismatch",
            field=_FIELD,
            hint="Give the job the adapter's rank, scale and targets.",
        )
