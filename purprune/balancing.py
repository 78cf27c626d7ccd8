"""Balancing: how many units each tensor of a global group loses, where there are limits or scales.

Without them one threshold decides, and :mod:`purprune.counting` finds it. A tensor with limits
loses ``min(max(units below the threshold, its least), its most)``, at the threshold where the total
is exact: in rounds, tensors that are beyond a limit are set to it, and the others are counted
again. Scores that are divided by what is usual in their tensor say how many of them go; which ones
go, the scores themselves say, so that no rounding of a quotient changes an order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from purprune.allocations import apportion
from purprune.counting import Group, count_down, keep
from purprune.groups import GlobalGroup, Scale
from purprune.groups import Group as Grouped
from purprune.ranking import count
from purprune.units import unit_scores

Limits = list[tuple[int, int]]
"""For each tensor the least and the most units that go."""

_RUN = 1 << 12
"""Terms that are summed at a time, in the fixed order of units."""


def limits_of(
    group: Grouped, units: Sequence[int], sparsity: Fraction, held: Sequence[int]
) -> Limits:
    """Return for each tensor how many units go at least, and at most.

    In a global group the least is its part of ``floor(all units * min(min_sparsity, sparsity))``,
    divided in proportion to units, so that masks nest as the sparsity grows; the most is
    ``floor(units * max_sparsity)``. What floors hold, ``held`` units, goes anyway.
    """
    if not isinstance(group, GlobalGroup):
        return [*zip(held, units, strict=True)]
    most = [count(n, group.max_sparsity) for n in units]
    floor = min(count(sum(units), group.min_sparsity), count(sum(units), sparsity))
    least = [max(own, n) for own, n in zip(apportion(floor, units, most), held, strict=True)]
    return [(low, max(low, high)) for low, high in zip(least, most, strict=True)]


def balanced(group: Group, limits: Limits) -> list[int]:
    """Return how many units each member loses: ``group.k`` in all, or what limits ask at least.

    All parts are here, one for each member.

    Raises:
        NaNError: a score is NaN. The message has no name.
    """
    found = [low for low, _ in limits]
    rest, left = list(range(len(limits))), max(group.k, sum(found))
    while left > sum(found[i] for i in rest):
        below = dict(zip(rest, _below_one_threshold(group, rest, left), strict=True))
        within = {i: min(max(n, limits[i][0]), limits[i][1]) for i, n in below.items()}
        excess = sum(within.values()) - left
        for i, n in below.items():
            low, high = limits[i]
            if n <= low if excess > 0 else n >= high if excess < 0 else True:
                found[i] = within[i]
                left -= within[i]
                rest.remove(i)
    return found


def _below_one_threshold(group: Group, members: Sequence[int], k: int) -> list[int]:
    """Return how many units each of some members loses, when these lose ``k`` in all."""
    parts = [group.parts[i] for i in members]
    trial = group._replace(parts=parts, sizes=tuple(group.sizes[i] for i in members), k=k)
    (outcome,) = count_down([trial])
    below, ties = [], outcome.ties
    for part in parts:
        stay, gone = keep(trial, part, outcome, ties)
        ties -= gone
        below.append(stay.numel() - int(torch.count_nonzero(stay)))
    return below


def scaled(group: Group, scale: Scale, squared: bool, wide: torch.dtype) -> Group:
    """Return the group with scores that are divided by their tensor's scale.

    Args:
        group: the group.
        scale: what is 1 in every tensor then: ``"l2"`` the L2 norm of the scores of its units,
            ``"mean"`` their mean, ``"max"`` the largest; of absolute values, without infinities. A
            tensor of zeros stays as it is.
        squared: whether the scores are squares, of which the roots are meant.
        wide: the float to calculate in.
    """
    parts = [
        part._replace(scores=_scaled(part.scores, scale, squared, wide)) for part in group.parts
    ]
    return group._replace(parts=parts, dtype=wide, among=None)


def _scaled(
    scores: Callable[[], Tensor], scale: Scale, squared: bool, wide: torch.dtype
) -> Callable[[], Tensor]:
    def plain() -> Tensor:
        found = scores().to(wide)
        return found.sqrt() if squared else found

    @functools.cache
    def divisors() -> tuple[float, float]:
        return _divisors(plain(), scale)

    def divided() -> Tensor:
        found = plain()
        for divisor in divisors():
            found = _over(found, divisor)
        return found

    return divided


def _divisors(scores: Tensor, scale: Scale) -> tuple[float, float]:
    """Return the largest score, and the scale of scores that were divided by it."""
    sizes = torch.where(scores.isfinite(), scores, 0).abs_().reshape(-1)
    largest = float(sizes.amax()) if sizes.numel() else 0.0
    if not largest or scale == "max":
        return largest or 1.0, 1.0
    sizes = _over(sizes, largest)
    if scale == "mean":
        return largest, _sum(sizes) / sizes.numel()
    return largest, math.sqrt(_sum(sizes.square_()))


def _over(terms: Tensor, divisor: float) -> Tensor:
    """Divide by a tensor: a number's reciprocal is what CUDA multiplies by, which rounds twice."""
    return terms / torch.full((), divisor, dtype=terms.dtype, device=terms.device)


def _sum(terms: Tensor) -> float:
    while terms.numel() > 1:
        terms = unit_scores(terms, (_RUN,), "sum")
    return float(terms)
