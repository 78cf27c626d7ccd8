"""The pruner's report: zeros counted in the weights as they are now, in integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from purprune import Count
from purprune.tables import skipped_text, text_table
from purprune.totals import sparsities_at
from purprune_adapters.distributed import counted
from purprune_adapters.targets import Targets


@dataclass(frozen=True)
class ReportRow:
    """One pruned parameter."""

    name: str
    shape: tuple[int, ...]
    weight: Count
    """Zeros among the weights now."""
    mask: Count
    """Entries that the mask prunes."""
    sparsity: float
    """The sparsity of units that the schedule has in force now."""
    target: float | None
    """The sparsity of units at the schedule's end; None for a callable schedule."""
    shared: bool = False
    """Whether both are those of all tensors of a global group together."""


@dataclass(frozen=True)
class Report:
    """What is pruned now, and why the rest is not."""

    phase: str
    """"new", "prepared" or "finalized"."""
    step: int
    model_entries: int
    """Entries of all parameters of the model, tied ones once."""
    rows: tuple[ReportRow, ...]
    skipped: Mapping[str, str]

    @property
    def total(self) -> Count:
        """Zeros among all weights that have a rule."""
        return Count(
            sum(row.weight.zeros for row in self.rows), sum(row.weight.entries for row in self.rows)
        )

    def __getitem__(self, name: str) -> ReportRow:
        """Return the row of a parameter."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"Expected a pruned parameter; got {name!r}.")

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, texts and numbers."""
        return {
            "phase": self.phase,
            "step": self.step,
            "model_entries": self.model_entries,
            "zeros": self.total.zeros,
            "entries": self.total.entries,
            "parameters": {
                row.name: {
                    "shape": list(row.shape),
                    "zeros": row.weight.zeros,
                    "entries": row.weight.entries,
                    "pruned_by_mask": row.mask.zeros,
                    "sparsity": row.sparsity,
                    "target_sparsity": row.target,
                    "shared": row.shared,
                }
                for row in self.rows
            },
            "skipped": dict(self.skipped),
        }

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            (
                row.name,
                "x".join(map(str, row.shape)),
                f"{row.weight.zeros:,}",
                f"{row.weight.entries:,}",
                f"{float(row.weight):.2%}",
                f"{row.sparsity:.4g}{shared}",
                "-" if row.target is None else f"{row.target:.4g}{shared}",
            )
            for row in self.rows
            for shared in [" of all" if row.shared else ""]
        ]
        head = ("parameter", "shape", "zeros", "entries", "zero", "in force", "target")
        share = self.total.zeros / self.model_entries if self.model_entries else 0.0
        title = f"{self.phase}, step {self.step}: {self.total} zero in the pruned parameters"
        return (
            f"{title}; {share:.2%} of all parameters\n"
            f"{text_table(head, rows)}{skipped_text(self.skipped)}"
        )


def report_of(
    phase: str,
    step: int,
    targets: Targets,
    masks: Mapping[str, Tensor],
    skipped: Mapping[str, str],
) -> Report:
    """Count the zeros in the weights and what the masks prune; a collective call for shards."""
    params = targets.params()
    zeros, pruned = _zeros(params), _zeros(masks)
    sparsities = sparsities_at(targets.rules, params, step)
    ended = {name: rule for name, rule in targets.rules.items() if rule.last_step is not None}
    ends = sparsities_at(ended, params, None)
    rows = [
        ReportRow(
            name,
            tuple(params[name].shape),
            Count(zeros[name], params[name].numel()),
            Count(pruned.get(name, 0), params[name].numel()),
            float(sparsities[name]),
            float(ends[name]) if name in ends else None,
            rule.is_global,
        )
        for name, rule in targets.rules.items()
    ]
    entries = sum(param.numel() for param in targets.model.parameters())
    return Report(phase, step, entries, tuple(rows), MappingProxyType(dict(skipped)))


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    kept = counted(tensors, lambda _, tensor: int(torch.count_nonzero(tensor.detach())))
    return {name: tensor.numel() - kept[name] for name, tensor in tensors.items()}
