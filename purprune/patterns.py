"""Patterns: what is pruned together (the unit), and within what the count is exact (the group).

A pattern is the product of two values. :func:`Unstructured`, :func:`Channel`, :func:`Kernel`,
:func:`Block` and :func:`NM` are constructors of the products that have names in the field; any
other product is as good.

Units tile a tensor from index 0 on. A dim that a unit does not divide ends in a ragged unit, made
of the entries that are there: padding never takes part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import field
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Discriminator, Field, Tag
from torch import Tensor

from purprune.errors import ConfigError
from purprune.values import StrictInt, value

Size = Annotated[StrictInt, Field(ge=1)]


@value
class EntryUnit:
    """Each entry by itself."""

    kind: Literal["entry"] = field(default="entry", repr=False, kw_only=True)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the unit's extent along each dim of ``shape``."""
        return (1,) * len(shape)


@value
class ChannelUnit:
    """All entries that share an index along ``dim``; ``size`` neighbouring channels go together."""

    dim: StrictInt = 0
    size: Size = 1
    kind: Literal["channel"] = field(default="channel", repr=False, kw_only=True)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the unit's extent along each dim of ``shape``."""
        at = _dim(self.dim, shape)
        return tuple(self.size if d == at else max(n, 1) for d, n in enumerate(shape))


@value
class KernelUnit:
    """One kernel: a pair of indices along dims 0 and 1 with all that lies behind them.

    ``size`` kernels along dim 0 go together. The weight of a Linear has nothing behind dim 1, so
    its kernels are single entries.
    """

    size: Size = 1
    kind: Literal["kernel"] = field(default="kernel", repr=False, kw_only=True)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the unit's extent along each dim of ``shape``."""
        if len(shape) < 2:
            raise ConfigError(f"Expected at least 2 dims for a kernel; got shape {tuple(shape)}.")
        return (self.size, 1, *(max(n, 1) for n in shape[2:]))


def _extent(n: int) -> int:
    if n != -1 and n < 1:
        raise ValueError(f"expected block extents >= 1, or -1 for a whole dim; got {n}.")
    return n


@value
class BlockUnit:
    """A block of the given extents; -1 is a whole dim, dims behind the last one given count 1."""

    shape: tuple[StrictInt, ...]
    kind: Literal["block"] = field(default="block", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the extents."""
        if not self.shape:
            raise ValueError("expected at least one block extent; got none.")
        for n in self.shape:
            _extent(n)

    def block(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the unit's extent along each dim of ``shape``."""
        if len(self.shape) > len(shape):
            raise ConfigError(
                f"Expected at least {len(self.shape)} dims for blocks of {self.shape}; "
                f"got shape {tuple(shape)}."
            )
        given = (*self.shape, *(1,) * (len(shape) - len(self.shape)))
        return tuple(max(n, 1) if b == -1 else b for b, n in zip(given, shape, strict=True))


Unit = Annotated[
    Annotated[EntryUnit, Tag("entry")]
    | Annotated[ChannelUnit, Tag("channel")]
    | Annotated[KernelUnit, Tag("kernel")]
    | Annotated[BlockUnit, Tag("block")],
    Discriminator("kind"),
]


class Span(NamedTuple):
    """Columns ``start`` to ``stop`` of a unit matrix, of which every ``size`` make one group."""

    start: int
    stop: int
    size: int


@value
class TensorGroup:
    """One group: all units of the tensor."""

    kind: Literal["tensor"] = field(default="tensor", repr=False, kw_only=True)

    def matrix(self, grid: Tensor) -> Tensor:
        """Lay the unit grid out in two dims, of which no group crosses the first."""
        return grid.reshape(1, -1)

    def restore(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`matrix`."""
        return matrix.reshape(tuple(shape))

    def spans(self, columns: int) -> list[Span]:
        """Return how the columns of the matrix divide into groups."""
        return [Span(0, columns, columns)] if columns else []


@value
class RowGroup:
    """One group for each index along ``dim``: the same count in every row."""

    dim: StrictInt = 0
    kind: Literal["row"] = field(default="row", repr=False, kw_only=True)

    def matrix(self, grid: Tensor) -> Tensor:
        """Lay the unit grid out in two dims, of which no group crosses the first."""
        rows = grid.movedim(_dim(self.dim, grid.shape), 0)
        return rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))

    def restore(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`matrix`."""
        at = _dim(self.dim, shape)
        rows = matrix.reshape([shape[at], *(n for d, n in enumerate(shape) if d != at)])
        return rows.movedim(0, at).contiguous()

    def spans(self, columns: int) -> list[Span]:
        """Return how the columns of the matrix divide into groups."""
        return [Span(0, columns, columns)] if columns else []


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

    def matrix(self, grid: Tensor) -> Tensor:
        """Lay the unit grid out in two dims, of which no group crosses the first."""
        last = grid.movedim(_dim(self.dim, grid.shape), -1)
        return last.reshape(math.prod(last.shape[:-1]), last.shape[-1])

    def restore(self, matrix: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`matrix`."""
        at = _dim(self.dim, shape)
        last = matrix.reshape([*(n for d, n in enumerate(shape) if d != at), shape[at]])
        return last.movedim(-1, at).contiguous()

    def spans(self, columns: int) -> list[Span]:
        """Return how the columns of the matrix divide into groups."""
        whole = columns - columns % self.m
        spans = [Span(0, whole, self.m), Span(whole, columns, columns - whole)]
        return [span for span in spans if span.stop > span.start]


Group = Annotated[
    Annotated[TensorGroup, Tag("tensor")]
    | Annotated[RowGroup, Tag("row")]
    | Annotated[EveryGroup, Tag("every")],
    Discriminator("kind"),
]
Norm = Literal["l2", "l1", "sum"]


@value
class Pattern:
    """A unit, a group, and how the scores of a unit's entries become the score of the unit.

    ``norm`` is ``"l2"`` (``sqrt(sum(s**2))``), ``"l1"`` (``sum(|s|)``) or ``"sum"`` (``sum(s)``,
    for scores with a sign). A unit of one entry keeps its score as it is.
    """

    unit: Unit = EntryUnit()
    group: Group = TensorGroup()
    norm: Norm = "l2"

    @property
    def target(self) -> Fraction | None:
        """The sparsity that the pattern itself sets: zeros / m; None when it sets none."""
        group = self.group
        return Fraction(group.zeros, group.m) if isinstance(group, EveryGroup) else None


def Unstructured() -> Pattern:  # noqa: N802
    """Return the pattern in which each entry is a unit and the tensor is the group.

    >>> Unstructured() == Pattern()
    True
    """
    return Pattern()


def Channel(dim: int = 0, *, size: int = 1, norm: Norm = "l2") -> Pattern:  # noqa: N802
    """Return the pattern that prunes whole channels along ``dim``, ``size`` neighbours together.

    >>> Channel(dim=1).unit.block((8, 4, 3, 3))
    (8, 1, 3, 3)
    """
    return Pattern(unit=ChannelUnit(dim, size), norm=norm)


def Kernel(*, size: int = 1, norm: Norm = "l2") -> Pattern:  # noqa: N802
    """Return the pattern that prunes whole kernels, ``size`` neighbours along dim 0 together.

    >>> Kernel().unit.block((8, 4, 3, 3))
    (1, 1, 3, 3)
    """
    return Pattern(unit=KernelUnit(size), norm=norm)


def Block(shape: int | Sequence[int], *, norm: Norm = "l2") -> Pattern:  # noqa: N802
    """Return the pattern that prunes blocks; an int is a block along dim 0, -1 is a whole dim.

    >>> Block(4) == Block((4,)), Block((2, -1)).unit.block((8, 16))
    (True, (2, 16))
    """
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    return Pattern(unit=BlockUnit(extents), norm=norm)


def NM(zeros: int, m: int, *, dim: int = 1) -> Pattern:  # noqa: N802
    """Return N:M sparsity: of every ``m`` neighbours along ``dim``, ``zeros`` go.

    The first number of "n:m" means zeros in some libraries and survivors in others, hence the
    name. While a schedule grows, floor(m * sparsity) go.

    >>> NM(zeros=2, m=4).target
    Fraction(1, 2)
    """
    return Pattern(group=EveryGroup(zeros, m, dim))


def _dim(dim: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(
            f"Expected a dim in [{-len(shape)}, {len(shape) - 1}]; got dim={dim} for a tensor of "
            f"shape {tuple(shape)}."
        )
    return dim % len(shape)


def grid_shape(block: Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Return how many units there are along each dim, ragged ones included."""
    return tuple(-(-n // b) for b, n in zip(block, shape, strict=True))


def _interleaved(block: Sequence[int], grid: Sequence[int]) -> list[int]:
    return [n for pair in zip(grid, block, strict=True) for n in pair]


def unit_scores(scores: Tensor, block: Sequence[int], norm: Norm) -> Tensor:
    """Return one score per unit, shaped like the unit grid.

    Sums run in float64 (float32 where the device has none) and always in the same order, a tree
    of elementwise sums, so that threads, strides and devices change no bit. The L2 norm is left
    squared: the order is the same, and no rounding makes ties.
    """
    if all(b == 1 for b in block):
        return scores
    shape, grid = scores.shape, grid_shape(block, scores.shape)
    wide = torch.float32 if scores.device.type == "mps" else torch.float64
    terms = scores.to(wide)
    if norm != "sum":
        terms = terms.abs() if norm == "l1" else _scaled(terms, scores.dtype).square()
    padding = [p for b, n, g in zip(block, shape, grid, strict=True) for p in (b * g - n, 0)]
    if any(padding):  # zeros add nothing to a sum; they never become entries
        terms = torch.nn.functional.pad(terms, padding[::-1])
    dims = len(shape)
    tiles = terms.reshape(_interleaved(block, grid))
    order = [*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)]
    return _tree_sum(tiles.permute(order).reshape(math.prod(grid), math.prod(block))).view(grid)


def _scaled(terms: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale by a power of two where squares could leave the range of the accumulator."""
    if terms.dtype != dtype or terms.numel() == 0:
        return terms  # float64 holds the square of every smaller float
    largest = torch.where(terms.isfinite(), terms, 0).abs().amax()
    exponent = -int(torch.frexp(largest).exponent)
    return terms * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)


def _tree_sum(terms: Tensor) -> Tensor:
    """Sum over the last dim by halves; zero terms give zero."""
    while (n := terms.shape[-1]) > 1:
        half = n // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        terms = torch.cat([folded, terms[..., 2 * half :]], dim=-1) if n % 2 else folded
    return terms.sum(dim=-1)


def spread(keep: Tensor, block: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the unit grid's decisions at every entry; a view where units span whole dims."""
    grid = grid_shape(block, shape)
    if all(b == 1 or g <= 1 for b, g in zip(block, grid, strict=True)):
        return keep.expand(tuple(shape))
    tiles = keep.reshape([n for g in grid for n in (g, 1)]).expand(_interleaved(block, grid))
    whole = tiles.reshape([b * g for b, g in zip(block, grid, strict=True)])
    return whole[tuple(slice(n) for n in shape)].contiguous()
