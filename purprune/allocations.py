"""Allocations: how a total is divided among tensors, in whole units and exactly.

:func:`apportion` is a divisor method, that of Webster and Sainte-Lague: seats are given one after
the other, each to the tensor with the largest ``weight / (2 * seats so far + 1)``. A larger total
therefore never takes a seat from anybody, so that masks nest as a sparsity grows.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from fractions import Fraction

from purprune.errors import ConfigError


def apportion(
    total: int,
    weights: Sequence[int | Fraction],
    caps: Sequence[int],
    *,
    quanta: Sequence[int] | None = None,
) -> list[int]:
    """Divide ``total`` seats in proportion to ``weights``, nobody above its cap.

    ``seats = min(cap, floor(level * weight + 1/2))`` at the level where the sum is the total; of
    several that are due at the same level the first are served. What a full one can't take goes to
    the others in proportion. Weight 0 takes nothing.

    The sum is the total, exactly. As the total grows, nobody loses a seat. Each of n has at most
    ``max(1, n - 1) / 2`` seats more or less than its real share ``min(cap, level * weight)``.

    Args:
        total: how many seats there are. They are not given one by one: a billion takes as long as
            a hundred.
        weights: exact numbers >= 0.
        caps: how many seats each takes at most.
        quanta: the seats of each come in multiples of this, such as one for every row of a tensor.
            The totals are then those that giving one quantum after the other passes by, and at most
            ``sum(quanta) / min(quanta)`` of them are given one by one.

    Raises:
        ConfigError: the caps or the quanta do not allow the total; says what they allow.

    Source: Webster's method, in Balinski and Young, "Fair Representation", 1982.

    >>> apportion(12, [5, 3, 1], [4, 10, 10])
    [4, 6, 2]
    >>> apportion(12, [1, 1], [20, 20], quanta=[4, 8])
    [4, 8]
    """
    sizes = [1] * len(caps) if quanta is None else [*quanta]
    shares = _whole([Fraction(w, size) for w, size in zip(weights, sizes, strict=True)])
    rooms = [cap // size if w else 0 for w, cap, size in zip(shares, caps, sizes, strict=True)]
    most = _sum_of(rooms, sizes)
    if not 0 <= total <= most:
        raise ConfigError(f"Expected a total in [0, {most}], which the caps allow; got {total}.")
    # Rounding gives at most half a quantum too much to each: start as far below the total.
    level = _level(max(0, 2 * total - sum(sizes)), shares, rooms, sizes)
    seats = [min(room, _rounded(level, w)) for w, room in zip(shares, rooms, strict=True)]
    _give(total, seats, shares, rooms, sizes)
    return [number * size for number, size in zip(seats, sizes, strict=True)]


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """Return integers in the same proportions."""
    if any(share < 0 for share in shares):
        raise ConfigError(f"Expected weights >= 0; got {min(shares)}.")
    denominator = math.lcm(*(share.denominator for share in shares))
    return [share.numerator * (denominator // share.denominator) for share in shares]


def _sum_of(seats: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(number * size for number, size in zip(seats, sizes, strict=True))


def _rounded(level: Fraction, share: int) -> int:
    return (2 * level.numerator * share + level.denominator) // (2 * level.denominator)


def _level(
    twice: int, shares: Sequence[int], rooms: Sequence[int], sizes: Sequence[int]
) -> Fraction:
    """Return the level at which ``sum(size * min(room, level * share))`` is half of ``twice``."""
    level, rest = Fraction(0), [i for i, share in enumerate(shares) if share]
    while rest:
        level = Fraction(twice, 2 * sum(shares[i] * sizes[i] for i in rest))
        up, down = level.numerator, level.denominator
        full = {i for i in rest if up * shares[i] >= down * rooms[i]}
        if not full:
            break
        twice -= 2 * sum(rooms[i] * sizes[i] for i in full)
        rest = [i for i in rest if i not in full]
    return level


def _give(
    total: int,
    seats: list[int],
    shares: Sequence[int],
    rooms: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """Give what is left, one quantum after the other, each to the one that is next."""

    def turn(i: int) -> tuple[float, Fraction, int]:
        odd = 2 * seats[i] + 1
        return odd / shares[i], Fraction(odd, shares[i]), i  # rounding keeps the order of fractions

    left = total - _sum_of(seats, sizes)
    turns = [turn(i) for i, room in enumerate(rooms) if seats[i] < room]
    heapq.heapify(turns)
    while left:
        *_, i = turns[0]
        if sizes[i] > left:
            raise ConfigError(
                f"Expected a total that whole quanta reach; got {total}. The nearest ones are "
                f"{total - left} and {total - left + sizes[i]}."
            )
        seats[i] += 1
        left -= sizes[i]
        if seats[i] < rooms[i]:
            heapq.heapreplace(turns, turn(i))
        else:
            heapq.heappop(turns)
