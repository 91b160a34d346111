"""The files of `deploy/` and the Compose files, held against what they speak of."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from core.config import Settings
from core.secret_files import file_variables_of, variables_of
from tests.support import compose
from tests.support.command_line import tunesmith
from tests.support.compose import BASE, GPU, REPOSITORY, is_ours
from worker.app import _JOIN_MARGIN_SECONDS

DEPLOY = REPOSITORY / "deploy"
ONE_SHOT = {"migrate", "cli"}
SERVICES = compose.load(BASE)["services"]
OURS = {name: service for name, service in SERVICES.items() if is_ours(service)}
SETTINGS = {
    name
    for field in Settings.model_fields
    for name in (
        *variables_of(Settings, field),
        *(file_variables_of(Settings, field) if field in Settings.secrets else ()),
    )
}
NAMES_A_SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|KEY|DATABASE_URL|BROKER_URL")


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema of the Compose Specification, from the package that keeps it."""
    package = metadata.distribution("check-jsonschema")
    path = package.locate_file("check_jsonschema/builtin_schemas/vendor/compose-spec.json")
    return dict(json.loads(Path(str(path)).read_text()))


def complaints(document: dict[str, Any], schema: dict[str, Any]) -> list[str]:
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@pytest.mark.parametrize("paths", [(BASE,), (BASE, GPU)], ids=["plain", "gpu"])
def test_the_compose_files_keep_to_the_specification(
    paths: tuple[Path, ...], schema: dict[str, Any]
) -> None:
    assert complaints(compose.load(*paths), schema) == []


def test_the_schema_finds_what_is_wrong(schema: dict[str, Any]) -> None:
    document = compose.load(BASE)
    document["services"]["api"]["helthcheck"] = document["services"]["api"].pop("healthcheck")
    assert any("helthcheck" in complaint for complaint in complaints(document, schema))


def docker_compose() -> list[str] | None:
    """Return the command of Docker Compose 2 or later, if there is one; it needs no daemon here."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            shown = subprocess.run([*command, "version", "--short"], capture_output=True, text=True)
            if shown.returncode == 0 and int(shown.stdout.lstrip("v").split(".")[0]) >= 2:
                return command
    return None


@pytest.mark.skipif(docker_compose() is None, reason="needs Docker Compose")
@pytest.mark.parametrize("paths", [(BASE,), (BASE, GPU)], ids=["plain", "gpu"])
def test_docker_compose_understands_them_as_we_do(paths: tuple[Path, ...]) -> None:
    command = docker_compose() or []
    shown_as_json = ["config", "--format", "json"]
    files = [argument for path in paths for argument in ("-f", str(path))]
    shown = subprocess.run(
        [*command, "--env-file", "/dev/null", *files, "--profile", "tools", *shown_as_json],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(shown.stdout)["services"]
    ours = compose.load(*paths)["services"]
    assert theirs.keys() == ours.keys()
    for name, service in ours.items():
        assert theirs[name].get("environment") == service.get("environment")
        # What it prints can be read again, so a dollar sign is doubled.
        command = [part.replace("$$", "$") for part in theirs[name]["command"] or []]
        assert command == service.get("command", [])
        assert theirs[name].get("depends_on", {}).keys() == service.get("depends_on", {}).keys()
        reserved = service.get("deploy", {}).get("resources", {}).get("reservations")
        assert theirs[name].get("deploy", {}).get("resources", {}).get("reservations") == reserved


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_tells_how_it_is_or_ends(name: str) -> None:
    service = SERVICES[name]
    if name in ONE_SHOT:
        assert service["restart"] == "no"
        return
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][0] in {"CMD", "CMD-SHELL"}
    assert service["deploy"]["resources"]["limits"]["memory"]


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_can_come_about(name: str) -> None:
    for other, wait in SERVICES[name].get("depends_on", {}).items():
        ends = wait["condition"] == "service_completed_successfully"
        assert ends == (other in ONE_SHOT)
        assert ends or "healthcheck" in SERVICES[other]


@pytest.mark.parametrize("name", OURS)
def test_our_services_run_commands_that_exist(name: str) -> None:
    commands = [OURS[name]["command"]]
    if "healthcheck" in OURS[name]:
        kind, program, *probe = OURS[name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "tunesmith")
        commands.append(probe)
    for command in commands:
        outcome = tunesmith(*command, *([] if "--help" in command else ["--help"]))
        assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_given_settings_that_exist(name: str) -> None:
    gpu = compose.load(BASE, GPU)["services"][name]
    unknown = set(gpu["environment"]) - SETTINGS - {"AWS_SHARED_CREDENTIALS_FILE"}
    assert unknown == set()


@pytest.mark.parametrize("name", OURS)
def test_our_services_are_confined(name: str) -> None:
    service = OURS[name]
    assert service["read_only"] is True
    assert service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "USER 10001:10001" in (DEPLOY / "Dockerfile").read_text()


def test_secrets_are_files_that_the_service_gets_and_needs() -> None:
    declared = compose.load(BASE)["secrets"]
    for name, service in SERVICES.items():
        for variable, value in service.get("environment", {}).items():
            if NAMES_A_SECRET.search(variable):
                assert variable.endswith("_FILE"), f"{name}: {variable} holds a secret itself"
                assert value.startswith("/run/secrets/"), f"{name}: {variable}"
        granted = set(service.get("secrets", []))
        assert granted <= declared.keys()
        text = json.dumps(service)
        if name == "prometheus":
            text += (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        named = set(re.findall(r"/run/secrets/(\w+)", text))
        assert granted == named, name
    for path in (BASE, GPU, REPOSITORY / ".env.example", DEPLOY / "prometheus/prometheus.yml"):
        assert not re.search(r"://[^/\s:$]*:[^/\s$]+@", path.read_text()), path.name


def test_the_script_makes_all_secrets_and_never_another_one(tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    make = ["sh", str(DEPLOY / "make-secrets.sh"), str(directory)]
    subprocess.run(make, check=True, capture_output=True)
    made = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert made.keys() == compose.load(BASE)["secrets"].keys()
    assert made["postgres_password"] in made["database_url"]
    assert made["redis_password"] in made["broker_url"]
    random = {made[n] for n in made if n.endswith(("_password", "_secret"))}
    assert len(random) == 4
    assert all(len(value) == 64 for value in random)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    for path in directory.iterdir():
        # A container's user is neither the owner nor in the owner's group.
        assert path.stat().st_mode & stat.S_IROTH

    (directory / "engine_secret").unlink()
    subprocess.run(make, check=True, capture_output=True)
    again = {path.name: path.read_text().strip() for path in directory.iterdir()}
    assert {n for n in made if made[n] != again[n]} == {"engine_secret"}


def test_images_are_pinned() -> None:
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    python = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", dockerfile, re.MULTILINE)
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"${PYTHON_IMAGE}"}
    for image in [*python, *(service["image"] for service in SERVICES.values())]:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-[\w-]+)?$", image), image


def test_our_version_is_the_packages() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert {service["image"] for service in OURS.values()} == {f"tunesmith:{project['version']}"}


def test_the_image_is_built_from_all_packages_and_nothing_else() -> None:
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {pattern.rstrip("*") for pattern in setuptools["packages"]["find"]["include"]}
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    sent = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert {name for name in sent if (REPOSITORY / name).is_dir()} == packages
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= sent


@pytest.mark.parametrize("name", OURS)
def test_a_worker_has_the_time_to_hand_its_job_over(name: str) -> None:
    needed = Settings().grace_seconds + _JOIN_MARGIN_SECONDS
    assert compose.seconds(OURS[name]["stop_grace_period"]) > needed + 5
    unit = (DEPLOY / "systemd" / "tunesmith@.service").read_text()
    assert float(re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)[0]) > needed + 5


def test_ports_are_published_to_this_machine_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    elsewhere = compose.load(BASE, environment={"API_ADDRESS": "192.0.2.1"})["services"]
    assert elsewhere["api"]["ports"] == ["192.0.2.1:8000:8000"]


def test_the_example_of_variables_names_all_of_them_and_no_others() -> None:
    text = (REPOSITORY / ".env.example").read_text()
    example = set(re.findall(r"^#?([A-Z][A-Z0-9_]*)=", text, re.MULTILINE))
    used = compose.variables(BASE, GPU)
    assert used <= example
    aws = {"AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"}
    assert example - used <= SETTINGS | aws
    # Compose's own value of a variable would hide that of `.env`.
    fixed = {name for service in OURS.values() for name in service["environment"]}
    assert not (example - used) & fixed


def test_grafana_reads_what_is_provisioned() -> None:
    source = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text()
    )["datasources"][0]
    dashboard = json.loads((DEPLOY / "grafana/dashboards/tunesmith.json").read_text())
    used = {panel["datasource"]["uid"] for panel in dashboard["panels"]}
    assert used == {source["uid"]}
    host, port = source["url"].removeprefix("http://").split(":")
    assert host in SERVICES
    assert f":{port}" in SERVICES[host]["ports"][0]
    provider = yaml.safe_load(
        (DEPLOY / "grafana/provisioning/dashboards/tunesmith.yml").read_text()
    )["providers"][0]
    mounts = [str(volume).split(":") for volume in SERVICES["grafana"]["volumes"]]
    assert provider["options"]["path"] in {mount[1] for mount in mounts}
    for where, *_ in (mount for mount in mounts if mount[0].startswith("./")):
        assert (REPOSITORY / where).is_dir()
