"""Scoring: what a rule says of one tensor, and what is refused on the way.

From a weight and its rule to the scores of its units and the layout of its groups. Errors name the
parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from purprune.context import ScoreContext, full_precision
from purprune.errors import ConfigError
from purprune.groups import Layout
from purprune.patterns import Norm, Pattern
from purprune.ranking import refuse_nan
from purprune.rules import Rule
from purprune.scores import Magnitude, OwnScore, needs_of
from purprune.units import grid_shape, is_entry, spread


def raw_scores(weight: Tensor, rule: Rule, context: ScoreContext) -> Tensor:
    """Return the scores of entries. Magnitude's are the weight itself: nothing is copied."""
    if isinstance(rule.score, Magnitude):
        return weight
    refuse_nan(weight, f"the weight {context.name!r}")  # a score may hide it
    return entry_scores(weight, rule, context)


def norm_of(rule: Rule) -> Norm:
    """Return the norm that makes units' scores of raw ones: a sum of magnitudes is the L1 norm."""
    norm = rule.pattern.norm
    return "l1" if norm == "sum" and isinstance(rule.score, Magnitude) else norm


def ranks_absolute(rule: Rule, of_entries: bool) -> bool:
    """Tell whether units go by the absolute values of their scores."""
    if isinstance(rule.score, Magnitude):
        return True
    return not of_entries and rule.pattern.norm != "sum"


def unit_layout(name: str, rule: Rule, shape: torch.Size) -> tuple[tuple[int, ...], Layout]:
    """Return the unit's extents and how the unit grid of a tensor divides into groups.

    Raises:
        ConfigError: when the rule's pattern does not fit the tensor; names the parameter.
    """
    try:
        return _fitted(rule.pattern, tuple(shape))
    except ConfigError as error:
        raise ConfigError(f"{name!r}: {error}") from None


@lru_cache(maxsize=1024)  # networks of many small tensors ask often
def _fitted(pattern: Pattern, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Layout]:
    block = pattern.unit.block(shape)
    return block, pattern.group.layout(grid_shape(block, shape))


def refuse_parts(name: str, tensor: Tensor) -> None:
    """Raise for a tensor of which this process may hold a part, as a DTensor."""
    if is_traceable_wrapper_subclass(tensor):
        raise TypeError(
            f"Expected a plain tensor for {name!r}; got a {type(tensor).__name__}. A Pruner and "
            f"purprune_adapters.sharded.sharded_masks make masks of shards, Pruner.report() counts "
            f"them, and .full_tensor() makes a plain one."
        )


def readable(name: str, weight: Tensor) -> Tensor:
    """Return the weight's values, detached; raise where it has none that can be read."""
    weight = weight.detach()
    if weight.is_meta:
        raise ConfigError(
            f"Expected a tensor with data for {name!r}; got a meta tensor. purprune.plan works "
            f"on meta tensors; masks need values."
        )
    if weight.layout is not torch.strided:
        raise ConfigError(
            f"Expected a strided tensor for {name!r}; got {weight.layout}. Pass .to_dense()."
        )
    try:
        weight.data_ptr()
    except RuntimeError:
        raise ConfigError(
            f"Expected a tensor with memory for {name!r}; got one of a torch.func transform or a "
            f"graph that is being captured. Compute masks outside, and apply_masks inside."
        ) from None
    return weight.resolve_neg()


def entry_scores(weight: Tensor, rule: Rule, context: ScoreContext) -> Tensor:
    """Return one score per entry; raise when the rule's score returns anything else."""
    gradient = context.gradient
    if gradient is None and "gradient" in {*context.stats} & {*needs_of(rule.score)}:
        gradient = context.stat("gradient", weight.shape)
    if gradient is not None:
        if gradient.shape != weight.shape:
            raise ConfigError(
                f"Expected a gradient of shape {tuple(weight.shape)} for {context.name!r}; "
                f"got {tuple(gradient.shape)}."
            )
        context = replace(context, gradient=full_precision(gradient.detach()))
    own = isinstance(rule.score, OwnScore)
    scores = rule.score(full_precision(weight) if own else full_precision(weight).clone(), context)
    if not isinstance(scores, Tensor) or scores.shape != weight.shape:
        got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(
            f"Expected scores of shape {tuple(weight.shape)} for {context.name!r}; got {got}."
        )
    if scores.is_complex() or scores.dtype in (torch.uint64, torch.bool):
        raise ConfigError(
            f"Expected scores that are floats or signed integers for {context.name!r}; "
            f"got {scores.dtype}."
        )
    return scores


def kept_units(
    what: str, mask: Tensor, block: tuple[int, ...], weight: Tensor, name: str
) -> Tensor:
    """Return which units a mask keeps; refuse one that cuts through units."""
    check_mask(name, mask, weight)
    if is_entry(block):
        return mask
    kept = mask[tuple(slice(None, None, b) for b in block)]  # the first entry of each unit
    if not _same(spread(kept, block, weight.shape), mask):
        raise ConfigError(
            f"Expected {what}[{name!r}] to prune whole units of {block}; got one that cuts through "
            f"units. Start without {what} when the pattern changes."
        )
    return kept


def _same(one: Tensor, other: Tensor) -> bool:
    steps = zip(one.stride(), other.stride(), strict=True)
    once = tuple(slice(0, 1) if a == b == 0 else slice(None) for a, b in steps)
    one, other = one[once], other[once]  # what both repeat is compared once
    if one.device.type == "cpu":  # where numpy compares bools twice as fast
        return np.array_equal(one.numpy(), other.numpy())
    return torch.equal(one, other)


def check_masks(masks: Any, way_out: str = "") -> None:
    """Raise unless masks are a mapping."""
    if not isinstance(masks, Mapping):
        raise TypeError(
            f"Expected masks as a dict of names to bool tensors; got {type(masks).__name__}. Pass "
            f"what compute_masks returns{way_out}."
        )


def check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    """Raise when a mask is not of dtype bool, or not of the weight's shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected a bool mask for {name!r}; got {mask.dtype}. True = keep.")
    if mask.shape != weight.shape:
        raise ValueError(
            f"Expected a mask of shape {tuple(weight.shape)} for {name!r}; got {tuple(mask.shape)}."
        )
