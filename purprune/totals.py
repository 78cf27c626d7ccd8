"""Totals: which tensors share one, and the sparsity that each tensor has at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from purprune.allocations import kept_units
from purprune.config import Rule
from purprune.errors import ConfigError
from purprune.ranking import count
from purprune.scoring import unit_layout
from purprune.units import grid_shape


def sharing(rules: Mapping[str, Rule]) -> list[tuple[str, ...]]:
    """Return the names that share a total: those whose rules are equal, and say that they share."""
    groups: list[tuple[Rule, list[str]]] = []
    for name, rule in rules.items():
        if rule.is_global or rule.is_divided:
            same = next((names for known, names in groups if known is rule or known == rule), None)
            if same is None:
                groups.append((rule, same := []))
            same.append(name)
    return [tuple(names) for _, names in groups]


def sparsities_at(
    rules: Mapping[str, Rule], params: Mapping[str, Tensor], step: int | None
) -> dict[str, Fraction]:
    """Return the sparsity of units in force for every name; no value is read.

    Of tensors in a global group it is that of all of them. Where a budget divides a total, it is
    ``pruned / units`` of each tensor, so that ``floor(units * sparsity)`` gives the count back.

    Args:
        rules: the rules by name: all that are equal, since they share.
        params: tensors with the whole shapes; meta tensors will do.
        step: the step; None means the end of the schedules.

    Raises:
        ConfigError: a schedule says no sparsity, or has no end that is known; a pattern does not
            fit its tensor. Names the parameter.
    """
    first = {id(rule): (name, rule) for name, rule in reversed(list(rules.items()))}
    totals = {key: total_at(name, rule, step) for key, (name, rule) in first.items()}
    found = {name: totals[id(rule)] for name, rule in rules.items()}
    for names in sharing(rules):
        if rules[names[0]].is_divided:
            found.update(_shares(names, rules[names[0]], found[names[0]], params))
    return found


def total_at(name: str, rule: Rule, step: int | None) -> Fraction:
    """Return the sparsity that a rule has in force; errors name the parameter that asks."""
    at = rule.last_step if step is None else step
    if at is None:
        raise ConfigError(
            f"Expected a step for {name!r}, since its schedule is a callable, of which the end "
            f"is not known; got None."
        )
    try:
        return rule.sparsity_at(at)
    except ConfigError as error:
        raise ConfigError(f"{name!r}: {error}") from None


def _shares(
    names: Sequence[str], rule: Rule, sparsity: Fraction, params: Mapping[str, Tensor]
) -> dict[str, Fraction]:
    shapes = tuple(tuple(params[name].shape) for name in names)
    units = tuple(_units(name, rule, params[name].shape) for name in names)
    kept = sum(units) - count(sum(units), sparsity)
    return {
        name: Fraction(n - seats, n) if n else Fraction(0)
        for name, n, seats in zip(
            names, units, kept_units(rule.budget, kept, shapes, units), strict=True
        )
    }


def _units(name: str, rule: Rule, shape: torch.Size) -> int:
    block, _ = unit_layout(name, rule, shape)
    return math.prod(grid_shape(block, shape))
