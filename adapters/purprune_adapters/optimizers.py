"""Zeros after an optimizer step: written, or proven to be there already.

A step of the optimizers in the table below moves an entry by a function of its own weight,
gradient and state alone, and that function is 0 where all three are 0:

    SGD      w - lr * (mu * m + g + wd * w)
    Adam(W)  w * (1 - lr * wd) - lr' * m / (sqrt(v) / c + eps)
    Adagrad  w - lr' * g / (sqrt(s) + eps)
    RMSprop  w - lr * (mu * b + g / (sqrt(v) + eps))

So an entry that is 0 before a step is 0 after it, when its gradient was masked and not touched
since, and its state is 0. Each of these is checked at every step; where one of them does not hold,
or the optimizer is another one, is given a closure or has hooks of others, the zeros are written. A
pass over the weights is saved.

What torch does not count is not seen: writes through ``.data``, and those of fused optimizers to
weights that this one holds too. So the proof is relied on only where that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from purprune_adapters.distributed import local
from purprune_adapters.hooks import MaskStore, Seen, write_zeros_
from purprune_adapters.inplace import is_zero_where_pruned

_KEEPING = (SGD, Adam, AdamW, Adagrad, RMSprop)


def keeps_zeros(optimizer: Optimizer, group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Tell whether a step leaves an entry at +0 whose weight, gradient and state are 0.

    >>> optimizer = torch.optim.Adam([torch.zeros(1)])
    >>> keeps_zeros(optimizer, optimizer.param_groups[0], torch.float32)
    True
    >>> keeps_zeros(optimizer, optimizer.param_groups[0], torch.float16)  # 1e-8 is 0 there: 0 / 0
    False
    """
    if type(optimizer) not in _KEEPING or group.get("capturable") or group.get("differentiable"):
        return False
    lr, decay = group["lr"], group.get("weight_decay", 0.0)
    if not (type(lr) is float and math.isfinite(lr) and 0 <= lr * decay <= 1):  # or 0 becomes -0
        return False
    return bool(group.get("eps", 1.0) >= torch.finfo(dtype).smallest_normal)


class ZeroKeeper:
    """Sees to it that pruned entries are zero after each step of an optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        store: MaskStore,
        params: Callable[[], Mapping[str, Tensor]],
        *,
        mask_state: bool,
        trust: bool,
    ) -> None:
        """Take what :meth:`attach` needs; ``params`` looks the pruned parameters up by name."""
        self._optimizer, self._store, self._params = optimizer, store, params
        self._mask_state, self._trust = mask_state, trust
        self.has_stepped = False
        """Whether the optimizer stepped since :meth:`forget_step`."""
        self._state_seen: dict[str, list[Seen]] = {}  # known to be zero where pruned
        self._state_moves: set[str] = set()  # known not to be
        self._sure: set[str] = set()  # that the step in progress leaves zeros
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Hook the optimizer."""
        if self._trust:
            self._handles.append(self._optimizer.register_step_pre_hook(self._before))
        self._handles.append(self._optimizer.register_step_post_hook(self._after))

    def forget_step(self) -> None:
        """Wait for the next step of the optimizer."""
        self.has_stepped = False

    def masks_changed(self, names: Iterable[str]) -> None:
        """Forget what was known of the state; zero it where pruned, if that was asked for."""
        for name in names:
            self._state_seen.pop(name, None)
            self._state_moves.discard(name)
        if self._mask_state:
            self.zero_state(names)

    def zero_state(self, names: Iterable[str]) -> None:
        """Zero the state of what the masks in force prune."""
        params = self._params()
        for name in names:
            for tensor in self._moments(params[name]):
                write_zeros_(tensor, self._store.mask_for(name, tensor))

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()

    @_disable_dynamo
    def _before(self, _: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._sure = set()
        if any(argument is not None for argument in (*args[1:], *kwargs.values())):
            return  # a closure may do to weights what it likes
        if self._has_other_hooks():
            return
        params = self._params()
        names = {id(param): name for name, param in params.items()}
        self._sure = {
            names[id(param)]
            for group in self._optimizer.param_groups
            for param in group["params"]
            if id(param) in names
            and keeps_zeros(self._optimizer, group, param.dtype)
            and not self._store.changed(names[id(param)], param)
            and self._state_is_zero(names[id(param)], param)
        }

    def _has_other_hooks(self) -> bool:
        """Tell whether somebody else may write between our two hooks."""
        own = self._optimizer._optimizer_step_pre_hooks, self._optimizer._optimizer_step_post_hooks
        everywhere = _global_optimizer_pre_hooks, _global_optimizer_post_hooks
        return any(len(hooks) > 1 for hooks in own) or any(everywhere)

    @_disable_dynamo
    def _after(self, *_: Any) -> None:
        self.has_stepped = True
        for name, param in self._params().items():
            if name in self._sure and self._store.has_masked_gradient(name, param):
                self._store.is_clean_now(name, param)
                self._state_seen[name] = [Seen.of(tensor) for tensor in self._moments(param)]
            else:
                self._store.apply_(name, param)

    def _moments(self, param: Tensor) -> list[Tensor]:
        """Return the state that has an entry for each entry of the parameter."""
        state = self._optimizer.state.get(param, {})
        return [
            value
            for key, value in state.items()
            if key != "step" and isinstance(value, Tensor) and value.shape == param.shape
            if value.layout is torch.strided
        ]

    def _state_is_zero(self, name: str, param: Tensor) -> bool:
        """Tell whether the state is zero where pruned; it is read once after new masks."""
        if name in self._state_moves:
            return False
        moments, known = self._moments(param), self._state_seen.get(name, [])
        if len(known) == len(moments) and all(map(Seen.is_still, known, moments)):
            return True
        mask = self._store.mask_for(name, param)
        if all(is_zero_where_pruned(local(tensor), local(mask)) for tensor in moments):
            return True
        self._state_moves.add(name)
        return False
