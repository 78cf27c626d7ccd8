"""The pruner's report: zeros counted in the weights as they are now, in integers.

It is a value: text, a rich table, plain dicts or a data frame are made of it when they are asked
for, and :func:`purprune_adapters.html_report.write_html` makes a page of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from purprune import Count
from purprune.rows import ByName
from purprune.tables import skipped_text, text_table
from purprune.totals import sparsities_at
from purprune.values import FrozenDict
from purprune_adapters.distributed import counted
from purprune_adapters.extras import data_frame
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

    def as_dict(self) -> dict[str, Any]:
        """Return the row as plain values.

        Where the sparsities are those of a global group, ``shared`` has them: the tensor by
        itself has none, so its own are None.
        """
        both = {"sparsity": self.sparsity, "target_sparsity": self.target}
        return {
            "shape": list(self.shape),
            "zeros": self.weight.zeros,
            "entries": self.weight.entries,
            "pruned_by_mask": self.mask.zeros,
            **(dict.fromkeys(both) if self.shared else both),
            "shared": both if self.shared else None,
        }


@dataclass(frozen=True)
class Report(ByName[ReportRow]):
    """What is pruned now, and why the rest is not: the rows by parameter name.

    It iterates over names, as a dict does; two reports are equal where all fields are.
    """

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

    @property
    def _in_order(self) -> Sequence[ReportRow]:
        return self.rows

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain dicts, lists, texts and numbers."""
        return {
            "phase": self.phase,
            "step": self.step,
            "model_entries": self.model_entries,
            "zeros": self.total.zeros,
            "entries": self.total.entries,
            "parameters": {row.name: row.as_dict() for row in self.rows},
            "skipped": dict(self.skipped),
        }

    def to_pandas(self) -> Any:
        """Return the rows as a ``pandas.DataFrame`` by the parameter's name.

        ``shared`` tells whether ``sparsity`` and ``target_sparsity`` are those of a global group.

        Raises:
            ImportError: pandas is not installed; names the extra.
        """
        rows = [
            {
                "parameter": row.name,
                "shape": row.shape,
                "zeros": row.weight.zeros,
                "entries": row.weight.entries,
                "zero": float(row.weight),
                "pruned_by_mask": row.mask.zeros,
                "sparsity": row.sparsity,
                "target_sparsity": row.target,
                "shared": row.shared,
            }
            for row in self.rows
        ]
        return data_frame(rows, "parameter")

    @property
    def title(self) -> str:
        """The phase, the step and the zeros of all, in one line."""
        share = self.total.zeros / self.model_entries if self.model_entries else 0.0
        return (
            f"{self.phase}, step {self.step}: {self.total} zero in the pruned parameters; "
            f"{share:.2%} of all parameters"
        )

    def __str__(self) -> str:
        """Return a table."""
        table = text_table(_HEAD, map(_cells, self.rows))
        return f"{self.title}\n{table}{skipped_text(self.skipped)}"

    def __rich__(self) -> Any:
        """Return the same as a rich table."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table()
        for place, head in enumerate(_HEAD):
            table.add_column(head, justify="right" if place else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, _cells(row)))
        return Group(Text(self.title), table, Text(skipped_text(self.skipped).strip("\n")))


_HEAD = ("parameter", "shape", "zeros", "entries", "zero", "in force", "target")


def _cells(row: ReportRow) -> tuple[str, ...]:
    of_all = " of all" if row.shared else ""
    return (
        row.name,
        "x".join(map(str, row.shape)),
        f"{row.weight.zeros:,}",
        f"{row.weight.entries:,}",
        f"{float(row.weight):.2%}",
        f"{row.sparsity:.4g}{of_all}",
        "-" if row.target is None else f"{row.target:.4g}{of_all}",
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
    return Report(phase, step, entries, tuple(rows), FrozenDict(skipped))


def _zeros(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    kept = counted(tensors, lambda _, tensor: int(torch.count_nonzero(tensor.detach())))
    return {name: tensor.numel() - kept[name] for name, tensor in tensors.items()}
