"""Targets: from a real share for each tensor to a config that names each with an exact target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

from torch import Tensor

from purprune.allocations import OwnTarget, apportion
from purprune.config import PruneConfig, as_config
from purprune.errors import ConfigError
from purprune.groups import EveryGroup, TensorGroup
from purprune.planning import PlannedTensor, plan
from purprune.quanta import nearest
from purprune.ranking import count
from purprune.rules import Rule
from purprune.selection import described, select
from purprune.values import exact


class Quota(NamedTuple):
    """What can go of one tensor: up to ``steps`` times ``size`` units."""

    name: str
    rule: Rule
    units: int
    size: int
    """One unit in every group: 1 where the tensor is one group, its rows where these are groups."""
    steps: int

    def ruled(self, pruned: int) -> Rule:
        """Return the rule that prunes so many units in the end, a multiple of ``size``."""
        share = Fraction(pruned, self.units or 1)
        scale = share / self.rule.target if self.rule.target else 1
        pattern = self.rule.pattern
        if isinstance(group := pattern.group, EveryGroup):
            pattern = replace(pattern, group=replace(group, zeros=pruned // self.size))
        return replace(
            self.rule,
            target_sparsity=share if pattern.target is None else None,
            initial_sparsity=exact(self.rule.initial_sparsity) * scale,
            pattern=pattern,
            budget=OwnTarget(),
        )


Divide = Callable[[Sequence[Quota], int], tuple[Sequence[int | Fraction], Sequence[int]]]
"""From tensors with one rule, and how many units of them go, to real counts and their caps."""


def divided(
    params: Mapping[str, Tensor], cfg: PruneConfig | Rule | Mapping[str, Any], divide: Divide
) -> PruneConfig:
    """Return a config that names every tensor, where each rule's total is divided among its own.

    Tensors whose rules are equal share ``floor(units * target)``, or where groups lie within a
    tensor, as rows do, the sum of ``floor(units * target)`` over these. ``divide`` says how, in
    real numbers, of which whole ones are made. Selectors that ``cfg`` sets to None stay.
    """
    cfg = as_config(cfg)
    shapes = described(params)
    rules = select(cfg, shapes).rules
    planned = {row.name: row for row in plan(shapes, cfg).tensors}
    quotas = [_quota(name, rule, planned[name]) for name, rule in rules.items()]
    found: dict[str, Rule | None] = {}
    for family in _families(quotas):
        total = _total(family)
        counts, caps = divide(family, total)
        whole = _whole(family, total, counts, caps)
        found.update({q.name: q.ruled(n) for q, n in zip(family, whole, strict=True)})
    dense = {name: rule for name, rule in cfg.module_name_configs.items() if rule is None}
    return PruneConfig(module_name_configs={**dense, **{name: found[name] for name in rules}})


def _total(family: Sequence[Quota]) -> int:
    """Return how many units go: with groups in a tensor, as many as the rule prunes by itself."""
    target = family[0].rule.target
    if isinstance(family[0].rule.pattern.group, TensorGroup):
        return count(sum(quota.units for quota in family), target)
    return sum(quota.size * count(quota.steps, target) for quota in family)


def _families(quotas: Sequence[Quota]) -> list[list[Quota]]:
    families: list[list[Quota]] = []
    for quota in quotas:
        same = next((family for family in families if family[0].rule == quota.rule), None)
        if same is None:
            families.append([quota])
        else:
            same.append(quota)
    return families


def _quota(name: str, rule: Rule, planned: PlannedTensor) -> Quota:
    if planned.shared:
        raise ConfigError(
            f"Expected a pattern with a count for each tensor; got scope='global' for {name!r}, "
            f"which divides the total by itself. Leave the scope out."
        )
    if not planned.groups:
        return Quota(name, rule, 0, 1, 0)
    group = planned.groups[0]
    m = getattr(rule.pattern.group, "m", group.units)
    if len(planned.groups) > 1 or group.units != m:
        raise ConfigError(
            f"Expected groups of {m} without a tail for {name!r} of shape {planned.shape}, so that "
            f"its sparsity has whole steps; got a tail. Set {name!r} to None."
        )
    return Quota(name, rule, planned.units, group.groups, group.units)


def _whole(
    family: Sequence[Quota], total: int, counts: Sequence[int | Fraction], caps: Sequence[int]
) -> list[int]:
    """Return whole counts near the real ones, in multiples of what each tensor can lose."""
    if all(quota.size == 1 for quota in family):
        return apportion(total, counts, caps)
    # Always reachable: the rule's own counts have this total, and none of them is above its cap.
    return nearest(total, counts, caps, [quota.size for quota in family])
