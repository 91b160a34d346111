"""The Compose files as Docker Compose understands them, as far as ours go.

Owns interpolation (`${NAME}`, `${NAME:-DEFAULT}`, `$$`) and the merge of an override. A test
compares the outcome with Docker Compose's own where that is installed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
BASE = REPOSITORY / "docker-compose.yml"
GPU = REPOSITORY / "compose.gpu.yml"

_VARIABLE = re.compile(r"\$(?:(?P<escaped>\$)|\{(?P<name>\w+)(?::-(?P<default>[^}]*))?\})")


def load(*paths: Path, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return Compose files, each merged into those before it.

    Args:
        paths: The files; ours by default.
        environment: What Docker Compose would have from the shell and `.env`.
    """
    merged: dict[str, Any] = {}
    for path in paths or (BASE,):
        content = _interpolate(yaml.safe_load(path.read_text()), environment or {})
        merged = _merge(merged, content)
    return {name: value for name, value in merged.items() if not name.startswith("x-")}


def variables(*paths: Path) -> set[str]:
    """Return the names of all variables in Compose files."""
    found = (match for path in paths for match in _VARIABLE.finditer(path.read_text()))
    return {match["name"] for match in found if match["name"]}


def is_ours(service: Mapping[str, Any]) -> bool:
    """Tell whether a service runs our image."""
    return str(service.get("image", "")).startswith("tunesmith:")


def seconds(duration: str) -> float:
    """Return a duration such as `1m30s` in seconds."""
    units = {"h": 3600, "m": 60, "s": 1}
    parts = re.findall(r"(\d+)([hms])", duration)
    assert "".join(number + unit for number, unit in parts) == duration
    return float(sum(int(number) * units[unit] for number, unit in parts))


def _interpolate(value: Any, environment: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {name: _interpolate(item, environment) for name, item in value.items()}
    if isinstance(value, list):
        return [_interpolate(item, environment) for item in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        if match["escaped"]:
            return "$"
        return environment.get(match["name"]) or match["default"] or ""

    return _VARIABLE.sub(replace, value)


def _merge(base: Any, override: Any) -> Any:
    if isinstance(base, dict) and isinstance(override, dict):
        names = [*base, *(name for name in override if name not in base)]
        return {
            name: _merge(base.get(name), override[name]) if name in override else base[name]
            for name in names
        }
    # Docker Compose joins most lists; ours only ever add one where there is none.
    assert not (isinstance(base, list) and isinstance(override, list)), "joining is not supported"
    return override
