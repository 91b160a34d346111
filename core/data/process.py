"""The validator: a long-lived child of the light worker that does dry runs.

Run as `python -m core.data.process` by its parent, which speaks the protocol of `core.child`.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from core.child import Channel, serve
from core.data.check import check_file
from core.data.dry_run import dry_run, examine
from core.data.hub_rows import HubRows, fetch
from core.data.quiet import silence_libraries
from core.data.sources import DataSource
from core.data.tokenizer import TokenizerCache, read_context_length
from core.inference.engine import BaseModelRef
from core.specs import JobSpec


class ValidateTask(BaseModel):
    """What the parent asks for."""

    spec: JobSpec
    base: BaseModelRef
    sources: list[DataSource]
    # Position of a source whose file is to be made → from which rows.
    to_fetch: dict[int, HubRows] = {}
    # Tell errors in the report, instead of failing with them.
    examine: bool = False


class Validator:
    """Does dry runs, with warm tokenizers."""

    def __init__(self) -> None:
        self._tokenizers = TokenizerCache()

    def __call__(self, task: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Return the dry run's report; see `core.data.dry_run`."""
        request = ValidateTask.model_validate(task)
        commits = {
            position: fetch(rows, request.sources[position].path, channel.check_stop)
            for position, rows in request.to_fetch.items()
        }
        run = examine if request.examine else dry_run
        report = run(
            request.spec,
            request.sources,
            self._tokenizers.get(request.base.digest, request.base.path),
            context_length=read_context_length(request.base.path),
            check_stop=channel.check_stop,
        )
        fetched = [_describe(request, position, commit) for position, commit in commits.items()]
        return report.model_dump(mode="json") | ({"fetched": fetched} if fetched else {})


def _describe(request: ValidateTask, position: int, commit: str) -> dict[str, Any]:
    """Return what the parent needs to keep fetched rows as a data set."""
    path = request.sources[position].path
    report = check_file(path, path.name)
    return {
        "position": position,
        "path": str(path),
        "report": report.model_dump(mode="json") | {"commit": commit},
    }


def main() -> None:
    """Serve tasks until the parent goes away."""
    silence_libraries()
    serve(Validator())


if __name__ == "__main__":
    main()
