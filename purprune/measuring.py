"""Measuring: the loss when one tensor alone is pruned, for every tensor and several sparsities."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, as_config
from purprune.groups import GlobalGroup, TensorGroup
from purprune.masks import apply_masks, compute_masks
from purprune.rules import Rule
from purprune.selection import check_params, select
from purprune.sensitivities import Sensitivity, as_levels

LossFn = Callable[[dict[str, Tensor], Any], Tensor]
"""``loss_fn(params, batch) -> scalar``, as for ``torch.func``."""

Run = Callable[[str, list[Tensor]], Tensor]
"""From a tensor's name and masks of it to the loss under each."""


@torch.no_grad()
def sensitivity(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    batch: Any,
    levels: Iterable[float | Fraction],
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    grads: Mapping[str, Tensor | None] | None = None,
    stats: Mapping[str, Mapping[str, Tensor]] | None = None,
    weight: float = 1.0,
    chunk_bytes: int = 1 << 28,
    vectorize: bool = True,
) -> Sensitivity:
    """Measure the loss when each tensor alone is pruned to each level, all others dense.

        losses[name][l] = loss_fn({**params, name: mask(name, levels[l]) * params[name]}, batch)

    Every tensor that a rule of ``cfg`` is for is pruned by that rule's score, unit and group; the
    level stands in for target, schedule and budget, and a global group is the tensor's own. A
    level at which nothing goes yet has the dense loss. In N:M groups ``floor(m * level)`` go.

    The levels of one tensor are stacked and go through ``torch.func.vmap``, in chunks of which the
    masked weights take up to ``chunk_bytes`` (at least one level). What follows the tensor is
    computed once per level of a chunk, activations included: ``chunk_bytes=0`` does one at a time.

    Args:
        loss_fn: ``loss_fn(params, batch) -> scalar``; a pure function, with
            ``torch.func.functional_call`` for a module in eval mode. Under ``vmap`` it can't draw
            random numbers: that raises.
        params: flat mapping of dotted names to tensors, as ``dict(model.named_parameters())``.
        batch: whatever ``loss_fn`` takes.
        levels: sparsities in [0, 1], ascending.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        grads: gradients by name, for scores that need them.
        stats: statistics by name, for scores that need them.
        weight: what the result counts in :func:`mean_sensitivity`, such as the batch's size.
        chunk_bytes: the memory of the masked weights of a chunk.
        vectorize: False calls ``loss_fn`` once per tensor and level, for one that ``vmap`` refuses.

    Raises:
        SelectionError, ConfigError, NaNError: as :func:`compute_masks` does.
        ConfigError: levels that are no ascending sparsities, or a loss that is not finite; names
            the tensor and the level.
        TypeError: ``loss_fn`` returns no scalar tensor.

    Source: Li et al., "Pruning filters for efficient ConvNets", 2017 (arXiv:1608.08710).

    >>> params = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}
    >>> loss_fn = lambda params, batch: (params["a"] * params["b"] * batch).sum()
    >>> print(sensitivity(loss_fn, params, torch.tensor(1.0), [0, 0.5, 1], Rule()))
    loss 11 dense; with one tensor pruned to:
    parameter |  0 | 0.5 | 1
    ----------+----+-----+--
    a         | 11 |   8 | 0
    b         | 11 |   8 | 0
    """
    check_params(params)
    rules = select(as_config(cfg), params).rules
    empty = Sensitivity(0.0, as_levels(levels), {}, weight)  # refuses levels before anything is run
    chunk_bytes = _check_bytes(chunk_bytes)
    run = functools.partial(_losses, loss_fn, params, batch, vectorize)
    first = next(iter(rules))
    dense = run(first, [torch.ones_like(params[first], dtype=torch.bool)])
    curves = {}
    for name, rule in rules.items():
        configs = (_alone(name, rule, level) for level in empty.levels)
        masks = (compute_masks(params, 0, c, grads=grads, stats=stats)[name] for c in configs)
        size = max(1, chunk_bytes // max(1, params[name].nbytes))
        curves[name] = torch.cat([_pruned(run, name, some, dense) for some in _chunks(masks, size)])
    return replace(empty, dense=float(dense), losses=curves)


def _chunks(masks: Iterator[Tensor], size: int) -> Iterator[list[Tensor]]:
    while chunk := [*itertools.islice(masks, size)]:
        yield chunk


def _check_bytes(chunk_bytes: int) -> int:
    if not isinstance(chunk_bytes, int) or chunk_bytes < 0:
        raise ValueError(f"Expected chunk_bytes as an int >= 0; got {chunk_bytes!r}.")
    return chunk_bytes


def _alone(name: str, rule: Rule, level: float | Fraction) -> PruneConfig:
    """Return a config for one tensor at a level, whatever target its rule or pattern sets."""
    pattern = rule.pattern
    if isinstance(pattern.group, GlobalGroup):
        pattern = replace(pattern, group=TensorGroup())
    alone = Rule(schedule=lambda step: level, score=rule.score, pattern=pattern)
    return PruneConfig(module_name_configs={name: alone})


def _pruned(run: Run, name: str, masks: list[Tensor], dense: Tensor) -> Tensor:
    """Return the loss under each mask; the dense one, to the bit, where a mask prunes nothing."""
    prunes = [not bool(mask.all()) for mask in masks]
    losses = dense.repeat(len(masks))
    if any(prunes):
        losses[prunes] = run(name, [*itertools.compress(masks, prunes)])
    return losses


def _losses(
    loss_fn: LossFn,
    params: Mapping[str, Tensor],
    batch: Any,
    vectorize: bool,
    name: str,
    masks: list[Tensor],
) -> Tensor:
    """Return the loss under each mask of one tensor, in float64."""

    def loss(mask: Tensor) -> Tensor:
        return _scalar(loss_fn(apply_masks(params, {name: mask}), batch))

    if not vectorize:
        return torch.stack([loss(mask) for mask in masks]).cpu().double()
    try:
        return torch.func.vmap(loss)(torch.stack(masks)).cpu().double()
    except RuntimeError as error:
        error.add_note("loss_fn ran under torch.func.vmap; vectorize=False calls it as it is.")
        raise


def _scalar(loss: Tensor) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() or loss.is_complex():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"Expected loss_fn to return a real scalar tensor; got {got}.")
    return loss
