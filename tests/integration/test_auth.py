from __future__ import annotations

import pytest
from sqlalchemy import select

from core import auth
from core.auth import LOCAL, SCOPES
from core.db.models import ApiKey
from core.db.session import Database
from core.errors import Forbidden, InvalidInput, NotFound, Unauthorized


def test_a_key_opens_its_project_with_its_scopes(database: Database) -> None:
    with database.session(write=True) as session:
        key, secret = auth.create_key(session, "team", "ci", ["generate"])
        _, second = auth.create_key(session, "team", "admin", ["admin", "admin"])
        _, default = auth.create_key(session, "default", "x", ["read"])
    with database.session() as session:
        principal = auth.authenticate(session, secret)
        assert principal.scopes == {"generate", "read"}
        assert principal.key_id == key.id
        assert auth.authenticate(session, second).project_id == principal.project_id
        assert auth.authenticate(session, second).scopes == set(SCOPES)
        assert auth.authenticate(session, default).project_id == LOCAL.project_id
        listed = auth.list_keys(session)
    principal.require("read")
    with pytest.raises(Forbidden):
        principal.require("train")
    assert [(entry.project, entry.name) for entry in listed] == [
        ("team", "ci"),
        ("team", "admin"),
        ("default", "x"),
    ]


def test_the_secret_is_not_stored(database: Database) -> None:
    with database.session(write=True) as session:
        _, secret = auth.create_key(session, "team", "ci", ["read"])
        row = session.scalars(select(ApiKey)).one()
        assert secret.startswith("tsk_")
        assert all(secret[4:] not in str(value) for value in vars(row).values())


def test_a_revoked_key_opens_nothing(database: Database) -> None:
    with database.session(write=True) as session:
        key, secret = auth.create_key(session, "team", "ci", ["read"])
        revoked = auth.revoke_key(session, key.id)
        assert revoked.revoked_at is not None
        assert auth.revoke_key(session, key.id).revoked_at == revoked.revoked_at
        with pytest.raises(Unauthorized) as caught:
            auth.authenticate(session, secret)
        assert caught.value.code == "invalid_api_key"
        with pytest.raises(NotFound):
            auth.revoke_key(session, "key-0")


@pytest.mark.parametrize(
    "secret", ["", "tsk_", "x" * 47, "tsk_" + "ü" * 43, "tsk_" + "a" * 43, "\x00"]
)
def test_a_wrong_secret_opens_nothing(sqlite_database: Database, secret: str) -> None:
    with sqlite_database.session() as session, pytest.raises(Unauthorized):
        auth.authenticate(session, secret)


@pytest.mark.parametrize(
    ("project", "name", "scopes", "code"),
    [
        ("team", "ci", ["root"], "unknown_scope"),
        ("team", "ci", [], "unknown_scope"),
        ("Team!", "ci", ["read"], "invalid_project_name"),
        ("team", "", ["read"], "invalid_key_name"),
        ("team", "a\x00b", ["read"], "invalid_key_name"),
    ],
)
def test_a_bad_key_is_not_made(
    sqlite_database: Database, project: str, name: str, scopes: list[str], code: str
) -> None:
    with sqlite_database.session(write=True) as session, pytest.raises(InvalidInput) as caught:
        auth.create_key(session, project, name, scopes)
    assert caught.value.code == code
