"""The report of layers that were pruned in one shot: counts, and errors over their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from purprune import Count
from purprune.rows import ByName
from purprune.tables import skipped_text, text_table
from purprune_adapters.inputs import Layer, with_outputs_first


@dataclass(frozen=True)
class LayerRow:
    """One pruned layer."""

    name: str
    shape: tuple[int, ...]
    pruned: Count
    """Entries that the mask prunes."""
    error: float
    """``||W X - W' X|| / ||W X||`` over the inputs X that the layer saw when it was pruned."""


@dataclass(frozen=True)
class LayerReport(ByName[LayerRow]):
    """What was pruned, at which error, and why the rest was not: the rows by parameter name."""

    rows: tuple[LayerRow, ...]
    skipped: Mapping[str, str]

    @property
    def _in_order(self) -> Sequence[LayerRow]:
        return self.rows

    @property
    def total(self) -> Count:
        """Entries that the masks prune."""
        counts = [row.pruned for row in self.rows]
        return Count(sum(c.zeros for c in counts), sum(c.entries for c in counts))

    @property
    def error(self) -> float:
        """The mean of the layers' errors."""
        return sum(row.error for row in self.rows) / len(self.rows)

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            (row.name, "x".join(map(str, row.shape)), str(row.pruned), f"{row.error:.4f}")
            for row in self.rows
        ]
        table = text_table(("layer", "shape", "pruned", "error"), rows)
        return f"{self.total} pruned\n{table}{skipped_text(self.skipped)}"


def row_of(layer: Layer, pruned: Tensor, mask: Tensor, hessian: Tensor) -> LayerRow:
    """Count what a mask prunes of a layer, and measure what the new weight does to its outputs."""
    dense = layer.weight.detach()
    lost, whole = (
        _squared_output(with_outputs_first(layer, w).flatten(1), hessian)
        for w in (dense.to(hessian.dtype) - pruned.to(hessian.dtype), dense.to(hessian.dtype))
    )
    count = Count(mask.numel() - int(torch.count_nonzero(mask)), mask.numel())
    error = math.sqrt(lost / whole) if whole else 0.0
    return LayerRow(layer.name, tuple(mask.shape), count, error)


def _squared_output(matrix: Tensor, hessian: Tensor) -> float:
    """Return ``||M X||**2`` of the inputs X whose sum of x x^T is the Hessian."""
    return max(0.0, float((matrix @ hessian).mul_(matrix).sum()))
