"""Sums over the gradients of batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from purprune import ConfigError
from purprune.context import full_precision
from purprune.statistics import ACCUMULATED

GRADIENT_STATS = ("gradient", "squared_gradient", "movement")
"""The statistics that are sums over the gradients of batches."""


class GradientSums:
    """Sums over the gradients of batches. They are asked for, so that none is left in ``grad``."""

    def __init__(self, model: nn.Module, needs: Mapping[str, list[str]]) -> None:
        """Take the parameters by name, and which of :data:`GRADIENT_STATS` each needs."""
        self.params = {name: model.get_parameter(name) for name in needs}
        self._needs = needs
        self._sums: dict[str, dict[str, Tensor]] = {name: {} for name in needs}
        self._batches = 0

    @contextmanager
    def enabled(self) -> Iterator[None]:
        """Let the parameters have gradients, frozen ones too; without any, save the memory."""
        frozen = [param for param in self.params.values() if not param.requires_grad]
        with torch.set_grad_enabled(bool(self.params)):
            try:
                for param in frozen:
                    param.requires_grad_(True)
                yield
            finally:
                for param in frozen:
                    param.requires_grad_(False)

    def add(self, loss: Tensor) -> None:
        """Add the gradients of one batch's loss."""
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"Expected a loss that is one number; got {got}. Take its mean.")
        grads = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        for (name, param), grad in zip(self.params.items(), grads, strict=True):
            if grad is None:
                raise ConfigError(
                    f"Expected a loss that depends on {name!r}; it does not. Set {name!r} to None."
                )
            self._add(name, param.detach(), grad)
        self._batches += 1

    def _add(self, name: str, weight: Tensor, grad: Tensor) -> None:
        weight, grad, sums = full_precision(weight), full_precision(grad), self._sums[name]
        for stat in self._needs[name]:
            found = ACCUMULATED[stat](weight, grad) if stat in ACCUMULATED else grad
            sums[stat] = sums[stat] + found if stat in sums else found

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the statistics by name."""
        return {
            name: {
                stat: found if stat == "movement" else found / self._batches
                for stat, found in sums.items()
            }
            for name, sums in self._sums.items()
        }
