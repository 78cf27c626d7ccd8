"""Masks that come from elsewhere: inferred from zeros, or checked against a config."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch
from torch import Tensor

from purprune.config import Rule
from purprune.errors import SelectionError, near_misses
from purprune.masks import kept_units, refuse_unreadable, sparsity_at, unit_layout
from purprune.patterns import Layout
from purprune.ranking import count
from purprune.selection import check_params


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
        ConfigError: a tensor has no data, or is sparse in its layout.

    >>> infer_masks({"w": torch.tensor([[0.5, 0.0], [-0.0, 2.0]]), "b": torch.zeros(2)})
    {'w': tensor([[ True, False],
            [False,  True]])}
    """
    check_params(params)
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
    refuse_unreadable(name, weight)
    return (weight.float() if weight.itemsize == 1 else weight) != 0  # float8 can't be compared


@torch.no_grad()
def refuse_unfit_masks(
    masks: Mapping[str, Tensor],
    step: int,
    rules: Mapping[str, Rule],
    floor: Mapping[str, Tensor],
) -> None:
    """Raise unless the masks could be what :func:`compute_masks` returns at ``step``.

    Whole units are pruned, ``floor``'s among them, and in each group as many as the step and
    ``floor`` say. Which ones they are, the weights of the time decided.

    Raises:
        ValueError: a mask does not fit; names the parameter and the counts.
    """
    for name, rule in rules.items():
        mask = masks[name]
        lowest = floor.get(name, torch.ones_like(mask))
        block, layout = unit_layout(name, rule, mask.shape)
        kept = kept_units("masks", mask, block, mask, name)
        below = kept_units("floor", lowest, block, mask, name)
        if bool((kept & ~below).any()):
            raise ValueError(
                f"Expected masks[{name!r}] to prune what floor[{name!r}] prunes; it keeps some of "
                f"it. It is damaged, or of another run."
            )
        _refuse_counts(name, step, sparsity_at(name, rule, step), kept, below, layout)


def _refuse_counts(
    name: str, step: int, sparsity: Fraction, kept: Tensor, below: Tensor, layout: Layout
) -> None:
    floors = _pruned_by_group(below, layout)
    for (size, pruned), (_, least) in zip(_pruned_by_group(kept, layout), floors, strict=True):
        due = least.clamp(min=count(size, sparsity))
        if not torch.equal(pruned, due):
            at = int((pruned != due).nonzero()[0])
            raise ValueError(
                f"Expected {int(due[at])} of {size} units pruned in {name!r} at step {step}, in "
                f"each group; the masks prune {int(pruned[at])}. They are damaged, or of another "
                f"step."
            )


def refuse_unfit_floor(
    floor: Mapping[str, Tensor], params: Mapping[str, Tensor], rules: Mapping[str, Rule]
) -> None:
    """Raise unless each mask is of a parameter with a rule, has its shape, and prunes whole units.

    Raises:
        ValueError, TypeError, SelectionError: a mask does not fit; names the parameter.
    """
    for name, mask in floor.items():
        if name not in rules:
            raise SelectionError(
                f"Expected masks of parameters that a rule is for; got {name!r}."
                f"{near_misses(str(name), rules)} Rule(0.0) keeps its zeros and prunes no more; "
                f"or leave its mask out."
            )
        if not isinstance(mask, Tensor):
            raise TypeError(f"Expected a bool mask for {name!r}; got {type(mask).__name__}.")
        block, _ = unit_layout(name, rules[name], params[name].shape)
        kept_units("masks", mask, block, params[name], name)


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
