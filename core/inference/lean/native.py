"""The decoder in C, for x86 processors with AVX2: the same mathematics, without torch in the step.

A pass takes tokens of any rows, each with its own adapter or none: next tokens of running answers
and pieces of prompts alike. Weights, adapters and cache stay where they are; nothing is copied
together, so ranks and numbers of rows may be mixed freely. The sources are in `kernel/`; setup
compiles them where there is a C compiler, and `why_not_native` says why they cannot be used.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.inference.lean.adapters import PARTS, LayerSizes, PlacedAdapter
from core.inference.lean.decoder import Decoder, LayerAdapters, LayerShape
from core.inference.lean.kv_cache import KvCache
from core.inference.lean.linear import Precision
from core.inference.lean.passes import Piece
from core.inference.lean.weights import shape_of

# As in the C sources.
_PANEL = 16
_VECTOR = 8
_LINE = 64
_MAX_GROUPS = 64


class _Matrix(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("half", c_int32),
        ("factor", c_float),
    ]


class _Source(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("stride", c_int64),
        ("scale", c_void_p),
        ("order", c_void_p),
        ("factor", c_float),
        ("outputs", c_int32),
    ]


class _Layer(Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down")),
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
        ("epsilon", c_float),
        ("embedding", c_void_p),
        ("layer", c_void_p),
        ("head", _Matrix),
    ]


class _Lora(Structure):
    _fields_ = [(name, _Matrix) for name in LayerAdapters._fields]


class _Group(Structure):
    _fields_ = [("layers", c_void_p), ("tokens", c_void_p), ("count", c_int32)]


class _Pass(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "groups", "kept", "low_width")),
        *((name, c_void_p) for name in ("ids", "slots", "positions", "cosines", "sines")),
        *((name, c_void_p) for name in ("group", "keep", "cache")),
        ("capacity", c_int64),
        ("logits", c_void_p),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled sources; `None` where setup has not compiled them."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            library.tunesmith_open.restype = c_void_p
            library.tunesmith_open.argtypes = [c_void_p, c_int32]
            library.tunesmith_step.argtypes = [c_void_p, c_void_p]
            library.tunesmith_close.argtypes = [c_void_p]
            library.tunesmith_close.restype = None
            library.tunesmith_pack.argtypes = [c_void_p, c_int32, c_int32, c_int32, c_void_p]
            library.tunesmith_pack.restype = c_float
            return library
    return None


class Arena:
    """Memory for matrices that are read from end to end, in pages as large as the system gives.

    Args:
        chunk_bytes: What is taken from the system at a time, unless a matrix needs more.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: Sequence[int], kind: torch.dtype) -> Tensor:
        """Return memory for a tensor; it is given back when all tensors of its chunk are gone."""
        size = math.prod(shape) * kind.itemsize
        if size > self._free.numel():
            chunk = mmap.mmap(-1, max(size, self._chunk_bytes))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):
                    chunk.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(chunk, dtype=torch.uint8)
        taken, self._free = self._free[:size], self._free[-(-size // _LINE) * _LINE :]
        return taken.view(kind).view(*shape)


class Panels:
    """A matrix as the kernel reads it: panels of 16 outputs, the last one filled up with zeros.

    Args:
        sources: What its outputs come from, side by side; tensors behind them live until then.
        inputs: Of the matrix.
        bias: Shape (outputs,).
        half: Keep it in float16, divided by a power of two so that small values stay exact.
        arena: Where it goes.

    Attributes:
        bytes: What it takes.
        struct: For the kernel.
    """

    def __init__(
        self,
        sources: Sequence[_Source],
        inputs: int,
        *,
        bias: Tensor | None = None,
        half: bool,
        arena: Arena,
    ) -> None:
        outputs = sum(source.outputs for source in sources)
        kind = torch.float16 if half else torch.float32
        self._data = arena.take((-(-outputs // _PANEL), inputs, _PANEL), kind)
        self._bias = None if bias is None else bias.detach().float().contiguous()
        address = self._data.data_ptr()
        library = _library()
        assert library is not None
        array = (_Source * len(sources))(*sources)
        factor = library.tunesmith_pack(array, len(sources), inputs, int(half), address)
        self.struct = _Matrix(
            data=address,
            bias=None if self._bias is None else self._bias.data_ptr(),
            inputs=inputs,
            outputs=outputs,
            half=half,
            factor=factor,
        )
        self.bytes = self._data.nbytes


class NativeAdapter:
    """A resident adapter as the kernel reads it.

    Args:
        adapter: Its matrices, float32.
        sizes: Of the model.
        half: Keep them in float16.

    Attributes:
        bytes: What the matrices take.
        low_width: Numbers that a token has between A and B, at most.
    """

    def __init__(self, adapter: PlacedAdapter, sizes: LayerSizes, *, half: bool) -> None:
        self._arena = Arena(_packed_bytes(adapter, sizes, half=half))
        self._half = half
        self._panels: list[Panels] = []
        self._structs = (_Lora * len(adapter.layers))()
        for index, matrices in enumerate(adapter.layers):
            for product, parts in PARTS.items():
                if any(part in matrices for part in parts):
                    self._pack(index, product, adapter, sizes)
        self.address = ctypes.addressof(self._structs)
        self.bytes = sum(panels.bytes for panels in self._panels)
        self.low_width = max(map(len, PARTS.values())) * adapter.rank

    def _pack(self, layer: int, product: str, adapter: PlacedAdapter, sizes: LayerSizes) -> None:
        matrices, rank = adapter.layers[layer], adapter.rank
        norm = sizes.norm_before(product, layer)
        own: list[_Source] = []
        # What sources point at.
        kept: list[Tensor | None] = [norm]
        for part in PARTS[product]:
            inputs, outputs = sizes.widths[part]
            order = sizes.order_of(part)
            if part in matrices:
                a, b = matrices[part].a.contiguous(), matrices[part].b.contiguous()
                kept += [a, b, order]
                own.append(_source(a, scale=norm))
                source = _source(b, order=order, factor=adapter.scale)
            else:
                own.append(_Source(outputs=rank))
                source = _Source(outputs=outputs)
            self._add(layer, f"b_{part}", [source], rank)
        self._add(layer, f"a_{product}", own, inputs)
        del kept

    def _add(self, layer: int, name: str, sources: Sequence[_Source], inputs: int) -> None:
        panels = Panels(sources, inputs, half=self._half, arena=self._arena)
        self._panels.append(panels)
        setattr(self._structs[layer], name, panels.struct)


def _source(
    matrix: Tensor,
    *,
    scale: Tensor | None = None,
    order: Tensor | None = None,
    factor: float = 1.0,
) -> _Source:
    """Return how to read a matrix (out, in): inputs scaled, outputs in another order."""
    return _Source(
        data=matrix.data_ptr(),
        stride=matrix.stride(0),
        scale=None if scale is None else scale.data_ptr(),
        order=None if order is None else order.data_ptr(),
        outputs=matrix.size(0),
        factor=factor,
    )


def _packed_bytes(adapter: PlacedAdapter, sizes: LayerSizes, *, half: bool) -> int:
    total = 0
    for matrices in adapter.layers:
        for parts in PARTS.values():
            if any(part in matrices for part in parts):
                inputs = sizes.widths[parts[0]][0]
                panels = [(inputs, len(parts) * adapter.rank)]
                panels += [(adapter.rank, sizes.widths[part][1]) for part in parts]
                total += sum(-(-n // _PANEL) * _PANEL * k * (2 if half else 4) for k, n in panels)
    # Each begins on a line of its own.
    return total + _LINE * len(LayerAdapters._fields) * len(adapter.layers)


class NativeDecoder:
    """Computes passes; see `core.inference.lean.passes.PassDecoder`.

    Args:
        decoder: Whose layers are `Panels`; it may be forgotten afterwards.
        shape: Sizes of the layers.
        precision: How base weights, adapters and cache are kept.
        threads: That compute together.
    """

    rows_in_front = False

    def __init__(
        self, decoder: Decoder, shape: LayerShape, precision: Precision, threads: int
    ) -> None:
        library = _library()
        assert library is not None
        self._library = library
        self._half = precision == "fp16"
        self.cache_type = torch.float16 if self._half else torch.float32
        # What the structures point at.
        self.weights = decoder
        self._frequencies = decoder.frequencies
        self._rotary_scale = decoder.rotary_scale
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
            epsilon=shape.epsilon,
            embedding=decoder.embedding.data_ptr(),
            layer=ctypes.addressof(self._layers),
            head=head.panels.struct,
        )
        self._handle = library.tunesmith_open(ctypes.addressof(model), threads)
        if self._handle is None:
            raise MemoryError("no memory for the decoder")
        self._close = weakref.finalize(self, library.tunesmith_close, self._handle)

    def prepare(self, adapter: PlacedAdapter, sizes: LayerSizes) -> NativeAdapter:
        """Return an adapter as the kernel reads it; safe from any thread."""
        return NativeAdapter(adapter, sizes, half=self._half)

    def bytes_beside(self, adapters: Sequence[NativeAdapter]) -> int:
        """Return what a pass with these adapters takes besides them: nothing."""
        return 0

    def forget(self, digest: str) -> None:
        """Note that an adapter is resident no longer."""

    def compute(
        self, pieces: Sequence[Piece], cache: KvCache, *, every_token: bool = False
    ) -> Tensor:
        """Return the logits after each piece, or after every token; see `PassDecoder`."""
        counts = [len(piece.token_ids) for piece in pieces]
        tokens = sum(counts)
        ids = np.fromiter((i for piece in pieces for i in piece.token_ids), np.int32, tokens)
        if ids.min() < 0 or ids.max() >= self._vocabulary:
            raise IndexError("a token is not one of the model's")
        slots = np.repeat(np.array([piece.slot for piece in pieces], np.int64), counts)
        ends = np.cumsum(counts)
        starts = np.array([piece.start for piece in pieces]) - (ends - counts)
        positions = np.arange(tokens, dtype=np.int64) + np.repeat(starts, counts)
        keep = (np.arange(tokens) if every_token else ends - 1).astype(np.int32)
        angles = torch.from_numpy(positions).float().unsqueeze(1) * self._frequencies
        cosines, sines = angles.cos() * self._rotary_scale, angles.sin() * self._rotary_scale
        groups, members = _group(pieces, ends, counts)
        if len(groups) > _MAX_GROUPS:
            raise ValueError(f"{len(groups)} adapters are more than a pass can use")
        layers = (c_void_p * len(cache.tensors))(*(t.data_ptr() for t in cache.tensors))
        logits = torch.empty(len(keep), self._vocabulary)
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
                    slots=slots.ctypes.data,
                    positions=positions.ctypes.data,
                    cosines=cosines.data_ptr(),
                    sines=sines.data_ptr(),
                    group=ctypes.addressof(groups),
                    keep=keep.ctypes.data,
                    cache=ctypes.addressof(layers),
                    capacity=cache.capacity,
                    logits=logits.data_ptr(),
                )
            ),
        )
        del members
        if done != 0:
            raise MemoryError("no memory for a pass of the decoder")
        return logits


def why_not_native(model: Any, precision: Precision) -> str | None:
    """Return why a model cannot be computed natively; `None` when it can."""
    library = _library()
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


class PanelLinear(nn.Module):
    """A linear layer that only the kernel computes.

    Args:
        weight: Shape (out, in).
        bias: Shape (out,).
        half: Keep it in float16.
        arena: Where it goes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, half: bool, arena: Arena) -> None:
        super().__init__()
        weight = weight.detach().float().contiguous()
        self.panels = Panels([_source(weight)], weight.size(1), bias=bias, half=half, arena=arena)


def _layer(layer: Any) -> _Layer:
    def address(norm: Tensor) -> int | None:
        return norm.data_ptr() if norm.numel() else None

    return _Layer(
        qkv=layer.qkv.panels.struct,
        o=layer.o.panels.struct,
        gate_up=layer.gate_up.panels.struct,
        down=layer.down.panels.struct,
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
