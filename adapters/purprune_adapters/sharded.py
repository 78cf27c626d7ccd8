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
from purprune.counting import Group, Part, count_down, keep
from purprune.masks import check_mask, check_step, kept_units, ranked, sparsity_at, unit_layout
from purprune.patterns import Layout
from purprune.ranking import count, nan_error, widest
from purprune.scores import ScoreContext, full_precision
from purprune.selection import check_params, select
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
    ready = _ready(tasks, params)
    masks = {task.name: _alone(task, scored) for task, scored in ready if not task.is_counted}
    masks |= _together([(task, scored) for task, scored in ready if task.is_counted])
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
    def is_counted(self) -> bool:
        """Whether processes have to count together."""
        return self.crosses and self.sparsity > 0

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
    if shards is not None:
        _refuse_wide_score(name, rule, shards)
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


def _refuse_wide_score(name: str, rule: Rule, shards: Shards) -> None:
    score = rule.score
    if isinstance(score, Magnitude | Taylor | Random) or not any(a.cuts for a in shards.axes):
        return
    if not getattr(score, "elementwise", False):
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


class _Scored(NamedTuple):
    """What a process made of its part of a weight."""

    scores: Tensor | None
    """None for magnitudes, which are ranked from the weight."""
    kept: Tensor | None
    """Which units were kept so far."""


def _ready(tasks: Sequence[_Task], params: Mapping[str, Tensor]) -> list[tuple[_Task, _Scored]]:
    """Do what can fail in one process alone, and find out together whether it did."""
    counts = {task.name: [1, 0, 0] for task in tasks}
    ready: list[tuple[_Task, _Scored]] = []
    failure: Exception | None = None
    try:
        for task in tasks:
            scored = _scored(task)
            counts[task.name] = [
                0,
                _nan(task.held),
                0 if scored.scores is None else _nan(scored.scores),
            ]
            ready.append((task, scored))
    except Exception as error:
        failure = error
        counts = {task.name: [1, 0, 0] for task in tasks}
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
    return ready


def _nan(tensor: Tensor) -> int:
    return int(tensor.isnan().sum()) if tensor.is_floating_point() else 0


def _scored(task: _Task) -> _Scored:
    kept = None if task.prev is None else kept_units(task.prev, task.block, task.held, task.name)
    if task.sparsity == 0 or isinstance(task.rule.score, Magnitude):
        _refuse_scaled_norm(task, task.weight.dtype)
        return _Scored(None, kept)
    scores = _scores(task)
    _refuse_scaled_norm(task, scores.dtype)
    return _Scored(scores, kept)


def _scores(task: _Task) -> Tensor:
    score = task.rule.score
    if isinstance(score, Random):  # of the whole tensor; only its shape is looked at
        whole = score(task.held.new_empty(1).expand(task.weight.shape), task.context)
        return whole if task.shards is None else whole[task.shards.here]
    grad = task.context.gradient
    context = replace(task.context, gradient=None if grad is None else full_precision(grad))
    found: Tensor = score(full_precision(task.held).clone(), context)
    return found


def _refuse_scaled_norm(task: _Task, dtype: torch.dtype) -> None:
    """Refuse the one norm that is scaled by the largest entry of the whole tensor."""
    cut = task.shards is not None and any(axis.cuts for axis in task.shards.axes)
    if (
        cut
        and dtype == torch.float64
        and task.rule.pattern.norm == "l2"
        and not is_entry(task.block)
    ):
        raise ConfigError(
            f"Expected norm='l1' or norm='sum' for float64 scores of units in the shards of "
            f"{task.name!r}; got norm='l2', which looks at the whole tensor first."
        )


def _given(rule: Rule, scored: _Scored) -> Rule:
    """Return a rule that takes the scores that are there."""
    scores = scored.scores
    return rule if scores is None else replace(rule, score=lambda weight, context: scores)


def _alone(task: _Task, scored: _Scored) -> Tensor:
    """Return the mask of what this process holds, as if it were all."""
    return compute_masks(
        {task.name: task.held},
        task.context.step,
        PruneConfig(module_name_configs={task.name: _given(task.rule, scored)}),
        prev=None if task.prev is None else {task.name: task.prev},
    )[task.name]


def _together(ready: Sequence[tuple[_Task, _Scored]]) -> dict[str, Tensor]:
    """Return masks for which processes count together: for all tensors at once."""
    by_processes: dict[Processes, list[tuple[_Task, Group]]] = {}
    for task, scored in ready:
        assert task.shards is not None
        by_processes.setdefault(task.shards.processes, []).append((task, _group(task, scored)))
    masks: dict[str, Tensor] = {}
    for processes, pairs in by_processes.items():
        groups = [group for _, group in pairs]
        outcomes = count_down(groups, reduce=processes.summed, bits=_BITS, sample=0)
        ties = share_ties(groups, outcomes, reduce=processes.summed, bits=_BITS)
        for (task, group), outcome, (share,) in zip(pairs, outcomes, ties, strict=True):
            kept, _ = keep(group, group.parts[0], outcome, share)
            masks[task.name] = spread(kept, task.block, task.held.shape)
    return masks


def _group(task: _Task, scored: _Scored) -> Group:
    """Return the units of a weight, of which this process has some."""
    assert task.shards is not None
    scores, absolute = ranked(task.held, _given(task.rule, scored), task.context, task.block)
    grid = grid_shape(task.block, task.weight.shape)
    first = tuple(-(-o // b) for o, b in zip(task.shards.offset, task.block, strict=True))
    units = math.prod(grid)
    floats = scores.is_floating_point()
    return Group(
        [Part(lambda: scores, 0, scored.kept, grid, first)],
        count(units, task.sparsity),
        (units,),
        widest([scores.dtype]) if floats else torch.int64,
        absolute,
    )
