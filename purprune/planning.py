"""The dry run: what would be pruned, in integers, before anything is. Works on meta tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from purprune.config import PruneConfig, as_config
from purprune.masks import check_step
from purprune.ranking import count
from purprune.rows import ByName
from purprune.rules import Rule
from purprune.scoring import unit_layout
from purprune.selection import described, select
from purprune.tables import skipped_text, text_table
from purprune.totals import sharing, sparsities_at, total_at
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
    """Groups by size; a tail of N:M is an entry of its own. Empty where tensors share one."""
    shared: bool = False
    """Whether values divide one total among the tensor and others: see :attr:`Plan.shared`."""

    @property
    def entries(self) -> int:
        """How many entries the tensor has."""
        return math.prod(self.shape)

    @property
    def pruned_units(self) -> int | None:
        """How many units are pruned; None where values decide, in a group of many tensors."""
        return None if self.shared else sum(g.groups * g.pruned for g in self.groups)


@dataclass(frozen=True)
class PlannedShare:
    """Tensors that share one total: how many units they have, and how many of these go."""

    names: tuple[str, ...]
    sparsity: Fraction
    units: int
    pruned: int

    def __str__(self) -> str:
        """Return a line below the table."""
        more = f" and {len(self.names) - 4} more" if self.names[4:] else ""
        names = f"{', '.join(self.names[:4])}{more}"
        return f"\ntogether: {self.pruned:,} of {self.units:,} units of {names}"


@dataclass(frozen=True)
class Plan(ByName[PlannedTensor]):
    """The result of :func:`plan`: the rows of pruned tensors by name, and why others are dense."""

    step: int | None
    tensors: tuple[PlannedTensor, ...]
    skipped: Mapping[str, str]
    shared: tuple[PlannedShare, ...] = ()
    """Totals of tensors whose rules are equal, divided by their values or by a budget."""

    @property
    def _in_order(self) -> Sequence[PlannedTensor]:
        return self.tensors

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
        shared = [
            {**asdict(g), "names": list(g.names), "sparsity": float(g.sparsity)}
            for g in self.shared
        ]
        found = {"step": self.step, "tensors": rows, "skipped": dict(self.skipped)}
        return {**found, "shared": shared}

    def __str__(self) -> str:
        """Return a table."""
        rows = [
            (
                t.name,
                "x".join(map(str, t.shape)),
                "x".join(map(str, t.unit)),
                f"{t.units:,}",
                f"{t.ragged_units:,}",
                "shared" if t.shared else _sum(f"{g.groups:,} of {g.units:,}" for g in t.groups),
                "-" if t.shared else _sum(f"{g.pruned:,}" for g in t.groups),
                "-" if t.pruned_units is None else f"{t.pruned_units:,}",
                f"{float(t.sparsity):.4g}",
            )
            for t in self.tensors
        ]
        head = (
            "parameter",
            "shape",
            "unit",
            "units",
            "ragged units",
            "groups",
            "k",
            "pruned",
            "target",
        )
        shared = "".join(map(str, self.shared))
        return text_table(head, rows) + shared + skipped_text(self.skipped)


def _sum(terms: Iterable[str]) -> str:
    return " + ".join(terms)


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
    shapes = described(params)
    step = None if step is None else check_step(step, "plan(params, cfg, step)")
    rules, skipped = select(as_config(cfg), shapes)
    sparsities = sparsities_at(rules, shapes, step)
    tensors = {
        name: _planned(name, shapes[name].shape, rule, sparsities[name])
        for name, rule in rules.items()
    }
    shared = tuple(
        _planned_share([tensors[name] for name in names], total_at(names[0], rules[names[0]], step))
        for names in sharing(rules)
    )
    return Plan(step, tuple(tensors.values()), skipped, shared)


def _planned_share(tensors: Sequence[PlannedTensor], sparsity: Fraction) -> PlannedShare:
    units = sum(tensor.units for tensor in tensors)
    names = tuple(tensor.name for tensor in tensors)
    return PlannedShare(names, sparsity, units, count(units, sparsity))


def _planned(name: str, shape: torch.Size, rule: Rule, sparsity: Fraction) -> PlannedTensor:
    block, layout = unit_layout(name, rule, shape)
    grid = grid_shape(block, shape)
    columns = math.prod(grid[d] for d in layout.order[layout.lead :])
    rows = math.prod(grid[d] for d in layout.order[: layout.lead])
    groups = tuple(
        PlannedGroups(rows * (stop - start) // size, size, count(size, sparsity))
        for start, stop, size in ([] if rule.is_global else layout.spans(columns))
    )
    whole = math.prod(n // b for b, n in zip(block, shape, strict=True))
    units = math.prod(grid)
    ragged = units - whole
    shared = rule.is_global
    return PlannedTensor(name, tuple(shape), sparsity, block, units, ragged, groups, shared)
