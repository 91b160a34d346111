"""Which trackers a job may report to."""

from __future__ import annotations

from core.config import Settings
from core.errors import InvalidInput
from core.specs import JobSpec


def check_trackers(spec: JobSpec, settings: Settings) -> None:
    """Refuse a spec that names a tracker without a target.

    Raises:
        InvalidInput: Code `tracker_not_configured`.
    """
    targets = {
        "mlflow": settings.tracking_mlflow_uri,
        "tensorboard": settings.tracking_tensorboard_dir,
    }
    for name in spec.training.report_to:
        if not targets[name]:
            known = [tracker for tracker, target in targets.items() if target]
            raise InvalidInput(
                f"this service reports to no {name}",
                code="tracker_not_configured",
                field="training.report_to",
                hint=f"Use one of: {', '.join(known)}."
                if known
                else "The operator configures trackers; leave training.report_to out.",
            )
