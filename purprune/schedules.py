"""Schedules: which sparsity is in force at a step, in closed form, with no memory of earlier calls.

A schedule is a *ramp* from ``initial_sparsity`` to ``target_sparsity``; both ends belong to the
rule that uses it, so one schedule serves layers with different targets. Called by itself, a ramp
runs from 0 to 1 unless the ends are given. Any callable ``step -> sparsity`` is a schedule too; it
brings its own values, so its rule takes no ends.

Arithmetic is exact (rational) wherever the power is an integer: step counts and sparsities that
are written as decimals give the sparsity of the formula and not one that float rounding moved
below a whole count.
"""

from __future__ import annotations

import functools
import math
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    Tag,
    WithJsonSchema,
    model_serializer,
)

from purprune.values import StrictFloat, StrictInt, exact, value

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_RANGE = re.compile(r"\s*range\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?(?:,\s*(\d+)\s*)?,?\s*\)\s*")


def _parse_range(text: str) -> range:
    found = _RANGE.fullmatch(text)
    if not found:
        raise ValueError(
            f"expected steps like [0, 100, 200] or the text 'range(start, stop, stride)'; "
            f"got {text!r}."
        )
    return range(*(int(part) for part in found.groups() if part is not None))


def _as_step(item: Any) -> int:
    if isinstance(item, bool):
        raise ValueError(f"expected whole update steps; got {item!r}.")
    try:
        return operator.index(item)
    except TypeError:
        raise ValueError(f"expected whole update steps; got {item!r}.") from None


def _as_steps(steps: Any) -> Sequence[int] | None:
    """Bring update steps into one form, so that equal schedules compare equal."""
    if steps is None:
        return None
    if isinstance(steps, str):
        steps = _parse_range(steps)
    if not isinstance(steps, Iterable):
        raise ValueError(f"expected a list of update steps; got {steps!r}.")
    found: Sequence[int]
    if isinstance(steps, range):  # not unrolled: it may be long
        found, rising = steps, steps.step > 0
    else:
        found = tuple(map(_as_step, steps))
        rising = all(map(operator.lt, found, found[1:]))
    if not found:
        raise ValueError("expected at least one update step; got none.")
    if found[0] < 0 or found[-1] < 0:
        raise ValueError(f"expected update steps >= 0; got {min(found[0], found[-1])}.")
    if not rising:
        raise ValueError("expected update steps in rising order, none twice; sort them first.")
    if isinstance(found, range):
        return found
    stride = found[1] - found[0] if len(found) > 1 else 1
    even = range(found[0], found[-1] + 1, stride)
    return even if len(even) == len(found) and all(map(operator.eq, even, found)) else found


def _positive(power: float) -> float:
    if not 0 < power < math.inf:
        raise ValueError(f"expected a power > 0; got {power!r}.")
    return power


def _steps_as_plain(steps: Sequence[int] | None) -> Any:
    if isinstance(steps, range):
        return f"range({steps.start}, {steps.stop}, {steps.step})"
    return None if steps is None else list(steps)


UpdateSteps = Annotated[
    Any,  # a range or a rising tuple of ints; see _as_steps
    BeforeValidator(_as_steps),
    PlainSerializer(_steps_as_plain),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
                {"type": "string", "pattern": r"^range\([0-9, ]+\)$"},
                {"type": "null"},
            ]
        }
    ),
]


class Ramp:
    """A schedule that goes from an initial to a target sparsity; see :meth:`remaining`."""

    def remaining(self, step: int) -> Fraction:
        """Return the share of the way that is still ahead: 1 before the start, 0 at the end."""
        raise NotImplementedError

    def changes_at(self, step: int) -> bool:
        """Tell whether masks are computed anew at ``step``."""
        raise NotImplementedError

    @property
    def last_step(self) -> int:
        """The step from which on the sparsity is the target."""
        raise NotImplementedError

    def between(self, step: int, initial: Fraction, target: Fraction) -> Fraction:
        """Return the exact sparsity in force at ``step`` on the way from initial to target."""
        remaining = self.remaining(step)
        return target + (initial - target) * remaining if remaining else target

    def __call__(
        self, step: int, initial_sparsity: float = 0.0, target_sparsity: float = 1.0
    ) -> float:
        """Return the sparsity in force at ``step``."""
        return float(self.between(step, exact(initial_sparsity), exact(target_sparsity)))


@value
class ConstantSparsity(Ramp):
    """The target from ``begin_step`` on, the initial sparsity before.

    ``sparsity(t) = target if t >= begin_step else initial``

    >>> schedule = ConstantSparsity(begin_step=10)
    >>> [schedule(t, target_sparsity=0.8) for t in (0, 9, 10, 11)]
    [0.0, 0.0, 0.8, 0.8]
    """

    begin_step: Annotated[StrictInt, Field(ge=0)] = 0
    kind: Literal["constant"] = field(default="constant", repr=False, kw_only=True)

    def remaining(self, step: int) -> Fraction:
        """Return 1 before ``begin_step`` and 0 from it on."""
        return Fraction(step < self.begin_step)

    def changes_at(self, step: int) -> bool:
        """Tell whether ``step`` is ``begin_step``."""
        return step == self.begin_step

    @property
    def last_step(self) -> int:
        """The step from which on the sparsity is the target."""
        return self.begin_step


@value
class PolynomialDecay(Ramp):
    """A ramp over L update steps: fast at first, then slower for a power above 1.

    ``sparsity = target + (initial - target) * (1 - i / (L - 1)) ** power`` at update i = 0..L-1;
    a single update goes straight to the target. Between updates the last value holds; before the
    first it is the initial sparsity. Note that the masks of update 0 have the *initial* sparsity.

    Give the updates as ints, a range or the text ``"range(0, 900, 100)"`` (parsed, never
    evaluated), or as ``begin_step``, ``end_step`` (the last update, when the frequency divides the
    distance) and ``frequency``.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017 (arXiv:1710.01878), equation 1, with
    the update index as coremltools' PolynomialDecayScheduler counts it.

    >>> schedule = PolynomialDecay("range(0, 900, 100)")
    >>> [schedule(t, target_sparsity=0.8) for t in (0, 100, 399, 400, 800, 5000)]
    [0.0, 0.2640625, 0.6046875, 0.7, 0.8, 0.8]
    >>> schedule == PolynomialDecay(begin_step=0, end_step=800, frequency=100)
    True
    """

    update_steps: UpdateSteps = None
    power: Annotated[StrictInt | StrictFloat, AfterValidator(_positive)] = 3
    begin_step: Annotated[StrictInt | None, Field(ge=0)] = field(default=None, repr=False)
    end_step: Annotated[StrictInt | None, Field(ge=0)] = field(default=None, repr=False)
    frequency: Annotated[StrictInt | None, Field(gt=0)] = field(default=None, repr=False)
    kind: Literal["polynomial"] = field(default="polynomial", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Bring the two ways of giving the updates into one."""
        span = (self.begin_step, self.end_step, self.frequency)
        if self.update_steps is not None:
            if span != (None, None, None):
                raise ValueError("expected update_steps or begin_step/end_step/frequency; got both")
            return
        if self.begin_step is None or self.end_step is None or self.frequency is None:
            raise ValueError(
                "expected update_steps, or all of begin_step, end_step and frequency; got "
                f"begin_step={span[0]}, end_step={span[1]}, frequency={span[2]}."
            )
        if self.end_step < self.begin_step:
            raise ValueError(f"expected begin_step <= end_step; got {span[0]} and {span[1]}.")
        steps = _as_steps(range(self.begin_step, self.end_step + 1, self.frequency))
        for name, new in (("update_steps", steps), *((n, None) for n in _SPAN)):
            object.__setattr__(self, name, new)

    @model_serializer(mode="wrap")
    def _without_span(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: item for key, item in handler(self).items() if key not in _SPAN}

    def remaining(self, step: int) -> Fraction:
        """Return ``(1 - i / (L - 1)) ** power`` for the last update i at or before ``step``."""
        done, updates = bisect_right(self.update_steps, step), len(self.update_steps)
        if done == 0:
            return Fraction(1)
        if done == updates:
            return Fraction(0)
        base = 1 - Fraction(done - 1, updates - 1)
        if float(self.power).is_integer():
            return base ** int(self.power)
        return Fraction(float(base) ** self.power)

    def changes_at(self, step: int) -> bool:
        """Tell whether ``step`` is one of the update steps."""
        done = bisect_right(self.update_steps, step)
        return done > 0 and bool(self.update_steps[done - 1] == step)

    @property
    def last_step(self) -> int:
        """The step from which on the sparsity is the target."""
        return int(self.update_steps[-1])


_SPAN = ("begin_step", "end_step", "frequency")


def _kind_of_schedule(schedule: Any) -> str | None:
    if isinstance(schedule, dict):
        if "kind" in schedule:
            return str(schedule["kind"])
        return "constant" if set(schedule) <= {"begin_step"} else "polynomial"
    if isinstance(schedule, ConstantSparsity | PolynomialDecay):
        return schedule.kind
    return "callable" if callable(schedule) and not isinstance(schedule, type) else None


def callable_as_plain(function: Any) -> dict[str, str]:
    """Name a callable in a dict: enough to compare it, not to load it."""
    return {"callable": _name_of(function)}


def _name_of(function: Any) -> str:
    """Name a callable alike in every process: no address of memory takes part."""
    if isinstance(function, functools.partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return _ADDRESS.sub("", f"{_name_of(function.func)}({', '.join(given)})")
    kind = function if hasattr(function, "__qualname__") else type(function)
    name = f"{kind.__module__}:{kind.__qualname__}"
    has_own_repr = kind is not function and kind.__repr__ is not object.__repr__
    return _ADDRESS.sub("", f"{name} {function!r}") if has_own_repr else name


AnyCallable = Annotated[
    Callable[..., Any],
    PlainSerializer(callable_as_plain),
    WithJsonSchema({"not": {}, "description": "a Python callable; only in code, never in a file"}),
]

Schedule = Annotated[
    Annotated[ConstantSparsity, Tag("constant")]
    | Annotated[PolynomialDecay, Tag("polynomial")]
    | Annotated[AnyCallable, Tag("callable")],
    Discriminator(
        _kind_of_schedule,
        custom_error_type="schedule",
        custom_error_message="a schedule (ConstantSparsity, PolynomialDecay), a dict like "
        "{'update_steps': [0, 100]} or {'begin_step': 0}, or a callable step -> sparsity",
    ),
]
"""What a rule accepts as its schedule."""
