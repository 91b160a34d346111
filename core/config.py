"""Settings of every process, from the environment; nothing else in the project reads variables."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import AliasChoices, Field, SecretStr
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from core.secret_files import EnvironmentWithFiles, file_variables_of

# sockaddr_un.sun_path holds 108 bytes on Linux and 104 on macOS, the terminating zero included.
_MAX_SOCKET_PATH = 100
# One report may be late without its worker being gone.
_MISSED_REPORTS = 3


class Settings(BaseSettings):
    """Configuration, each value settable as `TUNESMITH_<NAME>`; shared URLs also without prefix.

    Those of `secrets` may be given as the path of a file that holds them, in `<VARIABLE>_FILE`.

    Raises:
        InvalidInput: A secret's file is missing, or given beside the secret itself.
    """

    model_config = SettingsConfigDict(env_prefix="TUNESMITH_", extra="ignore", frozen=True)

    secrets: ClassVar[frozenset[str]] = frozenset(
        {"database_url", "broker_url", "engine_secret", "vllm_api_key"}
    )

    data_dir: Path = Path("data")
    database_url: str = Field(
        "", validation_alias=AliasChoices("TUNESMITH_DATABASE_URL", "DATABASE_URL")
    )
    broker_url: str = Field("", validation_alias=AliasChoices("TUNESMITH_BROKER_URL", "BROKER_URL"))
    engine_urls: str = Field(
        "",
        description="Comma-separated engines: `unix:PATH`, `http://HOST:PORT`, or"
        " `vllm+http://HOST:PORT` for a vLLM server.",
        validation_alias=AliasChoices("TUNESMITH_ENGINE_URLS", "ENGINE_URLS"),
    )
    artifact_url: str = Field(
        "",
        description="`s3://BUCKET/PREFIX` or `file:///DIRECTORY`; the data directory by default.",
        validation_alias=AliasChoices("TUNESMITH_ARTIFACT_URL", "ARTIFACT_URL"),
    )
    artifact_cache_bytes: int = Field(
        20 * 1024**3, ge=0, description="Copies of a bucket's artifacts are kept up to this size."
    )
    engine_secret: SecretStr = Field(
        SecretStr(""), description="Shared secret of API and engine when they speak over TCP."
    )

    auth: Literal["none", "keys"] = "none"
    allowed_hosts: str = Field(
        "localhost,127.0.0.1,[::1]",
        description="Comma-separated Host names accepted, ports ignored; `*` accepts all.",
    )
    allowed_origins: str = Field(
        "", description="Comma-separated further Origins that may send writes from a browser."
    )

    max_upload_bytes: int = 256 * 1024**2
    max_request_bytes: int = 16 * 1024**2
    max_dataset_rows: int = 1_000_000
    hub_datasets: str = Field(
        "",
        description="Comma-separated patterns such as `owner/*` of the data sets that jobs may"
        " fetch from the Hugging Face Hub; none by default.",
    )
    max_adapter_bytes: int = 2 * 1024**3

    lease_seconds: float = Field(30.0, gt=0)
    idle_poll_seconds: float = Field(5.0, gt=0)
    grace_seconds: float = Field(20.0, gt=0, description="From a stop request to SIGKILL.")
    max_attempts: int = Field(3, ge=1)
    max_job_seconds: int = Field(
        0, ge=0, description="Longest time under work of any job, over all attempts; 0 is no limit."
    )
    job_log_bytes: int = Field(
        1024**2, ge=0, description="Kept of what a job's trainer writes, the newest; 0 is nothing."
    )
    worker_memory_bytes: int = Field(
        0, ge=0, description="Memory that a worker offers to jobs; 0 is what the device has."
    )

    quota_queued_jobs: int = Field(1000, ge=0, description="Waiting jobs a project; 0 is no limit.")
    quota_running_jobs: int = Field(0, ge=0, description="Jobs at work a project; 0 is no limit.")
    quota_stored_rows: int = Field(0, ge=0, description="Rows of all data sets a project.")
    quota_stored_bytes: int = Field(
        0, ge=0, description="Data sets, adapters and exports a project."
    )

    webhook_allow_private: bool = Field(
        False, description="Send webhooks to private and loopback addresses, too."
    )
    webhook_max_attempts: int = Field(
        12, ge=1, le=100, description="After so many, about three days, a message is dead."
    )
    webhook_timeout_seconds: float = Field(
        10.0, gt=0, description="For a whole exchange with a receiver."
    )

    gc_interval_seconds: float = Field(3600.0, gt=0)
    gc_grace_seconds: float = Field(
        86_400.0, gt=0, description="Age from which bytes that nothing refers to are removed."
    )
    keep_checkpoints_seconds: float = Field(
        604_800.0, ge=0, description="How long a failed or cancelled job can go on where it was."
    )
    keep_jobs_seconds: float = Field(
        0.0, ge=0, description="Ended jobs are removed after this time; 0 keeps them."
    )
    keep_deliveries_seconds: float = Field(
        2_592_000.0, ge=0, description="Webhook deliveries that are done are kept so long."
    )
    keep_idempotency_seconds: float = Field(
        2_592_000.0, ge=0, description="How long an Idempotency-Key means the job it created."
    )
    keep_exports_seconds: float = Field(
        604_800.0, ge=0, description="Exports are removed this long after they ended."
    )
    gguf_converter: str = Field(
        "",
        description="Path of llama.cpp's `convert_hf_to_gguf.py`, or of a program that runs it, for"
        " API and light workers; without it there are no GGUF exports.",
    )
    tracking_mlflow_uri: str = Field(
        "", description="Where jobs with `report_to: mlflow` are tracked."
    )
    tracking_tensorboard_dir: str = Field(
        "", description="Directory for the event files of jobs with `report_to: tensorboard`."
    )
    trainer_max_rss_bytes: int = Field(
        0, description="Recycle the trainer above this size between jobs; 0 is half of the memory."
    )

    device: str = Field("auto", description="`auto`, `cpu`, `cuda`, `cuda:N` or `mps`.")
    trainer_threads: int = Field(
        0, ge=0, description="Torch threads of the trainer; 0 is all cores."
    )
    engine_threads: int = Field(0, ge=0, description="Torch threads of the engine; 0 is all cores.")
    trainer_niceness: int = Field(2, ge=0, le=19, description="Of the trainer, see nice(1).")
    engine_precision: Literal["auto", "float32", "fp16", "bf16"] = Field(
        "auto",
        description="How base weights are kept; auto is fp16 on x86 CPUs, bf16 on CUDA.",
    )
    engine_max_adapters: int = Field(16, ge=1, description="Adapters in the engine's memory.")
    engine_adapter_bytes: int = Field(
        0, ge=0, description="What they may take together; 0 is an eighth of the memory."
    )
    engine_base_bytes: int = Field(
        0, ge=0, description="What base models in memory may take; 0 is three fifths of it."
    )
    engine_kv_bytes: int = Field(
        0,
        ge=0,
        description="What requests may take while they are computed; 0 is a fifth of the memory.",
    )
    engine_prefix_bytes: int = Field(
        0,
        ge=0,
        description="What is kept of prompts for others that begin alike; 0 is a thirty-second "
        "of the memory, 1 keeps nothing.",
    )
    engine_max_waiting: int = Field(64, ge=1)
    generate_timeout_seconds: float = Field(600.0, gt=0)
    vllm_api_key: SecretStr = Field(
        SecretStr(""), description="What vLLM servers were given as `--api-key`."
    )
    vllm_precision: str = Field(
        "unknown",
        min_length=1,
        max_length=32,
        description="What answers of vLLM servers name as precision of the weights; they do not"
        " tell it themselves.",
    )
    vllm_max_lora_rank: int = Field(
        0, ge=0, description="Their `--max-lora-rank`, which jobs may not exceed; 0 is not known."
    )
    vllm_neutral_adapter: bool = Field(
        True,
        description="Whether requests without an adapter go to vLLM servers with one of zeros: on"
        " CPUs vLLM up to 0.32 computes them with another one's weights otherwise. On GPUs it may"
        " be turned off, which saves one of the places for adapters.",
    )
    vllm_max_rows: int = Field(
        256, ge=1, description="Answers of one vLLM server at a time, for each API process."
    )

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"

    @cached_property
    def root(self) -> Path:
        """The data directory as an absolute path."""
        return self.data_dir.expanduser().resolve()

    @property
    def run_dir(self) -> Path:
        """Sockets, broker files and other state that a restart may lose."""
        return self.root / "run"

    @property
    def resolved_database_url(self) -> str:
        """SQLAlchemy URL; SQLite in the data directory by default, Postgres through psycopg 3."""
        url = self.database_url
        if not url:
            return f"sqlite:///{self.root / 'tunesmith.db'}"
        for prefix in ("postgres://", "postgresql://"):
            if url.startswith(prefix):
                return "postgresql+psycopg://" + url.removeprefix(prefix)
        return url

    @property
    def engine_socket(self) -> Path:
        """Where the local engine listens; a short path if the data directory's is too long."""
        path = self.run_dir / "engine.sock"
        if len(os.fsencode(path)) < _MAX_SOCKET_PATH:
            return path
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"tunesmith-{os.getuid()}-{digest}" / "engine.sock"

    @property
    def engine_addresses(self) -> list[str]:
        """All configured engines; the local socket when none is named."""
        named = [part.strip() for part in self.engine_urls.split(",") if part.strip()]
        return named or [self._local_engine]

    @property
    def uses_local_engine(self) -> bool:
        """Whether an engine is the one that listens on the local socket."""
        return self._local_engine in self.engine_addresses

    @property
    def _local_engine(self) -> str:
        return f"unix:{self.engine_socket}"

    @property
    def uses_vllm(self) -> bool:
        """Whether an engine is a vLLM server."""
        return any(address.startswith("vllm+") for address in self.engine_addresses)

    @property
    def worker_silence_seconds(self) -> float:
        """How long a live worker may be silent; it reports at least once per idle poll."""
        return max(self.lease_seconds, _MISSED_REPORTS * self.idle_poll_seconds)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Return where values come from: arguments, then the environment."""
        return init_settings, EnvironmentWithFiles(settings_cls, cls.secrets)

    def environment(self) -> dict[str, str]:
        """Return the variables that give a child process these same settings.

        Secrets go by value; the variables that name files are emptied, as they would be read again.
        """
        variables = {
            name: "" for field in self.secrets for name in file_variables_of(type(self), field)
        }
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            if name == "data_dir":
                value = self.root
            variables[f"TUNESMITH_{name.upper()}"] = str(value)
        return variables
