"""Sparsity by layer: the overview, and a look at each of the largest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from purprune_adapters.html_report.charts import PERCENT_TICKS, Chart, Path, Tick, block
from purprune_adapters.html_report.histograms import histogram
from purprune_adapters.html_report.pictures import Picture, picture
from purprune_adapters.html_report.words import percent, plural, short
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report, ReportRow

_PICTURES = 360_000
"""Bytes of all pictures together: base64 makes a third more of them."""
_LARGEST = 24_000
"""Bytes of one picture."""
_SHOWN = 120
"""How many layers can be looked at; each has a histogram of a few thousand characters."""


class Layer(NamedTuple):
    """A pruned parameter, and where it stands in the model."""

    number: int
    row: ReportRow
    picture: Picture | None = None
    histogram: Chart | None = None

    @property
    def shape(self) -> str:
        """The shape in words."""
        return " × ".join(f"{extent:,}" for extent in self.row.shape) or "one entry"

    @property
    def zero(self) -> str:
        """The share of zeros in words."""
        return percent(self.row.weight.zeros, self.row.weight.entries)


def layers_of(report: Report) -> list[Layer]:
    """Return the pruned parameters in the order of the model."""
    return [Layer(number, row) for number, row in enumerate(report.rows, start=1)]


def looked_at(
    layers: list[Layer], pruner: Pruner, before: Mapping[str, Tensor] | None
) -> list[Layer]:
    """Return the largest layers with their pictures and histograms, in the model's order."""
    largest = sorted(layers, key=lambda layer: -layer.row.weight.entries)[:_SHOWN]
    budget = min(_LARGEST, _PICTURES // max(len(largest), 1))
    found = []
    for layer in sorted(largest):
        name = layer.row.name
        weight, mask = pruner.model.get_parameter(name), pruner.masks.get(name)
        shown = None if mask is None else picture(mask, budget)
        dense = (before or {}).get(name)
        found.append(layer._replace(picture=shown, histogram=histogram(name, weight, dense)))
    return found


def overview(layers: list[Layer], model_entries: int) -> Chart:
    """Return the chart in which a layer is as wide as it has weights and as high as its zeros."""
    left, paths = 0.0, []
    ticks: list[Tick] = []
    entries = sum(layer.row.weight.entries for layer in layers)
    whole = max(model_entries, entries, 1)
    for layer in layers:
        right = left + 100 * layer.row.weight.entries / whole
        title = f"{layer.number}. {layer.row.name}: {layer.zero} zero of {layer.row.weight}"
        paths.append(Path(block(left, right, 100), "room", title))
        paths.append(Path(block(left, right, 100 * float(layer.row.weight)), "zeros", title))
        tick = Tick((left + right) / 2, str(layer.number))
        if not ticks or tick.at - ticks[-1].at >= _width(tick):
            ticks.append(tick)
        left = right
    rest = whole - entries
    if rest:
        paths.append(Path(block(left, 100, 100), "rest", f"dense: {plural(rest, 'parameter')}"))
    if 100 - left >= 20:
        ticks.append(Tick((left + 100) / 2, "not pruned"))
    zero = percent(sum(layer.row.weight.zeros for layer in layers), whole)
    return Chart(
        f"Sparsity of {plural(len(layers), 'layer')}; {zero} of {short(whole)} parameters are "
        f"zero. The table below has the numbers.",
        f"layers by number, as wide as their share of {short(whole)} parameters",
        "zeros in the layer",
        ticks,
        PERCENT_TICKS,
        paths,
    )


def _width(tick: Tick) -> int:
    """Return about how many percent of a narrow plot the text of a tick takes."""
    return 3 + 2 * len(tick.text)
