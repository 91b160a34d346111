"""Fetches a split of a data set from the Hugging Face Hub, in a process of its own.

Run as `python -m core.hub_datasets ROWS TARGET` by `core.data.hub_rows`; prints one line of JSON on
stdout, and on a deliberate error exits with status 1. No code of a repository is run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from core.data.hub_rows import UNREACHABLE_HINT, HubRows
from core.errors import InvalidInput, TooLarge, Unavailable
from core.training.command import run_command

_TIMEOUT_SECONDS = 20.0


def download(rows: HubRows, target: Path) -> dict[str, Any]:
    """Write the rows to a Parquet file; raises what `core.data.hub_rows.fetch` does."""
    import datasets
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{rows.repository} at {rows.revision}"
    try:
        # Asked first: it fails at once without a network, where the loader would try for long.
        commit = (
            HfApi()
            .dataset_info(rows.repository, revision=rows.revision, timeout=_TIMEOUT_SECONDS)
            .sha
        )
        found = datasets.load_dataset(rows.repository, revision=commit, split=rows.split)
    except (
        RepositoryNotFoundError,
        RevisionNotFoundError,
        datasets.exceptions.DatasetNotFoundError,
    ) as error:
        raise InvalidInput(
            f"the hub has no data set {where}, or access needs a token",
            code="hub_dataset_not_found",
            hint="Check the name and the revision.",
        ) from error
    except (ConnectionError, httpx2.HTTPError, HfHubHTTPError, TimeoutError) as error:
        raise Unavailable(
            "the Hugging Face Hub cannot be reached", code="hub_unreachable", hint=UNREACHABLE_HINT
        ) from error
    except Exception as error:
        message = (str(error).splitlines() or [type(error).__name__])[0][:300]
        if message.startswith(("Unknown split", "Bad split")):
            raise InvalidInput(
                f"{where} has no split {rows.split!r}",
                code="unknown_split",
                field="split",
                hint=message,
            ) from error
        raise InvalidInput(
            f"{where} cannot be read: {message}",
            code="hub_dataset_unreadable",
            hint="Only data sets of plain files with one configuration are read; upload the rows.",
        ) from error
    if len(found) > rows.max_rows:
        raise TooLarge(
            f"{where} has {len(found):,} rows in {rows.split!r} and {rows.max_rows:,} are accepted",
            code="too_many_rows",
            hint="Take a slice, such as train[:1%].",
        )
    found.to_parquet(str(target))
    size = target.stat().st_size
    if size > rows.max_bytes:
        raise TooLarge(
            f"{rows.split!r} of {where} makes {size:,} bytes and {rows.max_bytes:,} are accepted",
            hint="Take a slice, such as train[:1%].",
        )
    return {"commit": commit, "rows": len(found), "bytes": size}


def _main(arguments: list[str]) -> dict[str, Any]:
    if len(arguments) != 2:
        raise InvalidInput("usage: python -m core.hub_datasets ROWS TARGET")
    return download(HubRows.model_validate_json(arguments[0]), Path(arguments[1]))


if __name__ == "__main__":
    sys.exit(run_command(_main))
