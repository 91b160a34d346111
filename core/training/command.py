"""The frame of the module commands: one line of JSON on stdout, all noise on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from core.errors import TunesmithError


def run_command(main: Callable[[list[str]], dict[str, Any]]) -> int:
    """Run `main` with the command's arguments and print its result; return the exit status.

    Whatever libraries print on file descriptor 1 meanwhile goes to stderr, so that a caller can
    parse stdout. A deliberate error is printed as its JSON members with status 1.
    """
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        result, status = main(sys.argv[1:]), 0
    except TunesmithError as error:
        result, status = error.as_dict(), 1
    with answers:
        answers.write(json.dumps(result, ensure_ascii=False) + "\n")
    return status
