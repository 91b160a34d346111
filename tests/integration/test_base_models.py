from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from core import base_models, jobs, registry
from core.artifacts import tree_digest
from core.auth import LOCAL
from core.config import Settings
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound, Unavailable
from core.storage import LocalStore
from tests.support.factories import add_base_model, publish_artifact, submit
from tests.support.tiny_gguf import write_tiny_gguf
from tests.support.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def test_a_directory_is_inspected_and_used_in_place(
    sqlite_database: Database, settings: Settings, tiny_model: Path
) -> None:
    added = base_models.add(sqlite_database, settings, "tiny", str(tiny_model))
    assert added.architecture == "LlamaForCausalLM"
    assert added.source == "local"
    assert added.chat_template
    assert added.digest == tree_digest(tiny_model)
    assert base_models.add(sqlite_database, settings, "tiny", str(tiny_model)) == added
    with sqlite_database.session() as session:
        ref, description = base_models.describe(session, "tiny")
        assert (ref.path, ref.digest) == (str(tiny_model), added.digest)
        assert "model.layers.0.self_attn.q_proj" in description["linear_modules"]
        assert base_models.get_ref_by_digest(session, added.digest) == ref
        assert base_models.list_models(session) == [added]
    base_models.remove(sqlite_database, settings, "tiny")
    assert tiny_model.is_dir(), "a directory of the operator's is never deleted"


def test_a_gguf_file_is_converted_into_the_data_directory(
    sqlite_database: Database, settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    source = f"gguf:{write_tiny_gguf(tiny_model, tmp_path / 'tiny.gguf')}"
    home = settings.root / "models" / "tiny"
    home.mkdir(parents=True)
    (home / "left.json").write_text("{}")  # of an addition that was killed before it was stored
    aside = settings.root / "models" / ".tmp"
    (aside / "model-old").mkdir(parents=True)  # of one that was killed while it converted
    os.utime(aside / "model-old", (0, 0))
    added = base_models.add(sqlite_database, settings, "tiny", source)
    assert added.source == "gguf"
    assert added.digest == tree_digest(home)
    assert base_models.add(sqlite_database, settings, "tiny", source) == added
    assert list((settings.root / "models" / ".tmp").iterdir()) == []
    base_models.remove(sqlite_database, settings, "tiny")
    assert not home.exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second file system")
def test_models_may_lie_on_a_volume_of_their_own(
    sqlite_database: Database, settings: Settings, tiny_model: Path, tmp_path: Path
) -> None:
    source = f"gguf:{write_tiny_gguf(tiny_model, tmp_path / 'tiny.gguf')}"
    with tempfile.TemporaryDirectory(dir="/dev/shm") as volume:
        assert Path(volume).stat().st_dev != tmp_path.stat().st_dev
        (settings.root / "models").symlink_to(volume)
        base_models.add(sqlite_database, settings, "tiny", source)
        assert (Path(volume) / "tiny" / "config.json").is_file()


def test_a_name_does_not_change_its_meaning(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    add_base_model(sqlite_database, "tiny", digest=tree_digest(model), path=str(model))
    assert base_models.add(sqlite_database, settings, "tiny", str(model)).name == "tiny"
    with pytest.raises(Conflict) as caught:
        base_models.add(sqlite_database, settings, "tiny", str(tmp_path))
    assert caught.value.code == "model_exists"
    (model / "config.json").write_text('{"changed": true}')
    with pytest.raises(Conflict):
        base_models.add(sqlite_database, settings, "tiny", str(model))
    shutil.rmtree(model)
    with pytest.raises(Conflict):
        base_models.add(sqlite_database, settings, "tiny", str(model))


@pytest.mark.parametrize(
    ("name", "source", "code"),
    [
        ("Tiny", "x", "invalid_model_name"),
        ("tiny", "/nowhere/at/all", "invalid_model_source"),
        ("tiny", "hf:owner/model", "invalid_model_source"),
        ("tiny", "hf:../../x@main", "invalid_model_source"),
    ],
)
def test_a_bad_name_or_source_is_refused(
    sqlite_database: Database, settings: Settings, name: str, source: str, code: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        base_models.add(sqlite_database, settings, name, source)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("files", "code"),
    [
        (["config.json", "tokenizer.json"], "model_file_missing"),
        (["config.json", "tokenizer.json", "pytorch_model.bin"], "pickle_refused"),
        (["model.safetensors", "config.json"], "model_file_missing"),
        (["model.safetensors", "tokenizer.json"], "model_file_missing"),
    ],
)
def test_a_directory_without_what_a_model_needs_is_refused(
    sqlite_database: Database, settings: Settings, tmp_path: Path, files: list[str], code: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InvalidInput) as caught:
        base_models.add(sqlite_database, settings, "tiny", str(tmp_path))
    assert caught.value.code == code


def test_a_refusal_of_the_converter_arrives_and_leaves_no_files(
    sqlite_database: Database, settings: Settings, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(InvalidInput) as caught:
        base_models.add(sqlite_database, settings, "tiny", f"gguf:{tmp_path / 'model.gguf'}")
    assert caught.value.code == "gguf_unreadable"
    assert list((settings.root / "models" / ".tmp").iterdir()) == []
    assert not (settings.root / "models" / "tiny").exists()


def test_the_hub_is_reported_unreachable_without_a_network(
    sqlite_database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Nothing listens on port 9 (discard) here, so the answer does not depend on the network.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(Unavailable) as caught:
        base_models.add(sqlite_database, settings, "tiny", "hf:owner/model@main")
    assert caught.value.code == "hub_unreachable"
    assert list((settings.root / "models" / ".tmp").iterdir()) == []


def test_a_base_model_in_use_stays(
    database: Database, settings: Settings, store: LocalStore, tmp_path: Path
) -> None:
    add_base_model(database, "tiny")
    job = submit(database, store, settings)
    with pytest.raises(Conflict) as caught:
        base_models.remove(database, settings, "tiny")
    assert caught.value.code == "model_in_use"
    with database.session(write=True) as session:
        jobs.cancel(session, LOCAL, job.id)
        registry.import_adapter(
            session,
            LOCAL,
            name="bot",
            published=publish_artifact(store, tmp_path / "artifact"),
            base_model="tiny",
            provenance={},
            store=store,
        )
    with pytest.raises(Conflict):
        base_models.remove(database, settings, "tiny")
    with database.session(write=True) as session:
        registry.delete_adapter(session, LOCAL, "bot", force=True)
    base_models.remove(database, settings, "tiny")
    with database.session() as session:
        for look in (base_models.get, base_models.get_ref, base_models.describe):
            with pytest.raises(NotFound) as missing:
                look(session, "tiny")
            assert missing.value.code == "unknown_base_model"
        with pytest.raises(NotFound):
            base_models.get_ref_by_digest(session, "b" * 64)
    with pytest.raises(NotFound):
        base_models.remove(database, settings, "tiny")
