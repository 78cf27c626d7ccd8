"""An assertion for tests and training loops: what masks prune is zero."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from purprune.errors import near_misses
from purprune.scoring import check_mask, check_masks, refuse_parts
from purprune.selection import check_params


@torch.no_grad()
def assert_sparse(model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise an AssertionError unless every entry that a mask prunes is zero.

    -0.0 is zero; NaN is not.

    Args:
        model: a model, or a flat mapping of names to tensors.
        masks: bool masks by parameter name, True = keep.

    Raises:
        AssertionError: names each parameter and its number of pruned entries that are not zero.
        KeyError, ValueError, TypeError: a mask is of no parameter, or does not fit it.

    >>> layer = nn.Linear(2, 1)
    >>> _ = nn.init.ones_(layer.weight)
    >>> assert_sparse(layer, {"weight": torch.tensor([[True, False]])})
    Traceback (most recent call last):
    AssertionError: Expected zeros where masks prune; got 1 of 1 not zero in 'weight'.
    """
    params: Mapping[str, Tensor] = (
        dict(model.named_parameters(remove_duplicate=False))
        if isinstance(model, nn.Module)
        else model
    )
    check_params(params)
    check_masks(masks)
    found = []
    for name, mask in masks.items():
        if name not in params:
            raise KeyError(
                f"Expected masks of known parameters; got {name!r}.{near_misses(name, params)}"
            )
        check_mask(name, mask, params[name])
        refuse_parts(name, params[name])
        pruned = params[name].detach()[~mask.to(params[name].device)]
        if wrong := int((pruned.float() != 0).sum()):
            found.append(f"{wrong:,} of {pruned.numel():,} not zero in {name!r}")
    if found:
        raise AssertionError(f"Expected zeros where masks prune; got {', '.join(found)}.")
