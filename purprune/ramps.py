"""Ramps: the way from an initial to a target sparsity, and how update steps are given."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import field
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from purprune.updates import UpdateSteps, as_steps
from purprune.values import StrictInt, exact, value


def half_cosine(passed: Fraction) -> Fraction:
    """Return ``(1 + cos(pi * passed)) / 2``, rounded to 15 decimals; exact at 0 and 1."""
    if passed in (0, 1):
        return 1 - passed
    return Fraction(round((1 + math.cos(math.pi * passed)) / 2 * 10**15), 10**15)


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


def _spanned() -> Any:
    return field(default=None, repr=False, kw_only=True)


@value
class Stepwise(Ramp):
    """A ramp over L update steps; between updates the last value holds.

    Before the first update it is the initial sparsity, from the last on the target, exactly. A
    single update goes straight to the target. Note that the masks of update 0 have the *initial*
    sparsity.

    Give the updates as ints, a range or the text ``"range(0, 900, 100)"`` (parsed, never
    evaluated), or as ``begin_step``, ``end_step`` (the last update, when the frequency divides the
    distance) and ``frequency``.
    """

    update_steps: UpdateSteps = None
    begin_step: Annotated[StrictInt | None, Field(ge=0)] = field(
        default=None, repr=False, kw_only=True
    )
    end_step: Annotated[StrictInt | None, Field(ge=0)] = field(
        default=None, repr=False, kw_only=True
    )
    frequency: Annotated[StrictInt | None, Field(gt=0)] = field(
        default=None, repr=False, kw_only=True
    )

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
        steps = as_steps(range(self.begin_step, self.end_step + 1, self.frequency))
        for name, new in (("update_steps", steps), *((n, None) for n in _SPAN)):
            object.__setattr__(self, name, new)

    @model_serializer(mode="wrap")
    def _without_span(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: item for key, item in handler(self).items() if key not in _SPAN}

    def passed(self, step: int) -> Fraction:
        """Return ``i / (L - 1)`` for the last update i at or before ``step``, or else 0."""
        done, updates = bisect_right(self.update_steps, step), len(self.update_steps)
        if done in (0, updates):
            return Fraction(done and 1)
        return Fraction(done - 1, updates - 1)

    def changes_at(self, step: int) -> bool:
        """Tell whether ``step`` is one of the update steps."""
        done = bisect_right(self.update_steps, step)
        return done > 0 and bool(self.update_steps[done - 1] == step)

    @property
    def last_step(self) -> int:
        """The step from which on the sparsity is the target."""
        return int(self.update_steps[-1])


_SPAN = ("begin_step", "end_step", "frequency")
