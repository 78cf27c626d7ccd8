"""Writing zeros in place: the one thing that the pure core never does."""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def zero_pruned_(tensor: Tensor, mask: Tensor) -> None:
    """Set the pruned entries of ``tensor`` to +0; the others keep every bit.

    ``mask`` is bool, True = keep. The words of the tensor are multiplied by 0 or 1 as integers: a
    pruned inf or NaN becomes 0 too, and one byte per entry is read where a float mask costs four.
    """
    words = _WORDS.get(tensor.itemsize)
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    if words is not None and plain and tensor.is_floating_point():
        tensor.detach().view(words).mul_(mask.view(torch.int8))
    else:
        tensor.detach().masked_fill_(~mask, 0)
