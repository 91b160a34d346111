"""The gates an adapter passes before it answers anything.

An answer for an adapter is never computed with other weights, nor silently with the base alone. So
the files must be what the manifest says, must belong to this very base model and tokenizer, must
hold finite matrices of matching shapes, must modify exactly the modules they name, and must change
the base's logits. Each refusal is a `Conflict` with a code of its own.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.artifacts import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    LoraTensor,
    Manifest,
    check_adapter_config,
    check_lora_tensors,
    read_lora_tensors,
    read_manifest,
    tree_digest,
    verify_files,
)
from core.errors import Conflict, InvalidInput, NotFound
from core.inference.engine import BaseModelRef

T = TypeVar("T")

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REPUBLISH = "Train or import the adapter again."


@dataclass(frozen=True)
class BaseFacts:
    """What adapters are matched against.

    Attributes:
        digest: Digest of the base model's files.
        tokenizer_sha256: Hash of its `tokenizer.json`.
        linear_modules: Name → [out_features, in_features] of its adaptable modules.
        vocabulary: Tokens that it knows.
    """

    digest: str
    tokenizer_sha256: str
    linear_modules: Mapping[str, list[int]]
    vocabulary: int


@dataclass(frozen=True)
class LoraMatrices:
    """The matrices of one module: A of shape (rank, in), B of shape (out, rank), float32."""

    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class AdapterWeights:
    """An adapter that passed the gates on its files.

    Attributes:
        digest: Its digest.
        r: Rank.
        lora_alpha: Scale before division by the rank.
        use_rslora: Whether the scale is divided by the rank's square root instead.
        modules: Matrices by full module name.
        template: Chat template; `None` when it has none.
        golden_token_ids: Tokens for the effect gate.
    """

    digest: str
    r: int
    lora_alpha: float
    use_rslora: bool
    modules: Mapping[str, LoraMatrices]
    template: str | None
    golden_token_ids: list[int]

    @property
    def bytes(self) -> int:
        """Size of the matrices in memory."""
        return sum(m.a.nbytes + m.b.nbytes for m in self.modules.values())


def check_base_files(ref: BaseModelRef) -> None:
    """Check that a base model's files are those that were registered.

    Raises:
        Conflict: Code `base_model_changed`.
        OSError: They cannot be read.
    """
    if tree_digest(Path(ref.path)) != ref.digest:
        raise Conflict(
            f"the files of the base model {ref.name} have changed since it was registered",
            code="base_model_changed",
            hint="Restore them, or register the model again under a new name.",
        )


def read_adapter(
    directory: Path, digest: str, base: BaseFacts, prepare: Callable[[AdapterWeights], T]
) -> T:
    """Read an adapter's files through all gates that need no model.

    Args:
        directory: Holds the files of a published artifact.
        digest: Of the adapter that was asked for.
        base: The base model that it has to fit.
        prepare: Makes of the weights what is wanted of them, while the files are being hashed.

    Returns:
        What `prepare` returned.

    Raises:
        Conflict: Code `digest_mismatch`, `invalid_manifest`, `base_model_mismatch`,
            `tokenizer_mismatch`, `template_mismatch`, `invalid_adapter_config`,
            `invalid_adapter_weights`, `adapter_shape_mismatch` or `adapter_not_finite`.
        NotFound: Code `adapter_files_missing`; they are not there, or were deleted meanwhile.
    """
    while True:
        try:
            opened = os.open(directory, os.O_RDONLY)
        except FileNotFoundError as error:
            raise NotFound(
                f"the files of the adapter {digest[:12]}… are gone", code="adapter_files_missing"
            ) from error
        try:
            return _read_once(directory, digest, base, prepare)
        except (Conflict, OSError):
            # A store deletes an adapter by moving its directory away, and may publish the same
            # one again: what a reader misses in the middle of that says nothing about the files.
            if _is_at(directory, opened):
                raise
        finally:
            os.close(opened)


def _is_at(path: Path, opened: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(opened))
    except FileNotFoundError:
        return False


def _read_once(
    directory: Path, digest: str, base: BaseFacts, prepare: Callable[[AdapterWeights], T]
) -> T:
    try:
        manifest = read_manifest(directory)
    except InvalidInput as error:
        raise _unservable(error) from error
    _check_identity(digest, manifest)
    # Reading and hashing take as long as all else, whatever comes of which: files that have changed
    # are told first.
    with ThreadPoolExecutor(1) as pool:
        data = pool.submit(_read_weights, directory, manifest)
        verified = pool.submit(_verify, directory, manifest, data)
        try:
            prepared = prepare(_read_files(directory, manifest, data, base))
        except Exception:
            _await_verified(verified)
            raise
        _await_verified(verified)
    return prepared


def _verify(directory: Path, manifest: Manifest, data: Future[NDArray[np.uint8]]) -> None:
    # The weights are read once, so that what is hashed is what is computed with.
    verify_files(directory, manifest, {WEIGHTS_FILE: data.result().data})


def _await_verified(verified: Future[None]) -> None:
    try:
        verified.result()
    except InvalidInput as error:
        raise _unservable(error) from error


def _unservable(error: InvalidInput) -> Conflict:
    # The caller's request was fine; it is the stored adapter that cannot serve it.
    return Conflict(
        error.message, code=error.code, hint=error.hint or _REPUBLISH, field=error.field
    )


def _read_weights(directory: Path, manifest: Manifest) -> NDArray[np.uint8]:
    path = directory / WEIGHTS_FILE
    published = {file.path: file.bytes for file in manifest.files}
    try:
        # Before memory is taken for it.
        if path.stat().st_size == published.get(WEIGHTS_FILE):
            return np.fromfile(path, np.uint8)
        problem = "have another size than was published"
    except OSError as error:
        problem = f"cannot be read: {error}"
    raise Conflict(f"the adapter's weights {problem}", code="digest_mismatch", hint=_REPUBLISH)


def _read_files(
    directory: Path, manifest: Manifest, data: Future[NDArray[np.uint8]], base: BaseFacts
) -> AdapterWeights:
    try:
        _check_origin(directory, manifest, base)
        config = check_adapter_config(directory / CONFIG_FILE)
        tensors = read_lora_tensors(directory / WEIGHTS_FILE)
        names = check_lora_tensors(tensors, rank=config["r"], linear_modules=base.linear_modules)
    except InvalidInput as error:
        raise _unservable(error) from error
    rslora = config.get("use_rslora", False)
    if (manifest.r, manifest.lora_alpha, manifest.use_rslora, manifest.target_modules) != (
        config["r"],
        config["lora_alpha"],
        rslora,
        names,
    ):
        raise Conflict(
            "the adapter's manifest and its files say different things",
            code="invalid_manifest",
            hint=_REPUBLISH,
        )
    # The manifest is in no digest, and what computes these tokens takes them as they are.
    if not all(0 <= token_id < base.vocabulary for token_id in manifest.golden_token_ids):
        raise Conflict(
            "the adapter's golden tokens are none of the base model's",
            code="invalid_manifest",
            hint=_REPUBLISH,
        )
    template = directory / TEMPLATE_FILE
    return AdapterWeights(
        digest=manifest.digest,
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=rslora,
        modules=_matrices_in(data.result(), tensors),
        template=template.read_text("utf-8") if manifest.template_sha256 else None,
        golden_token_ids=manifest.golden_token_ids,
    )


def check_applied(applied: Collection[str], expected: Collection[str]) -> None:
    """Check that an adapter modifies exactly the modules it names.

    Raises:
        Conflict: Code `adapter_not_applied`.
    """
    missing, surplus = set(expected) - set(applied), set(applied) - set(expected)
    if missing or surplus:
        example = min(missing or surplus)
        raise Conflict(
            f"the adapter modifies {len(set(applied) - surplus)} of its {len(set(expected))} "
            f"modules and {len(surplus)} others, for example {example}",
            code="adapter_not_applied",
            hint="The adapter does not fit this base model's architecture.",
        )


def check_effect(base_logits: Tensor, adapter_logits: Tensor) -> None:
    """Check that an adapter changes the logits of its golden tokens, to finite values.

    Raises:
        Conflict: Code `adapter_not_finite` or `adapter_has_no_effect`.
    """
    if not bool(torch.isfinite(adapter_logits).all()):
        raise Conflict(
            "with the adapter the model computes values that are not numbers",
            code="adapter_not_finite",
            hint="The training diverged; train again with a lower learning rate.",
        )
    if torch.equal(base_logits, adapter_logits):
        raise Conflict(
            "the adapter changes nothing: its logits are those of the base model",
            code="adapter_has_no_effect",
            hint="Train for more steps or with a higher learning rate.",
        )


def _check_identity(digest: str, manifest: Manifest) -> None:
    if manifest.digest != digest:
        raise Conflict(
            "the stored adapter is not the one that was asked for",
            code="digest_mismatch",
            hint=_REPUBLISH,
        )


def _check_origin(directory: Path, manifest: Manifest, base: BaseFacts) -> None:
    if manifest.base_digest != base.digest:
        raise Conflict(
            "the adapter was trained on other base weights "
            f"({manifest.base_digest[:12]}… rather than {base.digest[:12]}…)",
            code="base_model_mismatch",
            hint="Ask for the adapter's own base model, or train it again on this one.",
        )
    # The files themselves are hashed beside this.
    published = {file.path: file.sha256 for file in manifest.files}
    tokenizer_sha256 = published.get(TOKENIZER_FILE)
    if tokenizer_sha256 != manifest.tokenizer_sha256 or tokenizer_sha256 != base.tokenizer_sha256:
        raise Conflict(
            "the adapter was trained with another tokenizer than the base model's",
            code="tokenizer_mismatch",
            hint="Train the adapter again on this base model.",
        )
    template_sha256 = published.get(TEMPLATE_FILE)
    there = (directory / TEMPLATE_FILE).is_file()
    if template_sha256 != manifest.template_sha256 or there != (template_sha256 is not None):
        raise Conflict(
            "the adapter's chat template is not the one it was trained with",
            code="template_mismatch",
            hint=_REPUBLISH,
        )


def _matrices_in(data: NDArray[np.uint8], tensors: Sequence[LoraTensor]) -> dict[str, LoraMatrices]:
    contents = torch.from_numpy(data)
    typed = {
        kind: contents[: len(data) // kind.itemsize * kind.itemsize].view(kind)
        for kind in _DTYPES.values()
    }

    def numbers(start: int, end: int, kind: torch.dtype) -> Tensor:
        if start % kind.itemsize == 0:
            return typed[kind][start // kind.itemsize : end // kind.itemsize]
        # Files need not place numbers where a processor likes them.
        return contents[start:end].clone().view(kind)

    sides: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for tensor in tensors:
        own = numbers(*tensor.place, _DTYPES[tensor.dtype])
        sides[tensor.module][tensor.side] = own.view(tensor.shape).float()
    matrices = {name: LoraMatrices(a=pair["A"], b=pair["B"]) for name, pair in sides.items()}
    # What is not a number shows in the sum of all, which takes a fraction of looking at each.
    first, last = min(t.place[0] for t in tensors), max(t.place[1] for t in tensors)
    kinds = {_DTYPES[tensor.dtype] for tensor in tensors}
    if len(kinds) == 1 and numbers(first, last, *kinds).float().sum().isfinite():
        return matrices
    for name, pair in matrices.items():
        if not (torch.isfinite(pair.a).all() and torch.isfinite(pair.b).all()):
            raise Conflict(
                f"the adapter's weights of {name} are not all numbers",
                code="adapter_not_finite",
                hint="The training diverged; train again with a lower learning rate.",
            )
    return matrices
