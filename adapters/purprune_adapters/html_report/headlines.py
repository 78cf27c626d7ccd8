"""The headlines: few numbers that say most, and the reasons for what was left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from purprune_adapters.coreml.report import ExportReport
from purprune_adapters.html_report import words
from purprune_adapters.html_report.sizes import stored
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report


class Tile(NamedTuple):
    """A headline: a number, what it is, and of what."""

    number: str
    name: str
    note: str


class Reason(NamedTuple):
    """Why parameters are not pruned, and which."""

    why: str
    names: list[str]


class Accuracy(NamedTuple):
    """An accuracy that was given, with its distance from the first."""

    name: str
    value: float
    points: str
    """In percentage points; empty for the first."""


def tiles_of(
    report: Report, pruner: Pruner | None, export: ExportReport | None, accuracy: Sequence[Accuracy]
) -> list[Tile]:
    """Return the tiles at the top of the page."""
    total, all_ = report.total, report.model_entries
    tiles = [
        Tile(
            words.percent(total.zeros, total.entries),
            "of the pruned weights are zero",
            f"{total.zeros:,} of {total.entries:,}",
        ),
        Tile(words.percent(total.zeros, all_), "of all parameters", f"the model has {all_:,}"),
        Tile(f"{report.step:,}", "optimizer steps", _when(report, pruner)),
    ]
    if export is not None and export.dense_weight_bytes:
        note = f"instead of {words.size(export.dense_weight_bytes)}, in {export.path.name}"
        tiles.append(Tile(words.size(export.weight_bytes), "of weights in the package", note))
    elif total.entries:
        now = stored(total.zeros, total.entries)
        note = f"instead of {words.size(now.dense)}, computed for float16"
        tiles.append(Tile(words.size(min(now)), "to store the pruned weights", note))
    if accuracy:
        first, last = accuracy[0], accuracy[-1]
        against = f"; {last.points} points against {first.name}" if last.points else ""
        tiles.append(Tile(words.short_percent(last.value), "accuracy", last.name + against))
    return tiles


def _when(report: Report, pruner: Pruner | None) -> str:
    last = None if pruner is None else pruner.last_step
    if last is None or report.phase != "prepared":
        return f"the pruner is {report.phase}"
    if last == 0:
        return "one shot: there is no schedule"
    return f"the schedule ends at {last:,}" if report.step < last else "the schedule is over"


def compared(accuracy: Mapping[str, float]) -> list[Accuracy]:
    """Return each accuracy with its distance from the first."""
    first = next(iter(accuracy.values()), 0.0)
    return [
        Accuracy(name, value, f"{100 * (value - first):+.2f}".replace("-", "−") if place else "")
        for place, (name, value) in enumerate(accuracy.items())
    ]


def reasons_of(report: Report) -> list[Reason]:
    """Return which parameters are not pruned, by reason."""
    found: dict[str, list[str]] = {}
    for name, why in report.skipped.items():
        found.setdefault(why, []).append(name)
    return [Reason(why, names) for why, names in found.items()]
