"""The decoder in C, for x86 processors with AVX2: the same mathematics, without torch in the step.

A pass takes tokens of any rows, each with its own adapter or none: next tokens of running answers
and pieces of prompts alike. Weights, adapters and cache stay where they are; nothing is copied
together, so ranks and numbers of rows may be mixed freely.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_void_p
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.inference.lean.adapters import LayerSizes, PlacedAdapter
from core.inference.lean.decoder import Decoder, LayerShape
from core.inference.lean.kv_cache import KvShape
from core.inference.lean.linear import Precision
from core.inference.lean.paged_cache import PAGE_POSITIONS, PagedCache
from core.inference.lean.panels import Matrix, NativeAdapter, load_kernel
from core.inference.lean.passes import Piece
from core.inference.lean.weights import shape_of

# As in the C sources.
_VECTOR = 8
_MAX_GROUPS = 64
# For how many more positions rotations are computed at a time.
_ROTATIONS = 4096

Floats = NDArray[np.float32]


class _Layer(Structure):
    _fields_ = [
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
    ]


class _Model(Structure):
    _fields_ = [
        *(
            (name, c_int32)
            for name in ("layers", "width", "heads", "kv_heads", "head_dim", "intermediate")
        ),
        ("half_cache", c_int32),
        ("page", c_int32),
        ("epsilon", c_float),
        ("embedding", c_void_p),
        ("layer", c_void_p),
        ("head", Matrix),
    ]


class _Group(Structure):
    _fields_ = [("layers", c_void_p), ("tokens", c_void_p), ("count", c_int32)]


class _Pass(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "groups", "kept", "low_width")),
        *((name, c_void_p) for name in ("ids", "pages", "positions", "cosines", "sines")),
        *((name, c_void_p) for name in ("group", "keep", "logits")),
    ]


class NativeDecoder:
    """Computes passes; see `core.inference.lean.passes.PassDecoder`.

    Args:
        decoder: Whose layers are `Panels`; it may be forgotten afterwards.
        shape: Sizes of the layers.
        precision: How base weights, adapters and cache are kept.
        threads: That compute together.
    """

    # A result is one sum in one order, however many rows there are.
    rows_are_independent = True

    def __init__(
        self, decoder: Decoder, shape: LayerShape, precision: Precision, threads: int
    ) -> None:
        library = load_kernel()
        assert library is not None
        self._library = library
        self._half = precision == "fp16"
        self._threads = threads
        # What the structures point at.
        self.weights = decoder
        self._frequencies = decoder.frequencies.numpy()
        self._rotary_scale = decoder.rotary_scale
        self._cosines: Floats = np.empty((0, shape.head_dim // 2), np.float32)
        self._sines = self._cosines
        layers: list[Any] = list(decoder.layers)
        self._layers = (_Layer * len(layers))(*(_layer(layer) for layer in layers))
        head: Any = decoder.head
        vocabulary, width = decoder.embedding.shape
        self._vocabulary = vocabulary
        model = _Model(
            layers=len(layers),
            width=width,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            intermediate=shape.intermediate,
            half_cache=self._half,
            page=PAGE_POSITIONS,
            epsilon=shape.epsilon,
            embedding=decoder.embedding.data_ptr(),
            layer=ctypes.addressof(self._layers),
            head=head.matrix,
        )
        bits = library.tunesmith_vector_bits()
        self._handle = library.tunesmith_open(ctypes.addressof(model), threads, bits)
        if self._handle is None:
            raise MemoryError("no memory for the decoder")
        self._close = weakref.finalize(self, library.tunesmith_close, self._handle)

    def make_cache(self, layers: int, kv_heads: int, head_dim: int) -> PagedCache:
        """Return an empty cache."""
        dtype = torch.float16 if self._half else torch.float32
        return PagedCache(KvShape(layers, kv_heads, head_dim, dtype))

    def prepare(self, adapter: PlacedAdapter, sizes: LayerSizes) -> NativeAdapter:
        """Return an adapter as the kernel reads it; safe from any thread."""
        return NativeAdapter(adapter, sizes, half=self._half, threads=self._threads)

    def bytes_beside(self, adapters: Sequence[NativeAdapter]) -> int:
        """Return what a pass with these adapters takes besides them: nothing."""
        return 0

    def forget(self, digest: str) -> None:
        """Note that an adapter is resident no longer."""

    def _rotations(self, positions: int) -> tuple[Floats, Floats]:
        """Return the cosines and sines of so many positions or more, (positions, head_dim / 2)."""
        if len(self._cosines) < positions:
            # All at once is cheaper than those of each pass by themselves, and they are few.
            count = -(-positions // _ROTATIONS) * _ROTATIONS
            angles = np.outer(np.arange(count, dtype=np.float32), self._frequencies)
            scale = np.float32(self._rotary_scale)
            self._cosines, self._sines = np.cos(angles) * scale, np.sin(angles) * scale
        return self._cosines, self._sines

    def compute(
        self, pieces: Sequence[Piece], cache: PagedCache, *, every_token: bool = False
    ) -> Tensor:
        """Return the logits after each piece, or after every token; see `PassDecoder`."""
        counts = [len(piece.token_ids) for piece in pieces]
        tokens = sum(counts)
        ids = np.fromiter((i for piece in pieces for i in piece.token_ids), np.int32, tokens)
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise IndexError("a token is not one of the model's")
        pages = np.repeat(np.array([piece.place.address for piece in pieces], np.uintp), counts)
        ends = np.cumsum(counts)
        starts = np.array([piece.start for piece in pieces]) - (ends - counts)
        positions = np.arange(tokens, dtype=np.int64) + np.repeat(starts, counts)
        keep = (np.arange(tokens) if every_token else ends - 1).astype(np.int32)
        cosines, sines = self._rotations(int(positions.max()) + 1)
        groups, members = _group(pieces, ends, counts)
        if len(groups) > _MAX_GROUPS:
            raise ValueError(f"{len(groups)} adapters are more than a pass can use")
        logits = np.empty((len(keep), self._vocabulary), np.float32)
        done = self._library.tunesmith_step(
            self._handle,
            ctypes.byref(
                _Pass(
                    tokens=tokens,
                    groups=len(groups),
                    kept=len(keep),
                    low_width=max(
                        (piece.adapter.low_width for piece in pieces if piece.adapter), default=0
                    ),
                    ids=ids.ctypes.data,
                    pages=pages.ctypes.data,
                    positions=positions.ctypes.data,
                    cosines=cosines.ctypes.data,
                    sines=sines.ctypes.data,
                    group=ctypes.addressof(groups),
                    keep=keep.ctypes.data,
                    logits=logits.ctypes.data,
                )
            ),
        )
        del members
        if done != 0:
            raise MemoryError("no memory for a pass of the decoder")
        return torch.from_numpy(logits)


def why_not_native(model: Any, precision: Precision) -> str | None:
    """Return why a model cannot be computed natively; `None` when it can."""
    library = load_kernel()
    if model.device.type != "cpu":
        return f"it is on {model.device.type}"
    if precision not in ("float32", "fp16"):
        return f"the kernel does not compute in {precision}"
    if library is None:
        return "the kernel is not compiled"
    if not library.tunesmith_supported():
        return "the processor lacks AVX2, FMA or F16C"
    shape, width = shape_of(model), model.config.hidden_size
    if width % _VECTOR or shape.intermediate % _VECTOR or shape.head_dim % _VECTOR:
        return f"its sizes are not multiples of {_VECTOR}"
    return None


def _layer(layer: Any) -> _Layer:
    def address(norm: Tensor) -> int | None:
        return norm.data_ptr() if norm.numel() else None

    return _Layer(
        qkv=layer.qkv.matrix,
        o=layer.o.matrix,
        gate_up=layer.gate_up.matrix,
        down=layer.down.matrix,
        q_norm=address(layer.q_norm),
        k_norm=address(layer.k_norm),
    )


def _group(
    pieces: Sequence[Piece], ends: Any, counts: Sequence[int]
) -> tuple[ctypes.Array[_Group], list[Any]]:
    """Return which tokens use which adapter, and what must be kept while that is used."""
    tokens: dict[int, list[Any]] = {}
    for piece, end, count in zip(pieces, ends, counts, strict=True):
        if piece.adapter is not None:
            span = np.arange(end - count, end, dtype=np.int32)
            tokens.setdefault(piece.adapter.address, []).append(span)
    members = [np.concatenate(spans) for spans in tokens.values()]
    groups = (_Group * len(members))(
        *(
            _Group(layers=address, tokens=own.ctypes.data, count=len(own))
            for address, own in zip(tokens, members, strict=True)
        )
    )
    return groups, members
