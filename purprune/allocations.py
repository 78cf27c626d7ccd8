"""Allocations: how a total is divided among tensors, in whole units and exactly.

A budget says in which proportions tensors with equal rules keep units of one total.
:func:`apportion` is a divisor method, that of Webster and Sainte-Lague: seats are given one after
the other, each to the tensor with the largest ``weight / (2 * seats so far + 1)``. A larger total
therefore never takes a seat from anybody, so that masks nest as a sparsity grows.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import field
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Strict, Tag

from purprune.errors import ConfigError, near_misses
from purprune.values import value


@value
class OwnTarget:
    """No total: the rule's sparsity is that of every tensor, and of every group in it."""

    kind: Literal["own"] = field(default="own", repr=False, kw_only=True)

    def weight(self, shape: Sequence[int], units: int) -> int:
        """Return in which proportion a tensor of so many units keeps them."""
        return units


@value
class Uniform:
    """Units are kept in proportion to how many there are: one sparsity, and an exact total.

    >>> Uniform().weight((8, 4), units=32)
    32
    """

    kind: Literal["uniform"] = field(default="uniform", repr=False, kw_only=True)

    def weight(self, shape: Sequence[int], units: int) -> int:
        """Return in which proportion a tensor of so many units keeps them."""
        return units


@value
class ErdosRenyi:
    """Small and narrow tensors keep more: each a share of its units in proportion to its density.

    ``density = eps * sum(shape) / prod(shape)``, at most 1; one eps for all, such that the total is
    exact. With ``kernel=False`` the shape is that of the first two dims, whatever the kernel. A
    vector has ``n / n``, the highest density that there is for more than one channel.

    Source: Mocanu et al., "Scalable training of artificial neural networks with adaptive sparse
    connectivity", 2018 (arXiv:1707.04780); with kernels, Evci et al., "Rigging the lottery", 2020
    (arXiv:1911.11134).

    >>> ErdosRenyi().weight((8, 4, 3, 3), units=288)
    Fraction(18, 1)
    """

    kernel: Annotated[bool, Strict()] = True
    kind: Literal["erdos_renyi"] = field(default="erdos_renyi", repr=False, kw_only=True)

    def weight(self, shape: Sequence[int], units: int) -> Fraction:
        """Return in which proportion a tensor of so many units keeps them."""
        sides = (shape if self.kernel else shape[:2]) or (1,)
        return Fraction(units * sum(sides), math.prod(sides)) if units else Fraction(0)


_BUDGETS: dict[str, dict[str, Any]] = {
    "own": {"kind": "own"},
    "uniform": {"kind": "uniform"},
    "er": {"kind": "erdos_renyi", "kernel": False},
    "erk": {"kind": "erdos_renyi", "kernel": True},
}


def _named(budget: Any) -> Any:
    if not isinstance(budget, str):
        return budget
    if budget not in _BUDGETS:
        raise ValueError(
            f"expected one of {', '.join(map(repr, _BUDGETS))} as budget; got {budget!r}."
            f"{near_misses(budget, _BUDGETS)}"
        )
    return _BUDGETS[budget]


def _kind_of_budget(budget: Any) -> str | None:
    if isinstance(budget, dict):
        return str(budget.get("kind"))
    return budget.kind if isinstance(budget, OwnTarget | Uniform | ErdosRenyi) else None


Budget = Annotated[
    Annotated[OwnTarget, Tag("own")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[ErdosRenyi, Tag("erdos_renyi")],
    Discriminator(
        _kind_of_budget,
        custom_error_type="budget",
        custom_error_message="one of 'own', 'uniform', 'er', 'erk', or a dict like "
        "{'kind': 'erdos_renyi', 'kernel': False}",
    ),
    BeforeValidator(
        _named, json_schema_input_type=Literal["own", "uniform", "er", "erk"] | dict[str, Any]
    ),
]
"""What a rule accepts as its budget."""


@functools.lru_cache(maxsize=256)  # plans, masks and reports of one step ask alike
def kept_units(
    budget: OwnTarget | Uniform | ErdosRenyi,
    total: int,
    shapes: tuple[tuple[int, ...], ...],
    units: tuple[int, ...],
) -> tuple[int, ...]:
    """Return how many units each of some tensors keeps, ``total`` in all."""
    weights = [budget.weight(shape, n) for shape, n in zip(shapes, units, strict=True)]
    return tuple(apportion(total, weights, units))


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
    shares = _whole([w if n == 1 else Fraction(w, n) for w, n in zip(weights, sizes, strict=True)])
    rooms = [cap // size if w else 0 for w, cap, size in zip(shares, caps, sizes, strict=True)]
    most = _sum_of(rooms, sizes)
    if not 0 <= total <= most:
        raise ConfigError(f"Expected a total in [0, {most}], which the caps allow; got {total}.")
    # Rounding gives at most half a quantum too much to each: start as far below the total.
    level = _level(max(0, 2 * total - sum(sizes)), shares, rooms, sizes)
    seats = [min(room, _rounded(level, w)) for w, room in zip(shares, rooms, strict=True)]
    _give(total, seats, shares, rooms, sizes)
    return [number * size for number, size in zip(seats, sizes, strict=True)]


def _whole(shares: Sequence[int | Fraction]) -> list[int]:
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
