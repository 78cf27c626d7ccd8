"""Patterns as the calls that make them: ``NM(2, 4)``, where the repr has units and groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from purprune import NM, Block, Channel, Kernel, Pattern, Unstructured
from purprune.groups import EveryGroup, GlobalGroup, RowGroup, TensorGroup, TransposableGroup
from purprune.patterns import BlockUnit, ChannelUnit, KernelUnit

_SCOPES = {TensorGroup(): "tensor", RowGroup(): "row", GlobalGroup(): "global"}


def pattern_name(pattern: Pattern) -> str:
    """Return the call of the constructor that makes a pattern, or its repr where none does.

    >>> pattern_name(Channel(1, scope="global")), pattern_name(NM(2, 4))
    ("Channel(dim=1, scope='global')", 'NM(2, 4)')
    """
    build, order, options = _call(pattern)
    defaults = inspect.signature(build).parameters
    given = {key: item for key, item in options.items() if item != defaults[key].default}
    scope = given.get("scope")
    if isinstance(scope, RowGroup) or build(*order, **given) != pattern:
        return repr(pattern)
    words = [*map(repr, order), *(f"{key}={item!r}" for key, item in given.items())]
    return f"{build.__name__}({', '.join(words)})"


def _call(pattern: Pattern) -> tuple[Callable[..., Pattern], tuple[Any, ...], Mapping[str, Any]]:
    """Return the constructor that is nearest to a pattern, and its arguments."""
    unit, group = pattern.unit, pattern.group
    if isinstance(group, EveryGroup):
        return NM, (group.zeros, group.m), {"dim": group.dim}
    if isinstance(group, TransposableGroup):
        return NM, (group.zeros, group.m), {"dim": group.dims[1], "transposable": True}
    options = {"norm": pattern.norm, "scope": _SCOPES.get(group, group)}
    if isinstance(unit, BlockUnit):
        return Block, (unit.shape,), options
    if isinstance(unit, KernelUnit):
        return Kernel, (), {"size": unit.size, **options}
    if isinstance(unit, ChannelUnit):
        return Channel, (), {"dim": unit.dim, "size": unit.size, **options}
    return Unstructured, (), {"scope": options["scope"]}
