"""Masks at one bit per entry, in plain tensors that every checkpoint format carries.

Entry i in C order is bit ``i % 8``, the lowest first, of byte ``i // 8``; bits behind the last
entry are 0. For each mask there is ``<name>.bits``, uint8, and ``<name>.shape``, int64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from purprune.scoring import refuse_parts

_CHUNK = 1 << 20
_BITS, _SHAPE = ".bits", ".shape"


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return masks at one bit per entry: a flat dict of tensors on the CPU.

    For each mask of n entries: ``<name>.bits``, ``ceil(n / 8)`` bytes of uint8, and
    ``<name>.shape``, int64. Besides the result only a chunk is made, of views too.

    Raises:
        TypeError: a mask is not a bool tensor.

    >>> packed = pack_masks({"w": torch.tensor([[True, False, True], [True, True, False]])})
    >>> packed
    {'w.bits': tensor([29], dtype=torch.uint8), 'w.shape': tensor([2, 3])}
    >>> unpack_masks(packed)["w"].tolist()
    [[True, False, True], [True, True, False]]
    """
    packed: dict[str, Tensor] = {}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"Expected a bool mask for {name!r}; got {got}. True = keep.")
        refuse_parts(name, mask)
        packed[name + _BITS] = _packed(mask)
        packed[name + _SHAPE] = torch.tensor(mask.shape, dtype=torch.int64)
    return packed


def unpack_masks(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the masks that :func:`pack_masks` packed, on the CPU.

    Raises:
        ValueError: half of a pair is missing, or bits and shape do not fit; names the mask.
    """
    masks: dict[str, Tensor] = {}
    for key in packed:
        ends = (_BITS, _SHAPE) if isinstance(key, str) else ()
        name = next((key.removesuffix(end) for end in ends if key.endswith(end)), key)
        if name == key or not {name + _BITS, name + _SHAPE} <= set(packed):
            raise ValueError(
                f"Expected packed masks, a pair '<name>.bits' and '<name>.shape' for each; got "
                f"{key!r} alone. pack_masks makes such pairs."
            )
        if name not in masks:
            masks[name] = _unpacked(name, packed[name + _BITS], packed[name + _SHAPE])
    return masks


def _packed(mask: Tensor) -> Tensor:
    source = mask.detach().cpu().numpy()
    # flat reads a view in C order without a copy of the whole; slices of plain memory are faster.
    flat = source.reshape(-1) if source.flags.c_contiguous else source.flat
    bits = np.empty(-(-source.size // 8), np.uint8)
    for start in range(0, source.size, _CHUNK):
        part = np.packbits(flat[start : start + _CHUNK], bitorder="little")
        bits[start // 8 : start // 8 + part.size] = part
    return torch.from_numpy(bits)


def _unpacked(name: str, bits: Tensor, shape: Tensor) -> Tensor:
    extents = _extents(name, shape)
    entries = math.prod(extents)
    whole = isinstance(bits, Tensor) and bits.dtype == torch.uint8
    if not whole or bits.shape != (-(-entries // 8),):
        got = f"{tuple(bits.shape)} of {bits.dtype}" if isinstance(bits, Tensor) else type(bits)
        raise ValueError(
            f"Expected {-(-entries // 8)} bytes of bits for the mask {name!r} of shape {extents}; "
            f"got {got}. It is damaged."
        )
    packed = bits.detach().cpu().contiguous().numpy()
    if entries % 8 and int(packed[-1]) >> entries % 8:
        raise ValueError(f"Expected 0 behind the last bit of the mask {name!r}. It is damaged.")
    unpacked = np.unpackbits(packed, count=entries, bitorder="little")
    return torch.from_numpy(unpacked.view(np.bool_)).reshape(extents)


def _extents(name: str, shape: Tensor) -> tuple[int, ...]:
    fits = isinstance(shape, Tensor) and shape.dtype == torch.int64 and shape.dim() == 1
    extents = tuple(shape.tolist()) if fits else ()
    if not fits or any(n < 0 for n in extents):
        raise ValueError(
            f"Expected the shape of the mask {name!r} as an int64 tensor of one dim, none below 0; "
            f"got {shape!r}. It is damaged."
        )
    return extents
