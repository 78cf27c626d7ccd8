"""Outliers: layers with more entries far above the mean keep more weights (OWL)."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig
from purprune.context import ScoreContext
from purprune.errors import ConfigError
from purprune.layer_scores import Wanda
from purprune.ranking import refuse_nan
from purprune.rules import Rule
from purprune.scoring import readable
from purprune.targets import Quota, divided
from purprune.units import unit_scores
from purprune.values import exact

Stats = Mapping[str, Mapping[str, Tensor]]


@torch.no_grad()
def allocate_by_outliers(
    params: Mapping[str, Tensor],
    stats: Stats,
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    threshold: float = 5.0,
    spread: float | Fraction = 0.08,
    by: Callable[[str], Hashable] | None = None,
) -> PruneConfig:
    """Return a config in which layers with more outliers are pruned less, at the same total.

        A = |W| * input_norm          D = share of A > threshold * mean(A)
        density = 1 - s + 2 * spread * (d - mean(d)),   d = (D - min(D)) / (max(D) - min(D))

    with the target s of a rule and the mean over the units of its tensors. So the densities of a
    rule's layers lie within ``2 * spread``, and their mean is that of the target. Of all tensors
    with equal rules exactly ``floor(units * s)`` units go; how much each one loses is the nearest
    that is whole (:func:`purprune.allocations.apportion`), as a Fraction. Where no layer has more
    outliers than another, all have the target.

    Args:
        params: flat mapping of dotted names to tensors, as ``dict(model.named_parameters())``.
        stats: by name ``{"input_norm": norms}``, the L2 norm of each input feature over all
            tokens or patches, of shape ``weight.shape[1:]``.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        threshold: how many times the mean an outlier exceeds, M in the paper.
        spread: half the range of the densities, lambda in the paper.
        by: from a parameter's name to its layer, whose tensors have one D and one density; the
            paper's layer is a transformer block. None: each tensor is a layer.

    Raises:
        ValueError: a statistic is missing.
        ConfigError: one has another shape, or the spread leaves [0, 1].
        NaNError: a weight or a statistic holds NaN.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2024 (arXiv:2310.05175).

    >>> params = {"a": torch.ones(2, 8), "b": torch.ones(2, 8)}
    >>> stats = {"a": {"input_norm": torch.tensor([90.0, *[1.0] * 7])}}
    >>> stats["b"] = {"input_norm": torch.ones(8)}
    >>> found = allocate_by_outliers(params, stats, Rule(0.5), spread=0.25)
    >>> {name: str(rule.target) for name, rule in found.rules.items()}
    {'a': '1/4', 'b': '3/4'}
    """
    if not 0 <= threshold < math.inf:
        raise ConfigError(f"Expected a threshold >= 0; got {threshold}.")
    if not 0 <= exact(spread) <= 1:
        raise ConfigError(f"Expected a spread in [0, 1]; got {spread}.")

    def metric(name: str) -> Tensor:
        found = Wanda()(
            readable(name, params[name]), ScoreContext(name, 0, None, stats.get(name, {}))
        )
        refuse_nan(found, f"the weight {name!r} times its input_norm")
        return found

    def divide(family: Sequence[Quota], total: int) -> tuple[list[Fraction], list[int]]:
        target, units = family[0].rule.target, [q.units for q in family]
        layers = [q.name if by is None else by(q.name) for q in family]
        offsets = _offsets(_ratios(family, layers, metric, threshold), units)
        _refuse_spread(exact(spread), offsets, target)
        sparsities = [target - 2 * exact(spread) * offset for offset in offsets]
        return [n * s for n, s in zip(units, sparsities, strict=True)], units

    return divided(params, cfg, divide)


def _offsets(ratios: Sequence[Fraction], units: Sequence[int]) -> list[Fraction]:
    """Return where each ratio lies in the range of all, from the mean over the units."""
    width = max(ratios) - min(ratios)
    places = [(ratio - min(ratios)) / width if width else Fraction(0) for ratio in ratios]
    total = sum((place * n for place, n in zip(places, units, strict=True)), Fraction(0))
    mean = total / max(1, sum(units))
    return [place - mean for place in places]


def _refuse_spread(spread: Fraction, offsets: Sequence[Fraction], target: Fraction) -> None:
    """Raise where a sparsity would leave [0, 1]."""
    rooms = [(target if o > 0 else 1 - target) / (2 * abs(o)) for o in offsets if o]
    if spread > (most := min(rooms, default=spread)):
        raise ConfigError(
            f"Expected a spread of at most {math.floor(most * 10**4) / 10**4:g}, so that no "
            f"sparsity around {float(target):g} leaves [0, 1]; got {float(spread):g}."
        )


def _ratios(
    family: Sequence[Quota],
    layers: Sequence[Hashable],
    metric: Callable[[str], Tensor],
    threshold: float,
) -> list[Fraction]:
    """Return for each tensor the share of outliers in its layer; one metric is held at a time."""
    members: dict[Hashable, list[str]] = {}
    for quota, layer in zip(family, layers, strict=True):
        members.setdefault(layer, []).append(quota.name)
    ratios = {layer: _ratio(names, metric, threshold) for layer, names in members.items()}
    return [ratios[layer] for layer in layers]


def _ratio(names: Sequence[str], metric: Callable[[str], Tensor], threshold: float) -> Fraction:
    sums = [(_sum(found), found.numel()) for found in map(metric, names)]
    total, entries = map(sum, zip(*sums, strict=True))
    least = threshold * total / max(1, entries)
    above = sum(int((metric(name) > least).sum()) for name in names)
    return Fraction(above, max(1, int(entries)))


def _sum(metric: Tensor) -> float:
    """Add up in one fixed order, whatever the threads."""
    return float(unit_scores(metric, [max(n, 1) for n in metric.shape], "l1").sum())
