"""Factors per channel that may lie between a torch weight and what a converter stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RECOGNISED", "scalings"]

Array = NDArray[Any]

#: A damaged weight is still recognised while this share of its entries fits.
RECOGNISED = 0.9
# A free factor fits one survivor exactly, whatever it is; the others are the evidence.
_SURVIVORS_PER_FACTOR = 4


def scalings(
    weight: Array, stored: Array, lossy: bool, scales: Mapping[str, Array]
) -> Iterator[tuple[str | None, Array]]:
    """Factors per output channel that could lead from a weight to a stored tensor.

    First the model's own batch norms whose factors fit the largest entries of nine channels in
    ten; then, under the name None, factors read off those entries. A quantizer would blur these,
    and channels of fewer than four survivors on average would fit anything; neither is tried. A
    transposed convolution has its output channels along dim 1, once per group of input channels.
    """
    if weight.ndim < 2:
        return
    rows, columns = _by_row(weight, stored), _by_column(weight, stored, 1)
    for axis, ratio in ((0, rows), (1, columns[:1])):
        live = np.any(weight != 0, axis=tuple(i for i in range(weight.ndim) if i != axis))
        for name, scale in scales.items():
            if scale.size != weight.shape[axis]:
                continue
            near = np.isclose(ratio.reshape(-1), scale, rtol=0.25 if lossy else 2e-3, atol=1e-7)
            if np.mean(near[live]) >= RECOGNISED:
                yield name, scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    if lossy:
        return
    survivors = int(np.count_nonzero(weight))
    if survivors >= _SURVIVORS_PER_FACTOR * _live(weight.reshape(weight.shape[0], -1)):
        yield None, rows
    groups = [g for g in range(1, weight.shape[0] + 1) if weight.shape[0] % g == 0]
    for g in groups[:8]:
        if survivors >= _SURVIVORS_PER_FACTOR * _live(_columns(weight, g)):
            yield None, _by_column(weight, stored, g)


def _live(channels: Array) -> int:
    """Rows that hold a survivor."""
    return int(np.count_nonzero(channels.any(axis=1)))


def _ratio(weight: Array, stored: Array) -> Array:
    """Row by row, stored / weight at the largest entry of the weight; 1 for rows of zeros."""
    place = np.abs(weight).argmax(axis=1)[:, None]
    top = np.take_along_axis(weight, place, axis=1)
    low = np.take_along_axis(stored, place, axis=1)
    return np.asarray(np.divide(low, top, out=np.ones_like(top), where=top != 0)[:, 0])


def _by_row(weight: Array, stored: Array) -> Array:
    ratio = _ratio(weight.reshape(weight.shape[0], -1), stored.reshape(weight.shape[0], -1))
    return ratio.reshape([-1] + [1] * (weight.ndim - 1))


def _columns(weight: Array, groups: int) -> Array:
    """One row per group and entry of dim 1."""
    inputs, outputs = weight.shape[:2]
    cut = weight.reshape(groups, inputs // groups, outputs, -1)
    return np.moveaxis(cut, 1, 2).reshape(groups * outputs, -1)


def _by_column(weight: Array, stored: Array, groups: int) -> Array:
    inputs, outputs = weight.shape[:2]
    ratio = _ratio(_columns(weight, groups), _columns(stored, groups)).reshape(groups, 1, outputs)
    spread = np.broadcast_to(ratio, (groups, inputs // groups, outputs))
    return spread.reshape([inputs, outputs] + [1] * (weight.ndim - 2))
