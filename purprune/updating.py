"""Updating: the masks of one step from those of the step before, as training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.allocations import OwnTarget
from purprune.config import PruneConfig, as_config
from purprune.masks import check_given, check_step, compute_masks
from purprune.phases import Alternating
from purprune.ramps import Ramp
from purprune.regrow import Regrow, StraightThrough
from purprune.rules import Rule
from purprune.scores import needs_of
from purprune.scoring import check_mask
from purprune.selection import described, select
from purprune.totals import sparsities_at
from purprune.values import exact

Compute = Callable[..., dict[str, Tensor]]


def update_masks(
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
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

    In every group exactly ``floor(units * sparsity(step))`` units are pruned afterwards. Where a
    gradient holds inf or NaN, as in a step that mixed precision skips, nothing comes back by
    gradients at this update.

    Args:
        params: the weights as the optimizer left them; for StraightThrough the dense ones.
        masks: the masks of the step before; ``{}`` or None at the start.
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
    return updated(compute_masks, _not_finite, params, masks, step, cfg, **given)


def _not_finite(tensors: Mapping[str, Tensor]) -> int:
    return sum(int((~tensor.isfinite()).sum()) for tensor in tensors.values())


@torch.no_grad()
def updated(
    compute: Compute,
    not_finite: Callable[[dict[str, Tensor]], int],
    params: Mapping[str, Tensor],
    masks: Mapping[str, Tensor] | None,
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    **given: Mapping[str, Any] | None,
) -> dict[str, Tensor]:
    """Return what :func:`update_masks` does, by another function than :func:`compute_masks`.

    Args:
        compute: makes masks as :func:`compute_masks` does.
        not_finite: counts entries of gradients that are no finite numbers.
        params: the weights, and so on, as :func:`update_masks` takes them.
        masks: as there.
        step: as there.
        cfg: as there.
        **given: ``floor``, ``grads`` and ``stats``.
    """
    step = check_step(step, "update_masks(params, masks, step, cfg)")
    shapes, masks = described(params), {} if masks is None else masks
    rules = select(as_config(cfg), shapes).rules
    check_given(shapes, masks=masks, **given)
    for name in rules.keys() & masks.keys():
        check_mask(name, masks[name], shapes[name])
    due = _due(rules, masks, step)
    deciding = _exchanged(due, masks, step, given.get("grads") or {})
    held_back = deciding if deciding and not_finite(deciding) else {}
    going, coming = _phases(due, masks, step, shapes, held_back)
    pruned = _computed(compute, going, params, step, _before(due, masks), given)
    grown = _computed(compute, coming, params, step, pruned, given)
    found = {**masks, **pruned, **grown}
    return {name: found[name] for name in rules}


def exchanges(rule: Rule, step: int) -> bool:
    """Tell whether units of a tensor are exchanged at ``step``."""
    return isinstance(rule.regrow, Regrow) and rule.regrow.changes_at(step)


def by_gradient(rule: Rule) -> bool:
    """Tell whether gradients decide what comes back."""
    return isinstance(rule.regrow, Regrow) and "gradient" in needs_of(rule.regrow.score)


def comes_back(rule: Rule, step: int) -> bool:
    """Tell whether pruned entries may come back at ``step``, as zeros."""
    falls = step > 0 and rule.sparsity_at(step) < rule.sparsity_at(step - 1)
    return exchanges(rule, step) or (falls and not isinstance(rule.regrow, StraightThrough))


def may_come_back(rule: Rule) -> bool:
    """Tell whether pruned entries may ever come back; of a callable schedule it is not known."""
    schedule = rule.schedule
    falls = isinstance(schedule, Ramp) and exact(rule.initial_sparsity) > rule.target
    return rule.regrow is not None or isinstance(schedule, Alternating) or falls


def needs_whole_gradient(rule: Rule, step: int) -> bool:
    """Tell whether pruned entries need the gradient that is there when ``step`` is counted."""
    straight = isinstance(rule.regrow, StraightThrough)
    return straight or (exchanges(rule, step) and by_gradient(rule))


def _due(rules: Mapping[str, Rule], masks: Mapping[str, Tensor], step: int) -> dict[str, Rule]:
    """Return the rules that are due: with a tensor that is new all that may share with it."""
    fresh = [rule for name, rule in rules.items() if name not in masks]
    return {
        name: rule
        for name, rule in rules.items()
        if name not in masks or rule.changes_at(step) or rule in fresh
    }


def _before(due: Mapping[str, Rule], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks that go on: a straight-through rule chooses anew."""
    return {
        name: masks[name]
        for name, rule in due.items()
        if name in masks and not isinstance(rule.regrow, StraightThrough)
    }


def _exchanged(
    due: Mapping[str, Rule], masks: Mapping[str, Tensor], step: int, grads: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the gradients by which units come back at ``step``."""
    return {
        name: grads[name]
        for name, rule in due.items()
        if name in masks and exchanges(rule, step) and by_gradient(rule)
        if grads.get(name) is not None
    }


def _phases(
    due: Mapping[str, Rule],
    masks: Mapping[str, Tensor],
    step: int,
    shapes: Mapping[str, Tensor],
    held_back: Mapping[str, Any],
) -> tuple[dict[str, Rule], dict[str, Rule]]:
    """Return the rules by which units go, and then those by which units come back."""
    going, coming = dict(due), {}
    regrowing = {name: rule for name, rule in due.items() if isinstance(rule.regrow, Regrow)}
    sparsities = sparsities_at(regrowing, shapes, step)
    for name, rule in regrowing.items():
        regrow, s = rule.regrow, sparsities[name]
        assert isinstance(regrow, Regrow)
        if name not in masks:
            going[name] = replace(rule, score=regrow.start)
        elif regrow.changes_at(step) and name not in held_back:
            going[name] = _held(rule, s + regrow.fraction_at(step) * (1 - s))
            coming[name] = replace(_held(rule, s), score=regrow.score_at(step))
    return going, coming


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
    """A schedule with one sparsity. Rules share with each other what they did before."""

    sparsity: Fraction
    of: Rule

    def __call__(self, step: int) -> Fraction:
        return self.sparsity


def _held(rule: Rule, sparsity: Fraction) -> Rule:
    """Return the rule with one sparsity for each of its tensors, whatever its pattern's own is."""
    return replace(
        rule,
        schedule=_Held(sparsity, rule),
        target_sparsity=None,
        initial_sparsity=0.0,
        budget=OwnTarget(),
        regrow=None,
    )
