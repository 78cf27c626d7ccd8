"""Reshaping, joining, cutting, indexing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .registry import Args, op


@op("reshape")
def _reshape(a: Args) -> Tensor:
    x, shape = a.tensor("x"), a.ints("shape")
    return x.reshape([x.shape[i] if n == 0 and x.numel() else n for i, n in enumerate(shape)])


@op("transpose")
def _transpose(a: Args) -> Tensor:
    return a.tensor("x").permute(a.ints("perm"))


@op("concat")
def _concat(a: Args) -> Tensor:
    values, axis = a["values"], a.int("axis")
    if not a.flag("interleave"):
        return torch.cat(values, axis)
    axis %= values[0].ndim
    return torch.stack(values, axis + 1).flatten(axis, axis + 1)


@op("stack")
def _stack(a: Args) -> Tensor:
    return torch.stack(a["values"], a.int("axis"))


@op("split")
def _split(a: Args) -> tuple[Tensor, ...]:
    x, axis = a.tensor("x"), a.int("axis")
    sizes = a.ints("split_sizes")
    if not sizes:
        count = a.int("num_splits")
        sizes = [x.shape[axis] // count] * count
    return torch.split(x, sizes, axis)


@op("squeeze")
def _squeeze(a: Args) -> Tensor:
    x = a.tensor("x")
    axes = a.ints("axes") or [i for i, n in enumerate(x.shape) if n == 1]
    return x.squeeze(axes)


@op("expand_dims")
def _expand_dims(a: Args) -> Tensor:
    x, axes = a.tensor("x"), a.ints("axes")
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("slice_by_index")
def _slice_by_index(a: Args) -> Tensor:
    x = a.tensor("x")
    begin, end = a.ints("begin"), a.ints("end")
    stride = a.ints("stride", [1] * x.ndim)
    from_start, to_end = a.flags("begin_mask", x.ndim), a.flags("end_mask", x.ndim)
    single = a.flags("squeeze_mask", x.ndim)
    for axis in reversed(range(x.ndim)):
        size = x.shape[axis]
        if single[axis]:
            x = x.select(axis, begin[axis])
            continue
        start = None if from_start[axis] else begin[axis]
        stop = None if to_end[axis] else end[axis]
        places = range(size)[slice(start, stop, stride[axis])]
        if len(places) != size or stride[axis] < 0:
            x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


@op("slice_by_size")
def _slice_by_size(a: Args) -> Tensor:
    x = a.tensor("x")
    for axis, (start, size) in enumerate(zip(a.ints("begin"), a.ints("size"), strict=True)):
        x = x.narrow(axis, start, x.shape[axis] - start if size == -1 else size)
    return x


@op("gather")
def _gather(a: Args) -> Tensor:
    x, indices, axis = a.tensor("x"), a.tensor("indices").long(), a.int("axis")
    axis, batch = axis % x.ndim, a.int("batch_dims")
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    if batch:
        flat_x, flat_i = x.flatten(0, batch - 1), indices.flatten(0, batch - 1)
        rows = [_take(one, which, axis - batch) for one, which in zip(flat_x, flat_i, strict=True)]
        return torch.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)
    return _take(x, indices, axis)


def _take(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


@op("gather_along_axis")
def _gather_along_axis(a: Args) -> Tensor:
    return a.tensor("x").gather(a.int("axis"), a.tensor("indices").long())


@op("gather_nd")
def _gather_nd(a: Args) -> Tensor:
    if a.int("batch_dims"):
        raise NotImplementedError("gather_nd with batch_dims")
    return a.tensor("x")[tuple(a.tensor("indices").long().unbind(-1))]


@op("scatter")
def _scatter(a: Args) -> Tensor:
    data, indices, updates = a.tensor("data"), a.tensor("indices").long(), a.tensor("updates")
    axis, mode = a.int("axis"), a.text("mode", "add")
    axis %= data.ndim
    indices = torch.where(indices < 0, indices + data.shape[axis], indices).reshape(-1)
    shape = list(data.shape)
    shape[axis] = indices.numel()
    updates = updates.reshape(shape)
    if mode == "add":
        return data.index_add(axis, indices, updates)
    if mode == "update":
        return data.index_copy(axis, indices, updates)
    raise NotImplementedError(f"scatter with mode {mode!r}")


@op("pad")
def _pad(a: Args) -> Tensor:
    x, pad = a.tensor("x"), a.ints("pad")
    pairs = [pad[i : i + 2] for i in range(0, len(pad), 2)]
    flat = [n for pair in reversed(pairs) for n in pair]
    mode = {"reflect": "reflect", "replicate": "replicate"}.get(a.text("mode", "constant"))
    if mode is None:
        return functional.pad(x, flat, value=a.number("constant_val"))
    # torch pads the last dims of a batched tensor only; leading dims that stay are dropped.
    while flat[-2:] == [0, 0]:
        flat = flat[:-2]
    spare = max(len(flat) // 2 + 2 - x.ndim, 0)
    padded = functional.pad(x.reshape([1] * spare + list(x.shape)), flat, mode=mode)
    return padded.reshape(padded.shape[spare:])


@op("tile")
def _tile(a: Args) -> Tensor:
    return a.tensor("x").tile(a.ints("reps"))


@op("shape")
def _shape(a: Args) -> Tensor:
    return torch.tensor(a.tensor("x").shape, dtype=torch.int64)


@op("fill")
def _fill(a: Args) -> Tensor:
    value = a["value"] if "value" in a else torch.tensor(0.0)
    return torch.full(a.ints("shape"), value.item(), dtype=value.dtype)


@op("fill_like")
def _fill_like(a: Args) -> Tensor:
    value = a["value"] if "value" in a else torch.tensor(0.0)
    return torch.full(a.tensor("ref_tensor").shape, value.item(), dtype=value.dtype)


@op("range_1d")
def _range_1d(a: Args) -> Tensor:
    ends = [a.tensor(key).item() for key in ("start", "end", "step")]
    return torch.arange(*ends, dtype=a.tensor("start").dtype)


@op("reverse")
def _reverse(a: Args) -> Tensor:
    x = a.tensor("x")
    return x.flip(a.ints("axes") or list(range(x.ndim)))


@op("flatten2d")
def _flatten2d(a: Args) -> Tensor:
    x, axis = a.tensor("x"), a.int("axis", 1)
    rows = 1
    for n in x.shape[:axis]:
        rows *= n
    return x.reshape(rows, -1)


@op("pixel_shuffle")
def _pixel_shuffle(a: Args) -> Tensor:
    return functional.pixel_shuffle(a.tensor("x"), a.int("upscale_factor"))


@op("pixel_unshuffle")
def _pixel_unshuffle(a: Args) -> Tensor:
    return functional.pixel_unshuffle(a.tensor("x"), a.int("downscale_factor"))


@op("one_hot")
def _one_hot(a: Args) -> Tensor:
    hot = functional.one_hot(a.tensor("indices").long(), a.int("one_hot_vector_size")).movedim(
        -1, a.int("axis", -1)
    )
    on, off = a.number("on_value", 1.0), a.number("off_value")
    return torch.where(hot.bool(), torch.tensor(on), torch.tensor(off))


@op("band_part")
def _band_part(a: Args) -> Tensor:
    x, lower, upper = a.tensor("x"), a.int("lower", -1), a.int("upper", -1)
    x = x if lower < 0 else x.triu(-lower)
    return x if upper < 0 else x.tril(upper)


@op("crop")
def _crop(a: Args) -> Tensor:
    (top, bottom), (left, right) = a.ints("crop_height"), a.ints("crop_width")
    return functional.pad(a.tensor("x"), [-left, -right, -top, -bottom])
