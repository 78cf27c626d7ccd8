"""Masks: the pure functions that compute, apply and count them.

A mask has its weight's shape and device and dtype bool; True = keep. A parameter without a mask
is dense. Nothing here changes an argument or reads a global state.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, as_config
from purprune.errors import NaNError, near_misses
from purprune.groups import TransposableGroup
from purprune.ranking import keep_all_but_lowest, refuse_nan
from purprune.rules import Rule
from purprune.scoring import (
    check_mask,
    check_masks,
    kept_units,
    norm_of,
    ranks_absolute,
    raw_scores,
    refuse_parts,
    unit_layout,
)
from purprune.selection import check_params, described, select
from purprune.sharing import Inputs, Shared, shared_groups, shared_masks
from purprune.totals import sparsities_at
from purprune.transposable import keep_largest_sum, refuse_uneven
from purprune.units import is_entry, spread, unit_scores


def compute_masks(
    params: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    prev: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Return the masks in force at ``step``, one for every parameter that a rule is for.

    In every group exactly ``k = floor(units * sparsity(step))`` units are pruned: the first by
    (score, flat index), and where tensors share a group, ties by the order of ``params``. With
    ``floor`` they are the larger of k and what ``floor`` prunes there. Of transposable masks the
    one that keeps the largest sum of scores is taken (:mod:`purprune.transposable`).

    Args:
        params: flat mapping of dotted names to tensors, as ``dict(model.named_parameters())``.
        step: the optimizer step, from 0.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        prev: masks so far. What they prune stays pruned while the sparsity does not fall.
        floor: masks that hold at every step, such as those of a model that was pruned before.
            What they prune is pruned, whatever the sparsity: first they, then ``prev``.
        grads: gradients by name, for scores that need them.
        stats: statistics by name, for scores that need them: ``{"fc.weight": {"input_norm": x}}``.

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
    return dict(iter_masks(params, step, cfg, prev=prev, floor=floor, grads=grads, stats=stats))


def iter_masks(
    params: Mapping[str, Tensor],
    step: int,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    prev: Mapping[str, Tensor] | None = None,
    floor: Mapping[str, Tensor] | None = None,
    grads: Mapping[str, Tensor | None] | None = None,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and masks of :func:`compute_masks` one at a time.

    No more than one of the ``params`` is in use at a time, so that a mapping which loads its
    tensors when they are asked for may be larger than memory. Each is asked for once; tensors that
    share a count (``scope="global"``) are all counted first, for which each is asked for once to
    three times, seldom more; with bounds or scales (:class:`GlobalGroup`) some times more, to find
    out how many of each tensor go. What a :class:`LazyParams` says of shapes is believed, so that
    nothing is loaded to select rules.

    Args and errors are those of :func:`compute_masks`.

    >>> params = {"fc.weight": torch.tensor([[0.3, -0.2]]), "fc2.weight": torch.tensor([[0.1]])}
    >>> from purprune import Unstructured
    >>> rule = Rule(0.67, pattern=Unstructured(scope="global"))
    >>> [(name, mask.tolist()) for name, mask in iter_masks(params, 0, rule)]
    [('fc.weight', [[True, False]]), ('fc2.weight', [[False]])]
    """
    shapes = described(params)
    step = check_step(step, "compute_masks(params, step, cfg)")
    rules = select(as_config(cfg), shapes).rules
    check_given(shapes, prev=prev, floor=floor, grads=grads, stats=stats)
    inputs = Inputs(
        params, step, dict(prev or {}), dict(floor or {}), dict(grads or {}), dict(stats or {})
    )
    sparsities = sparsities_at(rules, shapes, step)
    return _masks(rules, sparsities, shared_groups(rules, shapes, sparsities), inputs)


def check_given(shapes: Mapping[str, Tensor], **given: Mapping[str, Any] | None) -> None:
    """Raise unless ``prev``, ``floor``, ``grads`` and ``stats`` are of parameters that are there.

    Gradients may have other names besides: those of a whole model.
    """
    for what, values in given.items():
        if values is not None and not isinstance(values, Mapping):
            raise TypeError(f"Expected {what} as a dict by name; got {type(values).__name__}.")
        if values and what != "grads":
            _refuse_strangers("statistics" if what == "stats" else "masks", values, shapes)
    for name, found in (given.get("stats") or {}).items():
        if not isinstance(found, Mapping):
            got = type(found).__name__
            raise TypeError(
                f"Expected stats[{name!r}] as a dict by statistic, such as "
                f"{{'input_norm': tensor}}; got {got}."
            )


@torch.no_grad()
def _masks(
    rules: Mapping[str, Rule],
    sparsities: Mapping[str, Fraction],
    groups: list[Shared],
    inputs: Inputs,
) -> Iterator[tuple[str, Tensor]]:
    shared = shared_masks([group for group in groups if group.sparsity], inputs)
    for name, rule in rules.items():
        own = name not in shared
        yield name, mask_of(name, rule, sparsities[name], inputs) if own else next(shared[name])


def check_step(step: int, order: str = "") -> int:
    """Return the step as an int; raise when it is none, or below 0, and say what comes in order."""
    try:
        whole = operator.index(step)
    except TypeError:
        way_out = f" The order is {order}." if order else ""
        raise TypeError(f"Expected step as an int; got {type(step).__name__}.{way_out}") from None
    if whole < 0 or isinstance(step, bool):
        raise ValueError(f"Expected step >= 0; got {step}.")
    return whole


def mask_of(name: str, rule: Rule, sparsity: Fraction, inputs: Inputs) -> Tensor:
    """Return the mask of one tensor, whose groups are its own, at a sparsity of units."""
    weight, context = inputs.weight(name), inputs.context(name)
    block, layout = unit_layout(name, rule, weight.shape)
    prev, floor = (
        kept_units(what, given[name], block, weight, name) if name in given else None
        for what, given in inputs.given.items()
    )
    group = rule.pattern.group
    refuse_uneven(name, group, floor=floor, prev=prev)
    if sparsity == 0:  # no score is needed, nor a gradient
        refuse_nan(weight, f"the weight {name!r}")
        if floor is not None:
            return inputs.floor[name].clone()
        return torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    try:
        scores = unit_scores(raw_scores(weight, rule, context), block, norm_of(rule))
        absolute = ranks_absolute(rule, is_entry(block))
        if isinstance(group, TransposableGroup):
            keep = keep_largest_sum(scores, absolute, group, sparsity, prev, floor)
        else:
            keep = keep_all_but_lowest(scores, absolute, layout, sparsity, prev, floor)
    except NaNError:
        refuse_nan(weight, f"the weight {name!r}")
        refuse_nan(raw_scores(weight, rule, context), f"the score of {name!r}")
        raise NaNError(f"Expected unit scores that are numbers for {name!r}; got NaN.") from None
    return spread(keep, block, weight.shape)


def _refuse_strangers(what: str, given: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
    for name in given:
        if name not in params:
            raise KeyError(
                f"Expected {what} of known parameters; got {name!r}.{near_misses(name, params)}"
            )


def apply_masks(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``params`` with pruned entries zero; a parameter without a mask is passed through.

    ``out = where(mask, w, 0)``: a pruned inf becomes 0, and the gradient of a pruned entry is 0.
    Works under ``torch.func`` transforms, ``vmap`` over masks among them.

    >>> apply_masks({"w": torch.ones(2), "b": torch.ones(1)}, {"w": torch.tensor([True, False])})
    {'w': tensor([1., 0.]), 'b': tensor([1.])}
    """
    check_params(params)
    _refuse_swapped(params, masks)
    _refuse_strangers("masks", masks, params)
    return {
        name: _masked(name, weight, masks[name]) if name in masks else weight
        for name, weight in params.items()
    }


def _refuse_swapped(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    check_masks(masks)
    if not params or any(param.dtype != torch.bool for param in params.values()):
        return
    if any(mask.dtype != torch.bool for mask in masks.values()):
        raise TypeError(
            "Expected params and then masks; got bool tensors alone as params, so that both seem "
            "swapped. The order is apply_masks(params, masks)."
        )


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
    check_masks(masks, "; Pruner.report() counts the zeros of a model")
    for name, mask in masks.items():
        check_mask(name, mask, mask)
        refuse_parts(name, mask)
    tensors = {
        name: Count(mask.numel() - int(torch.count_nonzero(mask)), mask.numel())
        for name, mask in masks.items()
    }
    zeros = sum(c.zeros for c in tensors.values())
    return Sparsity(zeros, sum(c.entries for c in tensors.values()), tensors)
