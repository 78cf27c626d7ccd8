"""Patterns: what is pruned together (the unit), and within what the count is exact (the group).

A pattern is the product of two values. :func:`Unstructured`, :func:`Channel`, :func:`Kernel`,
:func:`Block` and :func:`NM` are constructors of the products that have names in the field; any
other product is as good.

Units tile a tensor from index 0 on. A dim that a unit does not divide ends in a ragged unit, made
of the entries that are there: padding never takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from fractions import Fraction
from typing import Annotated, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from purprune.errors import ConfigError
from purprune.values import SparsityValue, StrictInt, constructor, exact, value

Scale = Literal["l2", "mean", "max"]
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
        at = _dim(self.dim, shape)
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
        at = _dim(self.dim, shape)
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
        down, across = (_dim(dim, shape) for dim in self.dims)
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
Norm = Literal["l2", "l1", "sum"]
Scope = Literal["tensor", "row", "global"] | GlobalGroup


@value
class Pattern:
    """A unit, a group, and how the scores of a unit's entries become the score of the unit.

    ``norm`` is ``"l2"`` (``sqrt(sum(s**2))``), ``"l1"`` (``sum(|s|)``) or ``"sum"`` (``sum(s)``,
    for scores with a sign). A unit of one entry keeps its score as it is.
    """

    unit: Unit = EntryUnit()
    group: Group = TensorGroup()
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        """Check that the unit and the group go together."""
        if isinstance(self.group, TransposableGroup) and not isinstance(self.unit, EntryUnit):
            raise ValueError(
                f"expected single entries as the units of a transposable group; got {self.unit}. "
                f"NM(zeros, m, transposable=True) has them."
            )

    @property
    def target(self) -> Fraction | None:
        """The sparsity that the pattern itself sets: zeros / m; None when it sets none."""
        group = self.group
        if not isinstance(group, EveryGroup | TransposableGroup):
            return None
        return Fraction(group.zeros, group.m)


_SCOPES: dict[str, TensorGroup | RowGroup | GlobalGroup] = {
    "tensor": TensorGroup(),
    "row": RowGroup(),
    "global": GlobalGroup(),
}


def _scoped(scope: Scope) -> TensorGroup | RowGroup | GlobalGroup:
    if isinstance(scope, GlobalGroup):
        return scope
    if scope not in _SCOPES:
        raise ConfigError(
            f"Expected scope='tensor', 'row', 'global' or a GlobalGroup; got {scope!r}."
        )
    return _SCOPES[scope]


@constructor()
def Unstructured(*, scope: Scope = "tensor") -> Pattern:  # noqa: N802
    """Return the pattern in which each entry is a unit.

    With ``scope="row"`` every row along dim 0 has the same count, here and below. With
    ``scope="global"`` all tensors whose rules are equal share one;
    ``scope=GlobalGroup(min_sparsity=0.2, max_sparsity=0.9)`` bounds what each of them loses.

    >>> Unstructured() == Pattern(), Unstructured(scope="global") == Pattern(group=GlobalGroup())
    (True, True)
    """
    return Pattern(group=_scoped(scope))


@constructor(axis="Along a dim it is Channel(dim=...).")
def Channel(  # noqa: N802
    dim: int = 0, *, size: int = 1, norm: Norm = "l2", scope: Scope = "tensor"
) -> Pattern:
    """Return the pattern that prunes whole channels along ``dim``, ``size`` neighbours together.

    >>> Channel(dim=1).unit.block((8, 4, 3, 3))
    (8, 1, 3, 3)
    """
    return Pattern(unit=ChannelUnit(dim, size), group=_scoped(scope), norm=norm)


@constructor()
def Kernel(  # noqa: N802
    *, size: int = 1, norm: Norm = "l2", scope: Scope = "tensor"
) -> Pattern:
    """Return the pattern that prunes whole kernels, ``size`` neighbours along dim 0 together.

    A kernel is what lies behind dims 0 and 1. The weight of a Linear has nothing there, so its
    kernels are single entries, as in :func:`Unstructured`; a plan shows its unit as ``1x1``.

    >>> Kernel().unit.block((8, 4, 3, 3))
    (1, 1, 3, 3)
    """
    return Pattern(unit=KernelUnit(size), group=_scoped(scope), norm=norm)


@constructor()
def Block(  # noqa: N802
    shape: int | Sequence[int], *, norm: Norm = "l2", scope: Scope = "tensor"
) -> Pattern:
    """Return the pattern that prunes blocks; an int is a block along dim 0, -1 is a whole dim.

    >>> Block(4) == Block((4,)), Block((2, -1)).unit.block((8, 16))
    (True, (2, 16))
    """
    extents = (shape,) if isinstance(shape, int) else tuple(shape)
    return Pattern(unit=BlockUnit(extents), group=_scoped(scope), norm=norm)


@constructor(
    n="The first number counts zeros: 2:4 is NM(zeros=2, m=4).",
    scope="Every group of m has its own count, so that N:M has no scope; Block((1, 4), "
    "scope='global') and others have.",
)
def NM(zeros: int, m: int, *, dim: int = 1, transposable: bool = False) -> Pattern:  # noqa: N802
    """Return N:M sparsity: of every ``m`` neighbours along ``dim``, ``zeros`` go.

    The first number of "n:m" means zeros in some libraries and survivors in others, hence the
    name. While a schedule grows, floor(m * sparsity) go. With ``transposable=True`` it holds along
    dim 0 too, for m up to 16 that divides both dims: see :class:`TransposableGroup`.

    >>> NM(zeros=2, m=4).target
    Fraction(1, 2)
    """
    if transposable:
        return Pattern(group=TransposableGroup(zeros, m, (0, dim)))
    return Pattern(group=EveryGroup(zeros, m, dim))


def _dim(dim: int, shape: Sequence[int]) -> int:
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(
            f"Expected a dim in [{-len(shape)}, {len(shape) - 1}]; got dim={dim} for a tensor of "
            f"shape {tuple(shape)}."
        )
    return dim % len(shape)
