"""The result of an export, as text, dict, JSON and a rich table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .numeric import NumericalCheck
from .verify import ParameterRecord, Verification

__all__ = ["ExportReport"]

_HEAD = ("parameter", "zeros", "stored", "bytes", "of dense", "matched", "MIL names", "note")


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and what was checked.

    Attributes:
        path: where the package is.
        target: the deployment target.
        precision: "float16" or "float32".
        frontend: the way the model was converted.
        frontend_reason: why that one.
        verification: the read-back of every pruned parameter.
        check: the numerical check.
        package_bytes: bytes of the package folder.
        dense_package_bytes: bytes of the same package stored dense; None when not compared.
        dense_weight_bytes: bytes of its weights; None when not compared.
        compress: the joint compression, or None.
        warnings: what needs attention.
        versions: torch, coremltools, purprune.
        speed: always "not measured".
    """

    path: Path
    target: str
    precision: str
    frontend: str
    frontend_reason: str
    verification: Verification
    check: NumericalCheck
    package_bytes: int
    dense_package_bytes: int | None
    dense_weight_bytes: int | None
    compress: str | None
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    speed: str = "not measured"

    @property
    def rows(self) -> tuple[ParameterRecord, ...]:
        """One record per pruned parameter."""
        return self.verification.rows

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored weights, shared ones once."""
        return self.verification.weight_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values that ``json`` can write."""
        return {
            "path": str(self.path),
            "target": self.target,
            "precision": self.precision,
            "frontend": self.frontend,
            "frontend_reason": self.frontend_reason,
            "compress": self.compress,
            "package_bytes": self.package_bytes,
            "dense_package_bytes": self.dense_package_bytes,
            "weight_bytes": self.weight_bytes,
            "dense_weight_bytes": self.dense_weight_bytes,
            "verification": self.verification.as_dict(),
            "check": self.check.as_dict(),
            "warnings": list(self.warnings),
            "versions": dict(self.versions),
            "speed": self.speed,
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=indent)

    def __str__(self) -> str:
        """A plain text table and what was checked."""
        rows = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self._title(), *lines, *self._facts()])

    def __rich__(self) -> Any:
        """The same as a rich table."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left")
        for place, name in enumerate(_HEAD):
            table.add_column(name, justify="right" if place in (1, 3, 4) else "left")
        for row in self.rows:
            table.add_row(*(Text(cell) for cell in _cells(row)))
        return Group(table, *(Text(line) for line in self._facts()))

    def _title(self) -> str:
        joint = f" + {self.compress}" if self.compress else ""
        return f"{self.path}  ({self.target}, {self.precision}{joint})"

    def _facts(self) -> list[str]:
        found = self.verification
        verdict = "; ".join(found.problems) or "every surviving weight is there"
        lines = [
            f"weights: {_size(self.weight_bytes, self.dense_weight_bytes)}",
            f"package: {_size(self.package_bytes, self.dense_package_bytes)}",
            f"read back: {verdict}",
            f"numbers: {_numbers(self.check)}",
            f"predict: {self.check.predict}",
            f"converted by {self.frontend}: {self.frontend_reason}",
            "versions: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
            f"speed {self.speed}",
        ]
        return lines + [f"warning: {text}" for text in self.warnings]


def _cells(row: ParameterRecord) -> tuple[str, ...]:
    share = row.bytes_stored / row.bytes_dense if row.bytes_dense else 0.0
    counts = (
        ("lost", row.dropped),
        ("revived", row.revived),
        ("changed", row.wrong),
        ("underflowed", row.underflowed),
        ("rounded to zero", row.rounded_to_zero),
        ("scaled to zero", row.scaled_to_zero),
    )
    notes = [f"{count} {word}" for word, count in counts if count]
    if "+" in row.storage:
        notes.append(f"max error {row.max_relative_error:.2g}")
    if row.shared_with:
        notes.append("shared with " + ", ".join(row.shared_with))
    if row.reason:
        notes.append(row.reason)
    return (
        row.name,
        f"{row.zeros_torch}/{row.entries}",
        row.storage,
        str(row.bytes_stored),
        f"{share:.1%}" if row.found else "-",
        row.matched or "-",
        ", ".join(row.mil_names) or "-",
        "; ".join(notes),
    )


def _size(now: int, dense: int | None) -> str:
    if not dense:
        return f"{now} bytes"
    return f"{now} bytes, {now / dense:.1%} of {dense} dense"


def _numbers(check: NumericalCheck) -> str:
    if check.error is None:
        return check.status
    text = (
        f"{check.status}; the saved program against torch in float32 arithmetic: largest error "
        f"{check.error:.2g} of the scale {check.scale:.3g} (allowed {check.tolerance:g})"
    )
    return f"{text}; in declared precision {check.declared_error:.2g}"
