"""The forward pass of the Llama family, for rows that may each use another adapter.

Written for TorchScript, which takes the interpreter out of the step; the same classes run as plain
modules where that is not to be had. Touvron et al., 2023 (Llama); Su et al., 2021 (rotary
positions); Ainslie et al., 2023 (grouped queries); Hu et al., 2021 (LoRA).

What is folded in beforehand: the weights of the norms into the products behind them, and the
rotary pairs, which lie side by side so that a rotation is one complex product.
"""

# No postponed annotations here: TorchScript cannot read those of named tuples.
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class LayerShape(NamedTuple):
    """Sizes of a layer.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads, of which each serves `heads / kv_heads` query heads.
        head_dim: Width of a head.
        intermediate: Width of the gated unit.
        epsilon: Of the norms.
    """

    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    epsilon: float


class LayerAdapters(NamedTuple):
    """The matrices of several adapters for one layer, the adapter being the first dimension.

    A is (adapters, in, rank), B is (adapters, rank, out) with the scale in it. An A without columns
    says that none of these adapters touches the module. The parts of a merged product have their A
    side by side and a B each.
    """

    a_qkv: Tensor
    b_q: Tensor
    b_k: Tensor
    b_v: Tensor
    a_o: Tensor
    b_o: Tensor
    a_gate_up: Tensor
    b_gate: Tensor
    b_up: Tensor
    a_down: Tensor
    b_down: Tensor


class Groups(NamedTuple):
    """Which rows use which adapter.

    Attributes:
        size: Adapters in use; 0 computes with the base weights alone.
        in_order: The rows are grouped already, the same number for each adapter and none without.
        gather: Otherwise: row of each place, (adapters x places,), where groups are filled up.
        rows: The rows that use an adapter.
        places: The place of each of these rows.
    """

    size: int
    in_order: bool
    gather: Tensor
    rows: Tensor
    places: Tensor


class Batch(NamedTuple):
    """Where the tokens of one pass belong.

    Attributes:
        rows: Rows of the cache that take part.
        tokens: Tokens of each.
        first_slot: The first of these rows in the cache.
        length: Positions of the cache that are looked at.
        positions: Position of each token, (rows x tokens,).
        slots: Place of each token in the cache's rows one after the other, (rows x tokens,).
        keep: Tokens whose logits are wanted; all when empty.
    """

    rows: int
    tokens: int
    first_slot: int
    length: int
    positions: Tensor
    slots: Tensor
    keep: Tensor


def add_adapters(x: Tensor, y: Tensor, a: Tensor, b: list[Tensor], groups: Groups) -> Tensor:
    """Return y plus what each row's adapter makes of x.

    Args:
        x: Input of the product, (rows, in).
        y: Its result with the base weights, (rows, out).
        a: (adapters, in, parts x rank).
        b: For each part (adapters, rank, out of the part).
        groups: Which rows use which adapter.
    """
    if groups.size == 0 or a.size(2) == 0:
        return y
    grouped = x if groups.in_order else x.index_select(0, groups.gather)
    low = torch.bmm(grouped.view(groups.size, -1, x.size(1)), a)
    if len(b) == 1:
        change = torch.bmm(low, b[0])
    else:
        rank = b[0].size(1)
        parts: list[Tensor] = []
        for index, part in enumerate(b):
            parts.append(torch.bmm(low[:, :, index * rank : (index + 1) * rank], part))
        change = torch.cat(parts, -1)
    change = change.view(-1, y.size(1))
    if groups.in_order:
        return y + change
    return y.index_add(0, groups.rows, change.index_select(0, groups.places))


class DecoderLayer(nn.Module):
    """Attention and gated unit of one layer.

    Args:
        shape: Sizes.
        qkv: Merged product of queries, keys and values.
        o: Output of the attention.
        gate_up: Merged product of gate and up.
        down: Output of the gated unit.
        q_norm: Weight of the norm of each query head, (head_dim,); empty where there is none.
        k_norm: The same for keys.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        qkv: nn.Module,
        o: nn.Module,
        gate_up: nn.Module,
        down: nn.Module,
        q_norm: Tensor,
        k_norm: Tensor,
    ) -> None:
        super().__init__()
        self.heads: int = shape.heads
        self.kv_heads: int = shape.kv_heads
        self.head_dim: int = shape.head_dim
        self.intermediate: int = shape.intermediate
        self.epsilon: float = shape.epsilon
        self.qkv = qkv
        self.o = o
        self.gate_up = gate_up
        self.down = down
        self.q_norm = q_norm
        self.k_norm = k_norm

    def forward(
        self,
        hidden: Tensor,
        cache: Tensor,
        batch: Batch,
        rotation: Tensor,
        mask: Tensor,
        adapters: LayerAdapters,
        groups: Groups,
    ) -> Tensor:
        """Return the hidden states after the layer, (rows x tokens, width).

        Args:
            hidden: (rows x tokens, width).
            cache: This layer's keys and values, (slots, capacity, 2, kv_heads, head_dim).
            batch: Where the tokens belong.
            rotation: Complex rotation of each token, (rows x tokens, 1, head_dim / 2).
            mask: What is added to the scores, (rows, 1, groups x tokens, length).
            adapters: Matrices of the adapters in use.
            groups: Which rows use which.
        """
        x = self._norm(hidden)
        b_qkv = [adapters.b_q, adapters.b_k, adapters.b_v]
        qkv = add_adapters(x, self.qkv(x), adapters.a_qkv, b_qkv, groups)
        mixed = self._attend(qkv, cache, batch, rotation, mask)
        hidden = hidden + add_adapters(mixed, self.o(mixed), adapters.a_o, [adapters.b_o], groups)

        x = self._norm(hidden)
        b_gate_up = [adapters.b_gate, adapters.b_up]
        gate_up = add_adapters(x, self.gate_up(x), adapters.a_gate_up, b_gate_up, groups)
        gated = functional.silu(gate_up[:, : self.intermediate]) * gate_up[:, self.intermediate :]
        return hidden + add_adapters(
            gated, self.down(gated), adapters.a_down, [adapters.b_down], groups
        )

    def _norm(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, [x.size(-1)], None, self.epsilon)

    def _attend(
        self, qkv: Tensor, cache: Tensor, batch: Batch, rotation: Tensor, mask: Tensor
    ) -> Tensor:
        count = qkv.size(0)
        heads, kv_heads, width = self.heads, self.kv_heads, self.head_dim
        q_and_k = qkv[:, : (heads + kv_heads) * width].view(count, heads + kv_heads, width)
        if self.q_norm.numel() > 0:
            q = functional.rms_norm(q_and_k[:, :heads], [width], self.q_norm, self.epsilon)
            k = functional.rms_norm(q_and_k[:, heads:], [width], self.k_norm, self.epsilon)
            q_and_k = torch.cat([q, k], 1)
        pairs = torch.view_as_complex(q_and_k.reshape(count, heads + kv_heads, width // 2, 2))
        q_and_k = torch.view_as_real(pairs * rotation).view(count, heads + kv_heads, width)

        values = qkv[:, (heads + kv_heads) * width :]
        written = torch.cat([q_and_k[:, heads:].reshape(count, kv_heads * width), values], 1)
        cache.view(-1, 2 * kv_heads * width).index_copy_(0, batch.slots, written)

        seen = cache[batch.first_slot : batch.first_slot + batch.rows, : batch.length]
        keys, remembered = seen[:, :, 0].transpose(1, 2), seen[:, :, 1].transpose(1, 2)
        # The query heads of one key-value head stand one below the other, as rows of one product.
        per_head = heads // kv_heads
        queries = q_and_k[:, :heads].view(batch.rows, batch.tokens, kv_heads, per_head, width)
        queries = queries.permute(0, 2, 3, 1, 4).reshape(
            batch.rows, kv_heads, per_head * batch.tokens, width
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, remembered, attn_mask=mask)
        mixed = mixed.view(batch.rows, kv_heads, per_head, batch.tokens, width)
        return mixed.permute(0, 3, 1, 2, 4).reshape(count, heads * width)


class Decoder(nn.Module):
    """The whole model: from token ids to logits.

    Args:
        embedding: (vocabulary, width), float32.
        layers: In order.
        head: Product that gives the logits, with the last norm's weight in it.
        frequencies: Rotary frequencies, (head_dim / 2,).
        rotary_scale: Factor of the rotations' length, 1 in most models.
        heads_per_kv: Query heads of one key-value head.
        epsilon: Of the last norm.
    """

    def __init__(
        self,
        embedding: Tensor,
        layers: list[DecoderLayer],
        head: nn.Module,
        *,
        frequencies: Tensor,
        rotary_scale: float,
        heads_per_kv: int,
        epsilon: float,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(layers)
        self.head = head
        self.frequencies = frequencies
        self.rotary_scale: float = rotary_scale
        self.heads_per_kv: int = heads_per_kv
        self.epsilon: float = epsilon

    def forward(
        self,
        token_ids: Tensor,
        batch: Batch,
        cache: list[Tensor],
        adapters: list[LayerAdapters],
        groups: Groups,
    ) -> Tensor:
        """Return float32 logits of the kept tokens, (kept, vocabulary), and extend the cache.

        Args:
            token_ids: (rows x tokens,).
            batch: Where they belong.
            cache: One tensor for each layer.
            adapters: One entry for each layer; a single one, unused, when `groups.size` is 0.
            groups: Which rows use which adapter.
        """
        hidden = functional.embedding(token_ids, self.embedding)
        angles = batch.positions.unsqueeze(1).float() * self.frequencies.unsqueeze(0)
        rotation = torch.polar(torch.full_like(angles, self.rotary_scale), angles).unsqueeze(1)
        mask = self._mask(batch)
        for index, layer in enumerate(self.layers):
            own = adapters[index if groups.size > 0 else 0]
            hidden = layer(hidden, cache[index], batch, rotation, mask, own, groups)
        if batch.keep.numel() > 0:
            hidden = hidden.index_select(0, batch.keep)
        last = functional.rms_norm(hidden, [hidden.size(-1)], None, self.epsilon)
        logits: Tensor = self.head(last)
        return logits

    def _mask(self, batch: Batch) -> Tensor:
        seen = torch.arange(batch.length, device=batch.positions.device)
        hidden_from = batch.positions.view(batch.rows, 1, 1, batch.tokens, 1)
        hides = seen.view(1, 1, 1, 1, -1) > hidden_from
        mask = torch.zeros(hides.size(), device=seen.device).masked_fill(hides, float("-inf"))
        mask = mask.expand(-1, -1, self.heads_per_kv, -1, -1)
        return mask.reshape(batch.rows, 1, self.heads_per_kv * batch.tokens, batch.length)
