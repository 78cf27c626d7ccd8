"""The table of operations that the evaluator knows, and access to their arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["OPS", "Args", "op"]


class Args(dict[str, Any]):
    """The arguments of one operation: tensors, lists of tensors, or text."""

    def tensor(self, key: str) -> Tensor:
        """A tensor that must be there."""
        value = self[key]
        assert isinstance(value, Tensor)
        return value

    def ints(self, key: str, default: list[int] | None = None) -> list[int]:
        """A list of integers; ``default`` when it is absent."""
        if key not in self:
            return list(default or [])
        return [int(n) for n in self.tensor(key).reshape(-1)]

    def flags(self, key: str, length: int) -> list[bool]:
        """A list of booleans; all False when it is absent."""
        return [bool(n) for n in self.ints(key)] or [False] * length

    def int(self, key: str, default: int = 0) -> int:
        """An integer."""
        return int(self.tensor(key)) if key in self else default

    def flag(self, key: str, default: bool = False) -> bool:
        """A boolean."""
        return bool(self.tensor(key)) if key in self else default

    def number(self, key: str, default: float = 0.0) -> float:
        """A float."""
        return float(self.tensor(key)) if key in self else default

    def text(self, key: str, default: str = "") -> str:
        """A string."""
        return str(self.get(key, default))

    def maybe(self, key: str) -> Tensor | None:
        """A tensor or None."""
        return self.get(key)


Function = Callable[[Args], Any]
F = TypeVar("F", bound=Function)

#: How each MIL operation computes its output (or a tuple of outputs) with torch.
OPS: dict[str, Function] = {}


def op(*names: str) -> Callable[[F], F]:
    """Register a function as the meaning of the named operations."""

    def register(function: F) -> F:
        OPS.update(dict.fromkeys(names, function))
        return function

    return register


def unary(function: Callable[[Tensor], Tensor]) -> Function:
    """An operation of ``x`` alone."""
    return lambda a: function(a.tensor("x"))


def binary(function: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """An operation of ``x`` and ``y`` with broadcasting."""
    return lambda a: function(a.tensor("x"), a.tensor("y"))


def as_float(x: Tensor) -> Tensor:
    """The tensor as float32."""
    return x.to(torch.float32)
