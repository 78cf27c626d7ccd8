"""Update steps: at which steps masks are computed anew, as a schedule is told them."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

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


def as_steps(steps: Any) -> Sequence[int] | None:
    """Bring update steps into one form, so that equal schedules compare equal."""
    if steps is None:
        return None
    if isinstance(steps, str):
        steps = _parse_range(steps)
    if not isinstance(steps, Iterable):
        raise ValueError(
            f"expected a list of update steps; got {steps!r}. Write range(0, 100, 10)."
        )
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


def _steps_as_plain(steps: Sequence[int] | None) -> Any:
    if isinstance(steps, range):
        return f"range({steps.start}, {steps.stop}, {steps.step})"
    return None if steps is None else list(steps)


UpdateSteps = Annotated[
    Any,  # a range or a rising tuple of ints; see as_steps
    BeforeValidator(as_steps),
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
