"""Writing zeros in place: the one thing that the pure core never does."""

from __future__ import annotations

import torch
from torch import Tensor

from purprune.ranking import WORDS
from purprune.scratch import scratch

_CHUNK = 1 << 19
"""Entries at a time on the CPU: the widened mask stays in the cache, in memory used again."""

_WORDS = {
    dtype: WORDS[dtype.itemsize]
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize in WORDS
}


def zero_pruned_(tensor: Tensor, mask: Tensor) -> None:
    """Set the pruned entries of ``tensor`` to +0; the others keep every bit.

    ``mask`` is bool, True = keep. The words of the tensor are multiplied by 0 or 1 as integers: a
    pruned inf or NaN becomes 0 too, and one byte per entry is read where a float mask costs four.
    """
    tensor = tensor.detach()  # each step comes here for each tensor: as few calls as may be
    words = _WORDS.get(tensor.dtype)
    if words is None or type(tensor) is not Tensor or tensor.layout is not torch.strided:
        tensor.masked_fill_(~mask, 0)
        return
    bits, factors = tensor.view(words), mask.view(torch.int8)
    if bits.numel() > _CHUNK and bits.device.type == "cpu":
        _multiply_(bits, factors)
    else:
        bits.mul_(factors)


@torch.no_grad()
def is_zero_where_pruned(tensor: Tensor, mask: Tensor) -> bool:
    """Tell whether every pruned entry of ``tensor`` is +0 or -0; NaN is not."""
    if tensor.shape != mask.shape or tensor.layout is not torch.strided:
        return False
    if tensor.dim() == 0 or tensor.numel() == 0:
        return bool(((tensor == 0) | mask).all())
    return not any(
        bool(((part != 0) & ~kept).any())
        for part, kept in zip(_chunks(tensor), _chunks(mask), strict=True)
    )


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    """Cut a tensor along its longest dim."""
    dim = max(range(tensor.dim()), key=tensor.shape.__getitem__)
    return torch.split(tensor, max(1, _CHUNK * tensor.shape[dim] // tensor.numel()), dim)


def _multiply_(bits: Tensor, factors: Tensor) -> None:
    """Multiply chunk by chunk: torch's product of two types widens one of them whole."""
    once = tuple(slice(0, 1) if step == 0 else slice(None) for step in factors.stride())
    if factors[once].numel() <= _CHUNK:  # few decisions, each for many entries
        bits.mul_(factors[once].to(bits.dtype))
        return
    if bits.is_contiguous() and factors.is_contiguous():
        bits, factors = bits.view(-1), factors.view(-1)
    parts = _chunks(factors)
    with scratch(parts[0].numel(), f"i{bits.itemsize}") as memory:
        wide = torch.from_numpy(memory)
        for into, by in zip(_chunks(bits), parts, strict=True):
            into.mul_(wide[: by.numel()].view(by.shape).copy_(by))
