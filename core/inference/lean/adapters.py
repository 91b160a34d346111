"""The matrices of resident adapters, and the contiguous bank that a mixed step reads.

A resident adapter keeps its matrices as the decoder wants them. For a step in which rows use
different adapters the matrices in use stand side by side in the bank, in the order of the rows, so
that one batched product serves all rows without a copy; it changes only where that order does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.inference.gates import AdapterWeights, LoraMatrices
from core.inference.lean.decoder import Groups, LayerAdapters, LayerShape
from core.inference.lean.weights import rotary_order

_MODULE = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.([a-z]+)_proj")
PARTS: dict[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


@dataclass(frozen=True)
class LayerNorms:
    """The weights of a layer's norms, which adapters need since the decoder folds them in."""

    attention: Tensor
    unit: Tensor


@dataclass(frozen=True)
class LayerSizes:
    """What adapters have to fit, and what is folded into them.

    Attributes:
        shape: Sizes of the layers.
        widths: Inputs and outputs of each product, by part: `q` → (in, out).
        norms: Of each layer.
    """

    shape: LayerShape
    widths: Mapping[str, tuple[int, int]]
    norms: Sequence[LayerNorms]

    def norm_before(self, product: str, layer: int) -> Tensor | None:
        """Return the weights of the norm that is folded into a product's inputs, (in,)."""
        norms = self.norms[layer]
        return {"qkv": norms.attention, "gate_up": norms.unit}.get(product)

    def order_of(self, part: str) -> Tensor | None:
        """Return the order that a part's outputs are in; `None` is as in transformers."""
        heads = {"q": self.shape.heads, "k": self.shape.kv_heads}.get(part)
        return None if heads is None else rotary_order(heads, self.shape.head_dim)


@dataclass(frozen=True)
class PlacedAdapter:
    """An adapter's matrices by layer and part.

    Attributes:
        rank: Its rank.
        scale: What B is multiplied by.
        layers: For each layer part → matrices; `q` is the query projection.
        applied: The modules that have a place, by name.
    """

    rank: int
    scale: float
    layers: list[dict[str, LoraMatrices]]
    applied: set[str]


def place(weights: AdapterWeights, sizes: LayerSizes) -> PlacedAdapter:
    """Find the place of each of an adapter's modules."""
    scale = weights.lora_alpha / (weights.r**0.5 if weights.use_rslora else weights.r)
    placed = PlacedAdapter(weights.r, scale, [{} for _ in sizes.norms], set())
    for name, matrices in weights.modules.items():
        match = _MODULE.fullmatch(name)
        if match and int(match[1]) < len(sizes.norms) and match[3] in sizes.widths:
            placed.layers[int(match[1])][match[3]] = matrices
            placed.applied.add(name)
    return placed


class AdapterMatrices:
    """One resident adapter for torch: for each layer its matrices, as a bank of one.

    Args:
        placed: The adapter.
        sizes: Of the model.
        device: Where the matrices go.

    Attributes:
        rank: Rank of the adapter.
        layers: One entry for each layer.
        bytes: What the matrices take.
        touched: For each field of `LayerAdapters` whether any layer has it.
    """

    def __init__(self, placed: PlacedAdapter, sizes: LayerSizes, device: torch.device) -> None:
        self.rank = placed.rank
        self.layers = [
            _layer(matrices, index, placed, sizes, device)
            for index, matrices in enumerate(placed.layers)
        ]
        self.bytes = sum(tensor.nbytes for layer in self.layers for tensor in layer)
        self.touched = tuple(
            any(getattr(layer, field).numel() for layer in self.layers)
            for field in LayerAdapters._fields
        )


def bank_bytes(adapters: Sequence[AdapterMatrices]) -> int:
    """Return what the bank takes with these adapters side by side."""
    if not adapters:
        return 0
    rank = max(adapter.rank for adapter in adapters)
    numbers = 0
    for index, field in enumerate(LayerAdapters._fields):
        user = next((adapter for adapter in adapters if adapter.touched[index]), None)
        if user is not None:
            # All layers of the bank have the matrices that any layer of any adapter has.
            widest = max(getattr(layer, field).numel() for layer in user.layers)
            numbers += widest // user.rank * rank * len(user.layers)
    return 4 * numbers * len(adapters)


class ActiveBank:
    """The adapters of a decoding step, side by side."""

    def __init__(self) -> None:
        self._digests: list[str | None] = []
        self._rank = 0
        self._touched: tuple[bool, ...] = ()
        self._storage: list[LayerAdapters] = []
        self._views: list[LayerAdapters] = []

    def select(
        self, digests: Sequence[str], resident: Mapping[str, AdapterMatrices]
    ) -> list[LayerAdapters]:
        """Return the matrices of these adapters, in this order, for each layer."""
        chosen = [resident[digest] for digest in digests]
        rank = max(adapter.rank for adapter in chosen)
        touched = tuple(
            any(adapter.touched[index] for adapter in chosen)
            for index in range(len(LayerAdapters._fields))
        )
        if len(digests) > len(self._digests) or rank != self._rank or touched != self._touched:
            self._allocate(len(digests), rank, touched, chosen[0])
        changed = False
        for slot, digest in enumerate(digests):
            if self._digests[slot] != digest:
                self._fill(slot, chosen[slot])
                self._digests[slot] = digest
                changed = True
        if changed or self._views[0].a_o.size(0) != len(digests):
            self._views = [
                LayerAdapters(*(tensor[: len(digests)] for tensor in layer))
                for layer in self._storage
            ]
        return self._views

    def forget(self, digest: str) -> None:
        """Note that an adapter is resident no longer; the last one leaves no memory behind."""
        self._digests = [None if known == digest else known for known in self._digests]
        if not any(self._digests):
            self.clear()

    def clear(self) -> None:
        """Give the memory back."""
        self.__init__()  # type: ignore[misc]

    def _allocate(
        self, slots: int, rank: int, touched: tuple[bool, ...], like: AdapterMatrices
    ) -> None:
        # First of all, so that a lack of memory leaves things as they are.
        storage = [
            LayerAdapters(
                *(
                    _empty(tensor, field, slots, rank, used)
                    for field, tensor, used in zip(
                        LayerAdapters._fields, layer, touched, strict=True
                    )
                )
            )
            for layer in like.layers
        ]
        self._digests = [None] * slots
        self._rank, self._touched = rank, touched
        self._storage = self._views = storage

    def _fill(self, slot: int, adapter: AdapterMatrices) -> None:
        for stored, own in zip(self._storage, adapter.layers, strict=True):
            for field, target, source in zip(LayerAdapters._fields, stored, own, strict=True):
                if target.numel():
                    _copy(target[slot], source[0], field, adapter.rank, self._rank)


def arrange(digests: Sequence[str | None]) -> tuple[list[str], Groups]:
    """Return the adapters that rows use, and how the rows belong to them.

    Args:
        digests: The adapter of each row, `None` for the base model.
    """
    counts = Counter(digest for digest in digests if digest is not None)
    order = list(counts)
    none = torch.zeros(0, dtype=torch.long)
    if not order:
        return [], Groups(0, True, none, none, none)
    places = max(counts.values())
    if [digest for digest in order for _ in range(places)] == list(digests):
        return order, Groups(len(order), True, none, none, none)
    gather = [0] * (len(order) * places)
    rows, own = [], []
    taken: Counter[str] = Counter()
    for row, digest in enumerate(digests):
        if digest is not None:
            place = order.index(digest) * places + taken[digest]
            taken[digest] += 1
            gather[place] = row
            rows.append(row)
            own.append(place)
    return order, Groups(
        len(order), False, torch.tensor(gather), torch.tensor(rows), torch.tensor(own)
    )


def _layer(
    matrices: Mapping[str, LoraMatrices],
    index: int,
    placed: PlacedAdapter,
    sizes: LayerSizes,
    device: torch.device,
) -> LayerAdapters:
    rank = placed.rank
    tensors: dict[str, Tensor] = {}
    for product, parts in PARTS.items():
        given = any(part in matrices for part in parts)
        a = torch.zeros(1, sizes.widths[parts[0]][0], rank * len(parts) if given else 0)
        norm = sizes.norm_before(product, index)
        for number, part in enumerate(parts):
            b = torch.zeros(1, rank if given else 0, sizes.widths[part][1])
            if part in matrices:
                pair, order = matrices[part], sizes.order_of(part)
                own_a = pair.a if norm is None else pair.a * norm.cpu()
                a[0, :, number * rank : (number + 1) * rank] = own_a.t()
                b[0] = (pair.b if order is None else pair.b[order]).t() * placed.scale
            tensors[f"b_{part}"] = b.to(device)
        tensors[f"a_{product}"] = a.to(device)
    return LayerAdapters(**tensors)


def _empty(like: Tensor, field: str, slots: int, rank: int, used: bool) -> Tensor:
    if field.startswith("a_"):
        parts = len(PARTS[field.removeprefix("a_")])
        return like.new_zeros(slots, like.size(1), parts * rank if used else 0)
    return like.new_zeros(slots, rank if used else 0, like.size(2))


def _copy(target: Tensor, source: Tensor, field: str, own_rank: int, bank_rank: int) -> None:
    """Copy an adapter of a lower rank than the bank's into its slot, the rest being zero."""
    if not source.numel():
        target.zero_()
    elif own_rank == bank_rank:
        target.copy_(source)
    elif field.startswith("a_"):
        target.zero_()
        parts = target.size(1) // bank_rank
        target.view(-1, parts, bank_rank)[:, :, :own_rank] = source.view(-1, parts, own_rank)
    else:
        target.zero_()
        target[:own_rank] = source
