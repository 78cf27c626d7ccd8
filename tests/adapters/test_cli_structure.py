"""The structure that is found in zeros, against masks of every pattern and slow counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purprune import NM, Block, Channel, Kernel, Pattern, Rule, compute_masks
from purprune_adapters.structure import structure_of


def pruned(shape: tuple[int, ...], pattern: Pattern, sparsity: float | None) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return weight * compute_masks({"w": weight}, 0, Rule(sparsity, pattern=pattern))["w"]


@pytest.mark.parametrize(
    ("shape", "pattern", "sparsity", "words"),
    [
        ((64, 64), NM(2, 4), None, "2:4 along dim 1"),
        ((64, 66), NM(2, 4), None, "2:4 along dim 1"),
        ((64, 64), NM(1, 2), None, "1:2 along dim 1"),
        ((64, 64), NM(4, 8), None, "4:8 along dim 1"),
        ((64, 64), NM(3, 4), None, "3:4 along dim 1"),
        ((64, 64), NM(12, 16), None, "12:16 along dim 1"),
        ((64, 64), NM(2, 4, dim=0), None, "2:4 along dim 0"),
        ((16, 16, 3, 3), NM(2, 4), None, "2:4 along dim 1"),
        ((64, 64), Block((4, 1)), 0.5, "blocks of 4x1"),
        ((66, 64), Block((4, 1)), 0.5, "blocks of 4x1"),
        ((64, 64), Block((1, 4)), 0.5, "blocks of 1x4"),
        ((64, 63), Block((8, 8)), 0.5, "blocks of 8x8"),
        ((16, 16, 3, 3), Kernel(), 0.5, "blocks of 1x1x3x3"),
        ((64, 32), Channel(0), 0.25, "16 zero channels along dim 0"),
        ((64, 32), Channel(1), 0.25, "8 zero channels along dim 1"),
        ((64, 64), Pattern(), 0.5, ""),
        ((64, 64), Pattern(), 0.0, ""),
        ((64, 64), Pattern(), 1.0, ""),
        ((64,), Pattern(), None, ""),
    ],
)
def test_the_structure_of_every_pattern_is_recognised(shape, pattern, sparsity, words):
    """Defends inspect: what was pruned is what is found, ragged ends included."""
    if len(shape) == 1:
        found = structure_of("w", torch.tensor([0.0, 1.0]))
    else:
        found = structure_of("w", pruned(shape, pattern, sparsity))
    assert str(found) == words


@given(
    st.integers(2, 9),
    st.integers(2, 9),
    st.integers(0, 2**32),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn]),
)
def test_what_is_said_is_so(rows, columns, seed, dtype):
    """Defends every statement by counting in plain Python."""
    generator = torch.Generator().manual_seed(seed)
    zero = torch.rand(rows, columns, generator=generator) < torch.rand(1, generator=generator)
    weight = (~zero).float().to(dtype)
    found = structure_of("w", weight)
    plain = zero.tolist()
    assert found.count.zeros == sum(map(sum, plain))
    if found.zero_channels:
        assert found.zero_channels[0] == sum(all(row) for row in plain)
        assert found.zero_channels[1] == sum(all(c) for c in zip(*plain, strict=True))
    if found.nm is not None:
        lines = plain if found.nm.dim == 1 else [*zip(*plain, strict=True)]
        for line, at in itertools.product(lines, range(0, len(lines[0]), found.nm.m)):
            group = line[at : at + found.nm.m]
            assert sum(group) >= len(group) * found.nm.zeros // found.nm.m
    if found.block:
        high, wide = found.block
        for i, j in itertools.product(range(0, rows, high), range(0, columns, wide)):
            block = [plain[a][b] for a in range(i, min(i + high, rows))
                     for b in range(j, min(j + wide, columns))]  # fmt: skip
            assert all(block) or not any(block)
