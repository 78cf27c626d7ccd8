"""Pruned weights in the forms of others: torch's 2:4 tensors, and state dicts of the dense class.

A finalized model needs none of this: its ``state_dict`` loads into the class that was pruned. Here
is what masks of the pure functions need, which have no model to finalize.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from purprune import apply_masks
from purprune.errors import near_misses
from purprune_adapters.distributed import is_sharded

_CAPABILITY = (8, 0)
_KERNELS = (torch.float16, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class SemiStructured:
    """Weights that were checked to be 2:4, in torch's compressed form where a device has it."""

    weights: Mapping[str, Tensor]
    """By name: ``SparseSemiStructuredTensor``, or the dense weight with its zeros."""
    compressed: tuple[str, ...]
    """Which of them are compressed."""
    reason: str
    """Why others are not; empty when all are."""

    def __str__(self) -> str:
        """Return how many are compressed, and why others are not."""
        found = f"{len(self.compressed)} of {len(self.weights)} weights are compressed"
        return f"{found}: {self.reason}" if self.reason else found


def to_semi_structured(
    model: nn.Module | Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> SemiStructured:
    """Return the masked weights as torch's semi-structured (2:4) tensors.

    Checked first, on any device, for all of them: along dim 1 every 4 neighbours keep at most 2
    entries, dims are the multiples that torch's kernels take, and the dtype is one that they
    compute 2:4 with (of float32 they keep 1 of 2). Compressed is what lies on a CUDA device of
    capability 8.0 or more; elsewhere the weights come back dense, and ``reason`` says why. The
    model is not changed: ``setattr(layer, "weight", nn.Parameter(weight, requires_grad=False))``
    puts one in.

    Raises:
        ValueError: a weight can't be one; says what differs, and where.
        KeyError: there is no such parameter.

    >>> from purprune import NM, Rule, compute_masks
    >>> params = {"fc.weight": torch.randn(64, 64).half()}
    >>> masks = compute_masks(params, 0, Rule(pattern=NM(2, 4)))
    >>> print(to_semi_structured(params, masks))
    0 of 1 weights are compressed: torch's kernels need CUDA, and weights are on the cpu
    """
    params = dict(model.named_parameters()) if isinstance(model, nn.Module) else dict(model)
    _refuse_unfit_names(params, masks)
    chosen = {name: params[name].detach() for name in masks}
    for name, weight in chosen.items():
        _refuse_unfit(name, weight)
    weights = apply_masks(chosen, masks)
    for name, weight in weights.items():
        _refuse_other_pattern(name, weight)
    reasons = {name: _why_dense(weight) for name, weight in weights.items()}
    compressed = tuple(name for name, reason in reasons.items() if not reason)
    for name in compressed:
        weights[name] = torch.sparse.to_sparse_semi_structured(weights[name].contiguous())
    why = "; ".join(dict.fromkeys(filter(None, reasons.values())))
    return SemiStructured(MappingProxyType(weights), compressed, why)


def _refuse_unfit_names(params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for name in masks:
        if name not in params:
            raise KeyError(
                f"Expected masks of parameters; got {name!r}.{near_misses(name, params)}"
            )
        if is_sharded(params[name]):
            raise ValueError(
                f"Expected a whole weight for {name!r}; it is in shards. Call full_tensor() on "
                f"every process first."
            )


def _refuse_unfit(name: str, weight: Tensor) -> None:
    if weight.dim() != 2:
        raise ValueError(
            f"Expected a weight of two dims for {name!r}; got shape {tuple(weight.shape)}. torch "
            f"has 2:4 kernels for matrices only."
        )
    if weight.dtype not in _KERNELS:
        raise ValueError(
            f"Expected float16, bfloat16 or int8 for {name!r}; got {weight.dtype}. Convert the "
            f"weight first, for instance with model.half()."
        )
    rows, columns = _multiples(weight.dtype)
    if weight.shape[0] % rows or weight.shape[1] % columns or not weight.numel():
        raise ValueError(
            f"Expected rows that are a multiple of {rows} and columns of {columns} for {name!r} "
            f"in {weight.dtype}; got shape {tuple(weight.shape)}. Leave it dense."
        )


def _multiples(dtype: torch.dtype) -> tuple[int, int]:
    """Return of what rows and columns are multiples in the backend that torch takes."""
    sparse: Any = torch.sparse
    cutlass = sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
    backend = "CUTLASS" if cutlass else "CUSPARSELT"
    found = getattr(sparse, f"SparseSemiStructuredTensor{backend}")._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return found.sparse_min_rows, found.sparse_min_cols


def _refuse_other_pattern(name: str, weight: Tensor) -> None:
    kept = (weight.reshape(len(weight), -1, 4) != 0).sum(dim=2)
    if not int((full := kept > 2).sum()):
        return
    row, group = torch.nonzero(full)[0].tolist()
    raise ValueError(
        f"Expected at most 2 non-zeros in every 4 along dim 1 of {name!r}; {int(full.sum())} of "
        f"{full.numel()} groups have more, the first in row {row} from column {4 * group}. "
        f"NM(zeros=2, m=4) makes such masks."
    )


def _why_dense(weight: Tensor) -> str:
    if weight.device.type != "cuda":
        return f"torch's kernels need CUDA, and weights are on the {weight.device.type}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < _CAPABILITY:
        have = ".".join(map(str, capability))
        return (
            f"torch's kernels need a CUDA device of capability 8.0, and {weight.device} has {have}"
        )
    return ""


def zeroed_state_dict(model: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the model's ``state_dict`` with the pruned entries zero, for the unpruned class.

    Keys, shapes and buffers are those of the model, tied weights are zero under every name, and
    the model is not changed. Zeroed weights are new tensors, the others are those of the model.

    Raises:
        KeyError: there is no such parameter.
        ValueError: a mask does not fit its parameter.

    >>> model = nn.Linear(2, 1)
    >>> state = zeroed_state_dict(model, {"weight": torch.tensor([[True, False]])})
    >>> nn.Linear(2, 1).load_state_dict(state), int((state["weight"] == 0).sum())
    (<All keys matched successfully>, 1)
    """
    params = dict(model.named_parameters(remove_duplicate=False))
    _refuse_unfit_names(params, masks)
    zeroed = apply_masks({name: params[name].detach() for name in masks}, masks)
    ties = {id(params[name]): weight for name, weight in zeroed.items()}
    return {
        key: ties.get(id(params[key]), tensor) if key in params else tensor
        for key, tensor in model.state_dict().items()
    }
