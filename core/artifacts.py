"""The adapter artifact: its files, its digest and the checks that need no model library.

An artifact is a directory that PEFT loads as it is, with a manifest beside it:

    adapter_model.safetensors  adapter_config.json     what PEFT reads
    tokenizer.json  tokenizer_config.json              the tokenizer it was trained with
    chat_template.jinja                                the template it was trained with, if any
    base_model.json                                    digest of the base weights
    manifest.json                                      digest, hashes, golden tokens; not digested

The digest is the SHA-256 over the sorted (path, size, sha256) of all files but the manifest.
Nothing here executes or unpickles what it reads.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from core.errors import InvalidInput, TooLarge
from core.specs import MAX_RANK

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
BASE_FILE = "base_model.json"
MANIFEST_FILE = "manifest.json"

ARTIFACT_FILES = frozenset(
    {
        WEIGHTS_FILE,
        CONFIG_FILE,
        TOKENIZER_FILE,
        TOKENIZER_CONFIG_FILE,
        TEMPLATE_FILE,
        BASE_FILE,
        MANIFEST_FILE,
    }
)

_BASE_MODEL_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt"})

# A header for rank 256 on every module of a 100-layer model stays far below this.
_MAX_HEADER_BYTES = 8 * 1024**2
_MAX_CONFIG_BYTES = 256 * 1024
_NOTHING_READ: Mapping[str, memoryview] = MappingProxyType({})
_BYTES_PER_ELEMENT = {"F32": 4, "F16": 2, "BF16": 2}
_LORA_KEY = re.compile(
    r"^base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<side>[AB])\.weight$"
)
_MODULE_NAME = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9_.]*$")

# A field of PEFT's LoraConfig with one of these values changes nothing; anything else that a
# foreign config sets is refused, since it would be ignored or would run code.
_NEUTRAL_VALUES: tuple[Any, ...] = (None, False, [], {}, "")
# PEFT writes these even where the feature they belong to is off.
_INERT_DEFAULTS = {"qalora_group_size": 16, "megatron_core": "megatron.core"}
# What a published config keeps; see `normalise_config`.
_KEPT_FIELDS = (
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout",
    "use_rslora", "bias", "fan_in_fan_out",
)  # fmt: skip


class ArtifactFile(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    path: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What an artifact is, derived from its files and its base model alone.

    Attributes:
        digest: The artifact's digest.
        files: All files but the manifest, sorted by path.
        base_digest: Digest of the base model's files.
        template_sha256: Hash of the chat template's text; `None` without a template.
        tokenizer_sha256: Hash of `tokenizer.json`.
        golden_token_ids: Tokens on which the adapter must change the base's logits.
        r: Rank.
        lora_alpha: Scale before division by the rank.
        use_rslora: Whether the scale is divided by the rank's square root instead.
        target_modules: Full names of the adapted modules, sorted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format_version: int = 1
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    files: list[ArtifactFile]
    base_digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    template_sha256: str | None
    tokenizer_sha256: str
    golden_token_ids: list[int] = Field(min_length=1, max_length=1024)
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: list[str]


class LoraTensor(NamedTuple):
    """Where a LoRA matrix lies in the weights file.

    Attributes:
        module: The module that it adapts.
        side: "A" or "B".
        shape: (rows, columns).
        dtype: "F32", "F16" or "BF16".
        place: Its first byte in the file, and the one behind its last.
    """

    module: str
    side: str
    shape: tuple[int, int]
    dtype: str
    place: tuple[int, int]


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Return the hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def describe_files(
    root: Path, names: Iterable[str], contents: Mapping[str, memoryview] = _NOTHING_READ
) -> list[ArtifactFile]:
    """Return path, size and hash of the named files below `root`, sorted by path.

    Args:
        root: A directory.
        names: Of files in it.
        contents: What was read of some of them, and is described in their stead.
    """

    def describe(name: str) -> ArtifactFile:
        if name in contents:
            data = contents[name]
            return ArtifactFile(
                path=name, bytes=data.nbytes, sha256=hashlib.sha256(data).hexdigest()
            )
        path = root / name
        return ArtifactFile(path=name, bytes=path.stat().st_size, sha256=sha256_file(path))

    return [describe(name) for name in sorted(names)]


def digest_of(files: Iterable[ArtifactFile]) -> str:
    """Return the digest over the sorted (path, size, sha256) of `files`."""
    listing = sorted((file.path, file.bytes, file.sha256) for file in files)
    canonical = json.dumps(listing, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def tree_digest(directory: Path) -> str:
    """Return the digest of a base model: over the files at its top level that a loader may read.

    Raises:
        OSError: The directory or a file of it cannot be read.
    """
    names = [
        entry.name
        for entry in directory.iterdir()
        if entry.suffix in _BASE_MODEL_SUFFIXES and entry.is_file()
    ]
    return digest_of(describe_files(directory, names))


def build_manifest(
    directory: Path,
    *,
    base_digest: str,
    golden_token_ids: list[int],
    linear_modules: Mapping[str, list[int]],
) -> Manifest:
    """Check an artifact directory, complete it and return its manifest.

    Args:
        directory: Holds weights, config, tokenizer and, where the model chats, the template.
        base_digest: Digest of the base model it belongs to.
        golden_token_ids: Tokens for the effect gate.
        linear_modules: Name → [out_features, in_features] of the base model's adaptable modules.

    Raises:
        InvalidInput: A file is missing or fails a check; the code names which.
    """
    for name in (WEIGHTS_FILE, CONFIG_FILE, TOKENIZER_FILE):
        if not (directory / name).is_file():
            raise InvalidInput(
                f"the adapter has no {name}",
                code="adapter_file_missing",
                field=name,
                hint="Give a PEFT LoRA directory saved with safetensors.",
            )
    config = check_adapter_config(directory / CONFIG_FILE)
    tensors = read_lora_tensors(directory / WEIGHTS_FILE)
    modules = check_lora_tensors(tensors, rank=config["r"], linear_modules=linear_modules)
    normalise_config(directory / CONFIG_FILE, modules)
    (directory / BASE_FILE).write_text(json.dumps({"digest": base_digest}) + "\n")

    names = sorted(
        name for name in ARTIFACT_FILES - {MANIFEST_FILE} if (directory / name).is_file()
    )
    files = describe_files(directory, names)
    template = directory / TEMPLATE_FILE
    manifest = Manifest(
        digest=digest_of(files),
        files=files,
        base_digest=base_digest,
        template_sha256=sha256_file(template) if template.is_file() else None,
        tokenizer_sha256=sha256_file(directory / TOKENIZER_FILE),
        golden_token_ids=golden_token_ids,
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=config.get("use_rslora", False),
        target_modules=modules,
    )
    (directory / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=2) + "\n")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        InvalidInput: It is missing or not a manifest.
    """
    try:
        return Manifest.model_validate_json((directory / MANIFEST_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"the adapter's manifest cannot be read: {error}", code="invalid_manifest"
        ) from error


def verify_files(
    directory: Path, manifest: Manifest, contents: Mapping[str, memoryview] = _NOTHING_READ
) -> None:
    """Check every file's size and hash, and the digest, against the manifest.

    Args:
        directory: Holds the files.
        manifest: Says what they were.
        contents: What was read of some of them, and is checked in their stead.

    Raises:
        InvalidInput: Code `digest_mismatch`; a file was changed, lost or added to.
    """
    try:
        files = describe_files(directory, [file.path for file in manifest.files], contents)
    except OSError as error:
        raise InvalidInput(
            f"a file of the adapter cannot be read: {error}", code="digest_mismatch"
        ) from error
    if digest_of(files) != manifest.digest or digest_of(manifest.files) != manifest.digest:
        raise InvalidInput(
            "the adapter's files do not match its digest",
            code="digest_mismatch",
            hint="The artifact was changed after it was published; publish or import it again.",
        )


def check_adapter_config(path: Path) -> dict[str, Any]:
    """Return a LoRA config's values after checking it against the allow-list.

    Only plain LoRA on literally named modules passes: no patterns, no code references, no paths.

    Raises:
        InvalidInput: Code `invalid_adapter_config`, with the offending field.
    """

    def refuse(message: str, field: str) -> InvalidInput:
        return InvalidInput(
            message,
            code="invalid_adapter_config",
            field=field,
            hint="Only plain LoRA adapters with literal module names can be served.",
        )

    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise refuse(f"{CONFIG_FILE} is larger than {_MAX_CONFIG_BYTES} bytes", CONFIG_FILE)
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise refuse(f"{CONFIG_FILE} is not JSON: {error}", CONFIG_FILE) from error
    if not isinstance(config, dict):
        raise refuse(f"{CONFIG_FILE} is not an object", CONFIG_FILE)

    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    if str(config.get("peft_type")).upper() != "LORA":
        raise refuse(f"peft_type is {config.get('peft_type')!r}, not LORA", "peft_type")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MAX_RANK:
        raise refuse(f"r must be a whole number from 1 to {MAX_RANK}", "r")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 65_536:
        raise refuse("lora_alpha must be a positive number", "lora_alpha")
    if not isinstance(config.get("use_rslora", False), bool):
        raise refuse("use_rslora must be true or false", "use_rslora")
    if not isinstance(config.get("fan_in_fan_out", False), bool) or config.get("fan_in_fan_out"):
        raise refuse("fan_in_fan_out is not supported", "fan_in_fan_out")
    if targets != "all-linear" and not (
        isinstance(targets, list)
        and targets
        and all(isinstance(name, str) and _MODULE_NAME.match(name) for name in targets)
    ):
        raise refuse("target_modules must list literal module names", "target_modules")
    if config.get("bias", "none") != "none":
        raise refuse("trained biases are not supported", "bias")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise refuse("this init_lora_weights changes the base weights", "init_lora_weights")

    checked = {
        "peft_type", "r", "lora_alpha", "use_rslora", "fan_in_fan_out", "target_modules", "bias",
        "init_lora_weights",
    }  # fmt: skip
    # Informative, or read only while training.
    harmless = {
        "task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
        "peft_version", "runtime_config", "ensure_weight_tying",
    }  # fmt: skip
    for field, value in config.items():
        if field in checked or field in harmless or value in _NEUTRAL_VALUES:
            continue
        if _INERT_DEFAULTS.get(field) == value:
            continue
        raise refuse(f"{field} = {value!r} is not supported", field)
    return config


def normalise_config(path: Path, target_modules: list[str]) -> None:
    """Rewrite a checked config with the fields that serving needs and nothing else.

    Args:
        path: An `adapter_config.json` that `check_adapter_config` has passed.
        target_modules: Full names of the adapted modules, from `check_lora_tensors`.
    """
    config = json.loads(path.read_bytes())
    kept = {field: config[field] for field in _KEPT_FIELDS if field in config}
    kept |= {"target_modules": target_modules, "inference_mode": True}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def read_lora_tensors(path: Path) -> list[LoraTensor]:
    """Parse a safetensors header without allocating tensors and return its LoRA matrices.

    The format: 8 bytes little-endian header size, JSON header, data
    (https://huggingface.co/docs/safetensors).

    Raises:
        InvalidInput: Code `invalid_adapter_weights`; not safetensors, a foreign tensor, a shape or
            offset that does not fit the file.
    """

    def refuse(message: str) -> InvalidInput:
        return InvalidInput(
            message,
            code="invalid_adapter_weights",
            field=WEIGHTS_FILE,
            hint="Save the adapter with PEFT's save_pretrained(safe_serialization=True).",
        )

    size = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise refuse("the weights are not a safetensors file")
        try:
            header = json.loads(stream.read(header_bytes))
        except (ValueError, RecursionError) as error:
            raise refuse("the weights' header is not JSON") from error
    if not isinstance(header, dict):
        raise refuse("the weights' header is not an object")

    data_bytes = size - 8 - header_bytes
    tensors: list[LoraTensor] = []
    spans: list[tuple[int, int]] = []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        match = _LORA_KEY.match(key)
        if match is None:
            raise refuse(f"the tensor {key!r} is not a LoRA matrix")
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            start, end = entry["data_offsets"]
            rows, columns = shape
            numbers = [start, end, rows, columns]
        except (TypeError, KeyError, ValueError) as error:
            raise refuse(f"the header entry of {key!r} is malformed") from error
        if set(map(type, numbers)) != {int} or min(numbers) < 0:
            raise refuse(f"the header entry of {key!r} is malformed")
        if dtype not in _BYTES_PER_ELEMENT:
            raise refuse(f"{key!r} has dtype {dtype!r}; F32, F16 and BF16 are supported")
        if end > data_bytes or end - start != rows * columns * _BYTES_PER_ELEMENT[dtype]:
            raise refuse(f"{key!r} does not fit its place in the file")
        spans.append((start, end))
        tensors.append(
            LoraTensor(
                module=match["module"],
                side=match["side"],
                shape=(rows, columns),
                dtype=dtype,
                place=(8 + header_bytes + start, 8 + header_bytes + end),
            )
        )
    spans.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
        raise refuse("tensors overlap in the weights file")
    if not tensors:
        raise refuse("the weights hold no LoRA matrices")
    return tensors


def check_lora_tensors(
    tensors: Iterable[LoraTensor], *, rank: int, linear_modules: Mapping[str, list[int]]
) -> list[str]:
    """Check names and shapes of all matrices against the base model; return the module names.

    Args:
        tensors: From `read_lora_tensors`.
        rank: `r` of the adapter's config.
        linear_modules: Name → [out_features, in_features] of the base model's adaptable modules.

    Raises:
        InvalidInput: Code `adapter_shape_mismatch`, naming the module.
    """

    def refuse(message: str) -> InvalidInput:
        return InvalidInput(
            message,
            code="adapter_shape_mismatch",
            field=WEIGHTS_FILE,
            hint="The adapter was trained for another base model or rank.",
        )

    sides: dict[str, dict[str, tuple[int, int]]] = {}
    for tensor in tensors:
        sides.setdefault(tensor.module, {})[tensor.side] = tensor.shape
    for module, shapes in sorted(sides.items()):
        if module not in linear_modules:
            raise refuse(f"the base model has no linear module {module!r}")
        out_features, in_features = linear_modules[module]
        expected = {"A": (rank, in_features), "B": (out_features, rank)}
        for side, shape in expected.items():
            if side not in shapes:
                raise refuse(f"{module} lacks its lora_{side} matrix")
            if shapes[side] != shape:
                raise refuse(f"{module}.lora_{side} is {shapes[side]}, expected {shape}")
    return sorted(sides)


def check_size(size: int, max_bytes: int, what: str) -> None:
    """Refuse what is larger than its limit.

    Raises:
        TooLarge: `size` exceeds `max_bytes`.
    """
    if size > max_bytes:
        raise TooLarge(
            f"{what} has more than {max_bytes:,} bytes",
            hint="Send less, or ask the operator to raise the limit.",
        )
