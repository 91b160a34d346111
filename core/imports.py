"""Adapters that come from elsewhere: a tar.gz of a PEFT directory, read without trusting it.

Owns the unpacking and the comparison with the base model. Nothing of an archive is executed,
unpickled or followed; tokenizer files of an upload are never used, only compared.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

from core.artifacts import (
    ARTIFACT_FILES,
    BASE_FILE,
    MANIFEST_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Manifest,
    build_manifest,
    check_size,
    sha256_file,
    sha256_text,
)
from core.errors import Conflict, InvalidInput

_MAX_MEMBERS = 200
# A path, times and a few attributes. The time to parse an extended header grows with its square.
_MAX_EXTENSION_BYTES = 1024
_MAX_JSON_BYTES = 4 * 1024**2
_CHUNK_BYTES = 1024**2
# Headers and padding of the archive itself, on top of its files.
_ARCHIVE_OVERHEAD_BYTES = 4 * 1024**2

_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
# What PEFT, tokenizers and trainers leave beside an adapter; serving needs none of it.
_SKIPPED_FILES = frozenset(
    {
        ".gitattributes",
        "added_tokens.json",
        "all_results.json",
        "chat_template.json",
        "config.json",
        "eval_results.json",
        "generation_config.json",
        "license",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer.model",
        "train_results.json",
        "trainer_state.json",
        "vocab.json",
        "vocab.txt",
    }
)
_EXTENSION_TYPES = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)


def unpack_archive(source: BinaryIO | Path, target: Path, max_bytes: int) -> None:
    """Unpack the files of an adapter from a tar.gz into `target`.

    Files may lie at the top or in one directory. What serving does not need is skipped.

    Args:
        source: The archive, read once from its present position.
        target: An existing, empty directory.
        max_bytes: Most bytes of all files together, unpacked.

    Raises:
        TooLarge: The archive unpacks to more.
        InvalidInput: `pickle_refused`; `unsafe_archive` (a path or kind of member that could leave
            the directory); `unexpected_file`; or `invalid_archive` (not a readable tar.gz).
    """
    if isinstance(source, Path):
        with source.open("rb") as stream:
            unpack_archive(stream, target, max_bytes)
        return
    try:
        with gzip.GzipFile(fileobj=source, mode="rb") as unzipped:
            limited = _Limited(unzipped, max_bytes)
            with tarfile.open(fileobj=limited, mode="r|", tarinfo=_CautiousInfo) as archive:  # type: ignore[call-overload]
                _unpack_members(archive, target, max_bytes)
    except (
        tarfile.TarError,
        EOFError,
        OSError,
        zlib.error,
        ValueError,  # tarfile's own parsing of numbers and names
        RecursionError,  # headers of headers of headers
    ) as error:
        raise InvalidInput(
            f"the upload is not a readable tar.gz: {error}",
            code="invalid_archive",
            field="file",
            hint="Pack the adapter with `tar -czf adapter.tar.gz -C DIRECTORY .`",
        ) from error


def prepare_import(
    directory: Path, *, description: dict[str, Any], base_digest: str, base_path: Path
) -> Manifest:
    """Check an unpacked adapter against its base model and complete it as an artifact.

    Args:
        directory: From `unpack_archive`.
        description: Of the base model, see `core.training.inspect_model`.
        base_digest: Of the base model.
        base_path: Directory of the base model, whose tokenizer and template are taken.

    Raises:
        InvalidInput: `tokenizer_mismatch`, `template_mismatch`, `base_mismatch`, or what
            `core.artifacts.build_manifest` finds.
        Conflict: Code `base_model_changed`; the base model's files are not those registered.
    """
    _check_claimed_base(directory, base_digest)
    _check_tokenizer(directory, description["tokenizer_sha256"])
    # Models that were described earlier say nothing of a template for those without one.
    fallback = description.get("fallback_template")
    _check_template(
        directory, sha256_text(fallback) if fallback else description["template_sha256"]
    )

    template = read_template(base_path)
    changed = sha256_file(base_path / TOKENIZER_FILE) != description["tokenizer_sha256"]
    if changed or (sha256_text(template) if template else None) != description["template_sha256"]:
        raise Conflict(
            "the base model's tokenizer or template was changed after it was added",
            code="base_model_changed",
            hint="Remove the base model and add it again.",
        )
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE):
        (directory / name).unlink(missing_ok=True)
        if (base_path / name).is_file():
            shutil.copyfile(base_path / name, directory / name)
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)
    template = template or fallback
    if template:
        (directory / TEMPLATE_FILE).write_bytes(template.encode("utf-8"))
    return build_manifest(
        directory,
        base_digest=base_digest,
        golden_token_ids=description["golden_token_ids"],
        linear_modules=description["linear_modules"],
    )


def read_template(directory: Path) -> str | None:
    """Return the chat template of a model directory, from its own file or the tokenizer's config.

    Raises:
        InvalidInput: Code `invalid_adapter_file`; the file that holds it is malformed.
    """
    own = directory / TEMPLATE_FILE
    if own.is_file():
        return _read_text(own) or None
    config = directory / TOKENIZER_CONFIG_FILE
    if not config.is_file():
        return None
    template = _read_object(config).get("chat_template")
    if isinstance(template, list):
        # Several named templates; the one called default is used.
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) and template else None


class _Limited:
    """A stream that refuses to yield more than an archive of `max_bytes` can need."""

    def __init__(self, stream: gzip.GzipFile, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._read = 0

    def read(self, size: int) -> bytes:
        chunk = self._stream.read(size)
        self._read += len(chunk)
        if self._read > self._max_bytes + _ARCHIVE_OVERHEAD_BYTES:
            check_size(self._read, self._max_bytes, "the unpacked archive")
        return chunk


class _CautiousInfo(tarfile.TarInfo):
    """Refuses members that cost far more memory, time or disk than they have bytes."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _CautiousInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENSION_TYPES and info.size > _MAX_EXTENSION_BYTES:
            _refuse("a header of the archive is oversized", "unsafe_archive")
        if info.type == tarfile.GNUTYPE_SPARSE:
            _refuse(f"{info.name!r} is a sparse file", "unsafe_archive")
        return info


def _unpack_members(archive: tarfile.TarFile, target: Path, max_bytes: int) -> None:
    total, folder = 0, None
    for count, member in enumerate(archive, start=1):
        if count > _MAX_MEMBERS:
            _refuse(f"the archive has more than {_MAX_MEMBERS} members", "unsafe_archive")
        path = _safe_path(member)
        if member.isdir():
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            _refuse(f"{member.name!r} is not a plain file", "unsafe_archive")
        if path.suffix.lower() in _PICKLE_SUFFIXES:
            _refuse(
                f"{member.name!r} is a pickle, which can run code",
                "pickle_refused",
                hint="Save with safetensors and leave pickles such as training_args.bin out.",
            )
        if path.name not in ARTIFACT_FILES:
            if not _is_skipped(path.name):
                _refuse(
                    f"{member.name!r} is no file of an adapter",
                    "unexpected_file",
                    hint="Pack the PEFT directory without checkpoints and other files.",
                )
            continue
        if folder is None:
            folder = path.parent
        if len(path.parts) > 2 or path.parent != folder:
            _refuse(f"{member.name!r} is not beside the adapter's other files", "unexpected_file")
        if (target / path.name).exists():
            _refuse(f"{member.name!r} occurs twice", "unsafe_archive")
        total += member.size
        check_size(total, max_bytes, "the unpacked adapter")
        content = archive.extractfile(member)
        if content is None:
            _refuse(f"{member.name!r} is not a plain file", "unsafe_archive")
        with (target / path.name).open("xb") as output:
            shutil.copyfileobj(content, output, _CHUNK_BYTES)


def _safe_path(member: tarfile.TarInfo) -> PurePosixPath:
    name = member.name
    path = PurePosixPath(name)
    unsafe = (
        path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or not name.isprintable()
        or re.match(r"[A-Za-z]:", name) is not None
    )
    if unsafe:
        _refuse(f"the path {name[:200]!r} could leave the directory", "unsafe_archive")
    return path


def _is_skipped(name: str) -> bool:
    lowered = name.lower()
    return lowered in _SKIPPED_FILES or lowered.endswith(".md") or name.startswith("._")


def _check_claimed_base(directory: Path, base_digest: str) -> None:
    if (directory / BASE_FILE).is_file():
        claimed = _read_object(directory / BASE_FILE).get("digest")
        if claimed != base_digest:
            raise InvalidInput(
                f"the adapter was made for the base model with digest {str(claimed)[:12]}…",
                code="base_mismatch",
                field=BASE_FILE,
                hint="Name the base model that it was trained on.",
            )


def _check_tokenizer(directory: Path, expected: str) -> None:
    own = directory / TOKENIZER_FILE
    if own.is_file() and sha256_file(own) != expected:
        raise InvalidInput(
            "the adapter's tokenizer is not that of the base model",
            code="tokenizer_mismatch",
            field=TOKENIZER_FILE,
            hint="Name the right base model, or leave the tokenizer out if it is the same.",
        )


def _check_template(directory: Path, expected: str | None) -> None:
    template = read_template(directory)
    if template is not None and sha256_text(template) != expected:
        raise InvalidInput(
            "the adapter's chat template is not that of the base model",
            code="template_mismatch",
            field=TEMPLATE_FILE,
            hint="Only adapters trained with the base model's own template can be imported.",
        )


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES} bytes")
        return path.read_bytes().decode("utf-8")
    except ValueError as error:
        raise InvalidInput(
            f"{path.name} cannot be read: {error}", code="invalid_adapter_file", field=path.name
        ) from error


def _read_object(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{path.name} is not JSON: {error}", code="invalid_adapter_file", field=path.name
        ) from error
    if not isinstance(value, dict):
        raise InvalidInput(
            f"{path.name} is not an object", code="invalid_adapter_file", field=path.name
        )
    return value


def _refuse(message: str, code: str, hint: str | None = None) -> NoReturn:
    raise InvalidInput(message, code=code, field="file", hint=hint)
