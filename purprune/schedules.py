"""Schedules: which sparsity is in force at a step, in closed form, with no memory of earlier calls.

A schedule is a *ramp* from ``initial_sparsity`` to ``target_sparsity``; both ends belong to the
rule that uses it, so one schedule serves layers with different targets. Called by itself, a ramp
runs from 0 to 1 unless the ends are given. Any callable ``step -> sparsity`` is a schedule too; it
brings its own values, so its rule takes no ends.

Arithmetic is exact (rational) wherever the formula is: step counts and sparsities that are written
as decimals give the sparsity of the formula and not one that float rounding moved below a whole
count. Elsewhere, as at fractional powers, it is the formula's to 15 digits or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from decimal import Context, Decimal
from fractions import Fraction
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    GetPydanticSchema,
    Tag,
)

from purprune.callables import AnyCallable, refuse_other_arguments
from purprune.errors import near_misses
from purprune.phases import Alternating
from purprune.ramps import ConstantSparsity as ConstantSparsity
from purprune.ramps import Ramp as Ramp
from purprune.ramps import Stepwise, half_cosine
from purprune.values import StrictFloat, StrictInt, value


def _positive(power: float) -> float:
    if not 0 < power < math.inf:
        raise ValueError(f"expected a power > 0; got {power!r}.")
    return power


@value
class PolynomialDecay(Stepwise):
    """A ramp over L update steps: fast at first, then slower for a power above 1.

    ``sparsity = target + (initial - target) * (1 - i / (L - 1)) ** power`` at update i = 0..L-1.
    :class:`Stepwise` says how updates are given.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), equation 1, with
    the update index as coremltools' PolynomialDecayScheduler counts it.

    >>> schedule = PolynomialDecay("range(0, 900, 100)")
    >>> [schedule(t, target_sparsity=0.8) for t in (0, 100, 399, 400, 800, 5000)]
    [0.0, 0.2640625, 0.6046875, 0.7, 0.8, 0.8]
    >>> schedule == PolynomialDecay(begin_step=0, end_step=800, frequency=100)
    True
    """

    power: Annotated[StrictInt | StrictFloat, AfterValidator(_positive)] = 3
    kind: Literal["polynomial"] = field(default="polynomial", repr=False, kw_only=True)

    def remaining(self, step: int) -> Fraction:
        """Return ``(1 - i / (L - 1)) ** power``."""
        base = 1 - self.passed(step)
        if float(self.power).is_integer():
            return base ** int(self.power)
        return Fraction(float(base) ** self.power)


@value
class CosineDecay(Stepwise):
    """A ramp over L update steps: slow at both ends, fast between them.

    ``sparsity = target + (initial - target) * (1 + cos(pi * i / (L - 1))) / 2`` at update
    i = 0..L-1, where the cosine's factor is rounded to 15 decimals. :class:`Stepwise` says how
    updates are given.

    Source: the annealing of Loshchilov and Hutter, "SGDR", 2017 (arXiv:1608.03983), equation 5, as
    Dettmers and Zettlemoyer, 2019 (arXiv:1907.04840), use it for pruning rates.

    >>> schedule = CosineDecay([0, 10, 20, 30, 40])
    >>> [schedule(t, target_sparsity=0.8) for t in (0, 20, 29, 40)]
    [0.0, 0.4, 0.4, 0.8]
    """

    kind: Literal["cosine"] = field(default="cosine", repr=False, kw_only=True)

    def remaining(self, step: int) -> Fraction:
        """Return ``(1 + cos(pi * i / (L - 1))) / 2``."""
        return half_cosine(self.passed(step))


@value
class ExponentialDecay(Stepwise):
    """A ramp over L update steps, each of which leaves the same share of what the last one left.

    ``density = d0 * (d1 / d0) ** (i / (L - 1))`` at update i = 0..L-1, where the density is
    1 - sparsity, d0 at the start and d1 at the end, rounded to 30 digits. A target of 1 is reached
    at update 1. :class:`Stepwise` says how updates are given: n iterations after the dense start
    are ``range(n + 1)``.

    Source: the iterations of SynFlow, Tanaka et al., 2020 (arXiv:2006.05467), algorithm 1.

    >>> schedule = ExponentialDecay(range(3))
    >>> [schedule(t, target_sparsity=0.99) for t in range(4)]
    [0.0, 0.9, 0.99, 0.99]
    """

    kind: Literal["exponential"] = field(default="exponential", repr=False, kw_only=True)

    def remaining(self, step: int) -> Fraction:
        """Return ``1 - i / (L - 1)``, of the way between the logarithms of both densities."""
        return 1 - self.passed(step)

    def between(self, step: int, initial: Fraction, target: Fraction) -> Fraction:
        """Return the sparsity in force at ``step`` on the way from initial to target."""
        passed = self.passed(step)
        if passed in (0, 1) or initial == target:
            return target if passed else initial
        found = 1 - _geometric(1 - initial, 1 - target, passed)
        return min(max(found, min(initial, target)), max(initial, target))


def _geometric(start: Fraction, end: Fraction, passed: Fraction) -> Fraction:
    """Return ``start * (end / start) ** passed``: with more digits than decimals need, rounded."""
    if not start or not end:
        return Fraction(0)
    digits = Context(prec=50)

    def decimal(number: Fraction) -> Decimal:
        return digits.divide(Decimal(number.numerator), Decimal(number.denominator))

    exponent = digits.multiply(digits.ln(decimal(end / start)), decimal(passed))
    return Fraction(Context(prec=30).multiply(decimal(start), digits.exp(exponent)))


OwnSchedule = ConstantSparsity | PolynomialDecay | CosineDecay | ExponentialDecay | Alternating
"""The schedules that are values, and so can stand in files."""

_KINDS = [cls.kind for cls in get_args(OwnSchedule)]


def _of_known_kind(schedule: Any) -> Any:
    kind = schedule.get("kind") if isinstance(schedule, dict) else None
    if isinstance(kind, str) and kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"expected one of {known}; got {kind!r}.{near_misses(kind, _KINDS)}")
    return schedule


def _kind_of_schedule(schedule: Any) -> str | None:
    if isinstance(schedule, dict):
        if "kind" in schedule:
            return str(schedule["kind"])
        return "constant" if set(schedule) <= {"begin_step"} else "polynomial"
    if isinstance(schedule, OwnSchedule):
        return schedule.kind
    return "callable" if callable(schedule) and not isinstance(schedule, type) else None


def _takes_one(schedule: Any) -> Any:
    return refuse_other_arguments(schedule, "a schedule(step)", 1)


_Tagged: Any = Annotated[
    Union[
        (
            *(Annotated[cls, Tag(cls.kind)] for cls in get_args(OwnSchedule)),
            Annotated[AnyCallable, AfterValidator(_takes_one), Tag("callable")],
        )
    ],
    Discriminator(
        _kind_of_schedule,
        custom_error_type="schedule",
        custom_error_message="expected a schedule such as PolynomialDecay(range(0, 100, 10)), a "
        "dict like {'update_steps': [0, 100]} or {'begin_step': 0}, or a callable step -> sparsity",
    ),
]

Schedule = Annotated[
    OwnSchedule | Callable[..., Any],
    GetPydanticSchema(lambda _, handler: handler.generate_schema(_Tagged)),
    BeforeValidator(_of_known_kind),
]
"""What a rule accepts as its schedule."""
