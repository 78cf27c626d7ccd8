"""The report: zeros counted in integers, in the shape that coremltools documents."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Mapping

import torch
from torch import Tensor

from purprune.tables import text_table


class PruningReport(UserDict[str, dict[str, float]]):
    """Statistics by module name, and of all together under ``"global"``; prints as a table."""

    def __repr__(self) -> str:
        """Return a table."""
        head = ("name", *self.data["global"])
        rows = [
            (name, *(f"{n:.5f}" if isinstance(n, float) else str(n) for n in row.values()))
            for name, row in self.data.items()
        ]
        return text_table(head, rows)


def report_on(params: Mapping[str, Tensor]) -> PruningReport:
    """Report on the pruned parameters, given by the names of their modules."""
    rows = {name: _statistics(param) for name, param in params.items()}
    return PruningReport({**rows, "global": _means(list(rows.values()))})


def _statistics(weight: Tensor) -> dict[str, float]:
    zero = weight.detach() == 0
    rows = zero.reshape(len(zero), -1)
    pairs = rows.reshape(len(rows) // 2, 2, -1).all(dim=1) if len(rows) % 2 == 0 else None
    return {
        "#params": weight.numel(),
        "structured_weight_sparsity": _share(rows.all(dim=1)),
        "unstructured_weight_sparsity": _share(zero),
        "block2_weight_sparsity": -1 if pairs is None else _share(pairs),
    }


def _share(flags: Tensor) -> float:
    return int(torch.count_nonzero(flags)) / max(flags.numel(), 1)


def _means(modules: list[dict[str, float]]) -> dict[str, float]:
    """Return the means weighted by #params; -1 (not applicable) takes no part."""
    means: dict[str, float] = {"#params": sum(row["#params"] for row in modules)}
    for key in modules[0]:
        if key == "#params":
            continue
        counted = [row for row in modules if row[key] >= 0]
        entries = sum(row["#params"] for row in counted)
        total = sum(row["#params"] * row[key] for row in counted)
        means[key] = total / max(entries, 1) if counted else -1
    return means
