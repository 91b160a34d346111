"""API keys: made, checked and revoked. A key is stored as its hash and shown once.

Keys carry 256 random bits, so a plain SHA-256 is a sufficient hash for them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable

from sqlalchemy.orm import Session

from core.artifacts import sha256_text
from core.db.models import ApiKey
from core.db.repositories.projects import ApiKeyRepository, ProjectRepository
from core.errors import InvalidInput, Unauthorized
from core.ids import new_id
from core.principal import LOCAL, SCOPES, Principal, expand_scopes
from core.reads import ApiKeyRead

__all__ = [
    "LOCAL",
    "SCOPES",
    "Principal",
    "authenticate",
    "create_key",
    "list_keys",
    "revoke_key",
]

_SECRET = re.compile(r"tsk_[A-Za-z0-9_-]{43}")
_PROJECT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_MAX_KEY_NAME = 64


def create_key(
    session: Session, project_name: str, name: str, scopes: Iterable[str]
) -> tuple[ApiKeyRead, str]:
    """Create a key, and its project if that is new.

    Args:
        session: Opened with `write=True`.
        project_name: Whose objects the key reaches.
        name: What the operator calls the key.
        scopes: From `SCOPES`; admin implies all, train and generate imply read.

    Returns:
        The key and its secret, which cannot be had again.

    Raises:
        InvalidInput: Code `unknown_scope`, `invalid_project_name` or `invalid_key_name`.
    """
    wanted = sorted(set(scopes))
    unknown = [scope for scope in wanted if scope not in SCOPES]
    if unknown or not wanted:
        raise InvalidInput(
            f"unknown scope {unknown[0]!r}" if unknown else "a key needs at least one scope",
            code="unknown_scope",
            field="scopes",
            hint=f"Scopes are {', '.join(SCOPES)}.",
        )
    if not _PROJECT_NAME.fullmatch(project_name):
        raise InvalidInput(
            f"{project_name!r} cannot be a project's name",
            code="invalid_project_name",
            field="project",
            hint="Use lower-case letters, digits, '.', '_' and '-'; at most 64 characters.",
        )
    if not name.isprintable() or not 1 <= len(name) <= _MAX_KEY_NAME:
        raise InvalidInput(
            f"a key's name has 1 to {_MAX_KEY_NAME} printable characters",
            code="invalid_key_name",
            field="name",
        )
    project = ProjectRepository(session).ensure(project_name)
    secret = f"tsk_{secrets.token_urlsafe(32)}"
    key = ApiKey(
        id=new_id("key"),
        project_id=project.id,
        name=name,
        key_hash=sha256_text(secret),
        scopes=wanted,
    )
    ApiKeyRepository(session).add(key)
    return _to_read(key, project_name), secret


def authenticate(session: Session, secret: str) -> Principal:
    """Return who a key belongs to.

    Raises:
        Unauthorized: Code `invalid_api_key`; it is unknown, malformed or revoked.
    """
    key = None
    if _SECRET.fullmatch(secret):
        key = ApiKeyRepository(session).find_active(sha256_text(secret))
    if key is None:
        raise Unauthorized(
            "the API key is not valid",
            code="invalid_api_key",
            hint="Send `Authorization: Bearer tsk_…` with a key that was not revoked.",
        )
    return Principal(key.project_id, expand_scopes(frozenset(key.scopes)), key.id)


def list_keys(session: Session) -> list[ApiKeyRead]:
    """Return all keys of all projects, oldest first, without secrets."""
    return [_to_read(key, project) for key, project in ApiKeyRepository(session).list()]


def revoke_key(session: Session, key_id: str) -> ApiKeyRead:
    """Make a key invalid at once; revoking it again changes nothing.

    Args:
        session: Opened with `write=True`.
        key_id: The key.

    Raises:
        NotFound: Code `unknown_key`.
    """
    keys = ApiKeyRepository(session)
    keys.get(key_id)
    keys.revoke(key_id)
    return _to_read(*keys.get(key_id))


def _to_read(key: ApiKey, project_name: str) -> ApiKeyRead:
    return ApiKeyRead(
        id=key.id,
        project=project_name,
        name=key.name,
        scopes=key.scopes,
        created_at=key.created_at,
        revoked_at=key.revoked_at,
    )
