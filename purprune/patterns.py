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
from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from purprune.errors import ConfigError
from purprune.groups import EveryGroup as EveryGroup
from purprune.groups import GlobalGroup as GlobalGroup
from purprune.groups import Group as Group
from purprune.groups import RowGroup as RowGroup
from purprune.groups import Size, dim_of
from purprune.groups import TensorGroup as TensorGroup
from purprune.groups import TransposableGroup as TransposableGroup
from purprune.values import StrictInt, constructor, value


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
        at = dim_of(self.dim, shape)
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
    m="2:4 sparsity is NM(2, 4), of which the first number counts zeros.",
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
