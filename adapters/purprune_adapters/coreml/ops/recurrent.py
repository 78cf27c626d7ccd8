"""LSTM, GRU and the plain RNN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .registry import Args, op

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
    "hard_sigmoid": lambda x: (0.2 * x + 0.5).clamp(0, 1),
}


def _activation(a: Args, key: str, default: str) -> Callable[[Tensor], Tensor]:
    name = a.text(key, default)
    if name not in _ACTIVATIONS:
        raise NotImplementedError(f"{key} {name!r} in a recurrent layer")
    return _ACTIVATIONS[name]


def _no_peephole(a: Args) -> None:
    if "peephole" in a or "clip" in a:
        raise NotImplementedError("lstm with peephole or clip")


def _lstm_pass(
    a: Args, x: Tensor, h: Tensor, c: Tensor, side: str
) -> tuple[Tensor, Tensor, Tensor]:
    """One direction over ``x`` of shape [steps, batch, features]; gates in the order i, f, o, g."""
    weight, inner = a.tensor("weight_ih" + side), a.tensor("weight_hh" + side)
    gate = _activation(a, "recurrent_activation", "sigmoid")
    cell = _activation(a, "cell_activation", "tanh")
    out = _activation(a, "activation", "tanh")
    fed = functional.linear(x, weight, a.maybe("bias" + side))
    states = []
    for step in fed:
        i, f, o, g = (step + functional.linear(h, inner)).chunk(4, -1)
        c = gate(f) * c + gate(i) * cell(g)
        h = gate(o) * out(c)
        states.append(h)
    return torch.stack(states), h, c


@op("lstm")
def _lstm(a: Args) -> tuple[Tensor, Tensor, Tensor]:
    _no_peephole(a)
    x, h, c = a.tensor("x"), a.tensor("initial_h"), a.tensor("initial_c")
    direction = a.text("direction", "forward")
    if direction == "bidirectional":
        (h0, h1), (c0, c1) = h.chunk(2, -1), c.chunk(2, -1)
        y0, h0, c0 = _lstm_pass(a, x, h0, c0, "")
        y1, h1, c1 = _lstm_pass(a, x.flip(0), h1, c1, "_back")
        y, h, c = torch.cat([y0, y1.flip(0)], -1), torch.cat([h0, h1], -1), torch.cat([c0, c1], -1)
    elif direction == "reverse":
        y, h, c = _lstm_pass(a, x.flip(0), h, c, "")
        y = y.flip(0)
    else:
        y, h, c = _lstm_pass(a, x, h, c, "")
    return (y if a.flag("output_sequence") else h[None]), h, c


def _scan(a: Args, step: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Run a layer of one state, in the direction asked for."""
    x, h = a.tensor("x"), a.tensor("initial_h")
    backwards = a.text("direction", "forward") == "reverse"
    states = []
    for one in x.flip(0) if backwards else x:
        h = step(one, h)
        states.append(h)
    y = torch.stack(states)
    y = y.flip(0) if backwards else y
    return (y if a.flag("output_sequence") else h[None]), h


@op("gru")
def _gru(a: Args) -> tuple[Tensor, Tensor]:
    """Weights in the order reset, output, update."""
    weight, inner = a.tensor("weight_ih"), a.tensor("weight_hh")
    gate = _activation(a, "recurrent_activation", "sigmoid")
    out = _activation(a, "activation", "tanh")
    bias, input_bias = a.maybe("bias"), a.maybe("input_bias")

    def step(x: Tensor, h: Tensor) -> Tensor:
        xr, xo, xz = functional.linear(x, weight, input_bias).chunk(3, -1)
        hr, ho, hz = functional.linear(h, inner, bias).chunk(3, -1)
        r, z = gate(xr + hr), gate(xz + hz)
        return (1 - z) * out(xo + r * ho) + z * h

    return _scan(a, step)


@op("rnn")
def _rnn(a: Args) -> tuple[Tensor, Tensor]:
    weight, inner, bias = a.tensor("weight_ih"), a.tensor("weight_hh"), a.maybe("bias")
    out = _activation(a, "activation", "tanh")

    def step(x: Tensor, h: Tensor) -> Tensor:
        return out(functional.linear(x, weight, bias) + functional.linear(h, inner))

    return _scan(a, step)
