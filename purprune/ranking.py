"""Ranking: the one place that knows order, ties, NaN and counts.

In every group exactly ``k = floor(units * sparsity)`` units are pruned: the first k by (score, flat
index), which is a stable sort. Scores are read as integers that order alike (*keys*): the bits of
an IEEE float, with the sign taken off and put back as a two's complement sign, order like the
float, and -0 equals 0. The first k are found without a sort, on the CPU by
:mod:`purprune.selecting`, on other devices by :mod:`purprune.bisecting`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from purprune.bisecting import all_but_lowest
from purprune.errors import NaNError
from purprune.groups import Layout
from purprune.keys import KeyMaker, NotANumberError
from purprune.selecting import Span
from purprune.selecting import keep_all_but_lowest as keep_all_but_lowest_
from purprune.values import exact

Array = Any  # numpy's on the CPU, torch's elsewhere

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers as which entries of so many bytes are read."""
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BITS = {dtype: WORDS[dtype.itemsize] for dtype in _FLOATS}
_NUMPY = {torch.float32: (np.float32, np.int32), torch.float64: (np.float64, np.int64)}
_INFINITY = {
    dtype: int(torch.tensor(math.inf, dtype=dtype).view(bits)) for dtype, bits in _BITS.items()
}


def count(units: int, sparsity: float | Fraction) -> int:
    """Return ``floor(units * sparsity)``, of the decimal that was written.

    >>> count(100, 0.29), count(95, 0.4), count(2**53 + 1, 0.5)
    (29, 38, 4503599627370496)
    """
    s = exact(sparsity)
    return units * s.numerator // s.denominator


def refuse_nan(tensor: Tensor, what: str) -> None:
    """Raise a NaNError that names ``what`` holds NaN, and how many."""
    if bad := int(tensor.isnan().sum()) if tensor.is_floating_point() else 0:
        raise nan_error(what, bad, tensor.numel())


def nan_error(what: str, bad: int, entries: int) -> NaNError:
    """Return the error that names ``what`` holds NaN, and how many."""
    return NaNError(
        f"Expected numbers in {what}; got {bad} NaN of {entries} entries. NaN has no rank: find "
        f"where the training diverged, or replace them before pruning."
    )


def keep_all_but_lowest(
    scores: Tensor,
    absolute: bool,
    layout: Layout,
    sparsity: Fraction,
    prev: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Return which units to keep: all but the first ``k`` by (score, flat index) in each group.

    With a floor they are ``max(k, what the floor prunes there)``.

    Args:
        scores: the unit grid, one score per unit.
        absolute: rank ``|scores|``, without making them.
        layout: how the grid divides into groups.
        sparsity: the fraction of units to prune in every group.
        prev: the units kept so far; the others go first, whatever their score.
        floor: the units that may be kept; the others go, and before those of ``prev``.

    Returns:
        A bool tensor of the grid's shape and device, True = keep.

    Raises:
        NaNError: a score is NaN. The message has no name; callers know it.
    """
    if floor is None:
        return _keep(scores, absolute, layout, sparsity, prev)
    before = floor if prev is None else prev & floor
    keep = _keep(scores, absolute, layout, sparsity, before)
    if bool((keep & ~before).any()):  # fewer go than before: which of them come back?
        last = _with_highest(scores, absolute, before)
        first = _keep(last, False, layout, sparsity, floor)
        keep = _keep(scores, absolute, layout, sparsity, before | first)
    return keep & floor


def _with_highest(scores: Tensor, absolute: bool, where: Tensor) -> Tensor:
    """Return integers that order like the scores, and in some places one above infinity."""
    bits, infinity = _as_integers(scores.detach())
    keys = _keys(bits, KeyMaker(absolute, infinity)).to(torch.int64)
    return keys.masked_fill(where, torch.iinfo(torch.int64).max - 1)


def _keep(
    scores: Tensor, absolute: bool, layout: Layout, sparsity: Fraction, prev: Tensor | None
) -> Tensor:
    bits, infinity = _as_integers(scores.detach())
    columns = math.prod(scores.shape[d] for d in layout.order[layout.lead :])
    spans = [Span(*span, count(span[2], sparsity)) for span in layout.spans(columns)]
    keep = _by_selecting if bits.device.type == "cpu" else _by_bisecting
    return keep(bits, layout, spans, prev, KeyMaker(absolute, infinity))


def _as_integers(scores: Tensor) -> tuple[Tensor, int | None]:
    """Return the bits of floats as integers, and those of infinity; integers as they are."""
    if scores.is_floating_point():
        scores = scores if scores.dtype in _BITS else scores.float()
        return scores.view(_BITS[scores.dtype]), _INFINITY[scores.dtype]
    refuse_extremes(scores)
    return scores.to(torch.int64), None


def refuse_extremes(scores: Tensor) -> None:
    """Raise when a score is an integer that keys need for themselves."""
    if scores.dtype == torch.int64:
        info = torch.iinfo(torch.int64)
        if bool(((scores == info.min) | (scores == info.max)).any()):
            raise ValueError("Expected int64 scores within +-(2**63 - 2); got an extreme value.")


def _by_selecting(
    bits: Tensor, layout: Layout, spans: list[Span], prev: Tensor | None, make: KeyMaker
) -> Tensor:
    """Select on the CPU, in the memory of the tensors."""
    bits = bits if layout.lead else bits.contiguous()
    # numpy asks for huge pages; the page faults of a fresh mask would cost as much as its making.
    keep = np.empty(bits.shape, dtype=np.bool_)
    before = None if prev is None else prev.numpy().transpose(layout.order)
    scores, into = bits.numpy().transpose(layout.order), keep.transpose(layout.order)
    try:
        keep_all_but_lowest_(scores, into, before, layout.lead, spans, make)
    except NotANumberError:
        raise NaNError("Expected numbers; got NaN.") from None
    return torch.from_numpy(keep)


def _by_bisecting(
    bits: Tensor, layout: Layout, spans: list[Span], prev: Tensor | None, make: KeyMaker
) -> Tensor:
    """Select with torch ops, for devices that share no memory with numpy."""
    highest = torch.iinfo(bits.dtype).max - 1 if make.infinity is None else make.infinity
    among = _up_to(highest, make.absolute)
    before = None if prev is None else prev.permute(layout.order)
    moved = bits.permute(layout.order)
    keep = all_but_lowest(moved, before, layout.lead, spans, lambda part: _keys(part, make), among)
    back = sorted(range(len(layout.order)), key=layout.order.__getitem__)
    return keep.permute(back).contiguous()


def _keys(bits: Tensor, make: KeyMaker) -> Tensor:
    """Do with torch what KeyMaker does with numpy."""
    if make.infinity is None:
        return bits.abs() if make.absolute else bits
    keys = bits & torch.iinfo(bits.dtype).max
    if keys.numel() and int(keys.max()) > make.infinity:
        raise NaNError("Expected numbers; got NaN.")
    if not make.absolute:  # times 1 or -1, of which each takes a byte
        keys *= (bits >= 0).view(torch.int8).mul_(2).sub_(1)
    return keys


def key_range(dtype: torch.dtype, absolute: bool) -> tuple[int, int]:
    """Return the lowest and the highest key of scores that are ranked in ``dtype``."""
    return _up_to(_INFINITY.get(dtype, torch.iinfo(torch.int64).max - 1), absolute)


def _up_to(highest: int, absolute: bool) -> tuple[int, int]:
    return (0 if absolute else -highest), highest


def keys_of(
    scores: Tensor, dtype: torch.dtype, absolute: bool, scratch: Array | None
) -> tuple[Array, int]:
    """Return the keys of scores, ranked in ``dtype``, and how many are NaN and have none.

    On the CPU the keys are numpy's, in the scratch; elsewhere they are torch's. Where some scores
    are NaN they mean nothing. ``dtype`` is one of the four floats that hold the scores exactly, or
    int64.
    """
    make = KeyMaker(absolute, _INFINITY.get(dtype))
    try:
        if scratch is None:
            return _keys_by_torch(scores, dtype, make), 0
        return make(_upcast(scores, dtype), scratch[: scores.numel()]), 0
    except (NaNError, NotANumberError):
        return np.zeros(0, np.int64), int(scores.isnan().sum())


def _keys_by_torch(scores: Tensor, dtype: torch.dtype, make: KeyMaker) -> Tensor:
    keys = _keys(_as_integers(scores.to(dtype))[0], make)
    return keys.int() if keys.itemsize == 2 else keys  # 16 bits do not hold every bound


def _upcast(scores: Tensor, dtype: torch.dtype) -> NDArray[np.signedinteger[Any]]:
    """Return the bits of scores in a wider float; by numpy, which makes no threads of its own."""
    if scores.dtype == dtype or dtype not in _BITS:
        return np.asarray(_as_integers(scores)[0].numpy())
    if scores.dtype == torch.bfloat16:  # the upper half of a float32
        floats: Any = np.left_shift(scores.view(torch.int16).numpy(), 16, dtype=np.int32)
        floats = floats.view(np.float32)
    else:
        floats = (scores.float() if scores.itemsize == 1 else scores).numpy()
    wide, word = _NUMPY[dtype]
    return np.asarray(floats.astype(wide, copy=False).view(word))


def widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the float in which scores of all these dtypes are ranked as they are."""
    found = {dtype if dtype in _BITS else torch.float32 for dtype in dtypes}
    if len(found) > 1:
        found |= {torch.float32}  # neither 16-bit float holds the other
    return max(found, key=lambda dtype: dtype.itemsize, default=torch.float32)
