"""What is checked before any work: target, options, model, masks and example inputs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from purprune.errors import near_misses
from purprune_adapters.hooks import MaskHook

from .storage import COMPRESSIONS

__all__ = [
    "as_inputs",
    "check_masks",
    "check_model",
    "check_options",
    "check_weights",
    "pruned_parameters",
    "resolve_target",
]

_LARGEST_FLOAT16 = 65504.0
PRECISIONS = ("float16", "float32")
FRONTENDS = ("auto", "export", "trace")


def resolve_target(coremltools: Any, target: Any) -> Any:
    """A member of ``ct.target`` that can store sparse weights.

    Raises:
        TypeError, ValueError: not a target, or older than iOS16 / macOS13.
    """
    members = coremltools.target.__members__
    able = [name for name, member in members.items() if member >= coremltools.target.iOS16]
    if isinstance(target, str):
        if target not in members:
            raise ValueError(
                f"Expected target to be one of {', '.join(able)}; got {target!r}."
                f"{near_misses(target, able)}"
            )
        target = members[target]
    if not isinstance(target, coremltools.target):
        raise TypeError(
            f"Expected target as a name like 'iOS16' or a coremltools.target; got {target!r}."
        )
    if target < coremltools.target.iOS16:
        raise ValueError(
            f"Expected target iOS16 / macOS13 or later; got {target.name}. Older systems have no "
            f"sparse weights, so the package would be dense. Pass one of {', '.join(able)}."
        )
    return target


def check_options(
    coremltools: Any,
    target: Any,
    *,
    precision: str,
    compress: str | None,
    frontend: str,
    min_sparsity: float | None,
    keep_float32: Any = (),
    flexible: bool = False,
) -> None:
    """Raise for an option outside its values, or one that the target or another can't have.

    Raises:
        TypeError: ``keep_float32`` isn't a sequence of texts.
        ValueError: everything else.
    """
    if compress is not None:
        if compress not in COMPRESSIONS:
            known = ", ".join(repr(name) for name in COMPRESSIONS)
            raise ValueError(f"Expected compress to be None or one of {known}; got {compress!r}.")
        if target < coremltools.target.iOS18:
            raise ValueError(
                f"compress={compress!r} needs target iOS18 / macOS15 or later; got {target.name}. "
                "Pass target='iOS18', or compress=None."
            )
    for name, value, known_values in (
        ("precision", precision, PRECISIONS),
        ("frontend", frontend, FRONTENDS),
    ):
        if value not in known_values:
            words = ", ".join(repr(v) for v in known_values)
            raise ValueError(f"Expected {name} to be one of {words}; got {value!r}.")
    if min_sparsity is not None and not 0.0 <= min_sparsity <= 1.0:
        raise ValueError(f"Expected 0 <= min_sparsity <= 1 (or None); got {min_sparsity!r}.")
    if flexible and frontend == "export":
        raise ValueError(
            "Expected inputs=None with frontend='export'; only tracing takes inputs. Pass "
            "frontend='trace' or leave frontend out."
        )
    _check_operations(keep_float32)


def _check_operations(keep: Any) -> None:
    """Raise for anything but names of MIL operations; a misspelled one would keep nothing."""
    if isinstance(keep, str) or not isinstance(keep, Sequence | Set):
        raise TypeError(
            f"Expected keep_float32 as a tuple of MIL operations, like ('softmax',); got {keep!r}."
        )
    builder = importlib.import_module("coremltools.converters.mil").Builder
    made = {name: getattr(builder, name) for name in dir(builder) if name[0] != "_"}
    # Operations are registered from elsewhere; the builder's own methods aren't operations.
    known = [n for n, one in made.items() if callable(one) and one.__module__ != builder.__module__]
    for name in keep:
        if name not in known:
            near = near_misses(name, known) if isinstance(name, str) else ""
            raise ValueError(
                f"Expected keep_float32 to name MIL operations, like 'softmax'; got {name!r}.{near}"
            )


def check_model(model: Any) -> None:
    """Raise for anything that isn't a finalized module in eval mode with materialized parameters.

    Raises:
        TypeError: not a module.
        ValueError: in training mode, still held by a pruner, or on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected model as a torch.nn.Module; got {type(model).__name__}.")
    for name, module in model.named_modules():
        if module.training:
            where = f"submodule '{name}'" if name else "the model"
            raise ValueError(
                f"Expected a model in eval mode; {where} ({type(module).__name__}) is in training "
                "mode. Call model.eval() first: dropout and batch norm differ between the two."
            )
        if any(isinstance(hook, MaskHook) for hook in module._forward_pre_hooks.values()):
            raise ValueError(
                "Expected a finalized model; a pruner still holds this one. Export what "
                "pruner.finalize() returns."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"Expected weights with values; '{name}' is on the meta device. Load the weights "
                "first, for example with model.to_empty(device='cpu') and load_state_dict."
            )


def as_inputs(example_inputs: Any) -> tuple[Tensor, ...]:
    """The example inputs as a tuple of tensors on the CPU, half precision upcast to float32.

    Raises:
        TypeError: not a tensor or a tuple (or list) of tensors.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else example_inputs
    if not isinstance(inputs, tuple | list) or not inputs:
        raise TypeError(
            "Expected example_inputs as a tensor or a tuple of tensors; got "
            f"{type(example_inputs).__name__}."
        )
    for place, one in enumerate(inputs):
        if not isinstance(one, Tensor):
            raise TypeError(
                f"Expected example_inputs[{place}] as a tensor; got {type(one).__name__}."
            )
    return tuple(
        one.detach().cpu().float() if one.is_floating_point() else one.detach().cpu()
        for one in inputs
    )


def check_weights(params: Mapping[str, Tensor], *, precision: str = "float32") -> None:
    """Raise ValueError for NaN and inf, and for what float16 can't hold in a float16 package."""
    for name, tensor in params.items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # An infinity or a NaN anywhere makes one of the two ends not finite.
        low, high = (float(v) for v in torch.aminmax(tensor.detach()))
        top = max(abs(low), abs(high))
        if not top < float("inf"):
            bad = tensor.numel() - int(torch.isfinite(tensor.detach()).sum())
            raise ValueError(
                f"Expected finite weights; got {bad} NaN or inf of {tensor.numel()} in '{name}'. "
                "Look for a diverged training step; nothing was exported."
            )
        if precision == "float16" and top > _LARGEST_FLOAT16:
            raise ValueError(
                f"Expected weights within +-{_LARGEST_FLOAT16:g} for precision='float16'; got "
                f"{top:g} in '{name}'. Pass precision='float32'."
            )


def check_masks(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Raise for masks that don't belong to the parameters.

    Raises:
        TypeError: a mask isn't a bool tensor.
        ValueError: an unknown name, another shape, or pruned entries that aren't zero.
    """
    for name, mask in masks.items():
        if name not in params:
            raise ValueError(
                f"Expected masks for parameters of the model; it has no '{name}'. It has "
                f"{', '.join(repr(n) for n in list(params)[:8])}, ..."
            )
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Expected a bool mask (True = keep) for '{name}'; got {kind}.")
        if mask.shape != params[name].shape:
            raise ValueError(
                f"Expected a mask of shape {tuple(params[name].shape)} for '{name}'; got "
                f"{tuple(mask.shape)}."
            )


def pruned_parameters(
    params: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The parameters that count as pruned, by name.

    Raises:
        TypeError, ValueError: as ``check_masks``, or nothing is pruned.
    """
    if masks is None:
        found = {
            name: tensor.detach()
            for name, tensor in params.items()
            if tensor.is_floating_point()
            and tensor.ndim >= 2
            and int(torch.count_nonzero(tensor)) < tensor.numel()
        }
        if not found:
            raise ValueError(
                "Expected a pruned model; no floating-point parameter of two or more dimensions "
                "holds a zero. Prune it and call finalize() first; an unpruned model needs "
                "coremltools.convert alone."
            )
        return found
    check_masks(params, masks)
    found = {name: params[name].detach() for name, mask in masks.items() if not bool(mask.all())}
    if not found:
        raise ValueError(
            f"Expected masks that prune something; all {len(masks)} masks keep every entry. Did "
            "the schedule reach its first update?"
        )
    for name, tensor in found.items():
        mask = masks[name].to(tensor.device)
        alive = int(torch.count_nonzero(tensor * ~mask))
        if alive:
            raise ValueError(
                f"Expected zeros where masks prune; {alive} pruned entries of '{name}' aren't "
                "zero. Call finalize() first, or apply the masks to the weights."
            )
    return found
