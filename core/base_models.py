"""Base models: what the operator allows to be trained and served.

Owns where their files lie and what is known of them. Inspecting and converting a model needs the
model libraries, so that happens in processes of their own; nothing of them is imported here.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from core.artifacts import tree_digest
from core.config import Settings
from core.db.models import BaseModel
from core.db.repositories.base_models import BaseModelRepository
from core.db.session import Database
from core.errors import Conflict, InvalidInput, NotFound, TunesmithError, Unavailable
from core.ids import new_id
from core.inference.engine import BaseModelRef
from core.reads import BaseModelRead

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,127}")
_HUB = re.compile(
    r"hf:(?P<repository>[A-Za-z0-9][\w.-]*(/[\w.-]+)?)@(?P<revision>[\w./-]+)", re.ASCII
)
_TIMEOUT_SECONDS = 3600
# No model's name begins with a dot.
_ASIDE = ".tmp"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def add(database: Database, settings: Settings, name: str, source: str) -> BaseModelRead:
    """Register a base model, fetching or converting it where the source asks for that.

    Adding what is there already, unchanged, answers with what is there.

    Args:
        database: Where.
        settings: Where files of ours go.
        name: What clients will call it.
        source: A directory, used in place; `hf:ID@REVISION`; or `gguf:PATH`.

    Raises:
        InvalidInput: `invalid_model_name`, `invalid_model_source`, `pickle_refused`,
            `model_file_missing`, or what inspection or conversion found.
        Conflict: Code `model_exists`; the name stands for something else.
        Unavailable: Code `hub_unreachable` or `model_inspection_failed`.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:80]!r} cannot be a base model's name",
            code="invalid_model_name",
            field="name",
            hint="Use lower-case letters, digits, '.', '_' and '-'; at most 128 characters.",
        )
    source = _normalise(source)
    with database.session() as session:
        existing = BaseModelRepository(session).find(name)
    if existing is not None:
        return _unchanged(existing, source)

    with _files(settings, name, source) as path:
        _check_files(path)
        digest = tree_digest(path)
        description = _run("core.training.inspect_model", str(path))
    model = BaseModel(
        name=name,
        source=source,
        path=str(_home(settings, name, source)),
        digest=digest,
        description=description,
    )
    with database.session(write=True) as session:
        models = BaseModelRepository(session)
        if models.add(model):
            return to_read(model)
        winner = models.get(name)
    return _unchanged(winner, source)


def remove(database: Database, settings: Settings, name: str) -> None:
    """Remove a base model; files that were fetched or converted for it are deleted.

    Raises:
        NotFound: Code `unknown_base_model`.
        Conflict: Code `model_in_use`; an unfinished job or an adapter version needs it.
    """
    with database.session(write=True) as session:
        models = BaseModelRepository(session)
        model = models.get(name, lock=True)
        if models.is_needed(model):
            raise Conflict(
                f"unfinished jobs or adapters need the base model {name!r}",
                code="model_in_use",
                hint="Delete its adapters and cancel its jobs first.",
            )
        models.delete(model)
    owned = _owned_directory(settings, name)
    if Path(model.path) == owned:
        shutil.rmtree(owned, ignore_errors=True)


def move(database: Database, name: str, directory: Path) -> BaseModelRead:
    """Note that the files of a base model are in another place now, as on another machine.

    Raises:
        NotFound: Code `unknown_base_model`.
        InvalidInput: `invalid_model_source` or `model_file_missing`; or `other_model` when the
            files are not those that adapters were trained on.
    """
    with database.session() as session:
        digest = BaseModelRepository(session).get(name).digest
    path = directory.expanduser().resolve()
    _check_files(path)
    if tree_digest(path) != digest:
        raise InvalidInput(
            f"the files in {path} are not those of {name!r}",
            code="other_model",
            field="directory",
            hint="Give an exact copy of the directory, or add it under another name.",
        )
    with database.session(write=True) as session:
        model = BaseModelRepository(session).get(name, lock=True)
        model.source, model.path = f"local:{path}", str(path)
        return to_read(model)


def get(session: Session, name: str) -> BaseModelRead:
    """Return a base model.

    Raises:
        NotFound: Code `unknown_base_model`.
    """
    return to_read(BaseModelRepository(session).get(name))


def list_models(session: Session) -> list[BaseModelRead]:
    """Return all base models by name."""
    return [to_read(model) for model in BaseModelRepository(session).list()]


def list_absent(session: Session) -> frozenset[str]:
    """Return the names of the base models whose files this machine lacks."""
    paths = BaseModelRepository(session).list_paths()
    return frozenset(name for name, path in paths.items() if not Path(path).is_dir())


def describe(session: Session, name: str) -> tuple[BaseModelRef, dict[str, Any]]:
    """Return where a base model lies and all that inspection found.

    Raises:
        NotFound: Code `unknown_base_model`.
    """
    model = BaseModelRepository(session).get(name)
    return to_ref(model), model.description


def get_ref(session: Session, name: str) -> BaseModelRef:
    """Return where a base model lies.

    Raises:
        NotFound: Code `unknown_base_model`.
    """
    return to_ref(BaseModelRepository(session).get(name))


def get_ref_by_digest(session: Session, digest: str) -> BaseModelRef:
    """Return where the base model of an adapter lies.

    Raises:
        NotFound: Code `unknown_base_model`.
    """
    model = BaseModelRepository(session).find_by_digest(digest)
    if model is None:
        raise NotFound(
            f"the base model with digest {digest[:12]}… is not there any more",
            code="unknown_base_model",
            hint="Add the same model again with `tunesmith models add`.",
        )
    return to_ref(model)


def to_ref(model: BaseModel) -> BaseModelRef:
    """Return what an engine or a trainer needs of a row."""
    return BaseModelRef(name=model.name, digest=model.digest, path=model.path)


def to_read(model: BaseModel) -> BaseModelRead:
    """Return what users see of a row; paths of this machine are left out."""
    known = model.description
    return BaseModelRead(
        name=model.name,
        digest=model.digest,
        source=model.source if model.source.startswith("hf:") else model.source.split(":")[0],
        architecture=known["architecture"],
        parameters=known["parameters"],
        context_length=known["context_length"],
        dtype=known["dtype"],
        chat_template=known["chat_template"],
        bytes=known["bytes"],
        created_at=model.created_at,
    )


def _normalise(source: str) -> str:
    if source.startswith("hf:"):
        if not _HUB.fullmatch(source):
            raise InvalidInput(
                f"{source!r} does not name a repository and a revision",
                code="invalid_model_source",
                field="source",
                hint="Write hf:OWNER/NAME@REVISION; a commit hash as revision cannot change.",
            )
        return source
    kind, path = ("gguf", source[5:]) if source.startswith("gguf:") else ("local", source)
    return f"{kind}:{Path(path).expanduser().resolve()}"


def _unchanged(existing: BaseModel, source: str) -> BaseModelRead:
    unchanged = existing.source == source
    if unchanged:
        try:
            unchanged = tree_digest(Path(existing.path)) == existing.digest
        except OSError:
            unchanged = False
    if not unchanged:
        raise Conflict(
            f"the name {existing.name!r} stands for another base model, or its files have changed",
            code="model_exists",
            field="name",
            hint="Choose another name, or remove that model first.",
        )
    return to_read(existing)


def _owned_directory(settings: Settings, name: str) -> Path:
    return settings.root / "models" / name


def _home(settings: Settings, name: str, source: str) -> Path:
    if source.startswith("local:"):
        return Path(source.removeprefix("local:"))
    return _owned_directory(settings, name)


@contextmanager
def _files(settings: Settings, name: str, source: str) -> Iterator[Path]:
    """Yield a directory with the model; fetched files move to their home if the body succeeds."""
    home = _home(settings, name, source)
    if source.startswith("local:"):
        yield home
        return
    # Beside the models, which may be on a volume of their own: a rename does not leave one.
    aside = home.parent / _ASIDE / new_id("model")
    aside.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(aside.parent)
    try:
        hub = _HUB.fullmatch(source)
        if hub is not None:
            _run("core.hub", hub["repository"], hub["revision"], str(aside))
        else:
            _run("core.training.convert_gguf", source.removeprefix("gguf:"), str(aside))
        yield aside
        if home.exists():
            if tree_digest(home) == tree_digest(aside):
                return  # another process added the same meanwhile and may use it already
            # No row names it: a crash between the rename and the commit left it here.
            shutil.rmtree(home)
        aside.rename(home)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_leftovers(directory: Path) -> None:
    """Remove what was left by processes that were killed while they fetched or converted."""
    for path in directory.iterdir():
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > 2 * _TIMEOUT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _check_files(path: Path) -> None:
    if not path.is_dir():
        raise InvalidInput(
            f"{path} is not a directory",
            code="invalid_model_source",
            field="source",
            hint="Give a model directory, hf:OWNER/NAME@REVISION or gguf:FILE.",
        )
    if not any(path.glob("*.safetensors")):
        pickled = any(True for pattern in _PICKLES for _ in path.glob(pattern))
        raise InvalidInput(
            f"{path} has no safetensors weights",
            code="pickle_refused" if pickled else "model_file_missing",
            field="source",
            hint="Pickled weights can run code and are not loaded; convert them to safetensors."
            if pickled
            else "Give a directory as transformers saves it.",
        )
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise InvalidInput(
                f"{path} has no {name}",
                code="model_file_missing",
                field="source",
                hint="Give a directory as transformers saves it, with a fast tokenizer.",
            )


def _run(module: str, *arguments: str) -> dict[str, Any]:
    """Run one of our module commands and return the JSON it prints."""
    try:
        process = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        answer = json.loads(process.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise Unavailable(
            f"{module} ended without an answer",
            code="model_inspection_failed",
            hint="Its output on stderr says why; it may have run out of memory.",
        ) from error
    if process.returncode != 0:
        raise _refusal(answer)
    result: dict[str, Any] = answer
    return result


def _refusal(answer: dict[str, Any]) -> TunesmithError:
    kind = Unavailable if answer.get("code") == "hub_unreachable" else InvalidInput
    return kind(
        str(answer.get("message", "the model was refused")),
        code=answer.get("code"),
        hint=answer.get("hint"),
        field="source",
    )
