"""Groups: within what the count is exact. A group is laid out on the grid of a tensor's units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from purprune.errors import ConfigError
from purprune.values import SparsityValue, StrictInt, exact, value

Scale = Literal["l2", "mean", "max"]
Size = Annotated[StrictInt, Field(ge=1)]


class Layout(NamedTuple):
    """How a unit grid divides into groups.

    With its dims in ``order`` the first ``lead`` of them index rows, and the rest are columns; the
    columns of each row divide into groups of ``size`` and a tail.
    """

    order: tuple[int, ...]
    lead: int
    size: int | None = None
    """None: a row is one group."""

    @property
    def is_whole(self) -> bool:
        """Whether all units are one group."""
        return self.lead == 0 and self.size is None

    def spans(self, columns: int) -> list[tuple[int, int, int]]:
        """Return (start, stop, size): of the columns from start to stop, every size are a group."""
        size = columns if self.size is None else self.size
        whole = columns - columns % size if size else 0
        spans = [(0, whole, size), (whole, columns, columns - whole)]
        return [span for span in spans if span[1] > span[0]]


@value
class TensorGroup:
    """One group: all units of the tensor."""

    kind: Literal["tensor"] = field(default="tensor", repr=False, kw_only=True)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return how a unit grid of this shape divides into groups."""
        return Layout(tuple(range(len(shape))), lead=0)


@value
class GlobalGroup:
    """One group: all units of all tensors whose rules are equal, one score against another.

    How much of each tensor goes is decided by its values; the count of all of them is exact.

    Args:
        min_sparsity: of every tensor at least this goes; before the rule's own sparsity is as high,
            all tensors have that one.
        max_sparsity: of every tensor at most this goes.
        normalize: scores of units are divided by what is usual in their tensor: ``"l2"`` by the
            L2 norm of them all (Molchanov et al., 2017, arXiv:1611.06440), ``"mean"`` by the mean
            and ``"max"`` by the largest of their absolute values. The order within a tensor stays.

    >>> GlobalGroup(min_sparsity=0.1, max_sparsity=0.95).is_plain
    False
    """

    min_sparsity: SparsityValue = 0.0
    max_sparsity: SparsityValue = 1.0
    normalize: Scale | None = None
    kind: Literal["global"] = field(default="global", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check that there is something between the bounds."""
        if exact(self.min_sparsity) > exact(self.max_sparsity):
            raise ValueError(
                f"expected min_sparsity <= max_sparsity; got {self.min_sparsity} and "
                f"{self.max_sparsity}."
            )

    @property
    def is_capped(self) -> bool:
        """Whether there is a tensor of which not everything may go."""
        return exact(self.max_sparsity) < 1

    @property
    def is_plain(self) -> bool:
        """Whether one threshold for the scores as they are decides alone."""
        return not (self.is_capped or self.min_sparsity or self.normalize)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return how a unit grid of this shape divides into groups: it is a part of one."""
        return TensorGroup().layout(shape)


@value
class RowGroup:
    """One group for each index along ``dim``: the same count in every row."""

    dim: StrictInt = 0
    kind: Literal["row"] = field(default="row", repr=False, kw_only=True)

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return how a unit grid of this shape divides into groups."""
        at = dim_of(self.dim, shape)
        return Layout((at, *(d for d in range(len(shape)) if d != at)), lead=1)


@value
class EveryGroup:
    """One group for every ``m`` neighbouring units along ``dim``, of which ``zeros`` go in the end.

    A tail of r < m units is a group of its own, in which ``floor(r * zeros / m)`` go.
    """

    zeros: Annotated[StrictInt, Field(ge=0)]
    m: Size
    dim: StrictInt = 1
    kind: Literal["every"] = field(default="every", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check that there are that many units to prune."""
        if self.zeros > self.m:
            raise ValueError(
                f"expected zeros <= m; got zeros={self.zeros}, m={self.m}. "
                f"2:4 sparsity is NM(zeros=2, m=4)."
            )

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return how a unit grid of this shape divides into groups."""
        at = dim_of(self.dim, shape)
        others = tuple(d for d in range(len(shape)) if d != at)
        return Layout((*others, at), lead=len(others), size=self.m)


@value
class TransposableGroup:
    """Every row and every column of every ``m`` x ``m`` block along ``dims`` is a group.

    In each of them ``zeros`` of m entries go in the end, so that the tensor and its transpose are
    N:M alike. A choice in one row changes what is left for the others: no longer the lowest go,
    but those without which the sum of the kept scores is the largest
    (:mod:`purprune.transposable`). ``m`` divides both dims; units are single entries.
    """

    zeros: Annotated[StrictInt, Field(ge=0)]
    m: Annotated[StrictInt, Field(ge=1, le=16)]
    dims: tuple[StrictInt, StrictInt] = (0, 1)
    kind: Literal["transposable"] = field(default="transposable", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check that there are that many entries to prune."""
        EveryGroup(self.zeros, self.m)

    def axes(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return the dims of a block's rows and columns, counted from 0."""
        down, across = (dim_of(dim, shape) for dim in self.dims)
        if down == across:
            raise ConfigError(f"Expected two dims that differ; got dims={self.dims}.")
        return down, across

    def layout(self, shape: Sequence[int]) -> Layout:
        """Return how a unit grid of this shape divides into the rows of blocks."""
        down, across = self.axes(shape)
        if shape[down] % self.m or shape[across] % self.m:
            raise ConfigError(
                f"Expected m={self.m} to divide dims {down} and {across} of a transposable "
                f"pattern; got shape {tuple(shape)}. NM({self.zeros}, {self.m}) takes any; "
                f"or leave it dense with None."
            )
        return EveryGroup(self.zeros, self.m, across).layout(shape)


Group = Annotated[
    Annotated[TensorGroup, Tag("tensor")]
    | Annotated[GlobalGroup, Tag("global")]
    | Annotated[RowGroup, Tag("row")]
    | Annotated[EveryGroup, Tag("every")]
    | Annotated[TransposableGroup, Tag("transposable")],
    Discriminator("kind"),
]


def dim_of(dim: int, shape: Sequence[int]) -> int:
    """Return a dim, which may count from the end, as one from 0 on; raise where there is none."""
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(
            f"Expected a dim in [{-len(shape)}, {len(shape) - 1}]; got dim={dim} for a tensor of "
            f"shape {tuple(shape)}."
        )
    return dim % len(shape)
