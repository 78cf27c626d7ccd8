"""Envelopes: curves of losses made convex, and the cheapest division of a total along them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor

from purprune.config import PruneConfig
from purprune.errors import ConfigError, near_misses
from purprune.rules import Rule
from purprune.sensitivities import Sensitivity
from purprune.targets import Quota, divided
from purprune.values import exact

Point = tuple[Fraction, Fraction]
"""A sparsity, and how much the loss grows."""


def allocate_by_sensitivity(
    curves: Sensitivity,
    params: Mapping[str, Tensor],
    cfg: PruneConfig | Rule | Mapping[str, Any],
) -> PruneConfig:
    """Return a config with the targets at which the measured losses grow least, at the same total.

    Minimises ``sum(f[name](pruned[name] / units[name]))`` where of all tensors with equal rules
    exactly ``floor(units * target)`` units go. f is a tensor's increase of the loss, made rising
    and convex: first the nearest curve that never falls (least squares), from the dense loss on,
    then its lower convex hull, linear in between. For such curves the cheapest unit first is the
    minimum; what costs the same goes by the order of ``params``. Everything is counted in
    fractions. No tensor is pruned beyond the largest level that was measured.

    That the increases of tensors add up is an assumption, and at high sparsities a rough one.

    With rows as groups counts are multiples of the rows, and with N:M each tensor gets its own
    ``zeros``; where tensors differ in these multiples, the counts are whole ones near the minimum.

    Args:
        curves: what :func:`sensitivity` measured of every tensor that a rule is for.
        params: flat mapping of dotted names to tensors; meta tensors will do.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict. Schedule, score and
            pattern stay; an initial sparsity is scaled as the target is.

    Raises:
        ConfigError: a tensor has no curve, a pattern has ``scope="global"``, or a total can't be
            met; says what can.

    >>> import torch
    >>> params = {"a": torch.empty(10, 10), "b": torch.empty(10, 10)}
    >>> curves = Sensitivity(0.0, [0.5, 1], {"a": [0.1, 0.3], "b": [0.2, 4.0]})
    >>> found = allocate_by_sensitivity(curves, params, Rule(0.6))
    >>> {name: str(rule.target) for name, rule in found.rules.items()}
    {'a': '1', 'b': '1/5'}
    """

    def divide(family: Sequence[Quota], total: int) -> tuple[list[int], list[int]]:
        runs = [_runs(envelope(curves, q.name), q) for q in family]
        caps = [sum(run.units for run in of_one) for of_one in runs]
        if total > sum(caps):
            raise ConfigError(
                f"Expected levels that reach {total:,} units of {', '.join(q.name for q in family)}"
                f"; up to {float(curves.levels[-1]):g} of each are {sum(caps):,}. Measure higher "
                f"levels, or lower the target."
            )
        return _cheapest(runs, total), caps

    return divided(params, cfg, divide)


class Run(NamedTuple):
    """Units of one tensor that cost the same each."""

    cost: Fraction
    units: int


def _cheapest(runs: Sequence[Sequence[Run]], total: int) -> list[int]:
    """Return how many units of each tensor go: the cheapest first, ties by order."""
    order = sorted((run.cost, i, run.units) for i, of_one in enumerate(runs) for run in of_one)
    counts = [0] * len(runs)
    for _, i, units in order:
        taken = min(units, total)
        counts[i] += taken
        total -= taken
    return counts


def _runs(points: Sequence[Point], quota: Quota) -> list[Run]:
    """Cut a convex curve where its slope changes, at whole steps; a step across a bend is one."""
    last = math.floor(points[-1][0] * quota.steps)
    bends = {f(s * quota.steps) for s, _ in points for f in (math.floor, math.ceil)}
    at = sorted(n for n in bends if n <= last)
    heights = [_height(points, Fraction(n, quota.steps)) if n else points[0][1] for n in at]
    return [
        Run((high - low) / ((b - a) * quota.size), (b - a) * quota.size)
        for (a, b), (low, high) in zip(
            itertools.pairwise(at), itertools.pairwise(heights), strict=True
        )
    ]


def _height(points: Sequence[Point], sparsity: Fraction) -> Fraction:
    """Interpolate."""
    (a, low), (b, high) = next(
        pair for pair in itertools.pairwise(points) if sparsity <= pair[1][0]
    )
    return low + (high - low) * (sparsity - a) / (b - a)


def envelope(curves: Sensitivity, name: str) -> list[Point]:
    """Return the corners of a tensor's rising, convex curve, from sparsity 0 on."""
    if name not in curves.losses:
        raise ConfigError(
            f"Expected a curve for {name!r}; there is none.{near_misses(name, curves.losses)} "
            f"Measure with the same config."
        )
    measured = zip(map(exact, curves.levels), curves.losses[name].tolist(), strict=True)
    points = [(s, Fraction(loss) - Fraction(curves.dense)) for s, loss in measured if s]
    levels, increases = zip((Fraction(0), Fraction(0)), *points, strict=True)
    return _hull([*zip(levels, _rising(increases), strict=True)])


def _rising(values: Sequence[Fraction]) -> list[Fraction]:
    """Return the nearest values that never fall: neighbours that do are pooled to their mean."""
    pools: list[tuple[Fraction, int]] = []
    for value in values:
        total, n = value, 1
        while pools and pools[-1][0] * n >= total * pools[-1][1]:
            before, k = pools.pop()
            total, n = total + before, n + k
        pools.append((total, n))
    return [total / n for total, n in pools for _ in range(n)]


def _hull(points: Sequence[Point]) -> list[Point]:
    """Return the corners of the lower convex hull of points that go to the right."""
    corners: list[Point] = []
    for x, y in points:
        while len(corners) > 1:
            (x0, y0), (x1, y1) = corners[-2:]
            if (y1 - y0) * (x - x0) < (y - y0) * (x1 - x0):
                break
            corners.pop()
        corners.append((x, y))
    return corners
