"""The orders in which a converter may store a torch weight, and hashes that ignore the order."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Layout", "count_nonzero", "fingerprint", "layouts", "same", "splits"]

Array = NDArray[Any]

_CHUNK = 1 << 16


def _mix(bits: Array) -> Array:
    """Scatter bit patterns over 64 bits; zero stays zero."""
    x = bits.astype(np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(29)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0x94D049BB133111EB)
    return x


@functools.cache
def _mixed_halves() -> Array:
    """``_mix`` of every float16, with both zeros at zero."""
    table = _mix(np.arange(1 << 16))
    table[1 << 15] = 0
    return table


def fingerprint(values: Array) -> int:
    """A 64-bit hash of the multiset of nonzero values; zeros, shape and order don't count.

    Equal for a weight and its transpose; different (but for a chance of about 2**-64) as soon as
    one nonzero value differs.

    Args:
        values: float16 or float32, of any shape.

    Example:
        >>> a = np.array([[1.0, 0.0], [2.0, 3.0]], dtype=np.float32)
        >>> fingerprint(a) == fingerprint(a.T), fingerprint(a) == fingerprint(a + a)
        (True, False)
    """
    flat = values.reshape(-1)
    bits = _bits(flat)
    total = 0
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, start + _CHUNK)
        if flat.itemsize == 2:
            mixed = _mixed_halves().take(bits[part])
        else:
            mixed = _mix(bits[part][flat[part] != 0])
        total += int(mixed.sum(dtype=np.uint64))
    return total % (1 << 64)


@dataclass(frozen=True)
class Layout:
    """A reordering: blocks of dim 0 first, then axes.

    Attributes:
        name: what the report calls it.
        blocks: the new order of equal blocks along dim 0; None leaves them.
        axes: the permutation of the axes; None leaves them.
    """

    name: str
    blocks: tuple[int, ...] | None = None
    axes: tuple[int, ...] | None = None

    def apply(self, weight: Array) -> Array:
        """From torch's order to the stored order."""
        if self.blocks is not None:
            parts = np.split(weight, len(self.blocks))
            weight = np.concatenate([parts[i] for i in self.blocks])
        return weight if self.axes is None else weight.transpose(self.axes)

    def undo(self, stored: Array, shape: tuple[int, ...]) -> Array:
        """From the stored order to torch's order, in torch's ``shape``."""
        if self.axes is None:
            weight = stored.reshape(shape)
        else:
            permuted = stored.reshape([shape[axis] for axis in self.axes])
            weight = permuted.transpose(np.argsort(self.axes))
        if self.blocks is not None:
            parts = np.split(weight, len(self.blocks))
            weight = np.concatenate([parts[i] for i in np.argsort(self.blocks)])
        return weight


def layouts(shape: tuple[int, ...]) -> Iterator[Layout]:
    """The layouts worth trying for a weight of this shape, the likely ones first."""
    yield Layout("as is")
    if len(shape) == 2 and shape[0] % 4 == 0:
        yield Layout("LSTM gate order (i, f, o, g)", blocks=(0, 1, 3, 2))
    real = [axis for axis, size in enumerate(shape) if size > 1]
    if len(real) < 2 or len(shape) > 5:
        return
    for order in itertools.permutations(real):
        if order == tuple(real):
            continue
        axes = list(range(len(shape)))
        for place, axis in zip(real, order, strict=True):
            axes[place] = axis
        name = "transposed" if len(real) == 2 else f"axes permuted to {tuple(axes)}"
        yield Layout(name, axes=tuple(axes))


def splits(rows: int) -> Iterator[tuple[str, list[slice]]]:
    """Ways in which converters cut a stacked weight (GRU, attention, LSTM) along dim 0."""
    for name, shares in (
        ("thirds of dim 0", (1, 1, 1)),
        ("quarters of dim 0", (1, 1, 1, 1)),
        ("one third and two thirds of dim 0", (1, 2)),
        ("halves of dim 0", (1, 1)),
    ):
        total = sum(shares)
        if rows % total == 0 and rows:
            ends = [rows // total * n for n in itertools.accumulate(shares)]
            starts = [0, *ends[:-1]]
            yield name, [slice(a, b) for a, b in zip(starts, ends, strict=True)]


def same(weight: Array, stored: Array) -> bool:
    """Whether two tensors hold equal values in the same flat order."""
    if weight.size != stored.size:
        return False
    if not np.array_equal(weight.flat[:512], stored.flat[:512]):
        return False  # the usual case, found without copying
    a, b = weight.reshape(-1), stored.reshape(-1)
    # numpy compares float16 slowly; equal bits are the usual case, and only zeros have two forms.
    return np.array_equal(_bits(a), _bits(b)) or np.array_equal(a, b)


def count_nonzero(values: Array) -> int:
    """Entries that aren't zero; much faster than numpy for float16."""
    if values.dtype == np.float16:
        return int(np.count_nonzero(_bits(values.reshape(-1)) & 0x7FFF))
    return int(np.count_nonzero(values))


def _bits(flat: Array) -> NDArray[np.integer[Any]]:
    """The same memory as unsigned integers."""
    return flat.view(np.dtype(f"u{flat.itemsize}"))
