from __future__ import annotations

import os
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from core import exports, housekeeping, quotas, registry
from core.auth import LOCAL
from core.causal_lm import load_causal_lm
from core.config import Settings
from core.db.models import BaseModel
from core.errors import LeaseLost
from core.storage import Blob
from tests.support.adapters import base_ref, make_adapter
from tests.support.api import Api, adapter_files, live_server, pack, running_api
from tests.support.command_line import succeed
from tests.support.polling import wait_until
from tests.support.query_plans import explained
from tests.support.tiny_model import make_tiny_model
from worker.exports import Exporter

PATH = "/adapters/bot/versions/1/exports"
IDS = torch.tensor([[5, 60, 70, 80, 90, 100]])


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with running_api(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "real")


@pytest.fixture(scope="module")
def adapter_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "real", model_dir)


def import_real(api: Api, model_dir: Path, adapter_dir: Path) -> None:
    """Publish a real adapter of a real base model as bot@1."""
    ref = base_ref(model_dir, "real")
    with api.database.session(write=True) as session:
        session.add(
            BaseModel(
                name="real",
                source="local",
                path=ref.path,
                digest=ref.digest,
                description={},
            )
        )
    published = api.store.publish_adapter(adapter_dir)
    with api.database.session(write=True) as session:
        registry.import_adapter(
            session,
            LOCAL,
            name="bot",
            published=published,
            base_model="real",
            provenance={},
            store=api.store,
        )


def exporter(api: Api, worker_id: str = "w", **settings: Any) -> Exporter:
    chosen: Settings = api.settings.model_copy(update=settings)
    return Exporter(chosen, api.database, api.store, worker_id, threading.Event())


def claim(api: Api, worker_id: str, lease_seconds: float = 60) -> exports.ExportClaim | None:
    return exports.claim(
        api.database, worker_id, lease_seconds=lease_seconds, max_attempts=2, absent=()
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_merged_export_computes_what_base_and_adapter_do(
    api: Api, model_dir: Path, adapter_dir: Path, tmp_path: Path
) -> None:
    import_real(api, model_dir, adapter_dir)
    answer = api.client.post(PATH, json={"format": "merged", "dtype": "fp32"})
    assert answer.status_code == 202, answer.text
    place = answer.headers["location"]
    assert answer.json()["status"] == "queued"
    again = api.client.post(PATH, json={"format": "merged", "dtype": "fp32"}).json()
    assert again["id"] == answer.json()["id"]
    early = api.client.get(f"{place}/download")
    assert (early.status_code, early.json()["code"]) == (409, "export_not_ready")

    exporter(api).work()

    done = api.client.get(place).json()
    assert (done["status"], done["error"]) == ("succeeded", None)
    file = api.client.get(f"{place}/download")
    assert len(file.content) == done["bytes"]
    assert file.headers["etag"] == f'"{done["sha256"]}"'
    part = api.client.get(f"{place}/download", headers={"Range": "bytes=512-1023"})
    assert (part.status_code, part.content) == (206, file.content[512:1024])
    same = api.client.get(f"{place}/download", headers={"If-None-Match": file.headers["etag"]})
    assert same.status_code == 304
    target = tmp_path / "out.tar"
    target.write_bytes(file.content)
    with tarfile.open(target) as archive:
        archive.extractall(tmp_path / "out", filter="data")
    merged = tmp_path / "out" / "model"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (merged / name).read_bytes() == (adapter_dir / name).read_bytes()
    base = load_causal_lm(model_dir, torch.float32)
    plain = base(IDS).logits
    wanted = PeftModel.from_pretrained(base, str(adapter_dir)).eval()(IDS).logits
    got = load_causal_lm(merged, torch.float32)(IDS).logits
    assert (wanted - plain).abs().max() > 0.1
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert not list((api.settings.root / "exports").iterdir())

    assert api.client.get(PATH).json()["data"] == [done]
    assert api.client.delete(place).status_code == 204
    assert api.client.get(place).json()["code"] == "unknown_export"
    assert not api.store.has_blob(done["sha256"])


def test_gguf_is_written_by_the_configured_converter(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    converter = tmp_path / "convert.py"
    converter.write_text(
        "import sys, pathlib\n"
        "assert (pathlib.Path(sys.argv[1]) / 'model.safetensors').is_file()\n"
        "assert sys.argv[2] == '--outfile' and sys.argv[4:] == ['--outtype', 'q8_0']\n"
        "pathlib.Path(sys.argv[3]).write_bytes(b'GGUF')\n"
    )
    with running_api(tmp_path / "data", gguf_converter=str(converter)) as api:
        import_real(api, model_dir, adapter_dir)
        place = api.client.post(PATH, json={"format": "gguf", "dtype": "q8_0"}).headers["location"]
        exporter(api).work()
        assert api.client.get(f"{place}/download").content == b"GGUF"

        converter.write_text("raise SystemExit('no such architecture')")
        failing = api.client.post(PATH, json={"format": "gguf", "dtype": "fp16"})
        exporter(api).work()
        error = api.client.get(failing.headers["location"]).json()["error"]
        assert error["code"] == "gguf_failed"
        assert "no such architecture" in error["message"]


def test_the_command_follows_an_export_and_saves_its_file(api: Api, tmp_path: Path) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    target = tmp_path / "model.tar"

    def work() -> None:
        wait_until(lambda: exports.is_due(api.database, ()), 20, "nothing was asked for")
        held = claim(api, "w")
        assert held is not None
        exports.succeed(api.database, held, "w", stored(api), api.store, api.settings)

    thread = threading.Thread(target=work)
    thread.start()
    with live_server(api) as url:
        command = ("adapters", "export", "bot@1", "--dtype", "bf16", "--output", target)
        outcome = succeed(*command, "--url", url)
    thread.join()
    assert "bot@1" in outcome.stdout
    assert target.read_bytes() == b"a model"
    (export,) = api.client.get(PATH).json()["data"]
    assert (export["format"], export["dtype"]) == ("merged", "bf16")


def test_what_cannot_be_exported_is_refused(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    for body, code in (
        ({"format": "gguf"}, "gguf_unavailable"),
        ({"format": "merged", "dtype": "q8_0"}, "invalid_dtype"),
    ):
        answer = api.client.post(PATH, json=body)
        assert (answer.status_code, answer.json()["code"]) == (422, code)
    missing = api.client.post("/adapters/bot/versions/9/exports", json={"format": "merged"})
    assert (missing.status_code, missing.json()["code"]) == (404, "unknown_version")


def test_an_export_outlives_its_worker_but_not_too_many(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    place = api.client.post(PATH, json={"format": "merged"}).headers["location"]
    first = claim(api, "dead", lease_seconds=0.01)
    assert first is not None
    wait_until(lambda: exports.is_due(api.database, ()), 10, "the lease did not run out")
    second = claim(api, "alive")
    assert second is not None
    assert (second.export_id, second.attempt) == (first.export_id, 2)
    with pytest.raises(LeaseLost):
        exports.succeed(api.database, first, "dead", stored(api), api.store, api.settings)
    exports.renew(api.database, second, "alive", 60)
    exports.hand_back(api.database, second, "alive", counted=True)
    assert claim(api, "third") is None
    ended = api.client.get(place).json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "attempts_exhausted")


def test_a_worker_without_exports_to_make_asks_one_thing(api: Api) -> None:
    with explained(api.database) as plans:
        exporter(api).work()
    (asked,) = plans.all
    assert "exports" in asked.statement


def test_a_deleted_export_is_given_up_by_its_worker(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    place = api.client.post(PATH, json={"format": "merged"}).headers["location"]
    held = claim(api, "w")
    assert held is not None
    assert api.client.delete(place).status_code == 204
    with pytest.raises(LeaseLost):
        exports.renew(api.database, held, "w", 60)


def test_an_export_that_its_child_cannot_make_fails_with_the_reason(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    place = api.client.post(PATH, json={"format": "merged"}).headers["location"]
    exporter(api).work()
    ended = api.client.get(place).json()
    assert (ended["status"], ended["error"]["code"]) == ("failed", "model_unreadable")


def used_bytes(api: Api) -> int:
    return int(api.client.get("/usage").json()["quotas"]["stored_bytes"]["used"])


def test_what_would_not_fit_beside_what_is_stored_and_being_made_is_refused(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    before = used_bytes(api)
    # The base model has 1000 parameters.
    limit = before + 7000
    with api.database.session(write=True) as session:
        quotas.set_quotas(session, api.settings, "default", {"stored_bytes": limit})
    assert api.client.post(PATH, json={"format": "merged", "dtype": "fp32"}).is_success
    assert api.client.post(PATH, json={"format": "merged", "dtype": "fp16"}).is_success
    refused = api.client.post(PATH, json={"format": "merged", "dtype": "bf16"})
    assert (refused.status_code, refused.json()["code"]) == (403, "quota_exceeded")
    assert refused.json()["limit"] == {"name": "stored_bytes", "value": limit, "used": before}
    held = claim(api, "w")
    assert held is not None
    exports.succeed(api.database, held, "w", stored(api), api.store, api.settings)
    assert used_bytes(api) == before + len(b"a model")
    # It became smaller than expected.
    assert api.client.post(PATH, json={"format": "merged", "dtype": "bf16"}).is_success


def test_an_export_that_became_too_large_fails_and_nothing_of_it_counts(
    tmp_path: Path, model_dir: Path, adapter_dir: Path
) -> None:
    with running_api(tmp_path, quota_stored_bytes=60_000) as api:
        import_real(api, model_dir, adapter_dir)
        before = used_bytes(api)
        asked = api.client.post(PATH, json={"format": "merged", "dtype": "fp32"})
        place = asked.headers["location"]
        exporter(api).work()
        ended = api.client.get(place).json()
        assert (ended["status"], ended["error"]["code"]) == ("failed", "quota_exceeded")
        assert used_bytes(api) == before
        assert ended["bytes"] is None


def stored(api: Api) -> Blob:
    return api.store.write_blob([b"a model"], 100)


def test_housekeeping_keeps_a_file_until_its_export_is_past_its_time(api: Api) -> None:
    api.import_adapter("bot", pack(adapter_files()))
    api.client.post(PATH, json={"format": "merged"})
    held = claim(api, "w")
    assert held is not None
    blob = stored(api)
    exports.succeed(api.database, held, "w", blob, api.store, api.settings)
    keeping = api.settings.model_copy(update={"gc_grace_seconds": 1e-9})
    report = housekeeping.clean(api.database, api.store, keeping)
    assert api.store.has_blob(blob.sha256)
    expired = keeping.model_copy(update={"keep_exports_seconds": 0.0})
    assert housekeeping.clean(api.database, api.store, expired, dry_run=True).removed[
        "exports"
    ].bytes == len(b"a model")
    report = housekeeping.clean(api.database, api.store, expired)
    assert report.removed["exports"].count == 1
    assert not api.store.has_blob(blob.sha256)
    assert api.client.get(PATH).json()["data"] == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.skipif(
    "TUNESMITH_TEST_GGUF_CONVERTER" not in os.environ, reason="needs llama.cpp's converter"
)
def test_a_gguf_of_the_sample_model_answers_alike(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from core.training.merging import convert_to_gguf, merge
    from tests.support.sample_model import sample_model_directory

    base = sample_model_directory()
    adapter = make_adapter(tmp_path / "adapter", base, r=8, targets=("q_proj",), scale=0.02)
    merge(base, adapter, tmp_path / "merged", "fp32")
    merged = load_causal_lm(tmp_path / "merged", torch.float32)
    wanted = merged.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
    del merged
    converter = Path(os.environ["TUNESMITH_TEST_GGUF_CONVERTER"])
    convert_to_gguf(converter, tmp_path / "merged", tmp_path / "model.gguf", "fp32")
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    got = read.generate(input_ids=IDS, max_new_tokens=16, do_sample=False)
    assert got.tolist() == wanted.tolist()
