"""Convolutions, matrix products, pooling, normalization, attention, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .registry import Args, op

# By the number of spatial dims.
_Table = dict[int, Callable[..., Tensor]]
_CONV: _Table = dict(enumerate((functional.conv1d, functional.conv2d, functional.conv3d), 1))
_CONV_TRANSPOSE: _Table = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_MAX_POOL: _Table = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVG_POOL: _Table = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


def _pads(a: Args, sizes: list[int], kernel: list[int], stride: list[int]) -> list[int]:
    """Padding as MIL writes it: before and after each spatial dim. ``kernel`` is dilated."""
    kind = a.text("pad_type", "valid")
    if kind == "custom":
        return a.ints("pad", [0] * 2 * len(sizes))
    if kind == "valid":
        return [0] * 2 * len(sizes)
    pads = []
    for size, k, s in zip(sizes, kernel, stride, strict=True):
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        less, more = total // 2, total - total // 2
        pads += [more, less] if kind == "same_lower" else [less, more]
    return pads


def _torch_pad(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    """Pad with MIL's order of dims (torch's begins at the last)."""
    if not any(pads):
        return x
    pairs = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    return functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


@op("conv")
def _conv(a: Args) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    n = weight.ndim - 2
    stride, dilation = a.ints("strides", [1] * n), a.ints("dilations", [1] * n)
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilation, strict=True)]
    x = _torch_pad(x, _pads(a, list(x.shape[2:]), kernel, stride))
    groups = a.int("groups", 1)
    return _CONV[n](x, weight, a.maybe("bias"), stride, 0, dilation, groups)


@op("conv_transpose")
def _conv_transpose(a: Args) -> Tensor:
    x, weight = a.tensor("x"), a.tensor("weight")
    n = weight.ndim - 2
    stride, dilation = a.ints("strides", [1] * n), a.ints("dilations", [1] * n)
    groups = a.int("groups", 1)
    y = _CONV_TRANSPOSE[n](x, weight, None, stride, 0, 0, groups, dilation)
    pads = a.ints("pad", [0] * 2 * n) if a.text("pad_type") == "custom" else [0] * 2 * n
    wanted = (
        a.ints("output_shape")[-n:]
        if "output_shape" in a
        else [size - pads[2 * i] - pads[2 * i + 1] for i, size in enumerate(y.shape[2:])]
    )
    if a.text("pad_type") in ("same", "same_lower"):
        raise NotImplementedError(f"conv_transpose with pad_type {a.text('pad_type')!r}")
    crop = []
    for i, size in enumerate(wanted):
        crop += [-pads[2 * i], size + pads[2 * i] - y.shape[2 + i]]
    y = _torch_pad(y, crop)
    bias = a.maybe("bias")
    return y if bias is None else y + bias.reshape([1, -1] + [1] * n)


@op("linear")
def _linear(a: Args) -> Tensor:
    return functional.linear(a.tensor("x"), a.tensor("weight"), a.maybe("bias"))


@op("matmul")
def _matmul(a: Args) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    x = x.transpose(-1, -2) if a.flag("transpose_x") else x
    y = y.transpose(-1, -2) if a.flag("transpose_y") else y
    return torch.matmul(x, y)


@op("einsum")
def _einsum(a: Args) -> Tensor:
    return torch.einsum(a.text("equation"), *a["values"])


def _window(a: Args) -> tuple[Tensor, list[int], list[int], list[int], list[int]]:
    """x, kernel, stride, pads, and the extra end padding that ceil mode asks for."""
    x, kernel = a.tensor("x"), a.ints("kernel_sizes")
    stride = a.ints("strides", [1] * len(kernel))
    sizes = list(x.shape[-len(kernel) :])
    pads, extra = _pads(a, sizes, kernel, stride), []
    for i, (size, k, s) in enumerate(zip(sizes, kernel, stride, strict=True)):
        room = size + pads[2 * i] + pads[2 * i + 1] - k
        count = math.ceil(room / s) if a.flag("ceil_mode") else room // s
        if count * s >= size + pads[2 * i]:  # a window may not begin behind the input
            count -= 1
        extra += [0, max(count * s - room, 0)]
    return x, kernel, stride, pads, extra


@op("max_pool")
def _max_pool(a: Args) -> Tensor:
    x, kernel, stride, pads, extra = _window(a)
    both = [p + e for p, e in zip(pads, extra, strict=True)]
    return _MAX_POOL[len(kernel)](_torch_pad(x, both, float("-inf")), kernel, stride)


@op("avg_pool")
def _avg_pool(a: Args) -> Tensor:
    x, kernel, stride, pads, extra = _window(a)
    pool = _AVG_POOL[len(kernel)]
    counted = 0.0 if a.flag("exclude_padding_from_average") else 1.0
    ones = _torch_pad(_torch_pad(torch.ones_like(x), pads, counted), extra)
    total = pool(_torch_pad(_torch_pad(x, pads), extra), kernel, stride)
    return total / pool(ones, kernel, stride)


def _across(value: Tensor, x: Tensor) -> Tensor:
    """One value per channel, shaped to broadcast over ``x``."""
    return value.reshape([1, -1] + [1] * (x.ndim - 2))


def _per_channel(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else _across(value, x)


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


@op("batch_norm")
def _batch_norm(a: Args) -> Tensor:
    x = a.tensor("x")
    mean, variance = _across(a.tensor("mean"), x), _across(a.tensor("variance"), x)
    y = (x - mean) * torch.rsqrt(variance + a.number("epsilon", 1e-5))
    return _affine(y, _per_channel(a.maybe("gamma"), x), _per_channel(a.maybe("beta"), x))


def _normalize(x: Tensor, axes: list[int], epsilon: float) -> Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + epsilon)


@op("instance_norm")
def _instance_norm(a: Args) -> Tensor:
    x = a.tensor("x")
    y = _normalize(x, list(range(2, x.ndim)), a.number("epsilon", 1e-5))
    return _affine(y, _per_channel(a.maybe("gamma"), x), _per_channel(a.maybe("beta"), x))


@op("layer_norm")
def _layer_norm(a: Args) -> Tensor:
    x = a.tensor("x")
    axes = a.ints("axes") or list(range(x.ndim))
    y = _normalize(x, axes, a.number("epsilon", 1e-5))
    return _affine(y, a.maybe("gamma"), a.maybe("beta"))


@op("l2_norm")
def _l2_norm(a: Args) -> Tensor:
    x = a.tensor("x")
    total = (x * x).sum((-3, -2, -1), keepdim=True)
    return x * torch.rsqrt(total + a.number("epsilon", 1e-6))


@op("scaled_dot_product_attention")
def _attention(a: Args) -> Tensor:
    mask = a.maybe("attn_mask")
    return functional.scaled_dot_product_attention(
        a.tensor("query"), a.tensor("key"), a.tensor("value"), attn_mask=mask
    )


def _scale_factors(a: Args) -> list[float]:
    return [a.number("scale_factor_height", 1.0), a.number("scale_factor_width", 1.0)]


@op("upsample_nearest_neighbor")
def _upsample_nearest(a: Args) -> Tensor:
    return functional.interpolate(a.tensor("x"), scale_factor=_scale_factors(a), mode="nearest")


@op("upsample_bilinear")
def _upsample_bilinear(a: Args) -> Tensor:
    corners = a.flag("align_corners", True)
    if a.flag("half_pixel_centers", not corners) == corners:
        raise NotImplementedError("upsample_bilinear with these corner rules")
    return functional.interpolate(
        a.tensor("x"), scale_factor=_scale_factors(a), mode="bilinear", align_corners=corners
    )


def _target_size(a: Args) -> list[int]:
    return [a.int("target_size_height"), a.int("target_size_width")]


@op("resize_nearest_neighbor")
def _resize_nearest(a: Args) -> Tensor:
    return functional.interpolate(a.tensor("x"), size=_target_size(a), mode="nearest")


@op("resize_bilinear")
def _resize_bilinear(a: Args) -> Tensor:
    mode = a.text("sampling_mode", "DEFAULT")
    rules: dict[str, Any] = {"ALIGN_CORNERS": True, "UNALIGN_CORNERS": False}
    if mode not in rules:
        raise NotImplementedError(f"resize_bilinear with sampling_mode {mode!r}")
    return functional.interpolate(
        a.tensor("x"), size=_target_size(a), mode="bilinear", align_corners=rules[mode]
    )
