from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.artifacts import read_manifest
from core.errors import Conflict, Unavailable
from tests.support.api import MODULES, Api, adapter_files, pack, running_api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path, models=("tiny", "other"), max_adapter_bytes=100_000) as running:
        yield running


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def test_an_imported_adapter_is_a_version_that_latest_points_at(api: Api) -> None:
    answer = api.import_adapter("bot", pack(adapter_files()))
    version = answer.json()
    assert answer.status_code == 201, answer.text
    assert answer.headers["location"] == "/adapters/bot/versions/1"
    assert (version["adapter"], version["version"], version["origin"]) == ("bot", 1, "import")
    assert version["base_digest"] == api.base_digests["tiny"]
    assert api.stored_adapters() == {version["digest"]}
    assert api.client.get("/adapters/bot/versions/1").json() == version
    adapter = api.client.get("/adapters/bot").json()
    assert (adapter["latest"], adapter["aliases"]) == (1, {"latest": 1})
    assert api.client.get("/adapters").json()["data"] == [adapter]
    assert list((api.settings.root / "tmp").iterdir()) == []


def test_a_raw_gzip_body_is_an_import_too(api: Api) -> None:
    answer = api.client.post(
        "/adapters/import?name=bot&base_model=tiny",
        content=pack(adapter_files()),
        headers={"Content-Type": "application/gzip"},
    )
    assert answer.status_code == 201, answer.text


def test_a_download_is_deterministic_and_imports_again_to_the_same_digest(api: Api) -> None:
    version = api.import_adapter("bot", pack(adapter_files())).json()
    answer = api.client.get("/adapters/bot/versions/1/download")
    archive = answer.content
    assert answer.headers["content-type"] == "application/gzip"
    assert "bot-v1.tar.gz" in answer.headers["content-disposition"]
    assert api.client.get("/adapters/bot/versions/1/download").content == archive
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        members = tar.getmembers()
        tar.extractall(api.settings.root / "out", filter="data")
    assert {member.name.split("/")[0] for member in members} == {"bot-v1"}
    assert [member.name for member in members] == sorted(member.name for member in members)
    assert read_manifest(api.settings.root / "out" / "bot-v1").digest == version["digest"]

    again = api.import_adapter("copy", archive)
    assert (again.status_code, again.json()["digest"]) == (201, version["digest"])


def test_aliases_promote_roll_back_and_go(api: Api) -> None:
    for seed in (1, 2):
        api.import_adapter("bot", pack(adapter_files(seed)))
    assert api.client.get("/adapters/bot").json()["latest"] == 2
    moved = api.client.put("/adapters/bot/aliases/latest", json={"version": 1})
    assert (moved.status_code, moved.json()["latest"]) == (200, 1)
    api.client.put("/adapters/bot/aliases/prod", json={"version": 2})
    assert api.client.delete("/adapters/bot/aliases/prod").status_code == 204
    gone = api.client.delete("/adapters/bot/aliases/prod")
    assert (gone.status_code, gone.json()["code"]) == (404, "unknown_alias")
    latest = api.client.delete("/adapters/bot/aliases/latest")
    assert (latest.status_code, latest.json()["code"]) == (409, "latest_is_fixed")
    missing = api.client.put("/adapters/bot/aliases/prod", json={"version": 9})
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_version")


def test_versions_are_listed_newest_first(api: Api) -> None:
    for seed in (1, 2, 3):
        api.import_adapter("bot", pack(adapter_files(seed)))
    page = api.client.get("/adapters/bot/versions", params={"limit": 2}).json()
    rest = api.client.get(
        "/adapters/bot/versions", params={"limit": 2, "cursor": page["next_cursor"]}
    ).json()
    assert [row["version"] for row in page["data"] + rest["data"]] == [3, 2, 1]


def test_deleting_needs_force_where_an_alias_points_and_removes_unshared_files(api: Api) -> None:
    shared = api.import_adapter("bot", pack(adapter_files(1))).json()["digest"]
    own = api.import_adapter("bot", pack(adapter_files(2))).json()["digest"]
    api.import_adapter("twin", pack(adapter_files(1)))

    refused = api.client.delete("/adapters/bot/versions/2")
    assert (refused.status_code, refused.json()["code"]) == (409, "alias_points_here")
    assert api.client.delete("/adapters/bot/versions/2?force=true").status_code == 204
    assert api.stored_adapters() == {shared}
    assert own not in {row["digest"] for row in api.client.get("/engine").json()["adapters"]}
    assert api.client.get("/adapters/bot").json()["latest"] == 1

    assert api.client.delete("/adapters/bot").status_code == 409
    assert api.client.delete("/adapters/bot?force=true").status_code == 204
    assert api.stored_adapters() == {shared}
    assert api.client.delete("/adapters/twin?force=true").status_code == 204
    assert api.stored_adapters() == set()
    assert api.client.get("/adapters").json()["data"] == []


@pytest.mark.parametrize("failure", ["gate", "down"])
def test_what_the_engine_refuses_is_not_published(api: Api, failure: str) -> None:
    digest = api.import_adapter("bot", pack(adapter_files())).json()["digest"]
    api.client.delete("/adapters/bot?force=true")
    if failure == "gate":
        api.engine.refusals[digest] = Conflict("no effect", code="adapter_without_effect")
    else:
        api.engine.unavailable = Unavailable("starting", code="engine_starting")
    answer = api.import_adapter("bot", pack(adapter_files()))
    expected = (409, "adapter_without_effect") if failure == "gate" else (503, "engine_starting")
    assert (answer.status_code, answer.json()["code"]) == expected
    assert api.stored_adapters() == set()
    assert api.client.get("/adapters/bot").status_code == 404


def test_a_refused_import_leaves_the_files_that_another_version_has(api: Api) -> None:
    digest = api.import_adapter("bot", pack(adapter_files())).json()["digest"]
    api.engine.refusals[digest] = Conflict("no effect", code="adapter_without_effect")
    assert api.import_adapter("other-bot", pack(adapter_files())).status_code == 409
    assert api.stored_adapters() == {digest}


def archive(**changes: bytes | tarfile.TarInfo | None) -> bytes:
    """Return an adapter archive with members added, replaced or, by None, left out."""
    named = {name.replace("__", "/").replace("_dot_", "."): c for name, c in changes.items()}
    members = {**adapter_files(), **named}
    return pack({name: content for name, content in members.items() if content is not None})


REFUSALS: dict[str, tuple[bytes, str]] = {
    "not an archive": (b"hello", "invalid_archive"),
    "empty": (b"", "invalid_archive"),
    "cut off": (archive()[:-200], "invalid_archive"),
    "no weights": (archive(adapter_model_dot_safetensors=None), "adapter_file_missing"),
    "pickled weights": (archive(adapter_model_dot_bin=b"\x80\x04."), "pickle_refused"),
    "traversal": (pack({"../adapter_config.json": b"{}"}), "unsafe_archive"),
    "absolute path": (pack({"/tmp/adapter_config.json": b"{}"}), "unsafe_archive"),
    "symlink": (pack({"x": link("adapter_config.json", "/etc/passwd")}), "unsafe_archive"),
    "hard link": (pack({"x": link("adapter_config.json", "y", tarfile.LNKTYPE)}), "unsafe_archive"),
    "foreign file": (archive(run_dot_py=b"print()"), "unexpected_file"),
    "foreign tokenizer": (archive(tokenizer_dot_json=b"{}"), "tokenizer_mismatch"),
    "foreign template": (archive(chat_template_dot_jinja=b"{{ 1 }}"), "template_mismatch"),
    "pattern as target": (pack(adapter_files(target_modules="q_.*")), "invalid_adapter_config"),
    "code reference": (
        pack(adapter_files(auto_mapping={"base_model_class": "os"})),
        "invalid_adapter_config",
    ),
    "config not json": (archive(adapter_config_dot_json=b"{"), "invalid_adapter_config"),
    "config too deep": (archive(adapter_config_dot_json=b"[" * 5000), "invalid_adapter_config"),
    "header too deep": (
        archive(adapter_model_dot_safetensors=(5000).to_bytes(8, "little") + b"[" * 5000),
        "invalid_adapter_weights",
    ),
    "weights not safetensors": (
        archive(adapter_model_dot_safetensors=b"PK\x03\x04" * 9),
        "invalid_adapter_weights",
    ),
    "another rank": (
        archive(adapter_model_dot_safetensors=adapter_files(r=4)["adapter_model.safetensors"]),
        "adapter_shape_mismatch",
    ),
    "unknown module": (
        pack(adapter_files(modules={"model.layers.9.self_attn.q_proj": [8, 8]})),
        "adapter_shape_mismatch",
    ),
    "other shape": (
        pack(adapter_files(modules={**MODULES, "model.layers.0.mlp.up_proj": [17, 8]})),
        "adapter_shape_mismatch",
    ),
    "another base": (
        archive(base_model_dot_json=json.dumps({"digest": "0" * 64}).encode()),
        "base_mismatch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_archives_that_are_unsafe_or_do_not_fit_are_refused(api: Api, name: str) -> None:
    content, code = REFUSALS[name]
    answer = api.import_adapter("bot", content)
    assert (answer.status_code, answer.json()["code"]) == (422, code), answer.text
    assert api.stored_adapters() == set()
    assert list((api.settings.root / "tmp").iterdir()) == []
    assert api.client.get("/adapters/bot").status_code == 404


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(api: Api) -> None:
    answer = api.import_adapter("bot", archive(adapter_model_dot_safetensors=bytes(200_000)))
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")


@pytest.mark.parametrize(
    ("name", "base_model", "status", "code"),
    [
        ("Bot", "tiny", 422, "invalid_request"),
        ("a" * 64, "tiny", 422, "invalid_request"),
        ("bot", "absent", 404, "unknown_base_model"),
    ],
)
def test_an_import_under_a_bad_name_is_refused(
    api: Api, name: str, base_model: str, status: int, code: str
) -> None:
    answer = api.import_adapter(name, pack(adapter_files()), base_model)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


@pytest.mark.parametrize("version", ["0", "-1", "x", str(2**31), "9" * 30])
def test_a_version_that_cannot_be_one_is_refused(api: Api, version: str) -> None:
    assert api.client.get(f"/adapters/bot/versions/{version}").status_code == 422
