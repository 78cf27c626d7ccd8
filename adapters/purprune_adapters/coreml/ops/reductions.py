"""Sums, means, extremes, sorting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .registry import OPS, Args, op


def _reduce(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[[Args], Any]:
    def apply(a: Args) -> Tensor:
        x = a.tensor("x")
        axes = a.ints("axes") or list(range(x.ndim))
        return function(x, axes, a.flag("keep_dims"))

    return apply


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


OPS.update(
    {
        "reduce_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
        "reduce_mean": _reduce(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
        "reduce_max": _reduce(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
        "reduce_min": _reduce(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
        "reduce_prod": _reduce(_prod),
        "reduce_sum_square": _reduce(lambda x, axes, keep: (x * x).sum(axes, keepdim=keep)),
        "reduce_l1_norm": _reduce(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
        "reduce_l2_norm": _reduce(lambda x, axes, keep: (x * x).sum(axes, keepdim=keep).sqrt()),
        "reduce_log_sum": _reduce(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
        "reduce_log_sum_exp": _reduce(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    }
)


@op("reduce_argmax")
def _argmax(a: Args) -> Tensor:
    return a.tensor("x").argmax(a.int("axis", -1), keepdim=a.flag("keep_dims", True))


@op("reduce_argmin")
def _argmin(a: Args) -> Tensor:
    return a.tensor("x").argmin(a.int("axis", -1), keepdim=a.flag("keep_dims", True))


@op("cumsum")
def _cumsum(a: Args) -> Tensor:
    x, axis = a.tensor("x"), a.int("axis")
    x = x.flip(axis) if a.flag("reverse") else x
    total = x.cumsum(axis)
    total = total - x if a.flag("exclusive") else total
    return total.flip(axis) if a.flag("reverse") else total


@op("topk")
def _topk(a: Args) -> tuple[Tensor, ...]:
    found = a.tensor("x").topk(a.int("k", 1), a.int("axis", -1), largest=not a.flag("ascending"))
    return tuple(found) if a.flag("return_indices", True) else (found[0],)


@op("argsort")
def _argsort(a: Args) -> Tensor:
    axis, falling = a.int("axis", -1), not a.flag("ascending")
    return a.tensor("x").argsort(stable=True, dim=axis, descending=falling)
