"""The result of an export, as text, dict, JSON and a rich table."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purprune.tables import text_table
from purprune_adapters.extras import data_frame

from .numeric import NumericalCheck
from .records import ParameterRecord, Verification

__all__ = ["ExportReport"]

_HEAD = ("parameter", "zeros", "stored", "bytes", "of dense")
_WIDTH = 100  # columns of the text below the table


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

    def to_pandas(self) -> Any:
        """The records as a ``pandas.DataFrame`` by the parameter's name; needs pandas."""
        return data_frame([row.as_dict() for row in self.rows], "name")

    def __str__(self) -> str:
        """A plain text table and what was checked; MIL names stand in ``as_dict()``."""
        table = text_table(_HEAD, [_cells(row) for row in self.rows])
        return "\n".join([self._title(), table, *self._notes(), *self._facts()])

    def __rich__(self) -> Any:
        """The same as a rich table, with MIL names."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(title=self._title(), title_justify="left")
        for place, name in enumerate((*_HEAD, "MIL names")):
            table.add_column(name, justify="right" if 0 < place < len(_HEAD) else "left")
        for row in self.rows:
            cells = (*_cells(row), ", ".join(row.mil_names) or "-")
            table.add_row(*(Text(cell) for cell in cells))
        return Group(table, *(Text(line) for line in (*self._notes(), *self._facts())))

    def _title(self) -> str:
        joint = f" + {self.compress}" if self.compress else ""
        return f"{self.path.name}  ({self.target}, {self.precision}{joint})"

    def _facts(self) -> list[str]:
        found = self.verification
        verdict = "; ".join(found.problems) or "every surviving weight is there"
        lines = [
            f"weights: {_size(self.weight_bytes, self.dense_weight_bytes)}",
            f"package: {_size(self.package_bytes, self.dense_package_bytes)}",
            f"read back: {verdict}",
            *_numbers(self.check),
            f"predict: {self.check.predict}",
            f"converted by {self.frontend}: {self.frontend_reason}",
            "versions: " + ", ".join(f"{k} {v}" for k, v in self.versions.items()),
            f"speed {self.speed}",
        ]
        return lines + [f"warning: {text}" for text in self.warnings]

    def _notes(self) -> list[str]:
        """How the parameters were matched, and what else there is to say of each."""
        found = Counter(row.matched for row in self.rows if row.found)
        lines = []
        for how, count in found.items():
            names = [row.name for row in self.rows if row.matched == how]
            words = f"{count} of {len(self.rows)}" if how == "as is" else ", ".join(names)
            lines.append(f"matched {how}: {words}")
        said = [(row.name, _note(row)) for row in self.rows]
        lines += [f"{name}: {note}" for name, note in said if note]
        return [textwrap.fill(line, _WIDTH, subsequent_indent="  ") for line in lines]


def _cells(row: ParameterRecord) -> tuple[str, ...]:
    share = row.bytes_stored / row.bytes_dense if row.bytes_dense else 0.0
    return (
        row.name,
        f"{row.zeros_torch}/{row.entries}",
        row.storage,
        str(row.bytes_stored),
        f"{share:.1%}" if row.found else "-",
    )


def _note(row: ParameterRecord) -> str:
    """What isn't as in torch, and why something is dense; what is missing is told elsewhere."""
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
    if row.found and row.reason:
        notes.append(row.reason)
    return "; ".join(notes)


def _size(now: int, dense: int | None) -> str:
    if not dense:
        return f"{now} bytes"
    return f"{now} bytes, {now / dense:.1%} of {dense} dense"


def _numbers(check: NumericalCheck) -> list[str]:
    if check.error is None or not (check.passed or check.failed):
        return [f"numbers: {check.status}"]
    return [
        f"numbers: {check.status}; the saved program against torch in float32 arithmetic:",
        f"  largest error {check.error:.2g} of the scale {check.scale:.3g} (allowed "
        f"{check.tolerance:g}); in declared precision {check.declared_error:.2g}",
    ]
