"""The decoder in C, for x86 processors with AVX2: the same mathematics, without torch in the step.

A pass takes tokens of any rows, each with its own adapter or none: next tokens of running answers
and pieces of prompts alike. Weights, adapters and cache stay where they are; nothing is copied
together, so ranks and numbers of rows may be mixed freely.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
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
_WRONG = {
    1: (MemoryError, "no memory for a pass of the decoder"),
    2: (IndexError, "a token is not one of the model's"),
    3: (ValueError, "a pass uses more adapters than it can"),
}
# For how many more positions rotations are computed at a time.
_ROTATIONS = 4096


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


class _Piece(Structure):
    _fields_ = [
        ("start", c_int64),
        ("pages", c_void_p),
        ("adapter", c_void_p),
        ("tokens", c_int32),
        ("low_width", c_int32),
    ]


class _Pieces(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("piece", "ids", "cosines", "sines", "logits")),
        ("pieces", c_int32),
        ("every_token", c_int32),
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
        self._frequencies = decoder.frequencies
        self._rotary_scale = decoder.rotary_scale
        self._cosines = torch.empty((0, shape.head_dim // 2))
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

    def _rotations(self, positions: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines of so many positions or more, (positions, head_dim / 2)."""
        if len(self._cosines) < positions:
            # All at once is cheaper than those of each pass by themselves, and they are few.
            count = -(-positions // _ROTATIONS) * _ROTATIONS
            angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
            self._cosines = angles.cos() * self._rotary_scale
            self._sines = angles.sin() * self._rotary_scale
        return self._cosines, self._sines

    def compute(
        self, pieces: Sequence[Piece], cache: PagedCache, *, every_token: bool = False
    ) -> Tensor:
        """Return the logits after each piece, or after every token; see `PassDecoder`."""
        token_ids = [token_id for piece in pieces for token_id in piece.token_ids]
        ids = (c_int32 * len(token_ids))(*token_ids)
        given = (_Piece * len(pieces))(*(_given(piece) for piece in pieces))
        longest = max(piece.start + len(piece.token_ids) for piece in pieces)
        cosines, sines = self._rotations(longest)
        kept = len(ids) if every_token else len(pieces)
        logits = torch.empty((kept, self._vocabulary))
        wrong = self._library.tunesmith_step(
            self._handle,
            ctypes.byref(
                _Pieces(
                    piece=ctypes.addressof(given),
                    ids=ctypes.addressof(ids),
                    cosines=cosines.data_ptr(),
                    sines=sines.data_ptr(),
                    logits=logits.data_ptr(),
                    pieces=len(pieces),
                    every_token=every_token,
                )
            ),
        )
        if wrong:
            kind, message = _WRONG[wrong]
            raise kind(message)
        return logits


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


def _given(piece: Piece) -> _Piece:
    adapter = piece.adapter
    return _Piece(
        piece.start,
        piece.place.address,
        None if adapter is None else adapter.address,
        len(piece.token_ids),
        0 if adapter is None else adapter.low_width,
    )
