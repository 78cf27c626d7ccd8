"""Masks that come from elsewhere: inferred from zeros, or checked against a config."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from purprune.balancing import limits_of
from purprune.errors import SelectionError, near_misses
from purprune.groups import Layout
from purprune.ranking import count
from purprune.rules import Rule
from purprune.scoring import kept_units, readable, unit_layout
from purprune.selection import check_params
from purprune.totals import sharing, sparsities_at
from purprune.transposable import refuse_uneven

Total = Callable[[Mapping[str, list[int]]], dict[str, list[int]]]


@torch.no_grad()
def infer_masks(
    params: Mapping[str, Tensor], *, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """Return the masks that zeros in the weights stand for: True where an entry is not zero.

    -0.0 is zero; infinities and NaN are not.

    Args:
        params: flat mapping of dotted names to tensors, as ``dict(model.named_parameters())``.
        names: the parameters to look at, each of which gets a mask. None means every
            floating-point tensor of two or more dims that has a zero: biases and norms, which
            are often zero without being pruned, have to be named.

    Raises:
        SelectionError: a name is not in ``params``.
        TypeError: ``names`` is a text.
        ConfigError: a tensor has no data, or is sparse in its layout.

    >>> infer_masks({"w": torch.tensor([[0.5, 0.0], [-0.0, 2.0]]), "b": torch.zeros(2)})
    {'w': tensor([[ True, False],
            [False,  True]])}
    """
    check_params(params)
    if isinstance(names, str):
        raise TypeError(f"Expected names as a list; got the text {names!r}. Pass [{names!r}].")
    if names is not None:
        return {name: _nonzero(name, _found(name, params)) for name in names}
    found = {
        name: _nonzero(name, weight)
        for name, weight in params.items()
        if weight.is_floating_point() and weight.dim() >= 2
    }
    return {name: mask for name, mask in found.items() if not bool(mask.all())}


def _found(name: str, params: Mapping[str, Tensor]) -> Tensor:
    if name not in params:
        raise SelectionError(
            f"Expected names of parameters; got {name!r}.{near_misses(str(name), params)}"
        )
    return params[name]


def _nonzero(name: str, weight: Tensor) -> Tensor:
    weight = readable(name, weight)
    return (weight.float() if weight.itemsize == 1 else weight) != 0  # float8 can't be compared


@torch.no_grad()
def refuse_unfit_masks(
    masks: Mapping[str, Tensor],
    step: int,
    rules: Mapping[str, Rule],
    floor: Mapping[str, Tensor],
    total: Total = dict,
    shapes: Mapping[str, Tensor] | None = None,
) -> None:
    """Raise unless the masks could be what :func:`compute_masks` returns at ``step``.

    Whole units are pruned, ``floor``'s among them, and in each group as many as the step and
    ``floor`` say. Which ones they are, the weights of the time decided.

    Args:
        masks: the masks, or what this process holds of them.
        step: the step that they are of.
        rules: the rules by name.
        floor: masks that hold at every step, or what this process holds of them.
        total: sums counts by name over all processes that hold parts of the masks.
        shapes: tensors with the whole shapes, where the masks are parts.

    Raises:
        ValueError: a mask does not fit; names the parameter and the counts. In every process.
    """
    sparsities = sparsities_at(rules, masks if shapes is None else shapes, step)
    counts: dict[str, list[int]] = {}
    failure: Exception | None = None
    for name, rule in rules.items():
        try:
            counts[name] = [
                0,
                *_counted(name, rule, sparsities[name], step, masks[name], floor.get(name)),
            ]
        except (TypeError, ValueError) as error:
            failure, counts[name] = failure or error, [1, 0, 0, 0]
    found = total(counts)
    if failure is not None:
        raise failure
    for name, (failed, *_) in found.items():
        if failed:
            raise ValueError(
                f"Expected a mask for {name!r} that fits in every process; in another one it does "
                f"not. It is damaged, or of another step; the error there says how."
            )
    for names in _of_one_count(rules):
        units, pruned, held = ([found[name][i] for name in names] for i in (1, 2, 3))
        sparsity = sparsities[names[0]]
        limits = limits_of(rules[names[0]].pattern.group, units, sparsity, held)
        due = max(sum(low for low, _ in limits), count(sum(units), sparsity))
        _refuse_count(" and ".join(map(repr, names)), sum(units), due, sum(pruned), step)
        for name, n, gone, (low, high) in zip(names, units, pruned, limits, strict=True):
            _refuse_count(repr(name), n, min(max(gone, low), high), gone, step)


def _counted(
    name: str, rule: Rule, sparsity: Fraction, step: int, mask: Tensor, floor: Tensor | None
) -> tuple[int, int, int]:
    """Return the units, how many of them are pruned, and how many a floor prunes.

    Groups within a tensor are checked here, and have no counts.
    """
    block, layout = unit_layout(name, rule, mask.shape)
    kept = kept_units("masks", mask, block, mask, name)
    floor = torch.ones_like(mask) if floor is None else floor
    below = kept_units("floor", floor, block, mask, name)
    if bool((kept & ~below).any()):
        raise ValueError(
            f"Expected masks[{name!r}] to prune what floor[{name!r}] prunes; it keeps some of "
            f"it. It is damaged, or of another run."
        )
    if layout.is_whole:
        return kept.numel(), int((~kept).sum()), int((~below).sum())
    refuse_uneven(name, rule.pattern.group, floor=below, masks=kept)
    floors = _pruned_by_group(below, layout)
    for (size, pruned), (_, least) in zip(_pruned_by_group(kept, layout), floors, strict=True):
        due = least.clamp(min=count(size, sparsity))
        if not torch.equal(pruned, due):
            at = int((pruned != due).nonzero()[0])
            _refuse_count(repr(name), size, int(due[at]), int(pruned[at]), step)
    return 0, 0, 0


def _of_one_count(rules: Mapping[str, Rule]) -> list[tuple[str, ...]]:
    """Return the names of tensors with one count; most have one of their own."""
    shared = [names for names in sharing(rules) if rules[names[0]].is_global]
    others = set(rules).difference(*shared)
    return [*shared, *((name,) for name in rules if name in others)]


def _refuse_count(names: str, units: int, due: int, pruned: int, step: int) -> None:
    if pruned != due:
        raise ValueError(
            f"Expected {due} of {units} units pruned in {names} at step {step}, in each group; the "
            f"masks prune {pruned}. They are damaged, or of another step."
        )


def refuse_unfit_floor(
    floor: Mapping[str, Tensor], params: Mapping[str, Tensor], rules: Mapping[str, Rule]
) -> None:
    """Raise unless each mask is of a parameter with a rule, has its shape, and prunes whole units.

    Raises:
        ValueError, TypeError, SelectionError: a mask does not fit; names the parameter.
    """
    refuse_without_rule(floor, rules)
    for name, mask in floor.items():
        if not isinstance(mask, Tensor):
            raise TypeError(f"Expected a bool mask for {name!r}; got {type(mask).__name__}.")
        block, _ = unit_layout(name, rules[name], params[name].shape)
        kept = kept_units("masks", mask, block, params[name], name)
        refuse_uneven(name, rules[name].pattern.group, masks=kept)


def refuse_without_rule(floor: Iterable[str], rules: Mapping[str, Rule]) -> None:
    """Raise a SelectionError when a mask is given for a parameter without a rule."""
    for name in floor:
        if name not in rules:
            raise SelectionError(
                f"Expected masks of parameters that a rule is for; got {name!r}."
                f"{near_misses(str(name), rules)} Rule(0.0) keeps its zeros and prunes no more; "
                f"or leave its mask out."
            )


def _pruned_by_group(kept: Tensor, layout: Layout) -> list[tuple[int, Tensor]]:
    """Return for each span of groups their size, and how many units of each group are pruned."""
    moved = kept.permute(layout.order)
    rows = math.prod(moved.shape[: layout.lead])
    columns = math.prod(moved.shape[layout.lead :])
    units = moved.reshape(rows, columns)
    return [
        (size, size - units[:, start:stop].reshape(-1, size).sum(dim=1))
        for start, stop, size in layout.spans(columns)
    ]
