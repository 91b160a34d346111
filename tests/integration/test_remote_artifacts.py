"""API and engine on machines of their own, with nothing between them but a bucket."""

from __future__ import annotations

import asyncio
import io
import tarfile
from pathlib import Path

import pytest

from core.artifacts import WEIGHTS_FILE, read_manifest
from core.config import Settings
from core.errors import Conflict
from core.inference.engine import AdapterRef, Engine
from core.storage import open_store
from core.storage.object_store import ObjectStore
from service import readiness
from service.doctor import parts
from tests.support.adapters import AdapterMaker, base_ref, make_adapter
from tests.support.api import ROWS, adapter_files, jsonl, pack, running_api
from tests.support.engine_process import EngineProcess
from tests.support.engine_world import collect, make_request
from tests.support.tiny_model import make_tiny_model


def test_the_api_keeps_everything_in_the_bucket_and_fetches_no_adapter(
    s3_url: str, tmp_path: Path
) -> None:
    elsewhere = open_store(Settings(data_dir=tmp_path / "engine", artifact_url=s3_url))
    with running_api(tmp_path / "api", artifact_url=s3_url) as api:
        api.engine.locate_adapter = elsewhere.adapter_path
        dataset = api.upload()
        assert [blob.name for blob in elsewhere.list_blobs()] == [dataset["sha256"]]
        assert elsewhere.blob_path(dataset["sha256"]).read_bytes() == jsonl(ROWS)
        rows = api.client.get(f"/datasets/{dataset['id']}/rows").json()["data"]
        assert [row["row"] for row in rows] == ROWS

        imported = api.import_adapter("bot", pack(adapter_files()))
        assert imported.status_code == 201, imported.text
        digest = imported.json()["digest"]
        answer = api.client.post("/generate?adapter=bot", json={"prompt": "hi"}).json()
        assert answer["text"] == f"{digest[:8]} hi"
        archive = api.client.get("/adapters/bot/versions/1/download")
        with tarfile.open(fileobj=io.BytesIO(archive.content)) as packed:
            unpacked = {
                Path(member.name).name: packed.extractfile(member).read()  # type: ignore[union-attr]
                for member in packed
            }
        files = elsewhere.adapter_path(digest)
        assert unpacked == {path.name: path.read_bytes() for path in files.iterdir()}
        assert not (api.settings.root / "cache" / "adapters").exists()
        assert asyncio.run(readiness.check(api.services)).checks["storage"].ok

        api.client.delete("/adapters/bot", params={"force": True})
        api.client.delete(f"/datasets/{dataset['id']}")
        assert not [*elsewhere.list_blobs(), *elsewhere.list_adapters()]
        assert not list(elsewhere.list_temporary())


def test_without_the_bucket_the_api_is_not_ready_and_says_what_is_wrong(
    s3_url: str, tmp_path: Path
) -> None:
    with running_api(tmp_path, artifact_url="s3://no-such-bucket/x") as api:
        storage = asyncio.run(readiness.check(api.services)).checks["storage"]
        assert not storage.ok
        assert "NoSuchBucket" in (storage.reason or "")
        answer = api.client.post("/datasets", files={"file": ("rows.jsonl", jsonl(ROWS))})
        assert (answer.status_code, answer.json()["code"]) == (503, "artifact_store_unavailable")
        assert answer.headers["retry-after"]


def test_the_doctor_tries_the_bucket(s3_url: str, tmp_path: Path) -> None:
    for url, status, words in [
        ("", "ok", "data directory"),
        (s3_url, "ok", s3_url),
        ("s3://no-such-bucket", "fail", "NoSuchBucket"),
        ("gs://bucket", "fail", "names no artifact store"),
    ]:
        finding = parts.check_artifact_store(Settings(data_dir=tmp_path, artifact_url=url))
        assert finding.status == status
        assert words in finding.detail
        assert finding.hint or status == "ok"


def test_an_engine_fetches_an_adapter_by_its_digest(s3_url: str, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "base", seed=1)
    path = make_adapter(tmp_path / "adapter", model)
    adapter = AdapterRef(digest=read_manifest(path).digest)
    open_store(Settings(data_dir=tmp_path / "worker", artifact_url=s3_url)).publish_adapter(path)

    process = EngineProcess(tmp_path / "engine", artifact_url=s3_url)
    try:
        process.wait_until_ready()
        request = make_request(base_ref(model), adapter, max_new_tokens=4)
        answer = process.run(lambda engine: collect(engine, request))
        assert answer.started.adapter_digest == adapter.digest
        assert process.stop() == 0, process.log.read_text()
    finally:
        process.kill()


def test_an_engine_refuses_what_was_changed_in_the_bucket_or_in_its_own_copies(
    s3_url: str, tmp_path: Path
) -> None:
    model = make_tiny_model(tmp_path / "base", seed=1)
    maker = AdapterMaker(model)
    paths = [maker.make(tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2)]
    store = open_store(Settings(data_dir=tmp_path / "worker", artifact_url=s3_url))
    remote, local = (AdapterRef(digest=store.publish_adapter(path).digest) for path in paths)
    assert isinstance(store, ObjectStore)
    [weights] = [
        found.name
        for found in store._bucket.list(f"adapters/{remote.digest}")
        if found.name.endswith(WEIGHTS_FILE)
    ]
    content = store._bucket.read(weights)
    assert content is not None
    # A single bit of a matrix: every name, shape and size stays as it was.
    store._bucket.put_bytes(weights, content[:-1] + bytes([content[-1] ^ 1]))

    process = EngineProcess(tmp_path / "engine", artifact_url=s3_url)
    try:
        process.wait_until_ready()
        base = base_ref(model)

        async def scenario(engine: Engine) -> None:
            with pytest.raises(Conflict) as refused:
                await engine.generate(make_request(base, remote))
            assert refused.value.code == "artifact_damaged"
            await collect(engine, make_request(base, local, max_new_tokens=2))
            assert await engine.unload(local.digest)
            [copy] = (tmp_path / "engine" / "cache" / "adapters").rglob(WEIGHTS_FILE)
            stored = bytearray(copy.read_bytes())
            stored[-1] ^= 1
            copy.write_bytes(stored)
            with pytest.raises(Conflict) as refused:
                await engine.generate(make_request(base, local))
            assert refused.value.code == "digest_mismatch"

        process.run(scenario)
        assert process.stop() == 0, process.log.read_text()
    finally:
        process.kill()
