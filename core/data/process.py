"""The validator: a long-lived child of the light worker that does dry runs.

Run as `python -m core.data.process` by its parent, which speaks the protocol of `core.child`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from core.child import Channel, serve
from core.data.detect import DatasetFormat
from core.data.dry_run import dry_run, examine
from core.data.quiet import silence_libraries
from core.data.tokenizer import TokenizerCache, read_context_length
from core.inference.engine import BaseModelRef
from core.specs import JobSpec


class ValidateTask(BaseModel):
    """What the parent asks for."""

    spec: JobSpec
    base: BaseModelRef
    data_path: Path
    data_format: DatasetFormat | None = None
    # Tell errors in the report, instead of failing with them.
    examine: bool = False


class Validator:
    """Does dry runs, with warm tokenizers."""

    def __init__(self) -> None:
        self._tokenizers = TokenizerCache()

    def __call__(self, task: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Return the dry run's report; see `core.data.dry_run`."""
        request = ValidateTask.model_validate(task)
        run = examine if request.examine else dry_run
        report = run(
            request.spec,
            request.data_path,
            request.data_format,
            self._tokenizers.get(request.base.digest, request.base.path),
            context_length=read_context_length(request.base.path),
            check_stop=channel.check_stop,
        )
        return report.model_dump(mode="json")


def main() -> None:
    """Serve tasks until the parent goes away."""
    silence_libraries()
    serve(Validator())


if __name__ == "__main__":
    main()
