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
_VERSION = 6
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


class _Packing(Structure):
    """See `kernel/pack.h`."""

    _fields_ = [("matrix", c_void_p), ("sources", c_void_p), ("count", c_int32)]


class Lora(Structure):
    """See `kernel/pieces.h`."""

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
            library.tunesmith_open.argtypes = [c_void_p, c_int32, c_int32]
            library.tunesmith_step.argtypes = [c_void_p, c_void_p]
            library.tunesmith_close.argtypes = [c_void_p]
            library.tunesmith_close.restype = None
            library.tunesmith_pack.argtypes = [c_void_p, c_int32, c_int32]
            library.tunesmith_pack.restype = None
            return library
    return None


class Arena:
    """Memory for matrices that are read from end to end, in pages as large as the system gives.

    Args:
        chunk_bytes: What is taken from the system at a time, unless more is needed at once.
    """

    def __init__(self, chunk_bytes: int) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, size: int) -> Tensor:
        """Return so many bytes, (size,); a chunk is given back when all its bytes are forgotten."""
        if size > self._free.numel():
            # Not shared, as is the default: shared memory has large pages on few systems.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            chunk = mmap.mmap(-1, max(size, self._chunk_bytes), flags=flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):
                    chunk.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(chunk, dtype=torch.uint8)
        taken, self._free = self._free[:size], self._free[size:]
        return taken


# A matrix with its sizes, and what its outputs come from, side by side.
Plan = tuple[Matrix, Sequence[Source]]


def pack(plans: Sequence[Plan], arena: Arena, *, threads: int = 1) -> Tensor:
    """Fill matrices with panels of 16 outputs, the last one of each filled up with zeros.

    A float16 matrix is divided by a power of two, so that small values stay exact.

    Args:
        plans: What goes where; tensors behind the sources live until this returns.
        arena: Where the numbers go.
        threads: That may work on it.

    Returns:
        The memory that the matrices refer to, (bytes,).
    """
    sizes = [_packed_bytes(matrix) for matrix, _ in plans]
    memory = arena.take(sum(sizes))
    flat = [source for _, own in plans for source in own]
    sources, packings = (Source * len(flat))(*flat), (_Packing * len(plans))()
    data, place = memory.data_ptr(), ctypes.addressof(sources)
    for packing, (matrix, own), size in zip(packings, plans, sizes, strict=True):
        matrix.data = data
        packing.matrix, packing.sources, packing.count = ctypes.addressof(matrix), place, len(own)
        data += size
        place += len(own) * ctypes.sizeof(Source)
    library = load_kernel()
    assert library is not None
    library.tunesmith_pack(packings, len(plans), threads)
    return memory


def _packed_bytes(matrix: Matrix) -> int:
    numbers: int = math.ceil(matrix.outputs / _PANEL) * _PANEL * matrix.inputs
    # Each begins on a line of its own.
    size = numbers * (2 if matrix.half else 4)
    return math.ceil(size / _LINE) * _LINE


class NativeAdapter:
    """A resident adapter as the kernel reads it.

    Args:
        adapter: Its matrices, float32.
        sizes: Of the model.
        half: Keep them in float16.
        threads: That may work on it.

    Attributes:
        address: Of its structures.
        bytes: What the matrices take.
        low_width: Numbers that a token has between A and B, at most.
    """

    def __init__(
        self, adapter: PlacedAdapter, sizes: LayerSizes, *, half: bool, threads: int
    ) -> None:
        self._structs = (Lora * len(adapter.layers))()
        plans: list[Plan] = []
        # What sources point at.
        kept: list[Tensor | None] = []
        for index, matrices in enumerate(adapter.layers):
            lora = self._structs[index]
            for product, parts in PARTS.items():
                if not any(part in matrices for part in parts):
                    continue
                norm = sizes.norm_before(product, index)
                low: list[Source] = []
                for part in parts:
                    inputs, outputs = sizes.widths[part]
                    high = Source(outputs=outputs)
                    low.append(Source(outputs=adapter.rank))
                    if part in matrices:
                        a, b = matrices[part].a.contiguous(), matrices[part].b.contiguous()
                        order = sizes.order_of(part)
                        kept += [norm, a, b, order]
                        low[-1] = _source(a, scale=norm)
                        high = _source(b, order=order, factor=adapter.scale)
                    plans.append((_planned(lora, f"b_{part}", adapter.rank, outputs, half), [high]))
                low_width = len(parts) * adapter.rank
                plans.append((_planned(lora, f"a_{product}", inputs, low_width, half), low))
        self._memory = pack(plans, Arena(0), threads=threads)
        del kept
        self.address = ctypes.addressof(self._structs)
        self.bytes = self._memory.nbytes
        self.low_width = max(map(len, PARTS.values())) * adapter.rank


def _planned(lora: Lora, name: str, inputs: int, outputs: int, half: bool) -> Matrix:
    matrix: Matrix = getattr(lora, name)
    matrix.inputs, matrix.outputs, matrix.half = inputs, outputs, half
    return matrix


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


class PanelLinear(nn.Module):
    """A linear layer that only the kernel computes.

    Args:
        weight: Shape (out, in).
        bias: Shape (out,).
        half: Keep it in float16.
        arena: Where it goes.

    Attributes:
        matrix: For the kernel, as long as this layer lives.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, half: bool, arena: Arena) -> None:
        super().__init__()
        weight = weight.detach().float().contiguous()
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self.matrix = Matrix(
            bias=None if self._bias is None else self._bias.data_ptr(),
            inputs=weight.size(1),
            outputs=weight.size(0),
            half=half,
        )
        self._memory = pack([(self.matrix, [_source(weight)])], arena)
