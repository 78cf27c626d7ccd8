"""Settings: dataclasses that may be changed, and are validated when built and when changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from typing import IO, Any, Self, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as validated_dataclass

from purprune import ConfigError
from purprune.config import read_yaml
from purprune.errors import near_misses
from purprune.findings import one_line

T = TypeVar("T")
_CONFIG = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_assignment=True)


@dataclass_transform(field_specifiers=(dataclasses.field,))
def settings(cls: type[T]) -> type[T]:
    """Make ``cls`` a dataclass whose fields are checked; an assignment that fails changes nothing.

    purprune's own values are frozen. coremltools' configs are not, and code relies on it.
    """
    built: Any = validated_dataclass(config=_CONFIG)(cls)
    names = [f.name for f in dataclasses.fields(built)]
    init, assign = built.__init__, built.__setattr__

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        with _one_line_errors(cls):
            init(self, *args, **kwargs)

    def checked_setattr(self: Any, name: str, value: Any) -> None:
        if name not in names:
            raise AttributeError(
                f"Expected one of {', '.join(names)}; got {cls.__name__}.{name}."
                f"{near_misses(name, names)}"
            )
        before = dict(vars(self))
        try:
            with _one_line_errors(cls):
                assign(self, name, value)
        except ConfigError:
            vars(self).update(before)
            raise

    built.__init__, built.__setattr__ = checked_init, checked_setattr
    return built  # type: ignore[no-any-return]


@contextlib.contextmanager
def _one_line_errors(cls: type[Any]) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise ConfigError(one_line(error, cls.__name__, cls)) from None


@contextlib.contextmanager
def error_prefix(key: str) -> Iterator[None]:
    """Put the key under which it was found before the message of a ConfigError."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


class Dictable:
    """Gives :func:`settings` the way to and from plain dicts and YAML."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Build from a dict of field names and values.

        Raises:
            ConfigError: it is no dict, a key is unknown, or a value is impossible.
        """
        return cls(**as_keys(config_dict, cls.__name__))

    @classmethod
    def from_yaml(cls, yml: str | os.PathLike[str] | IO[Any]) -> Self:
        """Build from the path of a YAML file, or from an open stream; an empty one is ``{}``.

        Raises:
            ConfigError: it is no YAML, names a key twice, or holds impossible values.
        """
        return cls.from_dict(read_yaml(yml) or {})

    def as_dict(self) -> dict[str, Any]:
        """Return plain dicts and values; module classes as keys and other objects stay."""
        return {key: _plain(value) for key, value in vars(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.as_dict() if isinstance(value, Dictable) else value


def as_keys(given: Any, title: str) -> dict[str, Any]:
    """Return a copy of a dict whose keys are texts; raise for anything else."""
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ConfigError(f"{title}: expected a dict with texts as keys; got {given!r}.")
    return dict(given)
