"""Phases: schedules whose sparsity comes and goes before it stays."""

from __future__ import annotations

from dataclasses import field
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from purprune.ramps import Ramp
from purprune.values import StrictInt, value


@value
class Alternating(Ramp):
    """Sparse and dense phases in turns, and sparse for good from ``end_step`` on.

    ``sparsity(t)`` is the target in a sparse phase and the initial sparsity in a dense one::

        t < begin_step                                               dense (warm-up)
        (t - begin_step) mod (sparse_steps + dense_steps) < sparse_steps     sparse
        t >= end_step                                                sparse

    At the start of each sparse phase the masks are chosen anew. In a dense phase everything is
    trained; what comes back starts at zero.

    Source: AC/DC, Peste et al., 2021 (arXiv:2106.12379).

    >>> schedule = Alternating(begin_step=2, sparse_steps=3, dense_steps=2, end_step=10)
    >>> [round(schedule(t, target_sparsity=0.9), 1) for t in range(12)]
    [0.0, 0.0, 0.9, 0.9, 0.9, 0.0, 0.0, 0.9, 0.9, 0.9, 0.9, 0.9]
    """

    begin_step: Annotated[StrictInt, Field(ge=0)]
    sparse_steps: Annotated[StrictInt, Field(ge=1)]
    dense_steps: Annotated[StrictInt, Field(ge=1)]
    end_step: Annotated[StrictInt, Field(ge=0)]
    kind: Literal["alternating"] = field(default="alternating", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check that the end comes after the beginning."""
        if self.end_step < self.begin_step:
            raise ValueError(
                f"expected begin_step <= end_step; got {self.begin_step} and {self.end_step}."
            )

    def remaining(self, step: int) -> Fraction:
        """Return 0 in a sparse phase and 1 in a dense one."""
        if step >= self.end_step:
            return Fraction(0)
        at = (step - self.begin_step) % (self.sparse_steps + self.dense_steps)
        return Fraction(step < self.begin_step or at >= self.sparse_steps)

    def changes_at(self, step: int) -> bool:
        """Tell whether a phase begins at ``step``."""
        if step == 0:
            return self.remaining(0) == 0
        return self.remaining(step) != self.remaining(step - 1)

    @property
    def last_step(self) -> int:
        """The step from which on the sparsity is the target."""
        return self.end_step
