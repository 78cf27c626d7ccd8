"""How large a pruned checkpoint will be, from its headers and a plan: arithmetic, before any work.

A dense file keeps its size, whatever is zero. As a bit mask and the entries that are left a tensor
of n entries with z zeros takes ``ceil(n / 8) + (n - z) * itemsize`` bytes. Core ML stores float16
by default, as a bit mask where that is smaller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from purprune import Plan
from purprune.planning import PlannedShare, PlannedTensor
from purprune_adapters.coreml.storage import sparse_bytes, why_dense

_FLOAT16 = 2


class Bounds(NamedTuple):
    """A number, or what it lies between where values decide."""

    least: int
    most: int

    def __str__(self) -> str:
        """Return the number, or both bounds."""
        if self.least == self.most:
            return f"{self.least:,}"
        return f"{self.least:,} to {self.most:,}"

    def plain(self) -> int | list[int]:
        """Return an int, or a list of both bounds."""
        return self.least if self.least == self.most else [*self]


def _sum(bounds: Iterable[Bounds]) -> Bounds:
    found = list(bounds)
    return Bounds(sum(b.least for b in found), sum(b.most for b in found))


@dataclass(frozen=True)
class Predicted:
    """What pruned tensors will take, in bytes but for ``zeros``."""

    zeros: Bounds
    dense: int
    bitmask: Bounds
    coreml_dense: int
    coreml: Bounds

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; a list of two where values decide."""
        return {
            "zeros": self.zeros.plain(),
            "dense_bytes": self.dense,
            "bitmask_bytes": self.bitmask.plain(),
            "coreml_dense_bytes": self.coreml_dense,
            "coreml_bytes": self.coreml.plain(),
        }


class Prediction(NamedTuple):
    """The pruned tensors by name, and all tensors of the checkpoint together."""

    tensors: Mapping[str, Predicted]
    total: Predicted


def predict(shapes: Mapping[str, Tensor], plan: Plan) -> Prediction:
    """Return the sizes that follow from a plan; ``shapes`` are meta tensors by name.

    >>> import torch
    >>> from purprune import NM, Rule, plan
    >>> shapes = {"w": torch.empty(64, 64, dtype=torch.bfloat16, device="meta")}
    >>> found = predict(shapes, plan(shapes, Rule(pattern=NM(2, 4)))).total
    >>> str(found.zeros), found.dense, str(found.bitmask), found.coreml_dense, str(found.coreml)
    ('2,048', 8192, '4,608', 8192, '4,833')
    """
    rows = {row.name: row for row in plan.tensors}
    tensors = {name: _tensor(shapes[name], _zeros(row)) for name, row in rows.items()}
    groups = []
    for share in plan.shared:
        members = [rows[name] for name in share.names]
        for row in members:
            others = share.units - row.units
            least = _entries(row, max(0, share.pruned - others)).least
            most = _entries(row, min(row.units, share.pruned)).most
            tensors[row.name] = _tensor(shapes[row.name], Bounds(least, most))
        parts = {row.name: tensors[row.name] for row in members}
        groups.append(_together(shapes, share, members, parts))
    shared = {name for share in plan.shared for name in share.names}
    single = [found for name, found in tensors.items() if name not in shared]
    rest = [_untouched(like) for name, like in shapes.items() if name not in tensors]
    return Prediction(tensors, _total([*single, *groups, *rest]))


def _zeros(row: PlannedTensor) -> Bounds:
    return _entries(row, row.pruned_units or 0)


def _entries(row: PlannedTensor, units: int) -> Bounds:
    """Return how many entries so many units have: ragged ones have fewer than whole ones."""
    size, whole = math.prod(row.unit), row.units - row.ragged_units
    if units == row.units or not row.ragged_units:
        return Bounds(*(row.entries if units == row.units else units * size,) * 2)
    least = max(0, units - row.ragged_units) * size + min(units, row.ragged_units)
    ragged = row.entries - whole * size if units > whole else 0
    return Bounds(least, min(units * size, min(units, whole) * size + ragged))


def _tensor(like: Tensor, zeros: Bounds) -> Predicted:
    n = like.numel()
    fewest, most = n - zeros.most, n - zeros.least
    halves = [
        n * _FLOAT16 if why_dense(like.shape, left, _FLOAT16) else sparse_bytes(n, left, 16)
        for left in (fewest, most)
    ]
    bitmask = [-(-n // 8) + left * like.itemsize for left in (fewest, most)]
    return Predicted(zeros, like.nbytes, Bounds(*bitmask), n * _FLOAT16, Bounds(*halves))


def _untouched(like: Tensor) -> Predicted:
    size = like.nbytes
    half = like.numel() * _FLOAT16 if like.is_floating_point() else 0
    return Predicted(Bounds(0, 0), size, Bounds(size, size), half, Bounds(half, half))


def _together(
    shapes: Mapping[str, Tensor], share: PlannedShare, members: Sequence[PlannedTensor],
    parts: Mapping[str, Predicted],
) -> Predicted:  # fmt: skip
    """Return the sizes of tensors that share a count, which is exact where units are entries."""
    total = _total(parts.values())
    if any(math.prod(row.unit) != 1 for row in members):
        return total
    left = share.units - share.pruned
    sizes = {shapes[name].itemsize for name in parts}
    bits = sum(-(-row.entries // 8) for row in members)
    exact = bits + left * sizes.pop() if len(sizes) == 1 else None
    sparse = sum(sparse_bytes(row.entries, 0, 16) for row in members) + left * _FLOAT16
    return replace(
        total,
        zeros=Bounds(share.pruned, share.pruned),
        bitmask=total.bitmask if exact is None else Bounds(exact, exact),
        # if each is stored sparse; dense only where that is smaller
        coreml=Bounds(max(total.coreml.least, left * _FLOAT16), min(total.coreml.most, sparse)),
    )


def _total(parts: Iterable[Predicted]) -> Predicted:
    found = list(parts)
    return Predicted(
        zeros=_sum(p.zeros for p in found),
        dense=sum(p.dense for p in found),
        bitmask=_sum(p.bitmask for p in found),
        coreml_dense=sum(p.coreml_dense for p in found),
        coreml=_sum(p.coreml for p in found),
    )
