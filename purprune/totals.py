"""Totals: which tensors share one, and the sparsity that each tensor has at a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from purprune.allocations import kept_units
from purprune.errors import ConfigError
from purprune.groups import GlobalGroup
from purprune.ranking import count
from purprune.rules import Rule
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
    totals: dict[int, Fraction] = {}
    for name, rule in rules.items():
        if id(rule) not in totals:  # most rules are one object for many names
            totals[id(rule)] = total_at(name, rule, step)
    found = {name: totals[id(rule)] for name, rule in rules.items()}
    for names in sharing(rules):
        rule = rules[names[0]]
        if rule.is_divided:
            found.update(_shares(names, rule, found[names[0]], params))
        elif isinstance(rule.pattern.group, GlobalGroup) and rule.pattern.group.is_capped:
            _refuse_beyond_caps(names, rule, found[names[0]], params)
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


def _refuse_beyond_caps(
    names: Sequence[str], rule: Rule, sparsity: Fraction, params: Mapping[str, Tensor]
) -> None:
    """Raise where the caps of a global group do not allow the sparsity, or the one in the end."""
    assert isinstance(rule.pattern.group, GlobalGroup)
    cap = rule.pattern.group.max_sparsity
    units = [_units(name, rule, params[name].shape) for name in names]
    most = sum(count(n, cap) for n in units)
    due = count(sum(units), sparsity if rule.last_step is None else max(sparsity, rule.target))
    if due > most:
        raise ConfigError(
            f"{names[0]!r}: Expected at most {most} of {sum(units)} units of its global group to "
            f"go, as max_sparsity={cap} leaves of {len(names)} tensors; got {due}. Lower the "
            f"sparsity, or raise max_sparsity."
        )


def _units(name: str, rule: Rule, shape: torch.Size) -> int:
    block, _ = unit_layout(name, rule, shape)
    return math.prod(grid_shape(block, shape))
