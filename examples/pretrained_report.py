"""What came out of the pruning of a pretrained network: its tables, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from picture import FAINT, INK, STYLE
from purprune.tables import text_table

COLOURS = {
    "uniform": "#8b8796",
    "erk": "#e66101",
    "global": "#0e8a80",
    "lamp": "#1d4f91",
    "wanda": "#b5a000",
    "ria": "#c2185b",
    "sensitivity": "#5e3c99",
}


class Result(NamedTuple):
    """The raw pitch accuracy after one way to prune, in percent."""

    sparsity: float  # what was asked for
    method: str
    stage: str
    zeros: float  # what it is, in percent of the weights that rules are for
    known: float  # of the kinds of sounds that calibration heard
    other: float

    @property
    def cell(self) -> str:
        """Both accuracies as text."""
        return f"{self.known:.1f} / {self.other:.1f}"

    @property
    def both(self) -> float:
        """The accuracy over all kinds, of which there are as many frames."""
        return (self.known + self.other) / 2


class Exported(NamedTuple):
    """A Core ML package: what it weighs, and its raw pitch accuracy, in percent."""

    sparsity: float
    lost: int  # surviving weights that the package has not
    weight_bytes: int
    dense_weight_bytes: int
    package_bytes: int
    error: float  # of the numerical check
    frames: int
    package: tuple[float, float]  # known and other kinds, evaluated as the package declares
    torch: tuple[float, float]  # the same frames, by the model that was exported


def results_table(results: Sequence[Result]) -> str:
    """Return the accuracies: a row for each method and stage, a column for each sparsity."""
    sparsities = sorted({r.sparsity for r in results})
    found = {(r.method, r.stage, r.sparsity): r.cell for r in results}
    rows = [
        (method, stage, *(found.get((method, stage, s), "") for s in sparsities))
        for method, stage in dict.fromkeys((r.method, r.stage) for r in results)
    ]
    return text_table(("method", "stage", *(f"{s:.0%}" for s in sparsities)), rows)


def exports_table(exports: Sequence[Exported]) -> str:
    """Return what the packages weigh, and how they compare with the models."""
    head = ("pruned", "lost", "weights", "of dense", "package", "error", "package hears", "torch")
    rows = [
        (
            f"{e.sparsity:.0%}",
            str(e.lost),
            f"{e.weight_bytes:,}",
            f"{e.weight_bytes / e.dense_weight_bytes:.1%}",
            f"{e.package_bytes:,}",
            f"{e.error:.1g}",
            f"{e.package[0]:.1f} / {e.package[1]:.1f}",
            f"{e.torch[0]:.1f} / {e.torch[1]:.1f}",
        )
        for e in exports
    ]
    return text_table(head, rows)


def draw(path: Path, results: Sequence[Result], exports: Sequence[Exported], tuned: str) -> None:
    """Write the picture: accuracy against sparsity, and against the bytes of the weights."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), dpi=150, facecolor="white", layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.set_title("Pruned in one shot, norms renewed")
        right.set_title("Fine-tuned, by its Core ML weights")
        left.set_ylabel("frames within 50 cents, %")
        _sparsities(left, results)
        _bytes(right, results, exports, tuned)
        figure.savefig(path)


def _sparsities(axes: Axes, results: Sequence[Result]) -> None:
    for method, colour in COLOURS.items():
        for stage, line in (("norms renewed", "o-"), ("fine-tuned", "^--")):
            some = [r for r in results if (r.method, r.stage) == (method, stage)]
            if some:
                name = f"{method}, fine-tuned" if stage == "fine-tuned" else method
                x = [100 * r.sparsity for r in some]
                axes.plot(x, [r.both for r in some], line, color=colour, label=name, ms=5)
    _dense(axes, results)
    axes.set_xlabel("weights pruned, %")
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _bytes(axes: Axes, results: Sequence[Result], exports: Sequence[Exported], tuned: str) -> None:
    last = {r.sparsity: r.both for r in results if r.method == tuned}  # the last stage
    x = [e.weight_bytes / 1000 for e in exports]
    axes.plot(x, [last[e.sparsity] for e in exports], "^--", color=COLOURS[tuned])
    for e, kilobytes in zip(exports, x, strict=True):
        place = (kilobytes, last[e.sparsity])
        axes.annotate(f"{e.sparsity:.0%}", place, (6, -12), textcoords="offset points", size=9)
    if exports:
        dense = exports[0].dense_weight_bytes / 1000
        before = next(r.both for r in results if r.method == "dense")
        axes.plot([dense], [before], "s", color=INK)
        axes.annotate("dense", (dense, before), (-14, -14), textcoords="offset points", size=9)
    _dense(axes, results)
    axes.set_xlabel("weights in the package, thousand bytes")


def _dense(axes: Axes, results: Sequence[Result]) -> None:
    dense = next(r.both for r in results if r.method == "dense")
    axes.axhline(dense, color=FAINT, linewidth=0.8, linestyle=":")
