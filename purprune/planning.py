"""The dry run: what would be pruned, in integers, before anything is. Works on meta tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, Rule, as_config
from purprune.errors import ConfigError
from purprune.masks import check_step, sparsity_at, unit_layout
from purprune.ranking import count
from purprune.selection import check_params, select
from purprune.tables import skipped_text, text_table
from purprune.units import grid_shape


@dataclass(frozen=True)
class PlannedGroups:
    """Groups of one size: how many there are, their units, and how many of these are pruned."""

    groups: int
    units: int
    pruned: int


@dataclass(frozen=True)
class PlannedTensor:
    """What a rule does to one tensor at one step."""

    name: str
    shape: tuple[int, ...]
    sparsity: Fraction
    """The sparsity in force, of units."""
    unit: tuple[int, ...]
    """The extents of a whole unit."""
    units: int
    """How many units there are, ragged ones included."""
    ragged_units: int
    """How many units are cut off by the tensor's end."""
    groups: tuple[PlannedGroups, ...]
    """Groups by size; a tail of N:M is an entry of its own."""

    @property
    def entries(self) -> int:
        """How many entries the tensor has."""
        return math.prod(self.shape)

    @property
    def pruned_units(self) -> int:
        """How many units are pruned."""
        return sum(g.groups * g.pruned for g in self.groups)


@dataclass(frozen=True)
class Plan:
    """The result of :func:`plan`: a row per pruned tensor, and why the others are dense."""

    step: int | None
    tensors: tuple[PlannedTensor, ...]
    skipped: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain dicts, lists, texts and numbers."""
        rows = [
            {
                **asdict(t),
                "sparsity": float(t.sparsity),
                "entries": t.entries,
                "pruned_units": t.pruned_units,
            }
            for t in self.tensors
        ]
        return {"step": self.step, "tensors": rows, "skipped": dict(self.skipped)}

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            (
                t.name,
                "x".join(map(str, t.shape)),
                "x".join(map(str, t.unit)),
                f"{t.units:,}",
                f"{t.ragged_units:,}",
                " + ".join(f"{g.groups:,} of {g.units:,}" for g in t.groups),
                " + ".join(f"{g.pruned:,}" for g in t.groups),
                f"{t.pruned_units:,}",
                f"{float(t.sparsity):.4g}",
            )
            for t in self.tensors
        ]
        head = ("parameter", "shape", "unit", "units", "ragged", "groups", "k", "pruned", "target")
        return text_table(head, rows) + skipped_text(self.skipped)


@torch.no_grad()
def plan(
    params: Mapping[str, Tensor],
    cfg: PruneConfig | Rule | Mapping[str, Any],
    step: int | None = None,
) -> Plan:
    """Return what :func:`compute_masks` would prune, without looking at a value.

    Args:
        params: flat mapping of dotted names to tensors; meta tensors will do.
        cfg: a :class:`PruneConfig`, a :class:`Rule` for everything, or a dict.
        step: the step; None means the end of the schedules.

    Raises:
        SelectionError, ConfigError: as :func:`compute_masks` does.

    >>> from purprune import NM
    >>> params = {"fc.weight": torch.empty(4, 10, device="meta"), "fc.bias": torch.empty(4)}
    >>> planned = plan(params, Rule(pattern=NM(zeros=2, m=4)))
    >>> [(g.groups, g.units, g.pruned) for g in planned.tensors[0].groups], planned.skipped
    ([(8, 4, 2), (4, 2, 1)], {'fc.bias': '1-D: the global rule is for 2 or more dims'})
    """
    check_params(params)
    step = None if step is None else check_step(step)
    selection = select(as_config(cfg), params)
    tensors = tuple(
        _planned(name, params[name].shape, rule, step) for name, rule in selection.rules.items()
    )
    return Plan(step, tensors, selection.skipped)


def _sparsity(name: str, rule: Rule, step: int | None) -> Fraction:
    at = rule.last_step if step is None else step
    if at is None:
        raise ConfigError(
            f"Expected a step for {name!r}, since its schedule is a callable, of which the end "
            f"is not known; got None."
        )
    return sparsity_at(name, rule, at)


def _planned(name: str, shape: torch.Size, rule: Rule, step: int | None) -> PlannedTensor:
    sparsity = _sparsity(name, rule, step)
    block, layout = unit_layout(name, rule, shape)
    grid = grid_shape(block, shape)
    columns = math.prod(grid[d] for d in layout.order[layout.lead :])
    rows = math.prod(grid[d] for d in layout.order[: layout.lead])
    groups = tuple(
        PlannedGroups(rows * (stop - start) // size, size, count(size, sparsity))
        for start, stop, size in layout.spans(columns)
    )
    whole = math.prod(n // b for b, n in zip(block, shape, strict=True))
    units = math.prod(grid)
    return PlannedTensor(name, tuple(shape), sparsity, block, units, units - whole, groups)
