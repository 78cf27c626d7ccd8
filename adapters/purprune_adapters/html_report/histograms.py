"""Histograms of weights, the zeros apart: they would be the only bar to be seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from purprune_adapters.html_report.charts import Chart, Path, Scale, bars
from purprune_adapters.html_report.words import plural

_BINS = 12, 60
"""At least and at most."""
_CHUNK = 1 << 22
_WIDTHS = 4
"""How many root mean squares the axis goes to each side; few weights are beyond."""


class Binned(NamedTuple):
    """Counts per bin of what is not zero, between -limit and limit."""

    limit: float
    counts: list[int]
    zeros: int
    beyond: int
    """How many are outside, or no numbers."""


def limit_of(weights: Tensor) -> float:
    """Return how far the axis goes: a few root mean squares of what is not zero."""
    squares, count, largest = 0.0, 0, 0.0
    for part in _parts(weights):
        numbers = part[torch.isfinite(part)]
        squares += float(numbers.double().square().sum())
        count += int(torch.count_nonzero(numbers))
        largest = max(largest, float(numbers.abs().max()) if numbers.numel() else 0.0)
    return min(largest, _WIDTHS * (squares / count) ** 0.5) if count else 1.0


def binned(weights: Tensor, limit: float) -> Binned:
    """Count in one pass, in chunks; bins by the rule of Rice, twice the cube root of weights."""
    fewest, most = _BINS
    bins = min(max(round(2 * weights.numel() ** (1 / 3)), fewest), most)
    counts, zeros = torch.zeros(bins, dtype=torch.int64), 0
    for part in _parts(weights):
        rest = part[part != 0]
        zeros += part.numel() - rest.numel()
        counts += torch.histc(rest.cpu(), bins, -limit, limit).to(torch.int64)
    beyond = weights.numel() - zeros - int(counts.sum())
    return Binned(limit, counts.tolist(), zeros, beyond)


def _parts(weights: Tensor) -> list[Tensor]:
    """Return chunks as float32, which histc takes on every device."""
    return [part.float() for part in torch.split(weights.detach().reshape(-1), _CHUNK)]


def histogram(name: str, after: Tensor, before: Tensor | None) -> Chart | None:
    """Return the chart of a weight's non-zeros now and, where it is known, before."""
    limit = limit_of(after if before is None else before)
    now = binned(after, limit)
    then = None if before is None else binned(before, limit)
    highest = max(now.counts + (then.counts if then else []))
    if highest == 0:
        return None
    y = Scale(0, highest * 1.04)
    paths = [] if then is None else [Path(bars([y(n) for n in then.counts]), "before")]
    paths.append(Path(bars([y(n) for n in now.counts]), "after"))
    return Chart(
        _description(name, now, then),
        "weight",
        "weights per bin",
        Scale(-limit, limit).ticks(4),
        y.ticks(3),
        paths,
    )


def _description(name: str, now: Binned, then: Binned | None) -> str:
    left = sum(now.counts)
    words = f"Histogram of {name}: {plural(left, 'weight')} that are not zero now"
    words += f", {sum(then.counts):,} before" if then else ""
    return words + f"; {plural(now.zeros, 'zero')} and {now.beyond:,} beyond the axis not drawn."
