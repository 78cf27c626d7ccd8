"""Activations, arithmetic, comparisons."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .registry import OPS, Args, binary, op, unary

_SAME_IN_TORCH = (
    *("abs", "acos", "asin", "atan", "atanh", "ceil", "cos", "cosh", "erf", "exp", "exp2", "floor"),
    *("logical_not", "relu", "round", "sigmoid", "sign", "sin", "sinh", "sqrt", "square", "tan"),
    "tanh",
)

OPS.update({name: unary(getattr(torch, name)) for name in _SAME_IN_TORCH})
OPS.update(
    {
        "identity": unary(lambda x: x),
        "relu6": unary(functional.relu6),
        "silu": unary(functional.silu),
        "softplus": unary(functional.softplus),
        "softsign": unary(functional.softsign),
        "add": binary(torch.add),
        "sub": binary(torch.sub),
        "mul": binary(torch.mul),
        "maximum": binary(torch.maximum),
        "minimum": binary(torch.minimum),
        "pow": binary(torch.pow),
        "floor_div": binary(lambda x, y: torch.div(x, y, rounding_mode="floor")),
        "mod": binary(torch.remainder),
        "equal": binary(torch.eq),
        "not_equal": binary(torch.ne),
        "greater": binary(torch.gt),
        "greater_equal": binary(torch.ge),
        "less": binary(torch.lt),
        "less_equal": binary(torch.le),
        "logical_and": binary(torch.logical_and),
        "logical_or": binary(torch.logical_or),
        "logical_xor": binary(torch.logical_xor),
    }
)


@op("real_div")
def _real_div(a: Args) -> Tensor:
    x, y = a.tensor("x"), a.tensor("y")
    whole = not (x.is_floating_point() or y.is_floating_point())
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


@op("log")
def _log(a: Args) -> Tensor:
    return torch.log(a.tensor("x") + a.number("epsilon"))


@op("rsqrt")
def _rsqrt(a: Args) -> Tensor:
    return torch.rsqrt(a.tensor("x") + a.number("epsilon"))


@op("inverse")
def _inverse(a: Args) -> Tensor:
    return 1 / (a.tensor("x") + a.number("epsilon"))


@op("clip")
def _clip(a: Args) -> Tensor:
    return a.tensor("x").clamp(a.number("alpha"), a.number("beta"))


@op("threshold")
def _threshold(a: Args) -> Tensor:
    return a.tensor("x").clamp(min=a.number("alpha"))


@op("thresholded_relu")
def _thresholded_relu(a: Args) -> Tensor:
    x = a.tensor("x")
    return torch.where(x >= a.number("alpha"), x, torch.zeros_like(x))


@op("clamped_relu")
def _clamped_relu(a: Args) -> Tensor:
    x = a.tensor("x")
    return torch.where(x >= 0, x, x * a.number("alpha")).clamp(max=a.number("beta"))


@op("leaky_relu")
def _leaky_relu(a: Args) -> Tensor:
    return functional.leaky_relu(a.tensor("x"), a.number("alpha"))


@op("prelu")
def _prelu(a: Args) -> Tensor:
    return functional.prelu(a.tensor("x"), a.tensor("alpha"))


@op("elu")
def _elu(a: Args) -> Tensor:
    return functional.elu(a.tensor("x"), a.number("alpha", 1.0))


@op("gelu")
def _gelu(a: Args) -> Tensor:
    x, mode = a.tensor("x"), a.text("mode", "EXACT")
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@op("sigmoid_hard")
def _sigmoid_hard(a: Args) -> Tensor:
    return (a.tensor("x") * a.number("alpha", 0.2) + a.number("beta", 0.5)).clamp(0, 1)


@op("scaled_tanh")
def _scaled_tanh(a: Args) -> Tensor:
    return a.number("alpha", 1.0) * torch.tanh(a.number("beta", 1.0) * a.tensor("x"))


@op("linear_activation")
def _linear_activation(a: Args) -> Tensor:
    return a.number("alpha", 1.0) * a.tensor("x") + a.number("beta")


@op("softplus_parametric")
def _softplus_parametric(a: Args) -> Tensor:
    x = a.tensor("x")
    shape = [1, -1] + [1] * (x.ndim - 2)
    alpha, beta = a.tensor("alpha").reshape(shape), a.tensor("beta").reshape(shape)
    return alpha * functional.softplus(beta * x)


@op("softmax")
def _softmax(a: Args) -> Tensor:
    return torch.softmax(a.tensor("x"), a.int("axis", -1))


@op("select")
def _select(a: Args) -> Tensor:
    return torch.where(a.tensor("cond").bool(), a.tensor("a"), a.tensor("b"))


@op("cast")
def _cast(a: Args) -> Tensor:
    x, kind = a.tensor("x"), a.text("dtype")
    if kind == "bool":
        return x.bool()
    # float16 is a matter of rounding, which the evaluator does; every integer is an int64 here.
    return x.float() if kind.startswith("fp") else x.to(torch.int64)
