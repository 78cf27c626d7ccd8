"""Finding torch weights among the stored tensors of a package, by content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .layouts import Layout, count_nonzero, fingerprint, layouts, same, splits
from .package import Stored
from .scaling import RECOGNISED, scalings

__all__ = ["Index", "Part", "find"]

Array = NDArray[Any]

# Half a unit in the last place, relative: what rounding to the type may change.
_ROUNDING = {"float16": 2.0**-11, "float32": 2.0**-24}
_SMALLEST = {"float16": 2.0**-25, "float32": 2.0**-150}


def rounded(weight: Tensor, dtype: str) -> Array:
    """A weight rounded to a stored type, as numpy; torch converts much faster than numpy."""
    to = torch.float16 if dtype == "float16" else torch.float32
    return np.asarray(weight.to(to).contiguous().numpy())


def _float32(array: Array) -> Array:
    """The array in float32; torch converts much faster than numpy."""
    return np.asarray(torch.from_numpy(np.array(array)).float().numpy())


@dataclass(frozen=True)
class Part:
    """One stored tensor that holds a weight, or some rows of it.

    Attributes:
        stored: the tensor in the package.
        rows: the rows of the torch weight that it holds.
        layout: how they are ordered there.
        scale: what they were multiplied by, broadcastable to the rows; None for 1.
        how: how the match was established, in words.
        dropped: survivors that are zero in the package and shouldn't be.
        underflowed: survivors too small for the stored type.
        rounded_to_zero: survivors that a quantizer or a palette turned into zero.
        scaled_to_zero: survivors of channels that a batch norm multiplies by zero.
        revived: pruned entries that aren't zero in the package.
        wrong: entries that differ otherwise.
        max_error: largest difference from the (scaled) torch weight over its largest magnitude.
        norm: the batch norm that was folded in, where its factors were recognised.
    """

    stored: Stored
    rows: slice
    layout: Layout
    scale: Array | None
    how: str
    dropped: int = 0
    underflowed: int = 0
    rounded_to_zero: int = 0
    scaled_to_zero: int = 0
    revived: int = 0
    wrong: int = 0
    max_error: float = 0.0
    norm: str | None = None

    @property
    def damage(self) -> int:
        """Entries that aren't what they should be."""
        return self.dropped + self.revived + self.wrong

    @property
    def exact(self) -> bool:
        """Whether it is the weight, rounded to the stored type and nothing else."""
        return self.scale is None and not self.stored.lossy and not self.damage

    @property
    def unexplained(self) -> bool:
        """Whether its factors were read off the weights, and belong to nothing in the model."""
        return self.scale is not None and self.norm is None

    def restored(self, weight: Array) -> Array:
        """The stored values in torch's order, without the scale (where it is zero: ``weight``)."""
        values = self.layout.undo(_float32(self.stored.array()), weight.shape)
        if self.scale is None:
            return values
        live = np.broadcast_to(self.scale != 0, values.shape)
        return np.divide(values, self.scale, out=weight.astype(np.float32), where=live)


@dataclass
class Index:
    """The stored tensors of one package, with their hashes computed on demand.

    Attributes:
        stored: the tensors.
        scales: factors per channel of the model's batch norms, by name.
        claimed: names of tensors that were matched.
        seen: hashes of torch weights by place, size and type; may be shared by several packages
            as long as the weights live.
    """

    stored: list[Stored]
    scales: Mapping[str, Array] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    seen: dict[tuple[int, int, str], int] = field(default_factory=dict)
    _hashes: dict[str, int] = field(default_factory=dict)

    def of_size(self, numel: int, dtype: str | None = None) -> list[Stored]:
        """Tensors of so many entries (and of that type, not quantized, where a type is given)."""
        return [
            s
            for s in self.stored
            if s.numel == numel and (dtype is None or (s.dtype == dtype and not s.lossy))
        ]

    def hash(self, stored: Stored) -> int:
        """The order-free hash of a stored tensor."""
        if stored.name not in self._hashes:
            self._hashes[stored.name] = fingerprint(stored.array())
        return self._hashes[stored.name]


def _dims(shape: tuple[int, ...]) -> list[int]:
    return sorted(size for size in shape if size > 1)


def _exact(index: Index, weight: Tensor, rows: slice, taken: set[str]) -> list[Part]:
    """Stored tensors that hold exactly the rounded values; copies may hold the same twice."""
    del taken
    found = []
    survivors = int(torch.count_nonzero(weight))
    for dtype in ("float16", "float32"):
        candidates = index.of_size(weight.numel(), dtype)
        if not candidates:
            continue
        values = rounded(weight, dtype)
        at = (weight.data_ptr(), weight.numel(), dtype)
        key = index.seen[at] = index.seen[at] if at in index.seen else fingerprint(values)
        for stored in candidates:
            if index.hash(stored) != key:
                continue
            if key == 0 and _dims(stored.shape) != _dims(tuple(weight.shape)):
                continue
            array = stored.array()
            layout = next((o for o in layouts(values.shape) if same(o.apply(values), array)), None)
            if layout is None:
                continue
            lost = survivors - count_nonzero(values)
            found.append(Part(stored, rows, layout, None, layout.name, underflowed=lost))
    return found


def _assess(part: Part, weight: Array, stored: Array, mask: Array) -> Part:
    """Count what differs between a weight (float32, torch's order) and a stored tensor."""
    wanted = weight if part.scale is None else weight * part.scale
    dtype = part.stored.dtype
    survives, there = weight != 0, stored != 0
    gone = survives & ~there
    tiny = gone & (np.abs(wanted) <= _SMALLEST[dtype] * 1.001)
    nothing = np.zeros_like(gone)
    silenced = gone & (wanted == 0) if part.norm else nothing
    tiny &= wanted != 0
    by_quantizer = gone & ~tiny & ~silenced & mask if part.stored.lossy else nothing
    error = np.abs(stored - wanted)
    tops = np.abs(wanted).max(initial=0.0)
    if part.stored.lossy:
        wrong = nothing
    else:
        # Behind a scale, the factor was rounded too; in float32, by several operations.
        slack = 1.0 if part.scale is None else {"float16": 2.1, "float32": 8.0}[dtype]
        bound = slack * _ROUNDING[dtype] * np.abs(wanted) * 1.001 + _SMALLEST[dtype] * 1.001
        wrong = survives & there & (error > bound)
    return replace(
        part,
        dropped=int(np.count_nonzero(gone & ~tiny & ~silenced & ~by_quantizer)),
        underflowed=int(np.count_nonzero(tiny)),
        rounded_to_zero=int(np.count_nonzero(by_quantizer)),
        scaled_to_zero=int(np.count_nonzero(silenced)),
        revived=int(np.count_nonzero(there & ~survives)),
        wrong=int(np.count_nonzero(wrong)),
        max_error=float(error.max(initial=0.0) / tops) if tops else 0.0,
    )


def _alike(pattern: Array, mask: Array) -> bool:
    """A quick look at the start of two zero patterns: do they overlap by more than half?"""
    a, b = pattern.flat[:8192], mask.flat[:8192]
    either = int(np.count_nonzero(a | b))
    return either == 0 or int(np.count_nonzero(a & b)) * 2 >= either


def _near(index: Index, weight: Tensor, rows: slice, taken: set[str]) -> list[Part]:
    """The stored tensor that fits best: scaled, quantized, or damaged."""
    values = weight.to(torch.float32).contiguous().numpy()
    pattern = values != 0
    best: Part | None = None
    for stored in index.of_size(weight.numel()):
        if stored.name in index.claimed | taken or (
            _dims(stored.shape) != _dims(values.shape) and not stored.lossy
        ):
            continue
        mask = stored.mask()
        array: Array | None = None
        for layout in layouts(values.shape):
            if not _alike(layout.apply(pattern), mask):
                continue
            array = _float32(stored.array()) if array is None else array
            here = layout.undo(array, values.shape)
            there = layout.undo(mask, values.shape)
            for part in _readings(stored, rows, layout, values, here, there, index.scales):
                if best is None or _cost(part) < _cost(best):
                    best = part
            if best is not None and best.damage == 0 and not best.stored.lossy:
                return [best]
    if best is None or not _recognised(best, values):
        return []
    if best.stored.lossy and best.max_error > 0.6:
        return []
    return [best]


def _cost(part: Part) -> tuple[int, float]:
    return part.damage, part.max_error


def _readings(
    stored: Stored,
    rows: slice,
    layout: Layout,
    weight: Array,
    array: Array,
    mask: Array,
    scales: Mapping[str, Array],
) -> Iterator[Part]:
    """The ways to read a stored tensor as a weight: plain, then scaled per output channel."""
    if stored.lossy or _likely(weight, array, None):
        plain = _assess(Part(stored, rows, layout, None, layout.name), weight, array, mask)
        yield plain
        if not stored.lossy and _recognised(plain, weight):
            return
    after = "" if layout.name == "as is" else f", {layout.name}"
    for norm, scale in scalings(weight, array, stored.lossy, scales):
        if not stored.lossy and not _likely(weight, array, scale):
            continue
        which = f" (batch norm '{norm}' folded)" if norm else ""
        how = f"scaled per output channel{which}{after}"
        part = Part(stored, rows, layout, scale, how, norm=norm)
        part = _assess(part, weight, array, mask)
        yield part
        # Later readings have more freedom, and would explain damage away.
        if not stored.lossy and _recognised(part, weight):
            return


def _likely(weight: Array, stored: Array, scale: Array | None) -> bool:
    """Whether half of a few thousand sampled survivors fit, to within a percent."""
    step = max(weight.size // 16384, 1)
    places = np.unravel_index(np.arange(0, weight.size, step), weight.shape)
    wanted, found = weight[places], stored[places]
    if scale is not None:
        wanted = wanted * np.broadcast_to(scale, weight.shape)[places]
    wanted, found = wanted[wanted != 0], found[wanted != 0]
    fits = np.count_nonzero(np.isclose(found, wanted, rtol=1e-2, atol=1e-6))
    return int(fits) * 2 >= int(wanted.size)


def _recognised(part: Part, weight: Array) -> bool:
    """Whether so much fits that it must be this weight, damaged or not."""
    return part.damage <= (1 - RECOGNISED) * max(int(np.count_nonzero(weight)), 10)


def find(index: Index, weight: Tensor, *, exact: bool) -> list[Part]:
    """The stored tensors that hold a weight; every one when it is stored several times.

    With ``exact``, values are looked up by hash: the whole weight in any layout, then its parts
    along dim 0. Otherwise the weight is compared with the unclaimed tensors of its size and zero
    pattern: multiplied per output channel (batch norm folded), quantized, or damaged.

    Returns:
        The parts; empty when the weight isn't there. Parts with ``damage`` are there but differ.
    """
    search = _exact if exact else _near
    if weight.ndim == 0 or (weight.ndim < 2 and not exact):
        return []
    whole = [("", [slice(0, weight.shape[0])])]
    for name, cuts in [*whole, *splits(weight.shape[0])]:
        found: list[Part] = []
        for cut in cuts:
            piece = search(index, weight[cut], cut, {p.stored.name for p in found})
            if not piece:
                break
            found += piece
        else:
            index.claimed |= {p.stored.name for p in found}
            return [replace(p, how=f"{name}, {p.how}") for p in found] if name else found
    return []
