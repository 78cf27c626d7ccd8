"""Whether a model trains between two calls of ``Pruner.step()``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from purprune_adapters.distributed import local
from purprune_adapters.hooks import state_of
from purprune_adapters.inplace import zero_pruned_

_SKIPPED = 16
"""So many steps in a row a GradScaler may skip while it halves its first scale, 2 ** 16."""
_ROWS = 16
_EARLY = 3
"""Calls in a row that tell of a wrong order: one or two may be of weights that were loaded."""


def untrained(calls: int) -> str:
    """Return the warning of a pruner that steps beside a training of something else."""
    return (
        f"step() was called {calls} times, but no pruned weight ever changed in between. Is the "
        f"optimizer made from the parameters of the model that prepare() returned? It is a copy "
        f"unless inplace=True."
    )


def too_early(calls: int) -> str:
    """Return the warning of a pruner that steps before the optimizer does."""
    return (
        f"step() was called {calls} times between the backward pass and optimizer.step(). Call it "
        f"after optimizer.step(): pruned weights that momentum moves are dense until the next "
        f"forward pass, and in a checkpoint. An optimizer that is attached, Pruner(..., "
        f"optimizer=optimizer), leaves zeros in any order."
    )


class Activity:
    """Counts the calls of step() before which a parameter was written to, and all others.

    Fused optimizers write without counting; what they did is seen in a sample of the rows.
    """

    def __init__(self) -> None:
        """Start without a call."""
        self.moved = 0
        self.still = 0
        self._left: dict[str, tuple[int, ...]] = {}
        self._rows: dict[str, Tensor] = {}
        self._probe: dict[str, Tensor] = {}
        self._warned = False
        self._early = 0

    def start(self, params: Mapping[str, Tensor]) -> None:
        """Remember the parameters as training finds them."""
        self._rows = {name: _rows(param).clone() for name, param in params.items()}
        self.leave(params)

    def leave(self, params: Mapping[str, Tensor]) -> None:
        """Remember the parameters as step() leaves them."""
        self._left = _versions(params)

    def has_moved(self, params: Mapping[str, Tensor]) -> bool:
        """Tell whether a parameter was written to since step() left it."""
        return _versions(params) != self._left

    def count(
        self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor], at_gradient: bool
    ) -> None:
        """Count one call of step(), and warn once when all or most of them find nothing new.

        With ``at_gradient`` nobody wrote to the weights since their gradients came: what moved them
        since the last call came before the backward pass, as in the wrong order of two steps.
        """
        moved = self.has_moved(params)
        self._early = self._early + 1 if moved and at_gradient else 0
        if self._early == _EARLY:
            warnings.warn(too_early(self._early), stacklevel=5)
        self.moved, self.still = self.moved + moved, self.still + (not moved)
        if self._warned or self.still <= _SKIPPED or self.still < self.moved:
            return
        before = self._probe  # fused optimizers move rows, but no version
        self._probe = {name: _rows(param).clone() for name, param in params.items()}
        if moved or not before or _differ(params, before, masks):
            return
        self._warned = True
        calls = self.moved + self.still
        if not self.trained(params, masks):
            warnings.warn(untrained(calls), stacklevel=5)
        else:
            warnings.warn(
                f"step() was called {calls} times, but before most of these calls no pruned weight "
                f"had changed. Call it once after each optimizer.step(), not after each batch: it "
                f"moves the schedule on.",
                stacklevel=5,  # over step() and the two frames that keep it out of graphs
            )

    def trained(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bool:
        """Tell whether a weight that is kept ever changed."""
        return self.moved > 0 or _differ(params, self._rows, masks)


def _differ(
    params: Mapping[str, Tensor], before: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> bool:
    return any(
        not _same(_rows(params[name]), rows, _rows(masks[name])) for name, rows in before.items()
    )


def _versions(params: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return what changes with writes that torch counts, and with new data."""
    return {
        name: (0, local(param).data_ptr()) if param.is_inference() else state_of(param)
        for name, param in params.items()
    }


def _rows(tensor: Tensor) -> Tensor:
    """Return a few rows of what this process holds, spread over the tensor."""
    held = local(tensor).detach()
    rows = held.reshape(1) if held.dim() == 0 else held
    return rows[:: max(1, len(rows) // _ROWS)]


def _same(now: Tensor, before: Tensor, mask: Tensor) -> bool:
    """Compare the kept entries by their bits; rows of another dtype or device are others."""
    if (now.dtype, now.device) != (before.dtype, before.device):
        return False
    now, before = (t.clone(memory_format=torch.contiguous_format) for t in (now, before))
    for tensor in (now, before):
        zero_pruned_(tensor, mask.to(tensor.device))
    return torch.equal(now.view(torch.uint8), before.view(torch.uint8))
