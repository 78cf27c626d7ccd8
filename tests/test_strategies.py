"""The generators are tested too: a law is only worth what reaches it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import find, settings
from torch import Tensor

from strategies import any_values, exact_values, matrix_shapes, patterns_for, views, weights

SEARCH = settings(max_examples=5000, database=None)


def _has_ties(w: Tensor) -> bool:
    return w.numel() > 4 and w.float().abs().unique().numel() < w.numel() // 2


@pytest.mark.parametrize(
    "reached",
    [
        _has_ties,
        lambda w: w.numel() == 0,
        lambda w: w.dim() == 0,
        lambda w: w.dim() == 5,
        lambda w: bool(w.isinf().any()),
        lambda w: w.dtype == torch.bfloat16 and w.numel() > 3,
        lambda w: bool(((w == 0) & w.signbit()).any()),
        lambda w: (
            w.dtype == torch.float32
            and bool(((w != 0) & (w.abs() < torch.finfo(torch.float32).tiny)).any())
        ),
    ],
    ids=["ties", "empty", "0-d", "5-d", "inf", "bfloat16", "negative zero", "subnormal"],
)
def test_weights_reach(reached: Callable[[Tensor], bool]):
    """Defends the coverage of the weight strategy."""
    find(weights(), reached, settings=SEARCH)


def test_patterns_reach_ragged_units_and_tails():
    """Defends that blocks and groups which do not divide their dim are drawn."""

    def ragged(drawn: tuple[Tensor, object]) -> bool:
        w, pattern = drawn
        block = pattern.unit.block(w.shape)  # type: ignore[attr-defined]
        return any(n % b for n, b in zip(w.shape, block, strict=True) if b < n)

    def tail(drawn: tuple[Tensor, object]) -> bool:
        w, pattern = drawn
        group = pattern.group  # type: ignore[attr-defined]
        return (
            group.kind == "every"
            and w.shape[group.dim] > group.m > 1
            and bool(w.shape[group.dim] % group.m)
        )

    both = weights(matrix_shapes, exact_values).flatmap(
        lambda w: patterns_for(w.dim()).map(lambda p: (w, p))
    )
    find(both, ragged, settings=SEARCH)
    find(both, tail, settings=SEARCH)


def test_views_have_the_entries_but_not_the_layout():
    """Defends that views are views: equal entries, other strides or offset."""
    base = weights(matrix_shapes, any_values)
    drawn = base.flatmap(lambda w: views(w).map(lambda v: (w, v)))
    w, v = find(drawn, lambda p: not p[1].is_contiguous() and p[0].numel() > 1, settings=SEARCH)
    assert torch.equal(w, v)
    w, v = find(drawn, lambda p: p[1].storage_offset() > 0, settings=SEARCH)
    assert torch.equal(w, v)
    assert math.prod(v.shape) == w.numel()
