"""Masked weights whose gradient is the dense one: straight-through estimation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purprune.masks import apply_masks


def straight_through(
    params: Mapping[str, Tensor], masks: Mapping[str, Tensor], *, decay: float = 0.0
) -> dict[str, Tensor]:
    """Return ``params`` with pruned entries zero, and the gradient of all entries.

    ``out = where(mask, w, 0)``, as :func:`apply_masks` does; backwards
    ``dw = dout + decay * where(mask, 0, w)``, which with ``decay`` draws pruned entries to zero.
    Works under ``torch.func.grad`` and ``vmap``.

    Sources: Bengio et al., 2013 (arXiv:1308.3432); with ``decay`` SR-STE, Zhou et al., 2021
    (arXiv:2102.04010), equation 8.

    >>> weights = {"w": torch.tensor([3.0, 1.0], requires_grad=True)}
    >>> masked = straight_through(weights, {"w": torch.tensor([True, False])}, decay=0.5)["w"]
    >>> masked.sum().backward()
    >>> masked.tolist(), weights["w"].grad.tolist()
    ([3.0, 0.0], [1.0, 1.5])
    """
    apply_masks(params, masks)  # refuses what does not fit
    return {
        name: _masked(weight, masks[name], decay) if name in masks else weight
        for name, weight in params.items()
    }


def _masked(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    masked: Tensor = _StraightThrough.apply(weight, mask, decay)  # type: ignore[no-untyped-call]
    return masked


def pull(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    """Return ``decay * where(mask, 0, weight)``: what draws pruned entries to zero."""
    return weight.masked_fill(mask, 0) * decay


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        weight, mask, ctx.decay = inputs
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        term = pull(weight, mask, ctx.decay) if ctx.decay else None
        return gradient if term is None else gradient + term, None, None
