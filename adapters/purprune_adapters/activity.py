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


def untrained(calls: int) -> str:
    """Return the warning of a pruner that steps beside a training of something else."""
    return (
        f"step() was called {calls} times, but no pruned weight ever changed in between. Is the "
        f"optimizer made from the parameters of the model that prepare() returned? It is a copy "
        f"unless inplace=True."
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
        self._warned = False

    def start(self, params: Mapping[str, Tensor]) -> None:
        """Remember the parameters as training finds them."""
        self._rows = {name: _rows(param).clone() for name, param in params.items()}
        self.leave(params)

    def leave(self, params: Mapping[str, Tensor]) -> None:
        """Remember the parameters as step() leaves them."""
        self._left = _versions(params)

    def count(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Count one call of step(), and warn once when all or most of them find nothing new."""
        if _versions(params) != self._left:
            self.moved += 1
            return
        self.still += 1
        if self.still == _SKIPPED + 1 and not self._warned and not self.trained(params, masks):
            self._warned = True
            warnings.warn(untrained(self.still), stacklevel=5)
        # One change alone may be weights that were loaded, before a fused optimizer goes on.
        if self.still > _SKIPPED and self.still >= self.moved > 1 and not self._warned:
            self._warned = True
            warnings.warn(
                f"step() was called {self.moved + self.still} times, but the pruned weights had "
                f"changed before {self.moved} of these calls only. Call it once after each "
                f"optimizer.step(), not after each batch: it moves the schedule on.",
                stacklevel=5,  # over step() and the two frames that keep it out of graphs
            )

    def trained(self, params: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> bool:
        """Tell whether a weight that is kept ever changed."""
        return self.moved > 0 or any(
            not _same(_rows(params[name]), rows, _rows(masks[name]))
            for name, rows in self._rows.items()
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
