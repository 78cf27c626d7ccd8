"""Masks of distributed tensors, computed from their shards: no weight leaves its process.

Where every group of units lies within one shard, masks are those of the shards. Where a whole
tensor is one group, the processes count their keys in common buckets and sum the counts, until they
know the last unit that goes (:mod:`purprune.counting`). What they send depends on the number of
buckets, not on the size of the tensor; all tensors share the calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from purprune import ConfigError, Magnitude, PruneConfig, Random, Rule, Taylor, compute_masks
from purprune.config import as_config
from purprune.counting import Group, alone, count_down, keep
from purprune.masks import check_step
from purprune.patterns import GlobalGroup, Layout
from purprune.ranking import count, nan_error
from purprune.scores import ScoreContext
from purprune.scoring import (
    check_mask,
    entry_scores,
    kept_units,
    readable,
    sparsity_at,
    unit_layout,
)
from purprune.selection import check_params, select
from purprune.sharing import Inputs, group_of, shared_groups
from purprune.ties import share_ties
from purprune.units import grid_shape, is_entry, spread
from purprune_adapters.distributed import local
from purprune_adapters.shards import Axis, Processes, Shards, shards_of, totals

_BITS = 11
"""Keys are counted in up to 2**11 buckets at a time: 16 KB, three times for 32 bits."""


@torch.no_grad()
def sharded_masks(
    params: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    prev: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Return the masks of ``compute_masks`` for the whole weights, in the shards of the weights.

    Bit for bit the same masks, ties included, from what each process holds. A collective call: all
    processes make it with the same names, step and config. Tensors that are no DTensor are taken
    to be the same in every process.

    Args:
        params: DTensors by name, cut by ``Shard`` along any dims of any mesh, or replicated.
        step: the optimizer step, from 0.
        cfg: a :class:`purprune.PruneConfig`, a :class:`purprune.Rule` for everything, or a dict.
        prev: masks so far, in the shards of the weights.
        grads: gradients by name, in the shards of the weights.

    Returns:
        Bool DTensors by name, True = keep, with the mesh and the placements of the weights.

    Raises:
        ConfigError: units or groups of a pattern cross the borders of shards, or a score looks at
            more than one entry at a time; in every process.
        NaNError: a weight or score holds NaN; in every process, with the count over all of them.
    """
    check_params(params)
    step = check_step(step)
    rules = select(as_config(cfg), params).rules
    before, gradients = dict(prev or {}), dict(grads or {})
    tasks = [
        _task(name, params[name], rule, step, before.get(name), gradients.get(name))
        for name, rule in rules.items()
    ]
    counts = _counts([task for task in tasks if task.is_counted])
    for sharing in counts:
        _processes(sharing)  # raises before anything is sent
    given = _Given(_ready(tasks, params))
    masks = {task.name: _alone(task, given) for task in tasks if not task.is_counted}
    masks |= _together(counts, given)
    return {task.name: task.shared(masks[task.name]) for task in tasks}


class _Task(NamedTuple):
    """One weight with all that its mask depends on."""

    context: ScoreContext
    weight: Tensor
    rule: Rule
    block: tuple[int, ...]
    sparsity: Fraction
    prev: Tensor | None
    shards: Shards | None
    """None: the weight is whole."""
    crosses: bool
    """Its one group crosses the borders of shards."""

    @property
    def name(self) -> str:
        return self.context.name

    @property
    def held(self) -> Tensor:
        """What this process holds of the weight."""
        return local(self.weight.detach())

    @property
    def is_global(self) -> bool:
        """Whether tensors share a count."""
        return isinstance(self.rule.pattern.group, GlobalGroup)

    @property
    def is_counted(self) -> bool:
        """Whether units are counted, over processes or over tensors."""
        return (self.crosses or self.is_global) and self.sparsity > 0

    @property
    def is_cut(self) -> bool:
        """Whether several processes hold parts of the weight."""
        return self.shards is not None and any(axis.cuts for axis in self.shards.axes)

    @property
    def processes(self) -> Processes | None:
        """The processes that hold parts of the weight; None: it is whole."""
        return None if self.shards is None else self.shards.processes

    @property
    def grid(self) -> tuple[int, ...]:
        """How many units the whole weight has along each dim."""
        return grid_shape(self.block, self.weight.shape)

    @property
    def first_unit(self) -> tuple[int, ...]:
        """Where in the grid the units of this process begin."""
        first = (0,) * len(self.grid) if self.shards is None else self.shards.offset
        return grid_shape(self.block, first)

    def given(self, scores: _Given) -> Rule:
        """Return the rule with scores that are there; magnitudes need none."""
        magnitude = isinstance(self.rule.score, Magnitude)
        return self.rule if magnitude else replace(self.rule, score=scores)

    def shared(self, mask: Tensor) -> Tensor:
        """Return the mask in the shards of the weight."""
        return mask if self.shards is None else self.shards.share(mask, self.weight)


def _task(
    name: str, weight: Tensor, rule: Rule, step: int, prev: Tensor | None, grad: Tensor | None
) -> _Task:
    """Check everything that all processes see alike, so that all of them raise or none."""
    block, layout = unit_layout(name, rule, weight.shape)
    shards = shards_of(name, weight) if isinstance(weight, DTensor) else None
    for what, given in ((f"the mask prev[{name!r}]", prev), (f"the gradient of {name!r}", grad)):
        _refuse_other_shards(what, given, shards)
    if prev is not None:
        check_mask(name, prev, weight)
    if shards is not None and any(axis.cuts for axis in shards.axes):
        _refuse_wide_score(name, rule)
    return _Task(
        ScoreContext(name, step, None if grad is None else local(grad)),
        weight,
        rule,
        block,
        sparsity_at(name, rule, step),
        None if prev is None else local(prev),
        shards,
        shards is not None and _crosses(name, block, layout, shards.axes),
    )


def _refuse_other_shards(what: str, given: Tensor | None, shards: Shards | None) -> None:
    if given is None:
        return
    placements = tuple(given.placements) if isinstance(given, DTensor) else None
    expected = None if shards is None else shards.placements
    if placements != expected:
        raise ConfigError(
            f"Expected {what} in the shards of its weight, {expected}; got {placements}. "
            f"Redistribute it first."
        )


def _refuse_wide_score(name: str, rule: Rule) -> None:
    score = rule.score
    own = isinstance(score, Magnitude | Taylor | Random)
    if not own and not getattr(score, "elementwise", False):
        raise ConfigError(
            f"Expected a score for the shards of {name!r} that looks at one entry at a time; got "
            f"{score!r}. If it does, say so with an attribute: score.elementwise = True."
        )


def _crosses(name: str, block: Sequence[int], layout: Layout, axes: Sequence[Axis]) -> bool:
    """Tell whether the one group of a tensor lies in several shards; other groups may not."""
    for dim, (axis, extent) in enumerate(zip(axes, block, strict=True)):
        if any(cut % extent for cut in axis.cuts):
            raise ConfigError(
                f"Expected units of {name!r} within one shard each; units of {tuple(block)} cross "
                f"the borders of shards at {axis.cuts[:4]} of dim {dim}. Shard another dim "
                f"(shard_placement_fn of fully_shard), or choose units that fit."
            )
    columns = [dim for dim in layout.order[layout.lead :] if axes[dim].cuts]
    if not columns or (layout.lead == 0 and layout.size is None):
        return bool(columns)
    for dim in columns:
        whole = None if layout.size is None else layout.size * block[dim]
        if whole is None or any(cut % whole for cut in axes[dim].cuts):
            group = "rows" if whole is None else f"groups of {whole} entries"
            raise ConfigError(
                f"Expected groups of {name!r} within one shard each; {group} cross the borders of "
                f"shards at {axes[dim].cuts[:4]} of dim {dim}. Shard another dim "
                f"(shard_placement_fn of fully_shard), or choose a pattern that fits."
            )
    return False


def _ready(tasks: Sequence[_Task], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Do what can fail in one process alone, and find out together whether it did.

    Returns:
        The scores by name, but for magnitudes, which are ranked from the weights.
    """
    scores: dict[str, Tensor] = {}
    failure: Exception | None = None
    try:
        counts = {task.name: [0, *_nan_counts(task, scores)] for task in tasks}
    except Exception as error:
        failure, counts = error, {task.name: [1, 0, 0] for task in tasks}
    found = totals(counts, params)
    if failure is not None:
        raise failure
    if any(failed for failed, _, _ in found.values()):
        raise RuntimeError(
            "Expected masks in every process; another one failed. Its error says why; nothing was "
            "changed here."
        )
    for name, (_, weight, score) in found.items():
        for what, bad in ((f"the weight {name!r}", weight), (f"the score of {name!r}", score)):
            if bad:
                raise nan_error(what, bad, params[name].numel())
    return scores


def _nan_counts(task: _Task, scores: dict[str, Tensor]) -> tuple[int, int]:
    """Count NaN in a weight and in its scores, which are added to ``scores``."""
    if task.prev is not None:
        kept_units(task.prev, task.block, task.held, task.name)
    bad = _nan(task.held)
    if task.sparsity == 0 or isinstance(task.rule.score, Magnitude):
        _refuse_scaled_norm(task, task.weight.dtype)
        return bad, 0
    found = scores[task.name] = _scores(task)
    _refuse_scaled_norm(task, found.dtype)
    return bad, _nan(found)


def _nan(tensor: Tensor) -> int:
    return int(tensor.isnan().sum()) if tensor.is_floating_point() else 0


def _scores(task: _Task) -> Tensor:
    """Return the scores of what this process holds."""
    score = task.rule.score
    if isinstance(score, Random):  # of the whole tensor; only its shape is looked at
        whole = score(task.held.new_empty(1).expand(task.weight.shape), task.context)
        return whole if task.shards is None else whole[task.shards.here]
    return entry_scores(readable(task.name, task.held), task.rule, task.context)


def _refuse_scaled_norm(task: _Task, dtype: torch.dtype) -> None:
    """Refuse the one norm that is scaled by the largest entry of the whole tensor."""
    if task.is_cut and dtype == torch.float64 and task.rule.pattern.norm == "l2":
        if is_entry(task.block) and not task.is_global:
            return
        raise ConfigError(
            f"Expected norm='l1' or norm='sum' for float64 scores of units in the shards of "
            f"{task.name!r}; got norm='l2', which looks at the whole tensor first."
        )


class _Given(NamedTuple):
    """A score that was computed before."""

    scores: Mapping[str, Tensor]

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        return self.scores[context.name]


def _alone(task: _Task, given: _Given) -> Tensor:
    """Return the mask of what this process holds, as if it were all."""
    return compute_masks(
        {task.name: task.held},
        task.context.step,
        PruneConfig(module_name_configs={task.name: task.given(given)}),
        prev=None if task.prev is None else {task.name: task.prev},
    )[task.name]


def _counts(tasks: Sequence[_Task]) -> list[list[_Task]]:
    """Return which tensors share a count: those of a global group, and every other by itself."""
    found: list[list[_Task]] = []
    for task in tasks:
        for others in found:
            if task.is_global and others[0].rule == task.rule:
                others.append(task)
                break
        else:
            found.append([task])
    return found


def _together(counts: Sequence[Sequence[_Task]], given: _Given) -> dict[str, Tensor]:
    """Return masks for which processes count together: for all groups at once."""
    by_processes: dict[Processes | None, list[Sequence[_Task]]] = {}
    for tasks in counts:
        by_processes.setdefault(_processes(tasks), []).append(tasks)
    masks: dict[str, Tensor] = {}
    for processes, among in by_processes.items():
        reduce = alone if processes is None else processes.summed
        groups = [_group(tasks, given) for tasks in among]
        outcomes = count_down(groups, reduce=reduce, bits=_BITS, sample=0)
        ties = share_ties(groups, outcomes, reduce=reduce, bits=_BITS)
        for tasks, group, outcome, shares in zip(among, groups, outcomes, ties, strict=True):
            for task, part, share in zip(tasks, group.parts, shares, strict=True):
                kept, _ = keep(group, part, outcome, share)
                masks[task.name] = spread(kept, task.block, task.held.shape)
    return masks


def _processes(tasks: Sequence[_Task]) -> Processes | None:
    """Return among which processes tensors are divided; those of a global group alike."""
    first = tasks[0].processes
    for task in tasks:
        if task.processes != first:
            raise ConfigError(
                f"Expected tensors of a global group divided among the same processes; "
                f"{tasks[0].name!r} and {task.name!r} are not. Give them rules that differ, or "
                f"leave one out."
            )
    return first


def _group(tasks: Sequence[_Task], given: _Given) -> Group:
    """Return the units of tensors that share a count, of which this process has some."""
    held = {task.name: task.held for task in tasks}
    rule = tasks[0].given(given)
    rule = replace(rule, pattern=replace(rule.pattern, group=GlobalGroup()))
    before = {task.name: task.prev for task in tasks if task.prev is not None}
    (shared,) = shared_groups(dict.fromkeys(held, rule), held)
    # Squares of less than float64 need no scale.
    own = group_of(shared, Inputs(held, tasks[0].context.step, before, {}), scale=0)
    parts = [
        part._replace(shape=task.grid, offset=task.first_unit)
        for part, task in zip(own.parts, tasks, strict=True)
    ]
    sizes = tuple(math.prod(task.grid) for task in tasks)
    return own._replace(parts=parts, sizes=sizes, k=count(sum(sizes), tasks[0].sparsity))
