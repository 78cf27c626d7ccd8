"""What is to be done for one weight whose mask is computed from shards, and what is refused.

What is decided here is decided from whole shapes, meshes and rules, which all processes know alike:
all of them raise or none does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from purprune import ConfigError, Magnitude, Rule
from purprune.context import ScoreContext
from purprune.groups import GlobalGroup, Layout, TransposableGroup
from purprune.scores import needs_of
from purprune.scoring import check_mask, unit_layout
from purprune.sharing import Inputs
from purprune.units import grid_shape, is_entry
from purprune_adapters.distributed import local
from purprune_adapters.shards import Axis, Processes, Shards, shards_of

GivenScore = Callable[[Tensor, ScoreContext], Tensor]


class Task(NamedTuple):
    """One weight with all that its mask depends on."""

    context: ScoreContext
    weight: Tensor
    rule: Rule
    block: tuple[int, ...]
    sparsity: Fraction
    prev: Tensor | None
    floor: Tensor | None
    shards: Shards | None
    """None: the weight is whole."""
    crosses: bool
    """Its one group crosses the borders of shards."""

    @property
    def name(self) -> str:
        """The parameter's name."""
        return self.context.name

    @property
    def held(self) -> Tensor:
        """What this process holds of the weight."""
        return local(self.weight.detach())

    @property
    def given(self) -> dict[str, Tensor]:
        """What this process holds of the masks that are given, by what they are called."""
        masks = {"prev": self.prev, "floor": self.floor}
        return {what: mask for what, mask in masks.items() if mask is not None}

    @property
    def is_global(self) -> bool:
        """Whether tensors share a count."""
        return self.rule.is_global

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

    def with_scores(self, score: GivenScore) -> Rule:
        """Return the rule with scores that are there; magnitudes need none."""
        magnitude = isinstance(self.rule.score, Magnitude)
        return self.rule if magnitude else replace(self.rule, score=score)

    def shared(self, mask: Tensor) -> Tensor:
        """Return the mask in the shards of the weight."""
        return mask if self.shards is None else self.shards.share(mask, self.weight)


def task_of(name: str, rule: Rule, sparsity: Fraction, inputs: Inputs) -> Task:
    """Check everything that all processes see alike, so that all of them raise or none."""
    weight, grad = inputs.params[name], inputs.grads.get(name)
    prev, floor = inputs.prev.get(name), inputs.floor.get(name)
    _refuse_statistics(name, rule)
    block, layout = unit_layout(name, rule, weight.shape)
    _refuse_balanced(name, rule)
    shards = shards_of(name, weight) if isinstance(weight, DTensor) else None
    _refuse_other_shards(f"the gradient of {name!r}", grad, shards)
    for what, mask in (("prev", prev), ("floor", floor)):
        _refuse_other_shards(f"the mask {what}[{name!r}]", mask, shards)
        if mask is not None:
            check_mask(name, mask, weight)
    if shards is not None and any(axis.cuts for axis in shards.axes):
        _refuse_wide_score(name, rule)
    return Task(
        ScoreContext(name, inputs.step, None if grad is None else local(grad)),
        weight,
        rule,
        block,
        sparsity,
        None if prev is None else local(prev),
        None if floor is None else local(floor),
        shards,
        shards is not None
        and any(
            _crosses(name, block, groups, shards.axes)
            for groups in (layout, *_turned(rule, weight))
        ),
    )


def _refuse_balanced(name: str, rule: Rule) -> None:
    group = rule.pattern.group
    if isinstance(group, GlobalGroup) and not group.is_plain:
        raise ConfigError(
            f"Expected scope='global' for {name!r} where weights are in shards; got {group!r}. "
            f"Leave bounds and normalize out, or give the tensors a budget."
        )


def _turned(rule: Rule, weight: Tensor) -> list[Layout]:
    """Return how the columns of transposable blocks are groups; their rows are the layout."""
    group = rule.pattern.group
    if not isinstance(group, TransposableGroup):
        return []
    return [replace(group, dims=group.dims[::-1]).layout(weight.shape)]


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


def _refuse_statistics(name: str, rule: Rule) -> None:
    """Refuse what nobody could pass: masks of shards take gradients, and no other statistic."""
    if missing := [need for need in needs_of(rule.score) if need != "gradient"]:
        raise ConfigError(
            f"Expected a score without statistics for the shards of {name!r}; got {rule.score!r}, "
            f"which needs {', '.join(missing)}. Compute the masks of whole weights with "
            f"purprune.compute_masks, and give them to the Pruner: masks=..."
        )


def _refuse_wide_score(name: str, rule: Rule) -> None:
    score = rule.score
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
    if not columns or layout.is_whole:
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


def refuse_scaled_norm(tasks: Sequence[Task], scores: Mapping[str, Tensor]) -> None:
    """Refuse the one norm that is scaled by the largest entry of all that share a count."""
    if all(is_entry(task.block) for task in tasks) or tasks[0].rule.pattern.norm != "l2":
        return
    for task in tasks:
        dtype = scores[task.name].dtype if task.name in scores else task.weight.dtype
        if task.is_cut and dtype == torch.float64:
            raise ConfigError(
                f"Expected norm='l1' or norm='sum' for float64 scores of units in the shards of "
                f"{task.name!r}; got norm='l2', which looks at the whole tensor first."
            )
