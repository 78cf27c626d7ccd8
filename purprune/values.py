"""How a value is declared: a frozen dataclass that is validated when it is built."""

from __future__ import annotations

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, ConfigDict, Strict, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from purprune.errors import ConfigError, one_line

T = TypeVar("T")


def _within_unit_interval(s: float) -> float:
    if not 0.0 <= s <= 1.0:  # also false for NaN
        raise ValueError(f"expected a sparsity (fraction of zeros) in [0, 1]; got {s!r}.")
    return float(s)


KNOWN_KEYS: set[str] = {"scheduler"}
"""The fields of all values, for near misses in errors."""

StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict()]
SparsityValue = Annotated[float, Strict(), AfterValidator(_within_unit_interval)]


def exact(s: float | Fraction) -> Fraction:
    """Return the decimal that was written as an exact fraction: ``exact(0.29) == 29/100``.

    A float stands for the shortest decimal that reads back as it, which is what its repr shows.

    >>> exact(0.29) * 100
    Fraction(29, 1)
    """
    if isinstance(s, Fraction):
        return s
    value = float(s)
    if not math.isfinite(value):
        raise ConfigError(f"Expected a finite sparsity; got {s!r}.")
    return Fraction(repr(value))


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass whose fields are validated and whose errors are one line."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    built = validated_dataclass(frozen=True, config=config)(cls)
    fields = [f.name for f in dataclasses.fields(built)]
    KNOWN_KEYS.update(fields)
    init = built.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(one_line(error, cls.__name__, fields, KNOWN_KEYS)) from None

    built.__init__ = checked  # type: ignore[method-assign]
    return built  # type: ignore[return-value]
