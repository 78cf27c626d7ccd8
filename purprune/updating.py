"""Updating: the masks of one step from those of the step before, as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, Rule, as_config
from purprune.masks import check_step, compute_masks
from purprune.regrow import Regrow, StraightThrough
from purprune.selection import described, select

Compute = Callable[..., dict[str, Tensor]]


def update_masks(
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    floor: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the masks in force at ``step``, given those of the step before.

    This is the fold of a training: start with no masks at step 0, and call it once for each step.
    Between the updates of a rule its masks are those that were given. At an update

    - a rule without ``regrow`` prunes on: ``compute_masks(..., prev=masks)``;
    - :class:`Regrow` prunes more than the schedule asks for, and lets the highest come back;
    - :class:`StraightThrough` chooses among all entries of ``params``, the dense weights.

    In every group exactly ``floor(units * sparsity(step))`` units are pruned afterwards.

    Args:
        params: the weights as the optimizer left them; for StraightThrough the dense ones.
        masks: the masks of the step before; ``{}`` at the start.
        step: the optimizer step, from 0.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        floor: masks that hold at every step, as in :func:`compute_masks`.
        grads: gradients by name, dense ones where pruned entries compete by them.
        stats: statistics by name, for scores that need them.

    Raises:
        NaNError, SelectionError, ConfigError: as :func:`compute_masks` does.

    >>> from purprune import SET
    >>> params, rule = {"w": torch.ones(4, 4)}, Rule(0.75, regrow=SET(every=1, fraction=0.5))
    >>> masks = update_masks(params, {}, 0, rule)
    >>> later = update_masks(params, masks, 1, rule)
    >>> int(later["w"].sum()), torch.equal(later["w"], masks["w"])
    (4, False)
    """
    given = {"floor": floor, "grads": grads, "stats": stats}
    return updated(compute_masks, params, masks, step, cfg, **given)


@torch.no_grad()
def updated(
    compute: Compute,
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    **given: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """Return what :func:`update_masks` does, by another function than :func:`compute_masks`."""
    step = check_step(step)
    rules = select(as_config(cfg), described(params)).rules
    due = _due(rules, masks, step)
    pruned = _computed(compute, {n: _pruning(r, n in masks, step) for n, r in due.items()},
                       params, step, _before(due, masks), given)  # fmt: skip
    growing = {n: _growing(r, step) for n, r in due.items() if n in masks and exchanges(r, step)}
    grown = _computed(compute, growing, params, step, pruned, given)
    found = {**masks, **pruned, **grown}
    return {name: found[name] for name in rules}


def exchanges(rule: Rule, step: int) -> bool:
    """Tell whether units of a tensor are exchanged at ``step``."""
    return isinstance(rule.regrow, Regrow) and rule.regrow.changes_at(step)


def comes_back(rule: Rule, step: int) -> bool:
    """Tell whether pruned entries may come back at ``step``, as zeros."""
    falls = step > 0 and rule.sparsity_at(step) < rule.sparsity_at(step - 1)
    return exchanges(rule, step) or (falls and not isinstance(rule.regrow, StraightThrough))


def needs_whole_gradient(rule: Rule, step: int) -> bool:
    """Tell whether pruned entries need the gradient that is there when ``step`` is counted."""
    return isinstance(rule.regrow, StraightThrough) or exchanges(rule, step)


def _due(rules: Mapping[str, Rule], masks: Mapping[str, Tensor], step: int) -> dict[str, Rule]:
    """Return the rules that are due: with a tensor that is new all that may share with it."""
    fresh = [rule for name, rule in rules.items() if name not in masks]
    return {n: rule for n, rule in rules.items() if rule.changes_at(step) or rule in fresh}


def _before(due: Mapping[str, Rule], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks that go on: a straight-through rule chooses anew."""
    return {
        name: masks[name]
        for name, rule in due.items()
        if name in masks and not isinstance(rule.regrow, StraightThrough)
    }


def _pruning(rule: Rule, has_mask: bool, step: int) -> Rule:
    """Return the rule by which units go at ``step``."""
    regrow = rule.regrow
    if not isinstance(regrow, Regrow):
        return rule
    if not has_mask:
        return replace(rule, score=regrow.start)
    if not regrow.changes_at(step):
        return rule
    sparsity = rule.sparsity_at(step)
    return _held(rule, sparsity + regrow.fraction_at(step) * (1 - sparsity))


def _growing(rule: Rule, step: int) -> Rule:
    """Return the rule by which units come back: of those that are gone, the highest."""
    assert isinstance(rule.regrow, Regrow)
    return replace(_held(rule, rule.sparsity_at(step)), score=rule.regrow.score_at(step))


def _computed(
    compute: Compute,
    rules: Mapping[str, Rule],
    params: Mapping[str, Tensor],
    step: int,
    prev: Mapping[str, Tensor],
    given: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, Tensor]:
    if not rules:
        return {}
    chosen = {what: _of(rules, values) for what, values in given.items() if values}
    return compute(
        params,
        step,
        PruneConfig(module_name_configs=rules),
        prev=_of(rules, prev),
        **chosen,
    )


def _of(names: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


@dataclass(frozen=True)
class _Held:
    """A schedule with one sparsity."""

    sparsity: Fraction

    def __call__(self, step: int) -> Fraction:
        return self.sparsity


def _held(rule: Rule, sparsity: Fraction) -> Rule:
    """Return the rule with one sparsity at every step, whatever its pattern's own is."""
    return replace(
        rule, schedule=_Held(sparsity), target_sparsity=None, initial_sparsity=0.0, regrow=None
    )
