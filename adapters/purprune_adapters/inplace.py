"""Writing zeros in place: the one thing that the pure core never does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from purprune.threads import in_threads

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 17


@torch.no_grad()
def zero_pruned_(tensor: Tensor, mask: Tensor) -> None:
    """Set the pruned entries of ``tensor`` to +0; the others keep every bit.

    ``mask`` is bool, True = keep. The words of the tensor are multiplied by 0 or 1 as integers: a
    pruned inf or NaN becomes 0 too, and one byte per entry is read where a float mask costs four.
    """
    words = _WORDS.get(tensor.itemsize)
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if words is None or not plain or not tensor.is_floating_point():
        tensor.detach().masked_fill_(~mask, 0)
        return
    bits, factors = tensor.detach().view(words), mask.view(torch.int8)
    if bits.device.type == "cpu" and bits.is_contiguous() and bits.numel() > _CHUNK:
        _multiply_(bits, factors.contiguous())
        torch.autograd.graph.increment_version(tensor)
    else:
        bits.mul_(factors)


def _multiply_(bits: Tensor, factors: Tensor) -> None:
    """Multiply large tensors with numpy: torch widens the whole mask first, in fresh memory."""
    into, by = bits.view(-1).numpy(), factors.view(-1).numpy()

    def work(starts: Sequence[int]) -> None:
        wide = np.empty(_CHUNK, into.dtype)
        for start in starts:
            part = into[start : start + _CHUNK]
            np.copyto(wide[: part.size], by[start : start + _CHUNK])
            np.multiply(part, wide[: part.size], out=part)

    in_threads(work, range(0, into.size, _CHUNK))
