"""Scores: how much each entry of a weight matters. The lowest go first.

A score is a callable ``score(weight, context) -> tensor`` of the weight's shape; it is a pure
function and sees nothing but its arguments. Floating-point and integer scores are ranked as they
are. Weights and gradients of less than 32 bits come in float32. A callable of the user gets a copy
of the weight, so nothing that it does to it is seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal, Union, get_args

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetPydanticSchema,
    StringConstraints,
    Tag,
)
from torch import Tensor

from purprune.callables import AnyCallable, refuse_other_arguments
from purprune.context import ScoreContext as ScoreContext
from purprune.context import wide, wide_stat
from purprune.errors import near_misses
from purprune.layer_scores import LAMP, RIA, Wanda
from purprune.values import StrictInt, value


@value
class Magnitude:
    """``score = |w|``. With a unit of several entries: the norm of the unit's weights.

    Source: Han et al., "Learning both weights and connections", 2015 (arXiv:1506.02626).

    >>> Magnitude()(torch.tensor([-3.0, 1.0]), ScoreContext("w", step=0))
    tensor([3., 1.])
    """

    needs: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True
    kind: Literal["magnitude"] = field(default="magnitude", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|weight|``."""
        return weight.abs()


@value
class Taylor:
    """``score = |w * g|``: the first-order change of the loss when the entry becomes zero.

    Source: Molchanov et al., 2017 (arXiv:1611.06440), for weights 2019 (arXiv:1906.10771); at
    initialisation it is SNIP, Lee et al., 2019 (arXiv:1810.02340).

    >>> context = ScoreContext("w", step=0, gradient=torch.tensor([0.5, 4.0]))
    >>> Taylor()(torch.tensor([-3.0, 1.0]), context)
    tensor([1.5000, 4.0000], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    elementwise: ClassVar[bool] = True
    kind: Literal["taylor"] = field(default="taylor", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|weight * gradient|`` in float64, which holds it exactly (mps: float32)."""
        return (wide(weight) * wide(context.grad)).abs()


@value
class Gradient:
    """``score = |g|``: how fast the loss changes with the entry, whatever its weight.

    Source: the criterion by which RigL grows entries, Evci et al., 2020 (arXiv:1911.11134).

    >>> context = ScoreContext("w", step=0, gradient=torch.tensor([0.5, -4.0]))
    >>> Gradient()(torch.tensor([-3.0, 1.0]), context)
    tensor([0.5000, 4.0000], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ("gradient",)
    elementwise: ClassVar[bool] = True
    kind: Literal["gradient"] = field(default="gradient", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|gradient|`` in float64 (mps: float32)."""
        return wide(context.grad).abs()


@value
class Fisher:
    """``score = w**2 * E[g**2]``: the change of the loss by a diagonal Fisher information.

    Needs the statistic ``squared_gradient``, the mean of squared gradients; the factor 1/2 of the
    expansion is left out. Where it is the square of one gradient, the order is that of
    :class:`Taylor`.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018
    (arXiv:1801.05787); Molchanov et al., 2019 (arXiv:1906.10771).

    >>> context = ScoreContext("w", step=0, stats={"squared_gradient": torch.tensor([0.5, 4.0])})
    >>> Fisher()(torch.tensor([-3.0, 1.0]), context)
    tensor([4.5000, 4.0000], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ("squared_gradient",)
    elementwise: ClassVar[bool] = True
    kind: Literal["fisher"] = field(default="fisher", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``weight**2 * squared_gradient`` in float64 (mps: float32)."""
        squares = wide_stat(weight, context, "squared_gradient", weight.shape)
        return wide(weight).square() * squares


@value
class Given:
    """The statistic itself is the score: what was computed from data or from the whole network.

    ``"movement"`` is ``Given("movement")``, the sum of ``-w * g`` over training steps: entries that
    move towards zero go first (Sanh et al., 2020, arXiv:2005.07683). ``"synflow"`` and ``"grasp"``
    are the scores of :func:`purprune.synflow_scores` and :func:`purprune.grasp_scores`.

    >>> context = ScoreContext("w", step=0, stats={"movement": torch.tensor([0.5, -4.0])})
    >>> Given("movement")(torch.tensor([-3.0, 1.0]), context)
    tensor([ 0.5000, -4.0000], dtype=torch.float64)
    """

    stat: Annotated[str, StringConstraints(strict=True, min_length=1)]
    elementwise: ClassVar[bool] = True
    kind: Literal["given"] = field(default="given", repr=False, kw_only=True)

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistic."""
        return (self.stat,)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return the statistic, of the weight's shape, in float64 (mps: float32)."""
        return wide(context.stat(self.stat, weight.shape).to(weight.device))


@value
class Random:
    """A fixed random order: a hash of (seed, parameter name, flat index), no generator involved.

    The same seed gives the same order at every step, on every device and in every process, so
    masks nest as the sparsity grows. The hash is the finalizer of SplitMix64 (Steele, Lea and
    Flood, 2014), of which the top 31 bits are the score.

    >>> Random(seed=7)(torch.zeros(3), ScoreContext("w", step=0)).dtype
    torch.int32
    """

    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    needs: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = True
    kind: Literal["random"] = field(default="random", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return integers in [0, 2**31) that depend on seed, name and flat index alone."""
        digest = hashlib.blake2b(f"{self.seed}:{context.name}".encode(), digest_size=8).digest()
        start = int.from_bytes(digest, "little", signed=True)
        index = torch.arange(weight.numel(), dtype=torch.int64, device=weight.device)
        return (_splitmix64(index, start) >> 33 & 0x7FFFFFFF).to(torch.int32).view(weight.shape)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _splitmix64(index: Tensor, start: int) -> Tensor:
    """Hash int64 indices; integer products wrap modulo 2**64 on every backend."""
    z = index * _signed(0x9E3779B97F4A7C15) + start
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: torch's is arithmetic


OwnScore = Magnitude | Taylor | Random | Gradient | Fisher | Wanda | RIA | LAMP | Given
"""The scores that are values, and so can stand in files."""

_KINDS: dict[str, dict[str, Any]] = {
    **{cls.kind: {"kind": cls.kind} for cls in get_args(OwnScore)},
    "snip": {"kind": "taylor"},
    **{stat: {"kind": "given", "stat": stat} for stat in ("movement", "synflow", "grasp")},
}
"""What the names of scores stand for."""


def needs_of(score: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the statistics that a score reads, ``"gradient"`` among them."""
    return tuple(getattr(score, "needs", ()))


def _named(score: Any) -> Any:
    kind = score.get("kind") if isinstance(score, dict) else score
    if not isinstance(kind, str):
        return score
    if kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise ValueError(f"expected one of {known}; got {kind!r}.{near_misses(kind, _KINDS)}")
    return {**score, **_KINDS[kind]} if isinstance(score, dict) else _KINDS[kind]


def _kind_of_score(score: Any) -> str | None:
    if isinstance(score, dict):
        return str(score.get("kind"))
    if isinstance(score, OwnScore):
        return score.kind
    # A class would be called as a score: its instance is meant.
    return "callable" if callable(score) and not isinstance(score, type) else None


def _takes_two(score: Any) -> Any:
    return refuse_other_arguments(score, "a score(weight, context)", 2)


_Tagged: Any = Annotated[
    Union[
        (
            *(Annotated[cls, Tag(cls.kind)] for cls in get_args(OwnScore)),
            Annotated[AnyCallable, AfterValidator(_takes_two), Tag("callable")],
        )
    ],
    Discriminator(
        _kind_of_score,
        custom_error_type="score",
        custom_error_message="expected a score such as 'magnitude', a dict like "
        "{'kind': 'random', 'seed': 0}, or a callable score(weight, context)",
    ),
]

Score = Annotated[
    OwnScore | Callable[..., Any],
    GetPydanticSchema(lambda _, handler: handler.generate_schema(_Tagged)),
    BeforeValidator(_named, json_schema_input_type=str | dict[str, Any]),
]
"""What a rule accepts as its score."""
