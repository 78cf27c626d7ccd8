"""Hypothesis strategies: weights with ties, zeros, infs, odd sizes, every dtype and views."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from hypothesis import strategies as st
from torch import Tensor

from purprune import (
    LAMP,
    NM,
    RIA,
    Block,
    Channel,
    Fisher,
    Given,
    Gradient,
    Kernel,
    Magnitude,
    Pattern,
    Random,
    ScoreContext,
    Taylor,
    Unstructured,
    Wanda,
)
from purprune.patterns import ChannelUnit, EveryGroup, GlobalGroup, KernelUnit, RowGroup

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=5).filter(lambda s: math.prod(s) <= 400)
matrix_shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).filter(
    lambda s: math.prod(s) <= 400
)

# Sums of squares of these are exact in float64 and of few bits: ties are true ties.
exact_values = st.one_of(
    st.integers(-16, 16).map(lambda n: n / 8),
    st.sampled_from([0.0, -0.0, 0.5, -0.5]),
    st.sampled_from([math.inf, -math.inf, 0.5]),
)
any_values = st.one_of(
    exact_values,
    st.floats(width=16, allow_nan=False),
    st.floats(width=32, allow_nan=False),
    st.sampled_from([1e-45, -1e-45, 1e-38, 6e-8, 65504.0, 3.0e38, -3.0e38]),
)


def _tensor(values: list[float], shape: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


@st.composite
def weights(
    draw: st.DrawFn,
    shape: st.SearchStrategy[list[int]] = shapes,
    values: st.SearchStrategy[float] = any_values,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Tensor:
    """Draw a contiguous weight; few distinct values make ties likely."""
    size = draw(shape)
    pool = draw(st.lists(values, min_size=1, max_size=12))
    n = math.prod(size)
    drawn = draw(st.lists(st.sampled_from(pool), min_size=n, max_size=n))
    return _tensor(drawn, size, draw(st.sampled_from(dtypes)))


@st.composite
def views(draw: st.DrawFn, of: Tensor) -> Tensor:
    """Draw a tensor with the entries of ``of`` in another memory layout."""
    kind = draw(st.sampled_from(["reversed dims", "strided", "offset"]))
    if kind == "reversed dims" and of.dim() > 1:
        order = list(range(of.dim()))[::-1]
        return of.permute(order).contiguous().permute(order)
    if kind == "strided":
        wide = torch.zeros((*of.shape, 2), dtype=of.dtype)
        wide[..., 1] = of
        return wide[..., 1]
    flat = torch.cat([torch.zeros(3, dtype=of.dtype), of.reshape(-1)])
    return flat[3:].view(of.shape)


sparsities = st.one_of(
    st.floats(0, 1, allow_nan=False),
    st.integers(0, 100).map(lambda n: n / 100),
    st.sampled_from([0.0, 1.0, 0.29, 0.57, 0.4]),
)


@st.composite
def patterns_for(draw: st.DrawFn, dims: int) -> Pattern:
    """Draw a pattern that fits a tensor of so many dims."""
    norm = draw(st.sampled_from(["l2", "l1", "sum"]))
    dim = draw(st.integers(-dims, dims - 1)) if dims else 0
    size = draw(st.integers(1, 3))
    extents = draw(st.lists(st.sampled_from([-1, 1, 2, 3]), min_size=1, max_size=max(dims, 1)))
    m = draw(st.integers(1, 20))
    zeros = draw(st.integers(0, m))
    choices = [Unstructured()]
    if dims:
        choices += [Channel(dim, size=size, norm=norm), Block(extents, norm=norm)]
        choices += [NM(zeros, m, dim=dim), Pattern(group=RowGroup(dim))]
        choices += [Pattern(unit=ChannelUnit(dim, size), group=RowGroup(dim), norm=norm)]
    if dims >= 2:
        choices += [Kernel(size=size, norm=norm)]
        choices += [Pattern(unit=KernelUnit(), group=EveryGroup(zeros, m, 0), norm=norm)]
    return draw(st.sampled_from(choices))


def global_patterns_for(dims: int) -> st.SearchStrategy[Pattern]:
    """Draw a pattern for tensors of so many dims or more that share one count."""
    grouped = GlobalGroup()
    return patterns_for(dims).map(lambda p: Pattern(unit=p.unit, group=grouped, norm=p.norm))


@st.composite
def members(
    draw: st.DrawFn,
    shape: st.SearchStrategy[list[int]] = shapes,
    values: st.SearchStrategy[float] = exact_values,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> dict[str, Tensor]:
    """Draw some tensors of few distinct values, so that ties go across tensors and dtypes."""
    pool = st.sampled_from(draw(st.lists(values, min_size=1, max_size=6)))
    number = draw(st.integers(1, 4))
    return {f"w{i}": draw(weights(shape, pool, dtypes)) for i in range(number)}


def squared(weight: Tensor, context: ScoreContext) -> Tensor:
    """Score as a user may: squares, which half precision would round to 0 or inf."""
    return weight * weight


SCORES = {
    "magnitude": Magnitude(),
    "taylor": Taylor(),
    "random": Random(seed=3),
    "gradient": Gradient(),
    "fisher": Fisher(),
    "wanda": Wanda(),
    "ria": RIA(),
    "lamp": LAMP(),
    "given": Given("movement"),
    "callable": squared,
}


def stats_for(weight: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Make up every statistic that a score of ``SCORES`` needs, in quarters."""
    generator = torch.Generator().manual_seed(seed)

    def quarters(low: int, shape: torch.Size) -> Tensor:
        return torch.randint(low, 21, shape, generator=generator) / 4

    return {
        "input_norm": quarters(0, weight.shape[1:]),
        "squared_gradient": quarters(0, weight.shape),
        "movement": quarters(-20, weight.shape),
    }


PATTERNS = {
    "unstructured": Unstructured(),
    "rows": Pattern(group=RowGroup(0)),
    "channel": Channel(),
    "channel of dim 1, l1": Channel(1, norm="l1"),
    "channel, sum": Channel(norm="sum"),
    "channel pairs": Channel(size=2),
    "kernel": Kernel(),
    "kernel pairs": Kernel(size=2),
    "block along dim 0": Block(4),
    "block (2, -1)": Block((2, -1)),
    "2:4": NM(zeros=2, m=4),
    "3:5 along dim 0": NM(zeros=3, m=5, dim=0),
    "1:1": NM(zeros=1, m=1),
    "5:17 (partition)": NM(zeros=5, m=17, dim=0),
    "unstructured, global": Unstructured(scope="global"),
    "channel of dim 1, global": Channel(1, scope="global"),
    "kernel, sum, global": Kernel(norm="sum", scope="global"),
    "block (3, -1), global": Block((3, -1), norm="l1", scope="global"),
    "kernel, balanced": Kernel(scope=GlobalGroup(min_sparsity=0.2, normalize="l2")),
    "2:4, transposable": NM(zeros=2, m=4, transposable=True),
    "channels in rows": Pattern(unit=ChannelUnit(1), group=RowGroup(1)),
}


def target_of(pattern: Pattern, sparsity: float) -> float | None:
    """Return the target that a rule with this pattern takes."""
    return None if pattern.target is not None else sparsity


def exact_sparsity(pattern: Pattern, sparsity: float) -> Fraction:
    """Return the sparsity in the end, as the oracle computes it."""
    return Fraction(str(sparsity)) if pattern.target is None else pattern.target
