"""Sensitivities: losses by tensor and sparsity, as values that can be saved and averaged."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Self, cast

import torch
from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, TypeAdapter
from pydantic import ValidationError as PydanticError
from torch import Tensor

from purprune.errors import ConfigError
from purprune.findings import one_line
from purprune.tables import text_table
from purprune.values import FrozenDict, SparsityValue, exact, value


def _as_curve(losses: Any) -> Tensor:
    return torch.as_tensor(losses, dtype=torch.float64, device="cpu")


def _as_level(level: float | Fraction) -> float | str:
    """Write a decimal as the number that reads back as it, and any other fraction as a text."""
    fraction = exact(level)
    return float(fraction) if exact(float(fraction)) == fraction else str(fraction)


def as_levels(levels: Iterable[float | Fraction]) -> tuple[float | Fraction, ...]:
    """Return levels as a tuple; raise for one alone."""
    if isinstance(levels, str) or not isinstance(levels, Iterable):
        raise ConfigError(
            f"Expected levels as a list of sparsities; got {levels!r}. Write [0.5, 0.7, 0.9]."
        )
    return tuple(levels)


Level = Annotated[SparsityValue, AfterValidator(exact), PlainSerializer(_as_level)]
Curve = Annotated[Tensor, BeforeValidator(_as_curve), PlainSerializer(Tensor.tolist)]


@value
class Sensitivity:
    """The loss by tensor and sparsity, when that tensor alone is pruned and all others are dense.

    Values compare by their numbers. :meth:`as_dict` is plain: ``json.dumps`` takes it.

    >>> curves = Sensitivity(0.5, [0.5, 0.9], {"fc.weight": [0.6, 1.5]})
    >>> print(curves)
    loss 0.5 dense; with one tensor pruned to:
    parameter | 0.5 | 0.9
    ----------+-----+----
    fc.weight | 0.6 | 1.5
    >>> Sensitivity.from_dict(curves.as_dict()) == curves
    True
    """

    dense: float
    """The loss with nothing pruned."""
    levels: tuple[Level, ...]
    """The sparsities, ascending, as exact decimals."""
    losses: Annotated[Mapping[str, Curve], AfterValidator(FrozenDict)]
    """By name a float64 tensor with a loss for each level."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """What this measurement counts in :func:`mean_sensitivity`."""

    def __post_init__(self) -> None:
        """Check levels and losses."""
        if not self.levels or any(a >= b for a, b in itertools.pairwise(self.levels)):
            shown = ", ".join(f"{float(level):g}" for level in self.levels)
            raise ValueError(f"expected levels in ascending order, at least one; got ({shown}).")
        if not math.isfinite(self.dense):
            raise ValueError(f"expected a finite dense loss; got {self.dense}.")
        for name, curve in self.losses.items():
            if curve.shape != (len(self.levels),):
                raise ValueError(
                    f"expected a loss for each of {len(self.levels)} levels of {name!r}; got "
                    f"shape {tuple(curve.shape)}."
                )
            for level, loss in zip(self.levels, curve.tolist(), strict=True):
                if not math.isfinite(loss):
                    raise ValueError(
                        f"expected finite losses; got {loss} for {name!r} at sparsity "
                        f"{float(level):g}. Leave that level out, or measure in float32."
                    )

    def __eq__(self, other: object) -> bool:
        """Compare the numbers."""
        return isinstance(other, Sensitivity) and self.as_dict() == other.as_dict()

    def __hash__(self) -> int:
        """Hash what is no tensor."""
        return hash((self.dense, self.levels, tuple(self.losses), self.weight))

    def __str__(self) -> str:
        """Return a table."""
        head = ("parameter", *(f"{float(level):g}" for level in self.levels))
        rows = [(n, *(f"{x:.4g}" for x in curve.tolist())) for n, curve in self.losses.items()]
        return f"loss {self.dense:.4g} dense; with one tensor pruned to:\n{text_table(head, rows)}"

    def as_dict(self) -> dict[str, Any]:
        """Return the measurement as plain dicts, lists, texts and numbers."""
        plain: dict[str, Any] = _adapter().dump_python(self, mode="json")
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """Return the measurement that :meth:`as_dict` wrote.

        Raises:
            ConfigError: a key is unknown or missing, or the numbers do not fit each other.
        """
        try:
            return cast("Self", _adapter().validate_python(dict(plain)))
        except PydanticError as error:
            raise ConfigError(one_line(error, "sensitivity", cls)) from None


@functools.cache
def _adapter() -> TypeAdapter[Sensitivity]:
    return TypeAdapter(Sensitivity)


def mean_sensitivity(measured: Iterable[Sensitivity]) -> Sensitivity:
    """Return the mean of measurements of several batches, each by its ``weight``; weights add up.

        losses = sum(weight_b * losses_b) / sum(weight_b)

    Only one measurement is held beside the sum, so that a generator over a loader is bounded in
    memory; means of means are the mean of all.

    Raises:
        ConfigError: none is given, or they are of other tensors or levels.

    >>> one, two = (Sensitivity(x, [0.5], {"w": [2 * x]}, weight=x) for x in (1.0, 3.0))
    >>> mean_sensitivity([one, two]).as_dict()
    {'dense': 2.5, 'levels': [0.5], 'losses': {'w': [5.0]}, 'weight': 4.0}
    """
    return functools.reduce(_mean_of_two, _at_least_one(measured))


def _at_least_one(measured: Iterable[Sensitivity]) -> Iterable[Sensitivity]:
    found = iter(measured)
    first = next(found, None)
    if first is None:
        raise ConfigError("Expected at least one Sensitivity; got none. Is the loader used up?")
    return itertools.chain([first], found)


def _mean_of_two(one: Sensitivity, other: Sensitivity) -> Sensitivity:
    if one.levels != other.levels or one.losses.keys() != other.losses.keys():
        raise ConfigError("Expected measurements of the same tensors and levels; got two kinds.")
    weight = one.weight + other.weight
    share = other.weight / weight
    losses = {
        name: curve + share * (other.losses[name] - curve) for name, curve in one.losses.items()
    }
    return Sensitivity(one.dense + share * (other.dense - one.dense), one.levels, losses, weight)
