"""What a pruner refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from purprune import SelectionError


def refuse_unfit_parameters(
    params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise when a parameter has no memory of its own, or the optimizer does not hold it."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} if optimizer else {}
    for name, param in params.items():
        if param.is_meta:
            raise SelectionError(
                f"Expected parameters with data; {name!r} is on the meta device. Load the model's "
                f"weights first; purprune.plan and resolve work without data."
            )
        if any(n > 1 and s == 0 for n, s in zip(param.shape, param.stride(), strict=True)):
            raise SelectionError(
                f"Expected parameters that can be written to; {name!r} is an expanded view. Make "
                f"it contiguous first."
            )
        if optimizer is not None and param.requires_grad and id(param) not in held:
            raise ValueError(
                f"Expected an optimizer that holds the model's parameters; it does not hold "
                f"{name!r}. Make it from model.parameters() of the model given to Pruner."
            )


def refuse_copy(
    given: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer | None, inplace: bool
) -> None:
    """Raise when a deepcopy to train would lose what belongs to the model that was given."""
    if inplace:
        return
    if optimizer is not None:
        raise ValueError(
            "Expected prepare(inplace=True) with optimizer=..., which holds the parameters of "
            "this model; a deepcopy would train without it."
        )
    if given is not model:
        raise ValueError(
            f"Expected prepare(inplace=True) for a model inside {type(given).__name__}; a "
            f"deepcopy would train without the wrapper. Or prepare the model, then wrap it."
        )


def refuse_another_model(
    model: nn.Module, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> None:
    """Raise when a model to finalize has other parameters than the pruned one."""
    for name, mask in masks.items():
        if name not in params:
            wraps = f"module.{name}" in params
            raise ValueError(
                f"Expected a model with the parameters of the pruned one; got "
                f"{type(model).__name__} without {name!r}."
                + (" It wraps the model: pass its .module." if wraps else "")
            )
        if params[name].shape != mask.shape:
            raise ValueError(
                f"Expected {name!r} of shape {tuple(mask.shape)}; got {tuple(params[name].shape)}."
            )
