"""Callables of the user in a config: they are told apart, but not loaded from files."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import PlainSerializer, WithJsonSchema

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


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


def refuse_other_arguments(function: Any, words: str, count: int) -> Any:
    """Return a callable that takes so many values in order, as far as it says what it takes.

    Raises:
        ValueError: it takes others; says what they are.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # not everything that is built in says it
        return function
    try:
        signature.bind(*(None,) * count)
    except TypeError as error:
        order = [p for p in signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        takes = f"which takes {len(order)} argument{'s' * (len(order) != 1)}"
        reason = takes if len(order) != count else str(error)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        raise ValueError(f"expected {words}; got {name}{signature}, {reason}.") from None
    return function


AnyCallable = Annotated[
    Callable[..., Any],
    PlainSerializer(callable_as_plain),
    WithJsonSchema({"not": {}, "description": "a Python callable; only in code, never in a file"}),
]
