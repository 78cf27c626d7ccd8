"""Masks that hold at every step, for models that were pruned before."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from purprune import Rule, infer_masks
from purprune.given import refuse_unfit_floor, refuse_without_rule
from purprune_adapters.distributed import is_sharded, local, placed, shared_like


def given_floor(
    masks: Mapping[str, Tensor], params: Mapping[str, Tensor], rules: Mapping[str, Rule]
) -> dict[str, Tensor]:
    """Return copies of masks that were given, after a check that they fit.

    Of masks in shards it takes all processes to tell whether they prune whole units: they do when
    they first compute masks.
    """
    if not isinstance(masks, Mapping):
        raise TypeError(f"Expected masks as a dict by name; got {type(masks).__name__}.")
    refuse_without_rule(masks, rules)
    whole = {name: mask for name, mask in masks.items() if not is_sharded(mask)}
    refuse_unfit_floor(whole, params, rules)
    return {name: placed(name, mask, params[name]) for name, mask in masks.items()}


def floor_of_zeros(params: Mapping[str, Tensor], rules: Mapping[str, Rule]) -> dict[str, Tensor]:
    """Return the masks that the zeros in the weights stand for, after the same check."""
    found = infer_masks({name: local(param) for name, param in params.items()}, names=params)
    whole = {name: mask for name, mask in found.items() if not is_sharded(params[name])}
    refuse_unfit_floor(whole, params, rules)
    return {name: shared_like(name, mask, params[name]) for name, mask in found.items()}
