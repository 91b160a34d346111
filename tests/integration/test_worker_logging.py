from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.children import REPOSITORY

PROGRAM = """
import logging, warnings
from core.config import Settings
from core.logging import bind, configure, get_logger

configure(Settings(log_level="DEBUG"), "engine")
with bind(request_id="r-1"):
    get_logger("core.example").debug("adapter_loaded", milliseconds=3)
logging.getLogger("uvicorn.error").info("listening on %s", "a socket")
logging.getLogger("somebody").debug("private data of a user")
warnings.warn("soon gone", FutureWarning)
try:
    secret = "a prompt"
    1 / 0
except ZeroDivisionError:
    get_logger("core.example").exception("broken", value={1})
"""


def logged() -> list[dict[str, Any]]:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=REPOSITORY, capture_output=True, text=True, timeout=30
    )
    assert (finished.returncode, finished.stdout) == (0, "")
    return [json.loads(line) for line in finished.stderr.splitlines()]


def test_all_logs_are_json_lines_on_stderr_and_hold_no_private_data() -> None:
    ours, foreign, warning, failure = logged()
    assert ours["event"] == "adapter_loaded"
    assert (ours["request_id"], ours["milliseconds"], ours["level"]) == ("r-1", 3, "debug")
    assert (foreign["event"], foreign["logger"]) == ("listening on a socket", "uvicorn.error")
    assert "request_id" not in foreign
    assert "soon gone" in warning["event"]
    assert "ZeroDivisionError" in failure["exception"]
    entries = (ours, foreign, warning, failure)
    assert {entry["process"] for entry in entries} == {"engine"}
    assert all({"timestamp", "logger", "level"} <= set(entry) for entry in entries)
