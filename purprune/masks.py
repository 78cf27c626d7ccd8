"""Masks: the pure functions that compute, apply and count them.

A mask has its weight's shape and device and dtype bool; True = keep. A parameter without a mask
is dense. Nothing here changes an argument or reads a global state.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, Rule, as_config
from purprune.errors import ConfigError, NaNError, near_misses
from purprune.patterns import Layout
from purprune.ranking import keep_all_but_lowest, refuse_nan
from purprune.scores import Magnitude, Random, ScoreContext, Taylor, full_precision
from purprune.selection import check_params, select
from purprune.units import grid_shape, is_entry, spread, unit_scores


@torch.no_grad()
def compute_masks(
    params: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    prev: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
) -> dict[str, Tensor]:
    """Return the masks in force at ``step``, one for every parameter that a rule is for.

    In every group exactly ``k = floor(units * sparsity(step))`` units are pruned: the first by
    (score, flat index). With ``floor`` they are the larger of k and what ``floor`` prunes there.

    Args:
        params: flat mapping of dotted names to tensors, as ``dict(model.named_parameters())``.
        step: the optimizer step, from 0.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        prev: masks so far. What they prune stays pruned while the sparsity does not fall.
        floor: masks that hold at every step, such as those of a model that was pruned before.
            What they prune is pruned, whatever the sparsity: first they, then ``prev``.
        grads: gradients by name, for scores that need them.

    Returns:
        Bool masks by name, True = keep; names that no rule is for are absent. A mask may be an
        expanded view where a unit spans whole dims: clone it before writing into it.

    Raises:
        NaNError: a weight or score holds NaN; names the parameter and the count.
        SelectionError: a selector matches nothing, or a parameter can't be pruned.
        ConfigError: a pattern does not fit a parameter, or ``prev`` or ``floor`` does not.

    >>> params = {"fc.weight": torch.tensor([[0.3, -0.2, -0.01, 0.05]])}
    >>> compute_masks(params, 0, Rule(target_sparsity=0.75))
    {'fc.weight': tensor([[ True, False, False, False]])}
    """
    check_params(params)
    step = check_step(step)
    rules = select(as_config(cfg), params).rules
    for what, given in (("prev", prev), ("floor", floor), ("grads", grads)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"Expected {what} as a dict by name; got {type(given).__name__}.")
    before, lowest, gradients = dict(prev or {}), dict(floor or {}), dict(grads or {})
    _refuse_strangers(before, params)
    _refuse_strangers(lowest, params)
    return {
        name: _mask(
            params[name].detach(),
            rule,
            ScoreContext(name, step, gradients.get(name)),
            before.get(name),
            lowest.get(name),
        )
        for name, rule in rules.items()
    }


def check_step(step: int) -> int:
    """Return the step as an int; raise when it is none, or below 0."""
    try:
        whole = operator.index(step)
    except TypeError:
        raise TypeError(f"Expected step as an int; got {type(step).__name__}.") from None
    if whole < 0 or isinstance(step, bool):
        raise ValueError(f"Expected step >= 0; got {step}.")
    return whole


def _mask(
    weight: Tensor, rule: Rule, context: ScoreContext, prev: Tensor | None, floor: Tensor | None
) -> Tensor:
    name = context.name
    refuse_unreadable(name, weight)
    if weight.is_neg():
        weight = weight.resolve_neg()
    block, layout = unit_layout(name, rule, weight.shape)
    before = None if prev is None else kept_units("prev", prev, block, weight, name)
    lowest = None if floor is None else kept_units("floor", floor, block, weight, name)
    sparsity = sparsity_at(name, rule, context.step)
    if sparsity == 0:  # no score is needed, nor a gradient
        refuse_nan(weight, f"the weight {name!r}")
        if floor is not None:
            return floor.clone()
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    try:
        ranked = _ranked(weight, rule, context, block)
        keep = _keep_within(lowest, *ranked, layout, sparsity, before)
    except NaNError:
        refuse_nan(weight, f"the weight {name!r}")
        refuse_nan(_scores(weight, rule, context), f"the score of {name!r}")
        raise NaNError(f"Expected unit scores that are numbers for {name!r}; got NaN.") from None
    return spread(keep, block, weight.shape)


def _keep_within(
    floor: Tensor | None,
    scores: Tensor,
    absolute: bool,
    layout: Layout,
    sparsity: Fraction,
    prev: Tensor | None,
) -> Tensor:
    """Return which units to keep: of those to prune the first are ``floor``'s, then ``prev``'s."""
    if floor is None:
        return keep_all_but_lowest(scores, absolute, layout, sparsity, prev)
    before = floor if prev is None else prev & floor
    keep = keep_all_but_lowest(scores, absolute, layout, sparsity, before)
    if bool((keep & ~before).any()):  # fewer go than before: which of them come back?
        last = _with_highest(scores, before)
        first = keep_all_but_lowest(last, absolute, layout, sparsity, floor)
        keep = keep_all_but_lowest(scores, absolute, layout, sparsity, before | first)
    return keep & floor


def _with_highest(scores: Tensor, where: Tensor) -> Tensor:
    """Return the scores with the highest that there is in some places."""
    scores = scores.float() if scores.itemsize == 1 else scores  # float8 may have no infinity
    highest = math.inf if scores.is_floating_point() else torch.iinfo(scores.dtype).max - 1
    return scores.masked_fill(where, highest)


def _ranked(
    weight: Tensor, rule: Rule, context: ScoreContext, block: tuple[int, ...]
) -> tuple[Tensor, bool]:
    """Return the scores of units, and whether to rank their absolute values.

    Magnitude is ranked, and its norms are summed, from the weight itself: nothing is copied.
    """
    norm = rule.pattern.norm
    if isinstance(rule.score, Magnitude):
        # The sum of magnitudes is the L1 norm.
        return unit_scores(weight, block, "l1" if norm == "sum" else norm), True
    refuse_nan(weight, f"the weight {context.name!r}")  # a score may hide it
    has_sign = is_entry(block) or norm == "sum"
    return unit_scores(_scores(weight, rule, context), block, norm), not has_sign


def sparsity_at(name: str, rule: Rule, step: int) -> Fraction:
    """Return the sparsity in force for a parameter; errors of its schedule name it."""
    try:
        return rule.sparsity_at(step)
    except ConfigError as error:
        raise ConfigError(f"{name!r}: {error}") from None


def unit_layout(name: str, rule: Rule, shape: torch.Size) -> tuple[tuple[int, ...], Layout]:
    """Return the unit's extents and how the unit grid of a tensor divides into groups.

    Raises:
        ConfigError: when the rule's pattern does not fit the tensor; names the parameter.
    """
    try:
        block = rule.pattern.unit.block(shape)
        return block, rule.pattern.group.layout(grid_shape(block, shape))
    except ConfigError as error:
        raise ConfigError(f"{name!r}: {error}") from None


def refuse_unreadable(name: str, weight: Tensor) -> None:
    """Raise when a tensor has no values to look at; names the parameter."""
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


def _scores(weight: Tensor, rule: Rule, context: ScoreContext) -> Tensor:
    gradient = context.gradient
    if gradient is not None:
        if gradient.shape != weight.shape:
            raise ConfigError(
                f"Expected a gradient of shape {tuple(weight.shape)} for {context.name!r}; "
                f"got {tuple(gradient.shape)}."
            )
        context = replace(context, gradient=full_precision(gradient.detach()))
    own = isinstance(rule.score, Taylor | Random)
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
    if not torch.equal(spread(kept, block, weight.shape), mask):
        raise ConfigError(
            f"Expected {what}[{name!r}] to prune whole units of {block}; got one that cuts through "
            f"units. Start without {what} when the pattern changes."
        )
    return kept


def check_mask(name: str, mask: Tensor, weight: Tensor) -> None:
    """Raise when a mask is not of dtype bool, or not of the weight's shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"Expected a bool mask for {name!r}; got {mask.dtype}. True = keep.")
    if mask.shape != weight.shape:
        raise ValueError(
            f"Expected a mask of shape {tuple(weight.shape)} for {name!r}; got {tuple(mask.shape)}."
        )


def _refuse_strangers(masks: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> None:
    for name in masks:
        if name not in params:
            raise KeyError(
                f"Expected masks of known parameters; got {name!r}.{near_misses(name, params)}"
            )


def apply_masks(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``params`` with pruned entries zero; a parameter without a mask is passed through.

    ``out = where(mask, w, 0)``: a pruned inf becomes 0, and the gradient of a pruned entry is 0.
    Works under ``torch.func`` transforms, ``vmap`` over masks among them.

    >>> apply_masks({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.tensor([True, False])})
    {'w': tensor([1., 0.]), 'b': tensor([1.])}
    """
    check_params(params)
    _refuse_strangers(masks, params)
    return {
        name: _masked(name, weight, masks[name]) if name in masks else weight
        for name, weight in params.items()
    }


def _masked(name: str, weight: Tensor, mask: Tensor) -> Tensor:
    check_mask(name, mask, weight)
    return torch.where(mask, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))


@dataclass(frozen=True)
class Count:
    """How many entries are zero, of how many."""

    zeros: int
    entries: int

    @property
    def fraction(self) -> Fraction:
        """The sparsity, exactly; 0 for an empty tensor."""
        return Fraction(self.zeros, self.entries) if self.entries else Fraction(0)

    def __float__(self) -> float:
        """Return the sparsity as a float."""
        return float(self.fraction)

    def __str__(self) -> str:
        """Return for instance ``75 of 108 (69.44 %)``."""
        return f"{self.zeros:,} of {self.entries:,} ({float(self):.2%})".replace("%", " %")


@dataclass(frozen=True)
class Sparsity(Count):
    """The count of all masks together, and of each in ``tensors``."""

    tensors: Mapping[str, Count]


def sparsity(masks: Mapping[str, Tensor]) -> Sparsity:
    """Count what masks prune, in integers.

    >>> counted = sparsity({"w": torch.tensor([True, False, False, False])})
    >>> counted.zeros, counted.entries, float(counted), str(counted.tensors["w"])
    (3, 4, 0.75, '3 of 4 (75.00 %)')
    """
    tensors = {
        name: Count(mask.numel() - int(torch.count_nonzero(mask)), mask.numel())
        for name, mask in masks.items()
    }
    zeros = sum(c.zeros for c in tensors.values())
    return Sparsity(zeros, sum(c.entries for c in tensors.values()), tensors)
