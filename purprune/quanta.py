"""Quanta: whole numbers near real ones, each a multiple of its own quantum, with an exact sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from purprune.errors import ConfigError


def nearest(
    total: int,
    counts: Sequence[int | Fraction],
    caps: Sequence[int],
    quanta: Sequence[int],
) -> list[int]:
    """Return multiples of ``quanta`` near the real ``counts``, none above its cap.

    Their sum is ``total``, and among all such numbers within a few quanta of ``counts`` they have
    the least ``sum((n - count)**2)``. Where there are none so near, the search widens: a total
    that can be reached at all is reached.

    Raises:
        ConfigError: no multiples of the quanta have this sum.

    >>> nearest(26, [13, 13], [100, 100], quanta=[10, 4])
    [10, 16]
    """
    sizes = [quantum // math.gcd(*quanta) for quantum in quanta]
    aims = [Fraction(n) / quantum for n, quantum in zip(counts, quanta, strict=True)]
    rooms = [cap // quantum for cap, quantum in zip(caps, quanta, strict=True)]
    sought, rest = divmod(total, math.gcd(*quanta))
    margin = 1
    while not rest:
        lows = [max(0, min(math.floor(a) - margin, n)) for a, n in zip(aims, rooms, strict=True)]
        highs = [max(0, min(math.ceil(a) + margin, n)) for a, n in zip(aims, rooms, strict=True)]
        found = _search(sought, aims, lows, highs, sizes)
        if found is not None:
            return [n * quantum for n, quantum in zip(found, quanta, strict=True)]
        if not any(lows) and highs == rooms:
            break
        margin *= 4
    raise ConfigError(
        f"Expected a total that multiples of {', '.join(map(str, sorted(set(quanta))))} reach, at "
        f"most {sum(room * q for room, q in zip(rooms, quanta, strict=True)):,}; got {total:,}."
    )


def _search(
    total: int,
    aims: Sequence[Fraction],
    lows: Sequence[int],
    highs: Sequence[int],
    sizes: Sequence[int],
) -> list[int] | None:
    """Find numbers between bounds by dynamic programming over what is left of the total."""
    left = total - sum(low * size for low, size in zip(lows, sizes, strict=True))
    if left < 0:
        return None
    costs = np.full(left + 1, np.inf)
    costs[0] = 0
    tables = []
    for aim, low, high, size in zip(aims, lows, highs, sizes, strict=True):
        deviations = [float((low + k - aim) * size) ** 2 for k in range(high - low + 1)]
        costs, table = _added(costs, deviations, size)
        tables.append(table)
    if not np.isfinite(costs[left]):
        return None
    found = [*lows]
    for i in reversed(range(len(sizes))):
        more = int(tables[i][left])
        found[i] += more
        left -= more * sizes[i]
    return found


def _added(
    costs: NDArray[np.float64], deviations: Sequence[float], size: int
) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """Return the least cost of every sum with one number more, and which number that is."""
    best, table = costs + deviations[0], np.zeros(costs.size, np.int32)
    for more in range(1, min(len(deviations), (costs.size - 1) // size + 1)):
        tried = costs[: costs.size - more * size] + deviations[more]
        better = tried < best[more * size :]
        best[more * size :][better] = tried[better]
        table[more * size :][better] = more
    return best, table
