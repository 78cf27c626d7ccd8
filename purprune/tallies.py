"""Tallies: how many keys are in each of many buckets, counted by several threads."""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Array = Any  # numpy's on the CPU, where it is faster, else torch's


class Buckets(NamedTuple):
    """Neighbouring intervals of keys, each ``2**shift`` wide."""

    first: int
    number: int
    shift: int

    @property
    def start(self) -> int:
        """The lowest key of the first bucket."""
        return self.first << self.shift

    @property
    def stop(self) -> int:
        """The key behind the last bucket."""
        return (self.first + self.number) << self.shift


class Tally:
    """Counts of NaN, of keys before the buckets, and in each bucket.

    Keys wait until there are as many as buckets, and are counted at once.
    """

    def __init__(self, buckets: Buckets) -> None:
        """Begin at zero."""
        self._counts = np.zeros(2 + buckets.number, dtype=np.int64)
        self._waiting: list[Array] = []
        self._waiting_keys = 0
        self._lock = threading.Lock()

    def add(self, nan: int, below: int, inside: Array) -> None:
        """Count a chunk; ``inside`` says in which bucket, from 0, each key is."""
        number = len(self._counts) - 2
        enough = len(inside) >= number  # which other threads need not wait for
        found = _histogram(inside, number) if enough else None
        with self._lock:
            self._counts[:2] += (nan, below)
            if found is not None:
                self._counts[2:] += found
                return
            self._waiting.append(inside)
            self._waiting_keys += len(inside)
            if self._waiting_keys >= number:
                self._settle()

    def counts(self) -> Tensor:
        """Return the counts so far as one tensor on the CPU."""
        self._settle()
        return torch.from_numpy(self._counts)

    def _settle(self) -> None:
        waiting, self._waiting, self._waiting_keys = self._waiting, [], 0
        if waiting:
            together = torch.cat if isinstance(waiting[0], Tensor) else np.concatenate
            self._counts[2:] += _histogram(together(waiting), len(self._counts) - 2)


def _histogram(inside: Array, number: int) -> Array:
    if isinstance(inside, Tensor):
        return torch.bincount(inside, minlength=number).cpu().numpy()
    return np.bincount(inside, minlength=number)
