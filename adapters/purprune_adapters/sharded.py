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
from typing import Any

import torch
from torch import Tensor

from purprune import ConfigError, Magnitude, PruneConfig, Random, Rule
from purprune.allocations import OwnTarget
from purprune.config import as_config
from purprune.context import ScoreContext
from purprune.counting import Group, alone, count_down, keep
from purprune.groups import GlobalGroup
from purprune.masks import check_step, mask_of
from purprune.ranking import count, nan_error, refuse_extremes
from purprune.scoring import entry_scores, kept_units, readable
from purprune.selection import check_params, select
from purprune.sharing import Inputs, group_of, shared_groups
from purprune.ties import share_ties
from purprune.totals import sharing, sparsities_at
from purprune.units import spread
from purprune_adapters.shard_tasks import GivenScore, Task, refuse_scaled_norm, task_of
from purprune_adapters.shards import Processes, totals

_BITS = 11
"""Keys are counted in up to 2**11 buckets at a time: 16 KB, three times for 32 bits."""


@torch.no_grad()
def sharded_masks(
    params: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    prev: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
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
        floor: masks that hold at every step, in the shards of the weights.
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
    inputs = Inputs(params, step, dict(prev or {}), dict(floor or {}), dict(grads or {}), {})
    sparsities = sparsities_at(rules, params, step)
    tasks = [task_of(name, rule, sparsities[name], inputs) for name, rule in rules.items()]
    single = [task for task in tasks if not task.is_counted]
    counts = _counts([task for task in tasks if task.is_counted])
    for counted in counts:
        _processes(counted)  # raises before anything is sent
    scores = _ready(tasks, params)
    for together in [*counts, *([task] for task in single)]:
        refuse_scaled_norm(together, scores)
    given = _given(scores)
    masks = {task.name: _alone(task, given) for task in single} | _together(counts, given)
    return {task.name: task.shared(masks[task.name]) for task in tasks}


def _ready(tasks: Sequence[Task], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _nan_counts(task: Task, scores: dict[str, Tensor]) -> tuple[int, int]:
    """Count NaN in a weight and in its scores, which are added to ``scores``."""
    for what, mask in task.given.items():
        kept_units(what, mask, task.block, task.held, task.name)
    bad = _nan(task.held)
    if task.sparsity == 0 or isinstance(task.rule.score, Magnitude):
        return bad, 0
    found = scores[task.name] = _scores(task)
    refuse_extremes(found)
    return bad, _nan(found)


def _nan(tensor: Tensor) -> int:
    return int(tensor.isnan().sum()) if tensor.is_floating_point() else 0


def _scores(task: Task) -> Tensor:
    """Return the scores of what this process holds."""
    score = task.rule.score
    if isinstance(score, Random):  # of the whole tensor; only its shape is looked at
        whole = score(task.held.new_empty(1).expand(task.weight.shape), task.context)
        return whole if task.shards is None else whole[task.shards.here]
    return entry_scores(readable(task.name, task.held), task.rule, task.context)


def _given(scores: Mapping[str, Tensor]) -> GivenScore:
    """Return a score that was computed before."""

    def given(weight: Tensor, context: ScoreContext) -> Tensor:
        return scores[context.name]

    return given


def _alone(task: Task, given: GivenScore) -> Tensor:
    """Return the mask of what this process holds, as if it were all."""
    rule, inputs = task.with_scores(given), _inputs([task])
    return mask_of(task.name, rule, task.sparsity, inputs)


def _inputs(tasks: Sequence[Task]) -> Inputs:
    """Return what this process holds; scores are there, so that no gradient is needed."""
    held = {task.name: task.held for task in tasks}
    prev, floor = (
        {task.name: task.given[what] for task in tasks if what in task.given}
        for what in ("prev", "floor")
    )
    return Inputs(held, tasks[0].context.step, prev, floor, {}, {})


def _counts(tasks: Sequence[Task]) -> list[list[Task]]:
    """Return which tensors share a count: those of a global group, and every other by itself."""
    by_name = {task.name: task for task in tasks if task.is_global}
    shared = sharing({name: task.rule for name, task in by_name.items()})
    own = [[task] for task in tasks if not task.is_global]
    return [[by_name[name] for name in names] for names in shared] + own


def _together(counts: Sequence[Sequence[Task]], given: GivenScore) -> dict[str, Tensor]:
    """Return masks for which processes count together: for all groups at once."""
    by_processes: dict[Processes | None, list[Sequence[Task]]] = {}
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


def _processes(tasks: Sequence[Task]) -> Processes | None:
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


def _group(tasks: Sequence[Task], given: GivenScore) -> Group:
    """Return the units of tensors that share a count, of which this process has some."""
    inputs, rule = _inputs(tasks), tasks[0].with_scores(given)
    pattern = replace(rule.pattern, group=GlobalGroup())
    rule = replace(rule, pattern=pattern, budget=OwnTarget())
    sparsities = {task.name: task.sparsity for task in tasks}
    (shared,) = shared_groups(dict.fromkeys(inputs.params, rule), inputs.params, sparsities)
    own = group_of(shared, inputs, scale=0)  # squares of less than float64 need no scale
    parts = [
        part._replace(shape=task.grid, offset=task.first_unit)
        for part, task in zip(own.parts, tasks, strict=True)
    ]
    sizes = tuple(math.prod(task.grid) for task in tasks)
    return own._replace(parts=parts, sizes=sizes, k=count(sum(sizes), tasks[0].sparsity))
