"""Ranking: the one place that knows order, ties, NaN and counts.

In every group exactly ``k = floor(units * sparsity)`` units are pruned: the first k by (score, flat
index), which is a stable sort. Nothing is sorted, though: scores are read as integers that order
alike, the k-th smallest is found by partition, and the ties with it go by index.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purprune.errors import NaNError
from purprune.patterns import Group
from purprune.values import exact

_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}
_BITS |= {torch.float32: torch.int32, torch.float64: torch.int64}
_INFINITY = {
    dtype: int(torch.tensor(math.inf, dtype=dtype).view(bits)) for dtype, bits in _BITS.items()
}
_PAIRWISE = 16
"""Groups up to this size are ranked by comparing all pairs, without a partition."""


def count(units: int, sparsity: float | Fraction) -> int:
    """Return ``floor(units * sparsity)``, of the decimal that was written.

    >>> count(100, 0.29), count(95, 0.4), count(2**53 + 1, 0.5)
    (29, 38, 4503599627370496)
    """
    return math.floor(units * exact(sparsity))


def count_nan(tensor: Tensor) -> int:
    """Return how many entries are NaN, without a floating-point temporary."""
    if not tensor.is_floating_point():
        return 0
    if tensor.dtype not in _BITS:
        tensor = tensor.float()
    bits = tensor.detach().view(_BITS[tensor.dtype])
    magnitude = bits & torch.iinfo(bits.dtype).max
    return int((magnitude > _INFINITY[tensor.dtype]).sum())


def refuse_nan(tensor: Tensor, what: str) -> None:
    """Raise a NaNError that names ``what`` holds NaN, and how many."""
    if bad := count_nan(tensor):
        raise NaNError(
            f"Expected numbers in {what}; got {bad} NaN of {tensor.numel()} entries. NaN has no "
            f"rank: find where the training diverged, or replace them before pruning."
        )


def ordered_keys(scores: Tensor) -> Tensor:
    """Return integers in the order of the scores; the extremes of their type never occur.

    The bits of an IEEE float, with the sign taken off and put back as a two's complement sign,
    order like the float, and -0 equals 0.
    """
    if not scores.is_floating_point():
        keys, info = scores.to(torch.int64), torch.iinfo(torch.int64)
        if scores.dtype == torch.int64 and bool(((keys == info.min) | (keys == info.max)).any()):
            raise ValueError("Expected int64 scores within +-(2**63 - 2); got an extreme value.")
        return keys
    if scores.dtype not in _BITS:
        scores = scores.float()
    bits = scores.contiguous().view(_BITS[scores.dtype])
    info = torch.iinfo(bits.dtype)
    sign = bits >> (info.bits - 1)
    return ((bits & info.max) ^ sign) - sign


def keep_lowest_out(
    scores: Tensor, group: Group, sparsity: Fraction, pruned: Tensor | None = None
) -> Tensor:
    """Return which units to keep: all but the first ``k`` by (score, flat index) in each group.

    Args:
        scores: the unit grid, one score per unit, no NaN.
        group: how the grid divides into groups.
        sparsity: the fraction of units to prune in every group.
        pruned: units that are pruned already; they go first, whatever their score.

    Returns:
        A bool tensor of the grid's shape and device, True = keep.
    """
    keys = group.matrix(ordered_keys(scores))
    first = None if pruned is None else group.matrix(pruned)
    gone = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    for start, stop, size in group.spans(keys.shape[1]):
        k = count(size, sparsity)
        part = keys[:, start:stop].reshape(-1, size)
        if first is not None:
            part = _pruned_first(part, first[:, start:stop].reshape(-1, size), k)
        gone[:, start:stop] = _lowest(part, k).view(gone.shape[0], stop - start)
    return group.restore(~gone, scores.shape)


def _pruned_first(keys: Tensor, pruned: Tensor, k: int) -> Tensor:
    """Move pruned units below all others; where more than k are pruned, the others above them."""
    info = torch.iinfo(keys.dtype)
    fit = pruned.sum(dim=1, keepdim=True) <= k
    below = torch.where(pruned & fit, info.min, keys)
    return torch.where(~pruned & ~fit, info.max, below)


def _lowest(keys: Tensor, k: int) -> Tensor:
    """Mark the first k of each row by (key, index)."""
    size = keys.shape[1]
    if k <= 0 or k >= size:
        return torch.full(keys.shape, k > 0, dtype=torch.bool, device=keys.device)
    if size <= _PAIRWISE:
        return _lowest_by_pairs(keys, k)
    if keys.device.type == "cpu":
        return torch.from_numpy(_lowest_by_partition(keys.numpy(), k))
    return _lowest_by_sort(keys, k)


def _lowest_by_pairs(keys: Tensor, k: int) -> Tensor:
    """Count for each unit how many stand before it; of a tied pair the left one does."""
    columns = keys.unbind(dim=1)
    before = torch.zeros(keys.T.shape, dtype=torch.int8, device=keys.device)
    for right in range(1, len(columns)):
        for left in range(right):
            left_first = columns[left] <= columns[right]
            before[right] += left_first
            before[left] += ~left_first
    return (before < k).T.contiguous()


def _lowest_by_partition(keys: NDArray[np.signedinteger], k: int) -> NDArray[np.bool_]:
    """Find the k-th smallest of each row, take all below it and the first of its ties."""
    threshold = np.partition(keys, k - 1, axis=1)[:, k - 1 : k]
    gone = keys <= threshold
    surplus = np.count_nonzero(gone, axis=1) - k
    for row in np.flatnonzero(surplus):
        ties = np.flatnonzero(keys[row] == threshold[row, 0])
        gone[row, ties[len(ties) - surplus[row] :]] = False
    return gone


def _lowest_by_sort(keys: Tensor, k: int) -> Tensor:
    """Sort stably on the device; ties stay in the order of their index."""
    order = torch.sort(keys, dim=1, stable=True).indices[:, :k]
    return torch.zeros(keys.shape, dtype=torch.bool, device=keys.device).scatter_(1, order, True)
