"""Scratch: memory that a thread uses again, since fresh pages cost more than arithmetic."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

_KEPT = 1 << 22
"""Bytes up to which memory is kept: what the largest chunk of keys takes."""

DEVICE_CHUNK = 1 << 22
"""Entries at a time on devices with memory of their own, where calls cost more than on the CPU."""


class _Free(threading.local):
    def __init__(self) -> None:
        self.blocks: list[NDArray[np.uint8]] = []


_free = _Free()


class scratch:  # noqa: N801
    """Memory for so many items, lent for the length of a ``with``; its content is anything.

    What is lent has one user, so that code which runs in between (a signal's handler) takes other
    memory. A thread keeps as many blocks as it ever had lent at once: three, of up to 4 MB each.

    >>> with scratch(3, np.int16) as keys:
    ...     keys[:] = 7
    ...     int(keys.sum())
    21
    """

    def __init__(self, size: int, dtype: Any) -> None:
        """Ask for so many items of a dtype."""
        self._dtype = np.dtype(dtype)
        self._bytes = size * self._dtype.itemsize

    def __enter__(self) -> NDArray[Any]:
        """Take the block that came back last, or a new one in its place where it is too small."""
        blocks = _free.blocks
        block = blocks.pop() if blocks else None
        if block is None or len(block) < self._bytes:
            block = np.empty(self._bytes, np.uint8)
        self._block = block
        return block[: self._bytes].view(self._dtype)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the block back."""
        if len(self._block) <= _KEPT:
            _free.blocks.append(self._block)
