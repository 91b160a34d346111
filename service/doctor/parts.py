"""Checks of the service's parts: database, base models, broker, artifact store, engine."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from kombu.exceptions import KombuError
from sqlalchemy.exc import SQLAlchemyError

import migrations
from core import base_models
from core.artifacts import tree_digest
from core.config import Settings
from core.db.session import Database
from core.errors import NotFound, TunesmithError
from core.queue import create_celery
from core.storage import open_store
from service.doctor.finding import Finding
from service.sample_model import SAMPLE_MODEL, sample_gguf_path

_CONNECT_TIMEOUT_SECONDS = 3.0


def check_broker(settings: Settings) -> Finding:
    """Check the broker that wakes workers; without it they only wake more slowly."""
    if not settings.broker_url:
        return Finding("broker", "ok", "files in the data directory")
    where = _without_password(settings.broker_url)
    celery = create_celery(settings)
    try:
        with celery.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=_CONNECT_TIMEOUT_SECONDS)
    except (KombuError, OSError) as error:
        return Finding(
            "broker",
            "warn",
            f"{where} cannot be reached: {error}",
            f"Jobs still start, up to {settings.idle_poll_seconds:g} s later; check BROKER_URL.",
        )
    finally:
        celery.close()
    return Finding("broker", "ok", where)


def check_artifact_store(settings: Settings) -> Finding:
    """Check that artifacts can be stored where the settings say."""
    if not settings.artifact_url:
        return Finding("artifact store", "ok", "the data directory")
    try:
        open_store(settings).check_writable()
    except TunesmithError as error:
        return Finding(
            "artifact store", "fail", f"{settings.artifact_url}: {error.message}", error.hint
        )
    return Finding("artifact store", "ok", settings.artifact_url)


def check_database(settings: Settings, *, deep: bool) -> Iterator[Finding]:
    """Check the database, its schema and the base models in it."""
    url = settings.resolved_database_url
    where = _without_password(url)
    if not settings.database_url and not (settings.root / "tunesmith.db").exists():
        yield Finding("database", "ok", f"{where} (not made yet)")
        yield _no_models()
        return
    try:
        present, newest = migrations.current(url), migrations.head()
    except (SQLAlchemyError, OSError) as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        yield Finding("database", "fail", f"{where}: {reason}", "Check DATABASE_URL.")
        return
    if migrations.standing(present) == "behind":
        yield Finding(
            "database",
            "fail",
            f"{where} is at revision {present or 'nothing'}, not {newest}",
            "Run `tunesmith db upgrade`.",
        )
        return
    yield Finding("database", "ok", f"{where}, revision {present}")

    database = Database(url)
    try:
        with database.session() as session:
            models = base_models.list_models(session)
            refs = [base_models.get_ref(session, model.name) for model in models]
    finally:
        database.close()
    if not models:
        yield _no_models()
    for ref in refs:
        yield check_model_files(ref.name, Path(ref.path), ref.digest, deep=deep)


def check_model_files(name: str, path: Path, digest: str, *, deep: bool) -> Finding:
    """Check that a base model's files are there and, if `deep`, unchanged."""
    label = f"base model {name}"
    hint = f"Remove it with `tunesmith models rm {name}` and add it again."
    if not any(path.glob("*.safetensors")) or not (path / "config.json").is_file():
        return Finding(label, "fail", f"no model in {path}", hint)
    if not deep:
        return Finding(label, "ok", f"{path} (--deep compares digests)")
    if tree_digest(path) != digest:
        return Finding(label, "fail", f"{path} was changed since it was added", hint)
    return Finding(label, "ok", f"{path}, digest {digest[:12]}")


def check_engine(address: str) -> Finding:
    """Check whether an engine accepts connections."""
    name = f"engine {address}"
    try:
        if address.startswith("unix:"):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(_CONNECT_TIMEOUT_SECONDS)
                connection.connect(address.removeprefix("unix:"))
        else:
            parts = urlsplit(address)
            where = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
            with socket.create_connection(where, timeout=_CONNECT_TIMEOUT_SECONDS):
                pass
    except (OSError, ValueError):
        return Finding(name, "warn", "not running", "`tunesmith serve` starts it.")
    return Finding(name, "ok", "accepts connections")


def _no_models() -> Finding:
    try:
        sample_gguf_path()
        hint = f"`tunesmith models add {SAMPLE_MODEL} sample` adds the sample model."
    except NotFound:
        hint = "Add one with `tunesmith models add NAME SOURCE`."
    return Finding("base models", "warn", "none", hint)


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@/]*@", r"\1:…@", url)
