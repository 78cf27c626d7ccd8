"""Regrow: how pruned entries come back while a model trains. Without it they never do.

Two ways are in the field. Some units are *exchanged* at every update: the least important ones
go, and as many others come back (SET, RigL, GraNet). Or the weights stay *dense* behind the mask,
all of them are trained, and the mask is chosen anew from them (straight-through estimators). Both
are values of a rule; :func:`purprune.update_masks` reads them.
"""

from __future__ import annotations

from dataclasses import field, replace
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from purprune.ramps import half_cosine
from purprune.scores import Gradient, Random, Score
from purprune.values import SparsityValue, StrictFloat, StrictInt, exact, value


@value
class Regrow:
    """Exchange some units every so many steps; the number of pruned units stays exact.

    At an update in step t, a share ``f(t)`` of the units that are kept goes, the lowest by the
    rule's score first, and as many of the pruned ones come back, the highest by ``score`` first::

        f(t) = fraction * (1 + cos(pi * t / end_step)) / 2      (decay="cosine")
        f(t) = fraction                                        (decay="constant")

    In integers, with ``k = floor(units * s)`` for the schedule's sparsity s: first
    ``floor(units * (s + f * (1 - s)))`` units are pruned, then units come back until k are. Those
    that just went may come back too, and keep their weight then; others come back as zero.

    Updates are at the steps t > 0 that ``every`` divides, before ``end_step``. A schedule that
    rises meanwhile prunes and regrows at once (GraNet).

    Args:
        every: steps from one exchange to the next.
        end_step: the step from which on nothing is exchanged; None: never (constant decay only).
        fraction: the share of the kept units that is exchanged at first, in [0, 1].
        score: what comes back: ``"gradient"`` (the largest ``|g|``), ``Random(seed)`` (another
            order at each update), or any score.
        decay: how the fraction develops.
        start: the score of the first masks, which the methods of the field draw at random.

    Sources: Mocanu et al., 2018 (arXiv:1707.04780) for SET; Evci et al., 2020
    (arXiv:1911.11134) for RigL; Liu et al., 2021 (arXiv:2106.10404) for GraNet.

    >>> exchange = Regrow(every=100, end_step=750)
    >>> [exchange.changes_at(t) for t in (0, 50, 100, 700, 800)]
    [False, False, True, True, False]
    >>> [round(float(exchange.fraction_at(t)), 3) for t in (100, 300, 700)]
    [0.287, 0.196, 0.003]
    """

    every: Annotated[StrictInt, Field(ge=1)] = 100
    end_step: Annotated[StrictInt | None, Field(ge=1)] = None
    fraction: SparsityValue = 0.3
    score: Score = Gradient()
    decay: Literal["cosine", "constant"] = "cosine"
    start: Score = Random()
    kind: Literal["exchange"] = field(default="exchange", repr=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check that a cosine has an end."""
        if self.decay == "cosine" and self.end_step is None:
            raise ValueError(
                "expected end_step with decay='cosine', the step from which on nothing is "
                "exchanged; got None. Three quarters of the training are usual; or "
                "decay='constant'."
            )
        if self.end_step is not None and self.every >= self.end_step:
            raise ValueError(
                f"expected every < end_step, or nothing is ever exchanged; got every={self.every} "
                f"and end_step={self.end_step}."
            )

    def changes_at(self, step: int) -> bool:
        """Tell whether units are exchanged at ``step``."""
        is_over = self.end_step is not None and step >= self.end_step
        return step > 0 and step % self.every == 0 and not is_over

    def fraction_at(self, step: int) -> Fraction:
        """Return the share of the kept units that is exchanged at ``step``."""
        if not self.changes_at(step):
            return Fraction(0)
        if self.decay == "constant" or self.end_step is None:
            return exact(self.fraction)
        return exact(self.fraction) * half_cosine(Fraction(step, self.end_step))

    def score_at(self, step: int) -> Any:
        """Return the score by which units come back; a random one draws anew at each update."""
        if isinstance(self.score, Random):
            return replace(self.score, seed=(self.score.seed + step) % 2**63)
        return self.score


@value
class StraightThrough:
    """Train dense weights behind the mask, and choose the mask anew every so many steps.

    The forward pass sees ``w * mask``; its gradient is taken as the gradient of all of w, pruned
    entries included. With ``decay`` the pruned ones are drawn to zero beside it::

        g <- g + decay * (1 - mask) * w

    Args:
        every: steps from one choice of the mask to the next.
        decay: the strength of that term; SR-STE uses 2e-4. 0 is the plain estimator.

    Sources: Bengio et al., 2013 (arXiv:1308.3432) for the estimator; Zhou et al., 2021
    (arXiv:2102.04010), equation 8, for SR-STE.

    >>> StraightThrough(decay=2e-4).changes_at(7)
    True
    """

    every: Annotated[StrictInt, Field(ge=1)] = 1
    decay: Annotated[StrictFloat | StrictInt, Field(ge=0, allow_inf_nan=False)] = 0.0
    kind: Literal["straight_through"] = field(default="straight_through", repr=False, kw_only=True)

    def changes_at(self, step: int) -> bool:
        """Tell whether the mask is chosen anew at ``step``."""
        return step % self.every == 0


def _kind(regrow: Any) -> str | None:
    if isinstance(regrow, dict):
        return str(regrow.get("kind", "exchange"))
    return getattr(regrow, "kind", None)


AnyRegrow = Annotated[
    Annotated[Regrow, Tag("exchange")] | Annotated[StraightThrough, Tag("straight_through")],
    Discriminator(
        _kind,
        custom_error_type="regrow",
        custom_error_message="None, Regrow(...), StraightThrough(...), or a dict like "
        "{'every': 100, 'end_step': 750} or {'kind': 'straight_through', 'decay': 2e-4}",
    ),
]
"""What a rule accepts as its regrow."""


def RigL(  # noqa: N802
    *, every: int = 100, end_step: int, fraction: float = 0.3, seed: int = 0
) -> Regrow:
    """Return RigL's exchange: the lowest magnitudes go, the largest gradients come back.

    Source: Evci et al., 2020 (arXiv:1911.11134), of which these are the defaults.

    >>> RigL(end_step=750) == Regrow(end_step=750)
    True
    """
    return Regrow(every, end_step, fraction, start=Random(seed))


def SET(  # noqa: N802
    *, every: int = 100, end_step: int | None = None, fraction: float = 0.3, seed: int = 0
) -> Regrow:
    """Return SET's exchange: the lowest magnitudes go, random ones come back.

    Source: Mocanu et al., 2018 (arXiv:1707.04780).

    >>> SET().decay
    'constant'
    """
    return Regrow(every, end_step, fraction, Random(seed), "constant", start=Random(seed))
