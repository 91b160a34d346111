"""Has a split of a data set fetched from the Hugging Face Hub.

`core.hub_datasets` does it, in a process of its own: the one that asks stays off the network, and
what is cached meanwhile goes with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from core.errors import InvalidInput, TunesmithError, Unavailable

_LOOK_SECONDS = 0.1
_TIMEOUT_SECONDS = 3600.0
_KEPT_LOG_BYTES = 4000
UNREACHABLE_HINT = "Try again with `tunesmith jobs retry`, or upload the rows."


class HubRows(BaseModel):
    """What is fetched.

    Attributes:
        repository: `OWNER/NAME`.
        revision: Branch, tag or commit.
        split: Such as `train` or `train[:1%]`.
        max_rows: Most rows accepted.
        max_bytes: Most bytes of the file that they make.
    """

    model_config = ConfigDict(frozen=True)
    repository: str
    revision: str
    split: str
    max_rows: int
    max_bytes: int


def fetch(
    rows: HubRows,
    target: Path,
    check_stop: Callable[[], None],
    *,
    timeout: float = _TIMEOUT_SECONDS,
) -> str:
    """Write the rows to a Parquet file and return the commit that they are of.

    Args:
        rows: What to fetch.
        target: The file; its directory takes what is downloaded meanwhile.
        check_stop: Called ten times a second; may raise to end early.
        timeout: Seconds that it may take.

    Raises:
        InvalidInput: `hub_dataset_not_found`, `unknown_split` or `hub_dataset_unreadable`.
        TooLarge: `too_many_rows` or `too_large`.
        Unavailable: Code `hub_unreachable`.
    """
    cache = target.parent / f"{target.name}.hub"
    log_path = target.parent / f"{target.name}.log"
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    argv = [sys.executable, "-m", "core.hub_datasets", rows.model_dump_json(), str(target)]
    try:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, env=environment
            )
            try:
                _wait(process, check_stop, time.monotonic() + timeout)
                answer = process.stdout.read() if process.stdout else b""
            finally:
                process.kill()
                process.communicate()
        if process.returncode:
            raise _error_of(answer, log_path)
        return str(json.loads(answer)["commit"])
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _wait(process: subprocess.Popen[bytes], check_stop: Callable[[], None], until: float) -> None:
    while process.poll() is None:
        check_stop()
        if time.monotonic() > until:
            raise Unavailable(
                "the Hugging Face Hub is too slow", code="hub_unreachable", hint=UNREACHABLE_HINT
            )
        time.sleep(_LOOK_SECONDS)


def _error_of(answer: bytes, log_path: Path) -> TunesmithError:
    try:
        members = json.loads(answer)
    except ValueError:
        said = log_path.read_bytes()[-_KEPT_LOG_BYTES:].decode("utf-8", "replace").strip()
        last = said.splitlines()[-1] if said else "it said nothing"
        return TunesmithError(f"fetching the data set failed: {last}", code="internal_error")
    details = {name: members.get(name) for name in ("code", "hint", "field")}
    kind = Unavailable if members["code"] == "hub_unreachable" else InvalidInput
    return kind(members["message"], **details)
