"""Small real objects: base models, data sets, specs, jobs and artifacts of a two-layer model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from core import datasets, jobs
from core.artifacts import Manifest, build_manifest, sha256_file, sha256_text
from core.auth import LOCAL, Principal
from core.config import Settings
from core.db.models import BaseModel
from core.db.repositories.base_models import BaseModelRepository
from core.db.repositories.projects import ProjectRepository
from core.db.session import Database
from core.jobs import Claim, JobRead
from core.reads import DatasetRead
from core.specs import JobSpec
from core.storage import ArtifactStore, PublishedAdapter

BASE_DIGEST = "b" * 64
TEMPLATE = "{{ messages }}"
TOKENIZER = '{"model": {"type": "BPE"}}'
LINEAR_MODULES = {
    f"model.layers.{layer}.self_attn.{name}": [16, 16]
    for layer in (0, 1)
    for name in ("q_proj", "v_proj")
}
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
]


def describe_base() -> dict[str, Any]:
    """Return what inspection would find in the base model of these factories."""
    return {
        "architecture": "LlamaForCausalLM",
        "parameters": 1234,
        "context_length": 512,
        "vocab_size": 64,
        "dtype": "float32",
        "linear_modules": LINEAR_MODULES,
        "chat_template": True,
        "template_sha256": sha256_text(TEMPLATE),
        "tokenizer_sha256": sha256_text(TOKENIZER),
        "golden_token_ids": list(range(1, 17)),
        "eos_token_id": 2,
        "bytes": 4096,
    }


def make_base_directory(path: Path) -> Path:
    """Write the tokenizer side of the base model."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(TOKENIZER)
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def add_base_model(
    database: Database, name: str = "tiny", *, digest: str = BASE_DIGEST, path: str = "/nowhere"
) -> None:
    """Insert a base model's row."""
    with database.session(write=True) as session:
        BaseModelRepository(session).add(
            BaseModel(
                name=name,
                source=f"local:{path}",
                path=path,
                digest=digest,
                description=describe_base(),
            )
        )


def add_project(database: Database, name: str) -> Principal:
    """Return a principal with all scopes in a project of this name."""
    with database.session(write=True) as session:
        return Principal(ProjectRepository(session).ensure(name).id, LOCAL.scopes)


def add_dataset(
    database: Database,
    store: ArtifactStore,
    principal: Principal = LOCAL,
    *,
    content: bytes = b"",
    filename: str = "rows.jsonl",
) -> DatasetRead:
    """Store rows as a data set."""
    lines = content or "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    blob = store.write_blob([lines], 10**6)
    with database.session(write=True) as session:
        return datasets.create(
            session,
            principal,
            filename=filename,
            blob=blob,
            format="messages",
            rows=len(ROWS),
            report={},
            store=store,
        )


def make_spec(**fields: Any) -> JobSpec:
    """Return a spec on the base model `tiny` with inline rows, unless told otherwise."""
    if "dataset" not in fields:
        fields.setdefault("rows", ROWS)
    return JobSpec.model_validate({"base_model": "tiny"} | fields)


def submit(
    database: Database,
    store: ArtifactStore,
    settings: Settings,
    principal: Principal = LOCAL,
    *,
    key: str | None = None,
    **fields: Any,
) -> JobRead:
    """Submit a job in a transaction of its own."""
    with database.session(write=True) as session:
        job, _ = jobs.submit(
            session,
            principal,
            make_spec(**fields),
            settings=settings,
            idempotency_key=key,
            store=store,
        )
    return job


def queue_job(
    database: Database, store: ArtifactStore, settings: Settings, **fields: Any
) -> JobRead:
    """Submit a job and pass its validation; it waits for training."""
    job = submit(database, store, settings, **fields)
    claim = must_claim(database, "validator", "validate")
    assert claim.job_id == job.id, "another job was waiting for its validation"
    jobs.validated(database, claim, "validator", {"rows": 1})
    return job


def must_claim(
    database: Database, worker_id: str, stage: jobs.Stage = "train", lease_seconds: float = 30
) -> Claim:
    """Claim a job that must be waiting."""
    claim = jobs.claim(database, worker_id=worker_id, stage=stage, lease_seconds=lease_seconds)
    assert claim is not None, "no job waits"
    return claim


def make_adapter_directory(path: Path, *, seed: int = 0, rank: int = 2) -> Path:
    """Write a PEFT directory for the base model of these factories, without a manifest."""
    path.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    weights = {}
    for module, (rows, columns) in LINEAR_MODULES.items():
        for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            name = f"base_model.model.{module}.lora_{side}.weight"
            weights[name] = random.normal(size=shape).astype(np.float32)
    save_file(weights, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def make_artifact(path: Path, *, seed: int = 0) -> Manifest:
    """Write a complete artifact; another seed gives another digest."""
    make_adapter_directory(path, seed=seed)
    make_base_directory(path)
    manifest = build_manifest(
        path,
        base_digest=BASE_DIGEST,
        golden_token_ids=describe_base()["golden_token_ids"],
        linear_modules=LINEAR_MODULES,
    )
    assert manifest.tokenizer_sha256 == sha256_file(path / "tokenizer.json")
    return manifest


def publish_artifact(store: ArtifactStore, path: Path, *, seed: int = 0) -> PublishedAdapter:
    """Store a complete artifact."""
    make_artifact(path, seed=seed)
    return store.publish_adapter(path)
