"""Scratch: memory of a thread that is used again, since fresh pages cost more than arithmetic."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT = 1 << 22
"""Bytes up to which memory is kept between calls."""


class _Held(threading.local):
    def __init__(self) -> None:
        self.bytes: dict[str, NDArray[np.uint8]] = {}


_held = _Held()


def scratch(use: str, size: int, dtype: Any) -> NDArray[Any]:
    """Return memory for so many items: this thread's own, whose content the next call takes over.

    Args:
        use: what for. Two uses never share memory; one use has the same memory again and again.
        size: items; with more than 4 MB nothing is kept.
        dtype: numpy's dtype of an item.
    """
    dtype = np.dtype(dtype)
    needed = size * dtype.itemsize
    if needed > _KEPT:
        return np.empty(size, dtype)
    held = _held.bytes.get(use)
    if held is None or held.size < needed:
        held = _held.bytes[use] = np.empty(needed, np.uint8)
    return held[:needed].view(dtype)
