"""Charts as values: shapes in percent of the plot, words in HTML beside it.

The template draws them. The plot is stretched to the width that there is, so lines keep their
width and words their size on a phone and on paper.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from purprune_adapters.html_report.words import short, short_percent


class Tick(NamedTuple):
    """A mark on an axis, at a percentage of its length."""

    at: float
    text: str


class Path(NamedTuple):
    """A line or an area; its kind is a class of the style sheet."""

    d: str
    kind: str
    title: str = ""


class Dot(NamedTuple):
    """A point of data, in percent from the left and from the bottom."""

    x: float
    y: float
    kind: str
    title: str = ""


class Label(NamedTuple):
    """A word in the plot, beside what it is about."""

    x: float
    y: float
    text: str
    kind: str
    side: str
    """Where it stands seen from the point: "left", "right" or "middle"."""


class Chart(NamedTuple):
    """A chart."""

    description: str
    x_title: str
    y_title: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    paths: Sequence[Path]
    dots: Sequence[Dot] = ()
    labels: Sequence[Label] = ()


class Scale(NamedTuple):
    """From numbers to percent of an axis."""

    low: float
    high: float

    def __call__(self, number: float) -> float:
        """Return where a number stands."""
        return 100 * (number - self.low) / ((self.high - self.low) or 1)

    def ticks(self, count: int = 4, text: str = "short") -> list[Tick]:
        """Return about so many round numbers."""
        rough = (self.high - self.low) / count or 1
        power = 10.0 ** math.floor(math.log10(rough))
        stride = next(power * f for f in (1, 2, 5, 10) if power * f >= rough * 0.999)
        first, last = math.ceil(self.low / stride - 1e-9), math.floor(self.high / stride + 1e-9)
        numbers = [i * stride for i in range(first, last + 1)]
        return [Tick(self(n), f"{n:,.0f}" if text == "whole" else _text(n)) for n in numbers]


def _text(number: float) -> str:
    return short(number) if abs(number) >= 1000 else f"{number:.3g}"


PERCENT_TICKS = tuple(Tick(p, short_percent(p / 100)) for p in (0, 25, 50, 75, 100))


def coordinate(number: float) -> str:
    """Return a coordinate in few characters."""
    return f"{number:.2f}".rstrip("0").rstrip(".")


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """Return a path through points given in percent from the left and from the bottom."""
    pairs = [f"{coordinate(x)} {coordinate(100 - y)}" for x, y in points]
    return "M" + "L".join(pairs)


def staircase(points: Sequence[tuple[float, float]]) -> str:
    """Return a path that holds each value until the next one."""
    (x, y), *rest = points
    path = f"M{coordinate(x)} {coordinate(100 - y)}"
    for x, new in rest:
        if new != y:
            path += f"H{coordinate(x)}V{coordinate(100 - new)}"
            y = new
    return path + f"H{coordinate(points[-1][0])}"


def bars(heights: Sequence[float]) -> str:
    """Return the outline of bars that fill the width side by side, heights in percent."""
    width, path, height = 100 / len(heights), "M0 100", 0.0
    for i, new in enumerate(heights):
        if new != height:
            path += f"H{coordinate(i * width)}V{coordinate(100 - new)}"
            height = new
    return path + "H100V100Z"


def block(left: float, right: float, height: float) -> str:
    """Return a rectangle that stands on the axis."""
    left_, right_ = coordinate(left), coordinate(right)
    return f"M{left_} 100V{coordinate(100 - height)}H{right_}V100Z"
