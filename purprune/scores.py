"""Scores: how much each entry of a weight matters. The lowest go first.

A score is a callable ``score(weight, context) -> tensor`` of the weight's shape; it is a pure
function and sees nothing but its arguments. Floating-point and integer scores are ranked as they
are. Weights and gradients of less than 32 bits come in float32. A callable of the user gets a copy
of the weight, so nothing that it does to it is seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Discriminator, Field, Tag
from torch import Tensor

from purprune.schedules import AnyCallable
from purprune.values import StrictInt, value


@dataclass(frozen=True)
class ScoreContext:
    """What a score may know beside the weight."""

    name: str
    """The parameter's dotted name."""
    step: int
    """The step for which masks are computed."""
    gradient: Tensor | None = None
    """The gradient given for this parameter, or None."""

    @property
    def grad(self) -> Tensor:
        """The gradient; raises when none was given for this parameter."""
        if self.gradient is None:
            raise ValueError(
                f"The score of {self.name!r} needs a gradient; got none. Pass "
                f"grads={{name: gradient}} to compute_masks, or call Pruner.step() after "
                f"loss.backward() and before zero_grad(); at step 0 there is none yet, so let the "
                f"schedule begin later: ConstantSparsity(begin_step=1)."
            )
        return self.gradient


def full_precision(tensor: Tensor) -> Tensor:
    """Return bfloat16, float16 and smaller floats in float32; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


@value
class Magnitude:
    """``score = |w|``. With a unit of several entries: the norm of the unit's weights.

    Source: Han et al., "Learning both weights and connections", 2015 (arXiv:1506.02626).

    >>> Magnitude()(torch.tensor([-3.0, 1.0]), ScoreContext("w", step=0))
    tensor([3., 1.])
    """

    kind: Literal["magnitude"] = field(default="magnitude", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|weight|``."""
        return weight.abs()


@value
class Taylor:
    """``score = |w * g|``: the first-order change of the loss when the entry becomes zero.

    Source: Molchanov et al., 2017 (arXiv:1611.06440); at initialisation it is SNIP, Lee et al.,
    2019 (arXiv:1810.02340).

    >>> context = ScoreContext("w", step=0, gradient=torch.tensor([0.5, 4.0]))
    >>> Taylor()(torch.tensor([-3.0, 1.0]), context)
    tensor([1.5000, 4.0000], dtype=torch.float64)
    """

    kind: Literal["taylor"] = field(default="taylor", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|weight * gradient|`` in float64, which holds it exactly (mps: float32)."""
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        return (weight.to(wide) * context.grad.to(wide)).abs()


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


def _named(score: Any) -> Any:
    return {"kind": score} if isinstance(score, str) else score


def _kind_of_score(score: Any) -> str | None:
    if isinstance(score, dict):
        return str(score.get("kind"))
    if isinstance(score, Magnitude | Taylor | Random):
        return score.kind
    # A class would be called as a score: its instance is meant.
    return "callable" if callable(score) and not isinstance(score, type) else None


Score = Annotated[
    Annotated[Magnitude, Tag("magnitude")]
    | Annotated[Taylor, Tag("taylor")]
    | Annotated[Random, Tag("random")]
    | Annotated[AnyCallable, Tag("callable")],
    Discriminator(
        _kind_of_score,
        custom_error_type="score",
        custom_error_message="one of 'magnitude', 'taylor', 'random', a dict like "
        "{'kind': 'random', 'seed': 0}, or a callable score(weight, context)",
    ),
    BeforeValidator(_named, json_schema_input_type=str | dict[str, Any]),
]
"""What a rule accepts as its score."""
