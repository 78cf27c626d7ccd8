"""Rows by name: how results that have a row for each tensor are asked for one of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

from purprune.errors import near_misses
from purprune.values import FrozenDict


class Named(Protocol):
    """What has a name."""

    @property
    def name(self) -> str:
        """The name."""


R = TypeVar("R", bound=Named)


class ByName(Mapping[str, R]):
    """A mapping of rows by their names, in their order; it iterates over names, as a dict does."""

    @property
    @abstractmethod
    def _in_order(self) -> Sequence[R]:
        """The rows."""

    @cached_property
    def _by_name(self) -> Mapping[str, R]:
        return FrozenDict({row.name: row for row in self._in_order})

    def __getitem__(self, name: str) -> R:
        """Return the row of a tensor."""
        if name not in self._by_name:
            near = near_misses(str(name), self._by_name)
            raise KeyError(f"Expected the name of a pruned tensor; got {name!r}.{near}")
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._by_name)

    def __len__(self) -> int:
        """Return how many rows there are."""
        return len(self._by_name)
