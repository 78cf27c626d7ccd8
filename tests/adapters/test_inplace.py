"""Zeros written in place: every layout, in chunks and at once, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from purprune_adapters import inplace
from purprune_adapters.inplace import zero_pruned_

MASKS = {
    "entries": lambda rows, columns: torch.rand(rows, columns) > 0.5,
    "rows that repeat": lambda rows, columns: (torch.rand(rows, 1) > 0.5).expand(rows, columns),
    "columns that repeat": lambda rows, columns: (torch.rand(columns) > 0.5).expand(rows, columns),
    "one decision": lambda rows, columns: torch.tensor(False).expand(rows, columns),
    "transposed": lambda rows, columns: (torch.rand(columns, rows) > 0.5).t(),
    "every other": lambda rows, columns: (torch.rand(rows, 2 * columns) > 0.5)[:, ::2],
}
LAYOUTS = {
    "contiguous": lambda tensor: tensor.clone(),
    "transposed": lambda tensor: tensor.t().contiguous().t(),
    "strided": lambda tensor: torch.stack([tensor, tensor], dim=-1)[..., 0],
}


def words(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("chunk", [7, 1 << 18], ids=["chunks", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", MASKS)
def test_pruned_entries_are_plus_zero_and_the_others_keep_every_bit(
    monkeypatch, mask, layout, dtype, chunk
):
    """Defends large tensors, which are written in chunks, and masks that repeat a decision."""
    monkeypatch.setattr(inplace, "_CHUNK", chunk)
    torch.manual_seed(0)
    before = torch.randn(9, 13).to(dtype)
    before[0, 0], before[1, 1], before[2, 2], before[3, 3] = math.nan, math.inf, -0.0, -math.inf
    tensor, kept = LAYOUTS[layout](before), MASKS[mask](9, 13)
    version = tensor._version
    zero_pruned_(tensor, kept)
    assert torch.equal(
        words(tensor), words(torch.where(kept, before, torch.zeros((), dtype=dtype)))
    )
    assert tensor._version > version
