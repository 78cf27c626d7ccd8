"""What a pruner has to know of models whose weights lie in shards.

Nothing here imports the machinery of shards: where it was never imported, no weight is sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import purprune
from purprune.updating import Compute


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: writing into it writes into the tensor."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        held: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return held


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules below a model that ``fully_shard`` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not torch.distributed.is_initialized():
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Put shards back where FSDP left gathered weights, as it does at the root after a forward."""
    for module in fsdp_modules(model):
        module.reshard()


def computing(params: Mapping[str, Tensor]) -> Compute:
    """Return ``compute_masks``, or what computes the same masks from the shards of weights."""
    if not any(map(is_sharded, params.values())):
        return purprune.compute_masks
    from purprune_adapters.sharded import sharded_masks

    return sharded_masks


def counted(tensors: Mapping[str, Tensor], count: Callable[[str, Tensor], int]) -> dict[str, int]:
    """Count something in each tensor by name; where they are sharded it is a collective call."""
    own = {name: [count(name, local(tensor))] for name, tensor in tensors.items()}
    return {name: n for name, (n,) in summed(own, tensors).items()}


def not_finite(tensors: Mapping[str, Tensor]) -> int:
    """Count entries that are inf or NaN; where tensors are sharded it is a collective call."""
    return sum(counted(tensors, lambda _, tensor: int((~tensor.isfinite()).sum())).values())


def summed(counts: Mapping[str, list[int]], tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Sum counts by name over the processes that hold different parts of the tensors."""
    if not any(map(is_sharded, tensors.values())):
        return dict(counts)
    from purprune_adapters.shards import totals

    return totals(counts, tensors)


def shared_like(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """Return the mask of what this process holds of a weight as a mask of the weight."""
    if not is_sharded(like):
        return mask
    from purprune_adapters.shards import shards_of

    return shards_of(name, like).share(mask, like)  # type: ignore[arg-type]


def brought(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """Return a mask where its weight is: itself, or a copy when the model moved."""
    there = mask.device == like.device and is_sharded(mask) == is_sharded(like)
    return mask if there else placed(name, mask, like)


def placed(name: str, mask: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a mask where its weight is: on the device, or in the shards, of ``like``."""
    if not is_sharded(like):
        if is_sharded(mask):
            raise ValueError(
                f"Expected a whole mask for {name!r}, as its weight is whole; got shards. Load it "
                f"with torch.distributed.checkpoint, or call full_tensor() on every process."
            )
        return mask.detach().to(like.device, copy=True)
    from purprune_adapters.shards import shards_of

    shards = shards_of(name, like)  # type: ignore[arg-type]
    if not is_sharded(mask):
        return shards.share(mask.detach()[shards.here].to(local(like).device, copy=True), like)
    if shards_of(name, mask)[:2] != shards[:2]:  # type: ignore[arg-type]
        raise ValueError(
            f"Expected a mask in the shards of {name!r}, {shards.placements}; got "
            f"{tuple(mask.placements)}. torch.distributed.checkpoint reshards what it loads."  # type: ignore[attr-defined]
        )
    return mask.detach().clone()
