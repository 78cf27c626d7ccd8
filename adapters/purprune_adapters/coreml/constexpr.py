"""Decoding of stored weights: packed bits, sparse, quantized and palettized tensors, in numpy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BITS", "DECODERS", "NUMPY_TYPES", "unpack"]

Array = NDArray[Any]

#: MIL element types that numpy knows.
NUMPY_TYPES: dict[str, type[np.generic]] = {
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
    "UINT64": np.uint64,
    "BOOL": np.bool_,
}

#: MIL element types of less than a byte: bits, signed.
BITS: dict[str, tuple[int, bool]] = {
    "UINT1": (1, False),
    "UINT2": (2, False),
    "UINT3": (3, False),
    "UINT4": (4, False),
    "UINT6": (6, False),
    "INT4": (4, True),
}


def unpack(packed: Array, count: int, bits: int, *, signed: bool = False) -> Array:
    """Read ``count`` integers of ``bits`` bits each, packed with the low bit first.

    Example:
        >>> unpack(np.array([0b0011_0001], dtype=np.uint8), 2, 4).tolist()
        [1, 3]
    """
    flat = np.unpackbits(packed.view(np.uint8), bitorder="little", count=count * bits)
    if bits == 1:
        return flat
    value = np.zeros(count, dtype=np.int16)
    for place in range(bits):
        value |= flat[place::bits].astype(np.int16) << place
    if signed:
        value = np.where(value >= 1 << (bits - 1), value - (1 << bits), value)
    return value.astype(np.int8 if signed else np.uint8)


def _scatter(mask: Array, nonzero: Array) -> Array:
    dense = np.zeros(mask.shape, dtype=nonzero.dtype)
    dense[mask.astype(bool)] = nonzero
    return dense


def _spread(small: Array, shape: tuple[int, ...]) -> Array:
    """Repeat each entry of a per-block tensor over its block."""
    for axis, size in enumerate(shape):
        if small.shape[axis] not in (1, size):
            small = np.repeat(small, size // small.shape[axis], axis=axis)
    return small


def _shift_scale(data: Array, scale: Array, offset: Array | None) -> Array:
    wide = data.astype(np.float32)
    if offset is not None:
        wide = wide - _spread(offset, data.shape).astype(np.float32)
    result: Array = (wide * _spread(scale, data.shape).astype(np.float32)).astype(scale.dtype)
    return result


def _look_up(indices: Array, lut: Array) -> Array:
    """Entries of a lookup table of shape ``[groups..., palettes, vector]``; vectors of one only."""
    if lut.shape[-1] != 1:
        raise NotImplementedError("lookup tables of vectors")
    palettes = lut[..., 0]
    if palettes[..., 0].size == 1:
        return np.asarray(palettes.reshape(-1)[indices])
    dense = np.empty(indices.shape, dtype=lut.dtype)
    groups = palettes.shape[:-1]
    steps = [size // count for size, count in zip(indices.shape, groups, strict=True)]
    for group in np.ndindex(*groups):
        block = tuple(slice(g * s, (g + 1) * s) for g, s in zip(group, steps, strict=True))
        dense[block] = palettes[group][indices[block]]
    return dense


def _sparse_to_dense(a: Mapping[str, Array]) -> tuple[Array, ...]:
    mask = a["mask"]
    if "shape" in a:  # the form of iOS16 and iOS17: packed bits and a shape
        shape = tuple(int(n) for n in a["shape"])
        mask = unpack(mask, int(np.prod(shape)), 1).reshape(shape)
    return (_scatter(mask, a["nonzero_data"]),)


def _affine_dequantize(a: Mapping[str, Array]) -> tuple[Array, ...]:
    data, axis = a["quantized_data"], int(a["axis"])
    shape = [-1 if i == axis % data.ndim else 1 for i in range(data.ndim)]
    return (_shift_scale(data, a["scale"].reshape(shape), a["zero_point"].reshape(shape)),)


def _lut_to_dense(a: Mapping[str, Array]) -> tuple[Array, ...]:
    if "shape" not in a:
        return (_look_up(a["indices"], a["lut"]),)
    shape = tuple(int(n) for n in a["shape"])
    bits = max(int(a["lut"].size - 1).bit_length(), 1)
    return (a["lut"][unpack(a["indices"], int(np.prod(shape)), bits)].reshape(shape),)


def _lut_to_sparse(a: Mapping[str, Array]) -> tuple[Array, ...]:
    mask = a["indices_mask"]
    dense = _look_up(_scatter(mask, a["indices_nonzero_data"]), a["lut"])
    return mask, dense[mask.astype(bool)]


def _sparse_shift_scale(a: Mapping[str, Array]) -> tuple[Array, ...]:
    mask = a["data_mask"]
    dense = _shift_scale(_scatter(mask, a["nonzero_data"]), a["scale"], a.get("offset"))
    return mask, dense[mask.astype(bool)]


#: How each ``constexpr_*`` op turns its arguments into its outputs.
DECODERS: dict[str, Callable[[Mapping[str, Array]], tuple[Array, ...]]] = {
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_cast": lambda a: (a["source_val"].astype(np.float32),),
    "constexpr_blockwise_shift_scale": lambda a: (
        _shift_scale(a["data"], a["scale"], a.get("offset")),
    ),
    "constexpr_sparse_blockwise_shift_scale": _sparse_shift_scale,
}
