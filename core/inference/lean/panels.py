"""Matrices as the kernel reads them, base weights and adapters alike.

Owns the compiled library and the memory that it reads. The sources are in `kernel/`; setup compiles
them where there is a C compiler.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from core.inference.lean.adapters import PARTS, LayerSizes, PlacedAdapter
from core.inference.lean.decoder import LayerAdapters

# As in the C sources; the version changes with every structure that Python fills in.
_VERSION = 1
_PANEL = 16
_LINE = 64


class Matrix(Structure):
    """See `kernel/product.h`."""

    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("inputs", c_int32),
        ("outputs", c_int32),
        ("half", c_int32),
        ("factor", c_float),
    ]


class Source(Structure):
    """See `kernel/pack.h`."""

    _fields_ = [
        ("data", c_void_p),
        ("stride", c_int64),
        ("scale", c_void_p),
        ("order", c_void_p),
        ("factor", c_float),
        ("outputs", c_int32),
    ]


class Lora(Structure):
    """See `kernel/step.c`."""

    _fields_ = [(name, Matrix) for name in LayerAdapters._fields]


@cache
def load_kernel() -> ctypes.CDLL | None:
    """Return the compiled sources; `None` where setup has not compiled them, or other ones."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernel{suffix}")
        if path.exists():
            library = ctypes.CDLL(str(path))
            if library.tunesmith_version() != _VERSION:
                return None
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
        sources: Sequence[Source],
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
        library = load_kernel()
        assert library is not None
        array = (Source * len(sources))(*sources)
        factor = library.tunesmith_pack(array, len(sources), inputs, int(half), address)
        self.struct = Matrix(
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
        self._structs = (Lora * len(adapter.layers))()
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
        own: list[Source] = []
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
                own.append(Source(outputs=rank))
                source = Source(outputs=outputs)
            self._add(layer, f"b_{part}", [source], rank)
        self._add(layer, f"a_{product}", own, inputs)
        del kept

    def _add(self, layer: int, name: str, sources: Sequence[Source], inputs: int) -> None:
        panels = Panels(sources, inputs, half=self._half, arena=self._arena)
        self._panels.append(panels)
        setattr(self._structs[layer], name, panels.struct)


def _source(
    matrix: Tensor,
    *,
    scale: Tensor | None = None,
    order: Tensor | None = None,
    factor: float = 1.0,
) -> Source:
    """Return how to read a matrix (out, in): inputs scaled, outputs in another order."""
    return Source(
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
