"""How a value is declared: a frozen dataclass that is validated when it is built."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, ParamSpec, TypeVar, dataclass_transform

import numpy as np
from pydantic import (
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    Strict,
    ValidationError,
    WithJsonSchema,
)
from pydantic.dataclasses import dataclass as validated_dataclass

from purprune.errors import ConfigError
from purprune.findings import keys_of, meant, one_line, own_keys, too_many

T = TypeVar("T")
P = ParamSpec("P")


StrictInt = Annotated[int, Strict()]
StrictFloat = Annotated[float, Strict()]


def exact(s: float | Fraction) -> Fraction:
    """Return the decimal that was written as an exact fraction: ``exact(0.29) == 29/100``.

    A float stands for the shortest decimal that reads back as it, which is what its repr shows.

    >>> exact(0.29) * 100
    Fraction(29, 1)
    """
    if isinstance(s, Fraction):
        return s
    if isinstance(s, bool) or not isinstance(s, int | float | np.floating | np.integer):
        raise ConfigError(f"Expected a sparsity as a float or a Fraction; got {s!r}.")
    if not math.isfinite(s):
        raise ConfigError(f"Expected a finite sparsity; got {s!r}.")
    return _decimal(s.item() if isinstance(s, np.float64) else s)


@functools.lru_cache(maxsize=1024, typed=True)  # networks of many small tensors ask often
def _decimal(s: Any) -> Fraction:
    return Fraction(str(s))


def _as_sparsity(s: Any) -> float | Fraction:
    """Keep fractions; read float32 and the like as the decimals that they show."""
    if isinstance(s, str) and _FRACTION.fullmatch(s):
        s = Fraction(s)
    fraction = exact(s)
    if not 0 <= fraction <= 1:
        percent = f" {s} % is {float(fraction) / 100}." if 1 < fraction <= 100 else ""
        raise ValueError(f"expected a sparsity (fraction of zeros) in [0, 1]; got {s!r}.{percent}")
    return s if isinstance(s, Fraction) else float(fraction)


def _as_plain(s: float | Fraction) -> float | str:
    return float(s) if not isinstance(s, Fraction) or s.denominator == 1 else str(s)


_FRACTION = re.compile(r"[0-9]+/[1-9][0-9]*")
SparsityValue = Annotated[
    float | Fraction,
    BeforeValidator(_as_sparsity),
    PlainSerializer(_as_plain),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": "^[0-9]+/[1-9][0-9]*$"},
            ]
        }
    ),
]
"""A fraction of zeros in [0, 1]: a float, an exact Fraction, or in files a text like "1/3"."""


class FrozenDict(dict[str, T]):
    """A dict that refuses to be changed, so that values which hold it are values."""

    def __hash__(self) -> int:  # type: ignore[override]
        """Hash the items in order."""
        return hash(tuple(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy through a plain dict."""
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            "Expected a mapping that stays as it is; got a change. Change dict(...) of it; of a "
            "config, set_module_name and the like return a new one."
        )

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def value(cls: type[T]) -> type[T]:
    """Make ``cls`` a frozen dataclass whose fields are validated and whose errors are one line."""
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)
    built = validated_dataclass(frozen=True, config=config)(cls)
    own_keys(built, (*keys_of(built), *getattr(built, "_also", ())), built.__name__)
    init = built.__init__

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ConfigError(one_line(error, cls.__name__, built)) from None

    built.__init__ = checked  # type: ignore[method-assign]
    return built  # type: ignore[return-value]


def constructor(**hints: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Give a function that builds a value the errors of one, under the name that was typed.

    Args:
        hints: for keys that it does not have and that are often expected, and for those that it
            has and that are often left out: what to write.
    """

    def decorate(build: Callable[P, T]) -> Callable[P, T]:
        name, signature = build.__name__, inspect.signature(build)
        own_keys(build, signature.parameters, str(signature.return_annotation))

        @functools.wraps(build)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            _refuse_misfit(name, signature, args, kwargs, hints)
            try:
                return build(*args, **kwargs)
            except ConfigError as error:
                raise ConfigError(_TITLE.sub(name, str(error))) from None

        return checked

    return decorate


_TITLE = re.compile(r"^\w+(?=[.:])", re.MULTILINE)


def _refuse_misfit(
    name: str, signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any],
    hints: Mapping[str, str],
) -> None:  # fmt: skip
    """Raise when values do not fit a function, in the words of values."""
    known = signature.parameters
    for key in kwargs:
        if key not in known:
            way_out = f" {hints[key]}" if key in hints else meant(key, known)
            raise ConfigError(f"{name}: unknown key {key!r}.{way_out}")
    by_name = [key for key, one in known.items() if one.kind is one.KEYWORD_ONLY]
    if len(args) > len(known) - len(by_name):
        raise ConfigError(too_many(name, list(known), by_name))
    for key, one in [*known.items()][len(args) :]:
        if one.default is one.empty and key not in kwargs:
            way_out = f" {hints[key]}" if key in hints else ""
            raise ConfigError(f"{name}.{key}: expected a value; got none.{way_out}")
