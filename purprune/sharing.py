"""Sharing: tensors whose rules are equal and have a global group share one count.

Units are ranked across tensors as if these were one; :mod:`purprune.counting` does it without
putting them together. One tensor's scores are in memory at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from purprune.balancing import balanced, limits_of, scaled
from purprune.context import ScoreContext
from purprune.counting import Group, Outcome, Part, count_down, keep
from purprune.errors import ConfigError, NaNError
from purprune.groups import GlobalGroup, TensorGroup
from purprune.ranking import count, keep_all_but_lowest, refuse_nan, widest
from purprune.rules import Rule
from purprune.scores import Magnitude, OwnScore, Random
from purprune.scoring import (
    kept_units,
    norm_of,
    ranks_absolute,
    raw_scores,
    readable,
    refuse_parts,
    unit_layout,
)
from purprune.totals import sharing
from purprune.units import exponent_of, grid_shape, is_entry, spread, unit_scores

_CHEAP = 64
"""Scores are kept between passes where a unit has so many entries or more: a 32nd of the memory."""


class Inputs(NamedTuple):
    """What masks are computed from; params are read one at a time."""

    params: Mapping[str, Tensor]
    step: int
    prev: Mapping[str, Tensor]
    floor: Mapping[str, Tensor]
    grads: Mapping[str, Tensor | None]
    stats: Mapping[str, Mapping[str, Tensor]]

    @property
    def given(self) -> dict[str, Mapping[str, Tensor]]:
        """The masks that are given, by what they are called in errors."""
        return {"prev": self.prev, "floor": self.floor}

    def weight(self, name: str) -> Tensor:
        """Return a parameter's values."""
        weight = self.params[name]  # which may be loaded anew each time
        refuse_parts(name, weight)
        return readable(name, weight)

    def context(self, name: str) -> ScoreContext:
        """Return what a parameter's score may know."""
        return ScoreContext(name, self.step, self.grads.get(name), self.stats.get(name, {}))


class Member(NamedTuple):
    """A tensor of a group, without its values."""

    like: Tensor
    """A meta tensor."""
    mps: bool
    block: tuple[int, ...]
    grid: tuple[int, ...]

    @property
    def units(self) -> int:
        """How many units there are."""
        return math.prod(self.grid)


class Shared(NamedTuple):
    """Tensors that share one count, in the order of the params."""

    rule: Rule
    members: Mapping[str, Member]
    sparsity: Fraction
    """The sparsity in force, of units."""

    @property
    def units(self) -> int:
        """How many units all tensors have."""
        return sum(member.units for member in self.members.values())

    @property
    def pruned(self) -> int:
        """How many of them go."""
        return count(self.units, self.sparsity)

    @property
    def of_entries(self) -> bool:
        """Whether every unit is a single entry, which keeps its score as it is."""
        return all(is_entry(member.block) for member in self.members.values())

    @property
    def wide(self) -> torch.dtype:
        """The float of units' scores: float64, where the device has it."""
        return torch.float32 if any(m.mps for m in self.members.values()) else torch.float64


def shared_groups(
    rules: Mapping[str, Rule], params: Mapping[str, Tensor], sparsities: Mapping[str, Fraction]
) -> list[Shared]:
    """Return the groups that tensors share; no value is read.

    Raises:
        ConfigError: when a rule's pattern does not fit its tensor.
    """
    return [
        Shared(
            rules[names[0]],
            {name: _member(name, rules[name], params[name]) for name in names},
            sparsities[names[0]],
        )
        for names in sharing(rules)
        if rules[names[0]].is_global
    ]


def _member(name: str, rule: Rule, tensor: Tensor) -> Member:
    block, _ = unit_layout(name, rule, tensor.shape)
    like = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return Member(like, tensor.device.type == "mps", block, grid_shape(block, tensor.shape))


def shared_masks(groups: list[Shared], inputs: Inputs) -> dict[str, Iterator[Tensor]]:
    """Count, and return by name from where to take each mask. Take them in the order of names.

    Raises:
        NaNError: a weight or score holds NaN; names the parameter and the count.
    """
    found: dict[str, Iterator[Tensor]] = {}
    for shared in groups:
        try:
            masks = _counted(shared, inputs)
        except NaNError:
            _refuse_nan(shared, inputs)
            raise
        found.update(dict.fromkeys(shared.members, masks))
    return found


def _counted(shared: Shared, inputs: Inputs) -> Iterator[Tensor]:
    group, how = group_of(shared, inputs), shared.rule.pattern.group
    if not isinstance(how, GlobalGroup) or how.is_plain:
        return _masks(shared, group, count_down([group])[0])
    held = [0 if p.floor is None else int((~p.floor).sum()) for p in group.parts]
    limits = limits_of(how, group.sizes, shared.sparsity, held)
    if sum(low for low, _ in limits) >= group.k:  # nothing is counted then
        _refuse_nan(shared, inputs)
    trial = group
    if how.normalize is not None:
        squared = not shared.of_entries and norm_of(shared.rule) == "l2"
        trial = scaled(group, how.normalize, squared, shared.wide)
    return _ranked(shared, group, balanced(trial, limits))


def _masks(shared: Shared, group: Group, outcome: Outcome) -> Iterator[Tensor]:
    """Yield one mask after the other; the ties that are left are carried along."""
    left = outcome.ties
    for part, member in zip(group.parts, shared.members.values(), strict=True):
        stay, gone = keep(group, part, outcome, left)
        left -= gone
        yield spread(stay, member.block, member.like.shape)


def _ranked(shared: Shared, group: Group, numbers: Sequence[int]) -> Iterator[Tensor]:
    """Yield one mask after the other, of which it is known how many units go."""
    for part, member, n in zip(group.parts, shared.members.values(), numbers, strict=True):
        layout, share = TensorGroup().layout(member.grid), Fraction(n, max(member.units, 1))
        scores, absolute = part.scores(), group.absolute
        stay = keep_all_but_lowest(scores, absolute, layout, share, part.prev, part.floor)
        yield spread(stay, member.block, member.like.shape)


def group_of(shared: Shared, inputs: Inputs, scale: int | None = None) -> Group:
    """Return the group as it is counted.

    Args:
        shared: the tensors.
        inputs: their values.
        scale: the power of two by which squares are scaled; None: found in the values.
    """
    dtype = _dtype(shared, inputs)
    scorers = _scorers(shared, inputs, dtype, scale)
    parts = [
        Part(scores, i, prev, floor=floor)
        for i, (name, scores) in enumerate(scorers.items())
        for prev, floor in [_kept(name, shared, inputs)]
    ]
    sizes = tuple(member.units for member in shared.members.values())
    return Group(parts, shared.pruned, sizes, dtype, ranks_absolute(shared.rule, shared.of_entries))


def _kept(name: str, shared: Shared, inputs: Inputs) -> list[Tensor | None]:
    """Return which units of a member ``prev`` keeps, and which ``floor`` does."""
    member = shared.members[name]
    return [
        kept_units(what, given[name], member.block, member.like, name) if name in given else None
        for what, given in inputs.given.items()
    ]


def _dtype(shared: Shared, inputs: Inputs) -> torch.dtype:
    """Return in what the scores of all members are ranked."""
    score = shared.rule.score
    if not shared.of_entries:
        return shared.wide
    if isinstance(score, Magnitude):
        return widest(member.like.dtype for member in shared.members.values())
    if isinstance(score, OwnScore):  # nothing is read for it
        return torch.int64 if isinstance(score, Random) else shared.wide
    is_float = _raw(shared, inputs, next(iter(shared.members))).is_floating_point()
    return shared.wide if is_float else torch.int64


def _scorers(
    shared: Shared, inputs: Inputs, dtype: torch.dtype, scale: int | None
) -> dict[str, Callable[[], Tensor]]:
    """Return for each member how to make its unit scores, which compare with the others'."""
    if shared.of_entries:
        return {
            name: functools.partial(_entry_scores, shared, inputs, name, dtype)
            for name in shared.members
        }
    scale = _exponent(shared, inputs) if scale is None else scale
    scorers: dict[str, Callable[[], Tensor]] = {}
    for name, member in shared.members.items():
        make = functools.partial(_unit_scores, shared, inputs, name, scale)
        cheap = member.like.numel() >= _CHEAP * member.units
        scorers[name] = functools.cache(make) if cheap else make
    return scorers


def _entry_scores(shared: Shared, inputs: Inputs, name: str, dtype: torch.dtype) -> Tensor:
    scores = _raw(shared, inputs, name)
    if scores.is_floating_point() != dtype.is_floating_point:
        raise ConfigError(
            f"Expected scores that are all floats or all integers in a global group; got "
            f"{scores.dtype} for {name!r} and another kind for {next(iter(shared.members))!r}."
        )
    return scores


def _raw(shared: Shared, inputs: Inputs, name: str) -> Tensor:
    return raw_scores(inputs.weight(name), shared.rule, inputs.context(name))


def _unit_scores(shared: Shared, inputs: Inputs, name: str, scale: int) -> Tensor:
    """Return the unit scores of a member; squares on one scale, by powers of two, for all."""
    raw, block, norm = _raw(shared, inputs, name), shared.members[name].block, norm_of(shared.rule)
    if is_entry(block):
        wide = raw.to(shared.wide)
        return _scaled(wide, scale / 2).square() if norm == "l2" else wide
    own = exponent_of(raw) if norm == "l2" and raw.dtype == shared.wide and raw.numel() else 0
    return _scaled(unit_scores(raw, block, norm), scale - own)


def _scaled(scores: Tensor, by: float) -> Tensor:
    """Multiply by ``4**by`` in two factors, each of which is a float; an inf stays one."""
    factors = [2.0 ** min(max(n, -1000), 1000) for n in (math.floor(by), math.ceil(by))]
    return scores * factors[0] * factors[1] if by else scores


def _exponent(shared: Shared, inputs: Inputs) -> int:
    """Return the power of two by which squares are scaled, so that no sum leaves float64.

    Float32 squares do not leave it, so that nothing is read for them.
    """
    score = shared.rule.score
    narrow = isinstance(score, Magnitude) and shared.wide not in {
        member.like.dtype for member in shared.members.values()
    }
    if norm_of(shared.rule) != "l2" or narrow or isinstance(score, Random):
        return 0
    largest = [_largest(_raw(shared, inputs, name)) for name in shared.members]
    return exponent_of(torch.tensor(largest, dtype=torch.float64))


def _largest(scores: Tensor) -> float:
    finite = torch.where(scores.isfinite(), scores, 0).abs()
    return float(finite.amax()) if scores.numel() else 0.0


def _refuse_nan(shared: Shared, inputs: Inputs) -> None:
    """Raise for the first member with NaN."""
    for name in shared.members:
        refuse_nan(inputs.weight(name), f"the weight {name!r}")
        refuse_nan(_raw(shared, inputs, name), f"the score of {name!r}")
