"""Size against sparsity: from which share of zeros on a sparse weight takes less room."""

from __future__ import annotations

from typing import NamedTuple

from purprune_adapters.coreml.report import ExportReport
from purprune_adapters.html_report.charts import Chart, Dot, Label, Path, Tick, polyline
from purprune_adapters.html_report.words import percent, short_percent, size
from purprune_adapters.report import Report

_HIGHEST = 115
"""Percent of the dense size at the top of the chart."""


class Stored(NamedTuple):
    """Bytes of weights stored dense, and as a bit mask with the values that are left."""

    dense: float
    sparse: float


def stored(zeros: int, entries: int, width: int = 2) -> Stored:
    """Return the bytes of one weight: n values, or n bits and the k values left.

    >>> stored(80, 100)
    Stored(dense=200, sparse=52.5)
    """
    return Stored(entries * width, entries / 8 + (entries - zeros) * width)


def break_even(width: int = 2) -> float:
    """Return the share of zeros from which on the bit mask pays: one bit per value.

    >>> break_even()
    0.0625
    """
    return 1 / (8 * width)


def size_chart(report: Report, export: ExportReport | None) -> Chart:
    """Return the chart, with what was measured of an exported package."""
    width = 4 if export is not None and export.precision == "float32" else 2
    pays, total = break_even(width), report.total
    now = stored(total.zeros, total.entries, width)
    share = 100 * now.sparse / (now.dense or 1)
    at = 100 * float(total)
    dots = [Dot(100 * pays, _y(100), "even", "break-even"), *_measured(export)]
    dots.append(Dot(at, _y(share), "reached", "the pruned weights together"))
    words = f"{percent(total.zeros, total.entries)} zero: {share:.3g}\u202f% of the size"
    labels = [
        Label(100 * pays, _y(100), f"pays from {short_percent(pays)} zeros", "even", "up"),
        Label(at, _y(share), f"now {share:.3g}\u202f%", "reached", "up" if at < 80 else "down"),
    ]
    return Chart(
        f"Stored size against sparsity in {8 * width}-bit floats. A bit mask with the values left "
        f"is smaller from {short_percent(pays)} zeros on; now {words}, "
        f"{size(now.sparse)} instead of {size(now.dense)}.",
        "zeros",
        "stored size, % of dense",
        [Tick(p, short_percent(p / 100)) for p in (0, 25, 50, 75, 100)],
        [Tick(_y(p), short_percent(p / 100)) for p in (0, 25, 50, 75, 100)],
        [
            Path(polyline([(0, _y(100)), (100, _y(100))]), "dense", "dense"),
            Path(polyline([(0, _y(100 + 100 * pays)), (100, _y(100 * pays))]), "planned", "sparse"),
        ],
        dots,
        labels,
    )


def _y(share: float) -> float:
    return 100 * share / _HIGHEST


def _measured(export: ExportReport | None) -> list[Dot]:
    rows = [] if export is None else [row for row in export.rows if row.found and row.bytes_dense]
    return [
        Dot(
            100 * row.zeros_stored / (row.entries or 1),
            min(_y(100 * row.bytes_stored / row.bytes_dense), 100),
            "measured",
            f"{row.name}: {size(row.bytes_stored)} of {size(row.bytes_dense)}, {row.storage}",
        )
        for row in rows
    ]
