"""The picture of a pruning run: which weights survived, how the sparsity grew, what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from purprune_adapters import Report
from purprune_adapters.coreml import ExportReport

# Purple and orange stay apart for every kind of colour vision, and in print.
POSITIVE, NEGATIVE, PRUNED = "#5e3c99", "#e66101", "#ecebf1"
INK, FAINT, PALE = "#2b2735", "#8b8796", "#c9c6d3"
LAYERS = {"conv.weight": "#0e8a80", "dense.weight": "#1d4f91"}
LEFT = 0.05
HEADING: dict[str, Any] = {"size": 12, "weight": "bold"}
STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}


def draw(
    path: Path,
    *,
    title: str,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    history: Sequence[Report],
    exported: ExportReport | None,
) -> None:
    """Write the picture as a PNG; without an export the bars of sizes are left out."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 10.6), dpi=150, facecolor="white")
        figure.suptitle(
            "Pruned while it trained", x=LEFT, y=0.975, ha="left", size=19, weight="bold"
        )
        figure.text(LEFT, 0.925, title, size=12)
        top = figure.add_gridspec(
            1, 2, left=LEFT, right=0.97, top=0.855, bottom=0.41, width_ratios=(1, 2.05), wspace=0.1
        )
        _conv(figure.add_subplot(top[0]), weights["conv.weight"], masks["conv.weight"])
        _dense(figure.add_subplot(top[1]), weights["dense.weight"], masks["dense.weight"])
        _schedule(figure.add_axes((0.09, 0.07, 0.395 if exported else 0.75, 0.25)), history)
        figure.text(LEFT, 0.34, "Sparsity: planned, and counted after every step", **HEADING)
        if exported:
            _sizes(figure.add_axes((0.715, 0.07, 0.27, 0.25)), exported)
            figure.text(0.655, 0.34, "Core ML: dense, and as stored", **HEADING)
        figure.savefig(path)


def _conv(axes: Axes, weight: Tensor, mask: Tensor) -> None:
    axes.set_title("conv: 12 kernels of 3 × 3")
    zoom, gap = 12, 10
    picture = _tiled(weight[:, 0], mask[:, 0], columns=3, zoom=zoom, gap=gap)
    axes.imshow(picture, interpolation="nearest")
    for kernel in range(12):
        row, column = divmod(kernel, 3)
        left, top = (place * (3 * zoom + gap) - 0.5 for place in (column, row))
        axes.text(left - 2, top + 1, str(kernel + 1), ha="right", va="top", size=9, color=FAINT)
        for cut in (zoom, 2 * zoom):  # the nine entries of a kernel
            axes.plot([left + cut] * 2, [top, top + 3 * zoom], color="white", linewidth=1.2)
            axes.plot([left, left + 3 * zoom], [top + cut] * 2, color="white", linewidth=1.2)
    axes.set_anchor("NW")
    axes.set_axis_off()
    kinds = {"positive weight": POSITIVE, "negative weight": NEGATIVE, "pruned": PRUNED}
    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in kinds.items()],
        loc="upper left",
        bbox_to_anchor=(0, -0.01),
        ncols=3,
        frameon=False,
        handlelength=0.9,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.1,
        borderaxespad=0,
        borderpad=0.2,
    )


def _dense(axes: Axes, weight: Tensor, mask: Tensor) -> None:
    axes.set_title("dense: what each digit reads from the 14 × 14 map of each kernel")
    shape, zoom, gap = (10 * 12, 14, 14), 3, 4
    picture = _tiled(weight.view(shape), mask.view(shape), columns=12, zoom=zoom, gap=gap)
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    pitch = 14 * zoom + gap
    axes.set_xticks([pitch * i + 7 * zoom for i in range(12)], [str(i + 1) for i in range(12)])
    axes.set_yticks([pitch * i + 7 * zoom for i in range(10)], [str(i) for i in range(10)])
    axes.set_xlabel("kernel")
    axes.set_ylabel("digit")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _tiled(
    weight: Tensor, mask: Tensor, *, columns: int, zoom: int, gap: int
) -> NDArray[np.float64]:
    """Lay tiles of shape (count, rows, cols) out in a grid, white gaps between; return RGB."""
    signs, keep = weight.sign().numpy(), mask.numpy()
    colours = np.where((signs > 0)[..., None], to_rgb(POSITIVE), to_rgb(NEGATIVE))
    colours = np.where(keep[..., None], colours, to_rgb(PRUNED))
    colours = colours.repeat(zoom, axis=1).repeat(zoom, axis=2)
    count, rows, cols, _ = colours.shape
    framed = np.pad(colours, ((0, 0), (0, gap), (0, gap), (0, 0)), constant_values=1)
    grid = framed.reshape(count // columns, columns, rows + gap, cols + gap, 3)
    picture: NDArray[np.float64] = np.concatenate(np.concatenate(grid, axis=1), axis=1)
    return picture[:-gap, :-gap]


def _schedule(axes: Axes, history: Sequence[Report]) -> None:
    steps = [report.step for report in history]
    for name, colour in LAYERS.items():
        rows = [report[name] for report in history]
        axes.plot(
            steps,
            [100 * float(row.weight) for row in rows],
            color=colour,
            alpha=0.3,
            linewidth=7,
            drawstyle="steps-post",
            solid_capstyle="butt",
        )
        axes.plot(
            steps,
            [100 * row.sparsity for row in rows],
            color=colour,
            linewidth=1.3,
            drawstyle="steps-post",
        )
        counted = rows[-1].weight
        axes.annotate(
            f"{name.partition('.')[0]}\n{counted.zeros:,} of {counted.entries:,} zeros",
            (steps[-1], 100 * float(counted)),
            xytext=(8, 6 if name == "dense.weight" else -6),
            textcoords="offset points",
            va="center",
            color=colour,
            weight="bold",
            annotation_clip=False,
        )
    axes.plot([], [], color=FAINT, linewidth=1.3, label="planned")
    axes.plot([], [], color=FAINT, alpha=0.4, linewidth=7, label="counted in the weights")
    axes.legend(loc="lower right", frameon=False)
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20), [f"{p} %" for p in range(0, 101, 20)])
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y", color=PRUNED)
    axes.set_axisbelow(True)


def _sizes(axes: Axes, exported: ExportReport) -> None:
    sizes = {
        "weights": (exported.dense_weight_bytes or 0, exported.weight_bytes),
        "package": (exported.dense_package_bytes or 0, exported.package_bytes),
    }
    for place, (dense, sparse) in enumerate(sizes.values()):
        for offset, size, colour, text in (
            (-0.19, dense, PALE, "dense"),
            (0.19, sparse, LAYERS["dense.weight"], f"sparse ({100 * sparse / dense:.0f} %)"),
        ):
            axes.barh(place + offset, size / 1000, height=0.34, color=colour)
            axes.annotate(
                f"{size / 1000:.1f} kB {text}",
                (size / 1000, place + offset),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
            )
    axes.set_yticks(range(len(sizes)), list(sizes), weight="bold")
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.65 * max(map(max, sizes.values())) / 1000)  # room for the texts
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(length=0)
