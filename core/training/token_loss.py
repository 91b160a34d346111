"""The cross entropy of trained tokens, with the output head computed for these alone.

Over a large vocabulary the head is the largest product of a small model, and its logits are the
largest tensor. Both are spared: positions that are not trained never reach the head, and the others
do so a few at a time, each time with the gradient of their hidden states computed at once, so that
no logits are kept for the backward pass. The head itself is frozen and needs no gradient.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from core.data.rendering import IGNORED_LABEL

# Of the logits that exist at one time; the products are no faster with more.
_LOGITS_BYTES = 32 * 2**20
_FEWEST_POSITIONS = 32

# Settings by which an architecture changes the logits after its head.
_LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


@dataclass(frozen=True)
class TokenLoss:
    """Sums over the trained tokens of a batch.

    Attributes:
        total: The cross entropy, which gradients can be computed of.
        correct: How many of them the model would have chosen.
    """

    total: torch.Tensor
    correct: torch.Tensor


class TokenLossFunction:
    """Computes the loss of batches from `PaddedBatch` for one model.

    Args:
        model: With an adapter attached, on its device.
    """

    def __init__(self, model: Any) -> None:
        base = model.get_base_model()
        self._head = base.get_output_embeddings()
        config = base.config.get_text_config()
        self._plain_head = type(self._head) is nn.Linear and all(
            getattr(config, name, None) in (None, 1.0) for name in _LOGIT_SETTINGS
        )
        # On CUDA the kernels that TRL has given the model do it, without waiting for the device.
        self._uses_trl = self._head.weight.is_cuda and "forward" in vars(base)
        self._needs_mask = not ignores_padding(base)

    def __call__(self, model: Any, batch: dict[str, Any]) -> TokenLoss:
        """Return the sums of a batch."""
        arguments = {"input_ids": batch["input_ids"], "use_cache": False}
        if self._needs_mask:
            arguments["attention_mask"] = batch["attention_mask"]
        else:
            positions = batch["input_ids"].shape[1]
            arguments["position_ids"] = torch.arange(
                positions, device=batch["input_ids"].device
            ).unsqueeze(0)
        targets = batch["targets"]
        if self._uses_trl:
            outputs = model(**arguments, shift_labels=targets, fused_lm_head=True)
            return TokenLoss(-outputs.log_probs.sum(), outputs.is_top1.sum())
        chosen = (targets != IGNORED_LABEL).flatten().nonzero().squeeze(1)
        return self._select(model, arguments, chosen, targets.flatten()[chosen])

    def _select(
        self, model: Any, arguments: dict[str, Any], chosen: torch.Tensor, targets: torch.Tensor
    ) -> TokenLoss:
        sums: list[TokenLoss] = []

        def select(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            hidden = given[0].flatten(0, 1)[chosen]
            if not self._plain_head:
                return (hidden,)
            sums.append(head_loss(hidden, self._head.weight, self._head.bias, targets))
            # What the model computes from it is of no use any more.
            return (hidden[:0],)

        # Before the head of whatever architecture, which then goes on with these positions only.
        hook = self._head.register_forward_pre_hook(select)
        try:
            logits = model(**arguments).logits
        finally:
            hook.remove()
        if sums:
            return sums[0]
        logits = logits.float()
        total = nn.functional.cross_entropy(logits, targets, reduction="sum")
        return TokenLoss(total, (logits.argmax(-1) == targets).sum())


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> TokenLoss:
    """Return the cross entropy of a linear head, summed over positions.

    Args:
        hidden: Shape (positions, features).
        weight: The frozen head, shape (tokens, features).
        bias: Of the head, frozen too.
        targets: The token of each position.
    """
    total, correct = _apply_head_loss(hidden, weight, bias, targets)
    return TokenLoss(total, correct)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        at_once = max(_FEWEST_POSITIONS, _LOGITS_BYTES // (4 * weight.shape[0]))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.long, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], at_once):
            part = slice(start, start + at_once)
            logits = nn.functional.linear(hidden[part], weight, bias).float()
            target = targets[part].unsqueeze(1)
            of_target = logits.gather(1, target)
            highest = logits.amax(dim=1, keepdim=True)
            correct += (of_target >= highest).sum()
            weights = logits.sub_(highest).exp_()
            sums = weights.sum(dim=1, keepdim=True)
            total += (sums.log() + highest - of_target).sum()
            if gradient is not None:
                probabilities = weights.div_(sums)
                probabilities.scatter_add_(1, target, torch.full_like(sums, -1.0))
                torch.mm(probabilities.to(weight.dtype), weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None, None


# torch declares no types for it.
_apply_head_loss: Any = _HeadLoss.apply


def ignores_padding(base: Any) -> bool:
    """Tell whether the model needs no mask for padding on the right.

    Where each position sees itself and what precedes it, trained positions never see the padding.
    Without a mask torch's causal kernels are used. A mixture of experts would route the padding
    too, and other kinds of attention are not relied on.
    """
    config = base.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and getattr(config, "is_causal", True)
        and layers == {"full_attention"}
        and not getattr(config, "sliding_window", None)
        and not any(
            getattr(config, name, None)
            for name in ("num_experts", "num_local_experts", "n_routed_experts")
        )
        and "position_ids" in inspect.signature(type(base).forward).parameters
    )
