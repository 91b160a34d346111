"""The API over a migrated SQLite database, a local store and a fake engine, with a client."""

from __future__ import annotations

import functools
import io
import json
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import uvicorn
from fastapi import FastAPI
from safetensors.numpy import save
from starlette.testclient import TestClient

from core import auth, jobs
from core.artifacts import sha256_text, tree_digest
from core.config import Settings
from core.db.models import BaseModel
from core.db.repositories.base_models import BaseModelRepository
from core.db.session import Database
from core.queue import NullQueue
from core.storage import ArtifactStore
from migrations import upgrade
from service.app import create_app
from service.deps import Services
from tests.support.fake_engine import FakeEngine
from tests.support.polling import wait_until

TEMPLATE = "{{ messages[-1]['content'] }}"
MODULES = {
    "model.layers.0.self_attn.q_proj": [8, 8],
    "model.layers.0.self_attn.v_proj": [4, 8],
    "model.layers.0.mlp.up_proj": [16, 8],
}
ROWS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]}
    for n in range(3)
]


@dataclass
class Api:
    """A running API and the parts behind it."""

    app: FastAPI
    client: TestClient
    engine: FakeEngine
    queue: NullQueue
    settings: Settings
    base_digests: dict[str, str] = field(default_factory=dict)

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    @property
    def database(self) -> Database:
        return self.services.database

    @property
    def store(self) -> ArtifactStore:
        return self.services.store

    def upload(self, rows: list[dict[str, Any]] = ROWS, **options: Any) -> dict[str, Any]:
        """Upload rows and return the data set."""
        answer = self.client.post(
            "/datasets", files={"file": ("rows.jsonl", jsonl(rows))}, **options
        )
        assert answer.status_code == 201, answer.text
        return dict(answer.json())

    def submit(self, **spec: Any) -> dict[str, Any]:
        """Submit a job on inline rows and return it."""
        answer = self.client.post("/jobs", json={"base_model": "tiny", "rows": ROWS, **spec})
        assert answer.status_code == 202, answer.text
        return dict(answer.json())

    def import_adapter(
        self, name: str, archive: bytes, base_model: str = "tiny", **options: Any
    ) -> httpx2.Response:
        """Import an archive."""
        return self.client.post(
            "/adapters/import",
            params={"name": name, "base_model": base_model},
            files={"file": ("adapter.tar.gz", archive, "application/gzip")},
            **options,
        )

    def add_key(self, project: str, *scopes: str) -> dict[str, str]:
        """Create an API key and return the header that carries it."""
        with self.database.session(write=True) as session:
            _, secret = auth.create_key(session, project, "test", scopes)
        return {"Authorization": f"Bearer {secret}"}

    def claim(self, stage: jobs.Stage) -> jobs.Claim:
        """Take the next job as a worker does."""
        claim = jobs.claim(self.database, worker_id="w", stage=stage, lease_seconds=60)
        assert claim is not None
        return claim

    def start_training(self) -> jobs.Claim:
        """Take the next job through validation into training."""
        jobs.validated(self.database, self.claim("validate"), "w", {"rows": 3})
        return self.claim("train")

    def blobs(self) -> set[str]:
        """Return the hashes of all stored uploads."""
        return {path.name for path in (self.settings.root / "blobs").iterdir()}

    def stored_adapters(self) -> set[str]:
        """Return the digests of all stored adapters."""
        return {path.name for path in (self.settings.root / "adapters").iterdir()}


@contextmanager
def running_api(
    root: Path, *, models: tuple[str, ...] = ("tiny",), **settings: Any
) -> Iterator[Api]:
    """Run the API below `root`; every model of `models` has other weights."""
    api = build_api(root, models=models, **settings)
    with TestClient(
        api.app, base_url="http://localhost", raise_server_exceptions=False
    ) as api.client:
        yield api


def build_api(root: Path, *, models: tuple[str, ...] = ("tiny",), **settings: Any) -> Api:
    """Return the API, its client not yet entered."""
    configured = Settings(data_dir=root / "data", **settings)
    configured.root.mkdir(parents=True)
    (configured.root / "tunesmith.db").write_bytes(_migrated_database())
    engine, queue = FakeEngine(), NullQueue()
    app = create_app(configured, engine=engine, queue=queue)
    api = Api(app, TestClient(app, base_url="http://localhost"), engine, queue, configured)
    engine.locate_adapter = api.store.adapter_path
    for name in models:
        api.base_digests[name] = _add_base_model(api.database, root / "models" / name, name)
    return api


@contextmanager
def live_server(api: Api) -> Iterator[str]:
    """Serve the API on a loopback port and yield its URL; streams are live only there."""
    config = uvicorn.Config(api.app, port=0, log_config=None, ws="none", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, 10, "the server did not start")
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        api.services.stopping.set()
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


def jsonl(rows: list[dict[str, Any]]) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def adapter_files(
    seed: int = 0, *, modules: Mapping[str, list[int]] = MODULES, r: int = 2, **config: Any
) -> dict[str, bytes]:
    """Return the files of a small PEFT directory for the test base models."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in modules.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = random.normal(size=(r, columns)).astype("float32")
        tensors[f"{key}.lora_B.weight"] = random.normal(size=(rows, r)).astype("float32")
    plain = {"peft_type": "LORA", "r": r, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    return {
        "adapter_model.safetensors": save(tensors),
        "adapter_config.json": json.dumps({**plain, **config}).encode(),
    }


def pack(files: Mapping[str, bytes | tarfile.TarInfo]) -> bytes:
    """Return a tar.gz of files; a TarInfo is a member without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def _add_base_model(database: Database, path: Path, name: str) -> str:
    path.mkdir(parents=True)
    tokenizer = json.dumps({"tokenizer": "of the tests"})
    (path / "tokenizer.json").write_text(tokenizer)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(name.encode())
    digest = tree_digest(path)
    description = {
        "architecture": "LlamaForCausalLM",
        "parameters": 1000,
        "context_length": 512,
        "vocab_size": 100,
        "dtype": "float32",
        "linear_modules": MODULES,
        "chat_template": True,
        "template_sha256": sha256_text(TEMPLATE),
        "tokenizer_sha256": sha256_text(tokenizer),
        "golden_token_ids": list(range(16)),
        "eos_token_id": 2,
        "bytes": 1000,
    }
    row = BaseModel(
        name=name, source=f"local:{path}", path=str(path), digest=digest, description=description
    )
    with database.session(write=True) as session:
        assert BaseModelRepository(session).add(row)
    return digest


@functools.cache
def _migrated_database() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "migrated.db"
        upgrade(f"sqlite:///{path}")
        return path.read_bytes()
