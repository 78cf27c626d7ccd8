"""Schedulers that are asked for the next sparsity, step by step, as coremltools defines them.

The two that coremltools brings become purprune's own closed forms; any other is folded.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purprune import ConfigError, ConstantSparsity, PolynomialDecay, Ramp
from purprune.errors import near_misses


class PruningScheduler(ABC):
    """Base of all schedulers: override :meth:`compute_sparsity`.

    >>> class Half(PruningScheduler):
    ...     def compute_sparsity(self, step_count, prev_sparsity, config):
    ...         return prev_sparsity + (config.target_sparsity - prev_sparsity) / 2
    """

    @abstractmethod
    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the sparsity from ``step_count`` on.

        Args:
            step_count: how often ``step()`` was called, this call included: 1, 2, 3, ...
            prev_sparsity: what the call for the step before returned; at step 1 the config's
                ``initial_sparsity``.
            config: the :class:`ModuleMagnitudePrunerConfig` of the module, in which
                ``target_sparsity`` is n / m when ``n_m_ratio`` is set.
        """


@dataclass(eq=False)
class PolynomialDecayScheduler(PruningScheduler):
    """From the initial to the target sparsity over update steps; see ``purprune.PolynomialDecay``.

    Args:
        update_steps: rising whole numbers, as a list, range, array or tensor, or as the text
            ``"range(0, 900, 100)"`` (parsed, never evaluated).
        power: how much faster it goes at first.

    Raises:
        ConfigError: a step is negative or fractional, the steps do not rise, or there are none.

    >>> PolynomialDecayScheduler("range(0, 900, 300)")
    PolynomialDecayScheduler(update_steps=tensor([  0, 300, 600]), power=3)
    """

    update_steps: Tensor | Sequence[int] | str
    power: int = 3

    def __post_init__(self) -> None:
        """Bring the steps into one form, a tensor of whole numbers."""
        if type(self.power) is not int:
            raise ConfigError(
                f"PolynomialDecayScheduler.power: expected an int; got {self.power!r}."
            )
        checked = PolynomialDecay(_whole(self.update_steps), self.power)
        self.update_steps = torch.tensor(list(checked.update_steps))

    def __eq__(self, other: object) -> bool:
        """Tell whether kind, steps and power are the same."""
        if not isinstance(other, PolynomialDecayScheduler) or type(other) is not type(self):
            return False
        return self.ramp() == other.ramp()

    __hash__ = None  # type: ignore[assignment]

    def ramp(self) -> PolynomialDecay:
        """Return purprune's schedule of the same steps."""
        return PolynomialDecay(_whole(self.update_steps), self.power)

    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the sparsity of the update at ``step_count``, or the one before."""
        ramp = self.ramp()
        if not ramp.changes_at(step_count):
            return prev_sparsity
        return ramp(step_count, getattr(config, "initial_sparsity", 0.0), config.target_sparsity)


@dataclass
class ConstantSparsityScheduler(PruningScheduler):
    """The target from ``begin_step`` on; see ``purprune.ConstantSparsity``.

    The first step is 1: a ``begin_step`` of 0 prunes at the first ``step()``.

    Raises:
        ConfigError: ``begin_step`` is no int, or negative.

    >>> ConstantSparsityScheduler(begin_step=100)
    ConstantSparsityScheduler(begin_step=100)
    """

    begin_step: int

    def __post_init__(self) -> None:
        """Check the step."""
        self.ramp()

    def ramp(self) -> ConstantSparsity:
        """Return purprune's schedule with the same begin."""
        return ConstantSparsity(self.begin_step)

    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        """Return the target from ``begin_step`` on, or the sparsity before."""
        return config.target_sparsity if step_count >= self.begin_step else prev_sparsity


def _whole(steps: Any) -> Any:
    """Turn tensors and arrays into lists and 2.0 into 2, which coremltools takes as well."""
    if isinstance(steps, Tensor | np.ndarray):
        steps = steps.tolist()
    if isinstance(steps, list | tuple):
        return [int(s) if isinstance(s, float) and s.is_integer() else s for s in steps]
    return steps


def scheduler_to_dict(scheduler: PruningScheduler) -> Any:
    """Return the fields of one of the two schedulers above; any other stays the object it is."""
    if type(scheduler) not in _KEYS:
        return scheduler
    return {key: _whole(getattr(scheduler, key)) for key in _KEYS[type(scheduler)]}


def scheduler_from_dict(keys: Mapping[str, Any]) -> PruningScheduler:
    """Build one of the two schedulers above; its keys tell which.

    Raises:
        ConfigError: the keys are of neither, or a value is impossible.
    """
    kind = ConstantSparsityScheduler if "begin_step" in keys else PolynomialDecayScheduler
    known = _KEYS[kind]
    if unknown := [str(key) for key in keys if key not in known]:
        raise ConfigError(
            f"scheduler: expected only {' and '.join(known)}; got the unknown key {unknown[0]!r}."
            f"{near_misses(unknown[0], known)}"
        )
    if known[0] not in keys:
        raise ConfigError(f"scheduler: expected update_steps or begin_step; got {dict(keys)}.")
    return kind(**keys)


_KEYS: dict[type, tuple[str, ...]] = {
    PolynomialDecayScheduler: ("update_steps", "power"),
    ConstantSparsityScheduler: ("begin_step",),
}


class Fold:
    """A scheduler as a function of the step. It is asked once for every step, in order."""

    def __init__(self, config: Any) -> None:
        """Take a module's config; a copy is kept, since a scheduler may have a state."""
        self._config = copy.deepcopy(config)
        self._written: dict[float, Fraction] = {}
        if config.n_m_ratio is not None:
            n, m = config.n_m_ratio
            self._config.target_sparsity = n / m
            self._written[n / m] = Fraction(n, m)  # the float may be a little below n / m
        self._asked = 0
        self._steps = [0]
        self._values: list[float] = [self._config.initial_sparsity]

    def __call__(self, step: int) -> float | Fraction:
        """Return the sparsity in force at ``step``."""
        while self._asked < step:
            self._ask(self._asked + 1)
        found = self._values[bisect_right(self._steps, step) - 1]
        return self._written.get(found, found)

    def __repr__(self) -> str:
        """Return what stays the same in another process, by which checkpoints are compared."""
        kind, config = type(self._config.scheduler), self._config
        ends = f"{config.initial_sparsity}, {config.target_sparsity}"
        return f"Fold({kind.__module__}.{kind.__qualname__}, {ends})"

    def _ask(self, step: int) -> None:
        scheduler, before = self._config.scheduler, self._values[-1]
        found = scheduler.compute_sparsity(step, prev_sparsity=before, config=self._config)
        try:
            sparsity = float(found)
        except (TypeError, ValueError):
            raise ConfigError(
                f"Expected a number from {type(scheduler).__name__}.compute_sparsity at step "
                f"{step}; got {found!r}. Return prev_sparsity to leave it as it is."
            ) from None
        self._asked = step
        if sparsity != before:  # a run of equal values is kept once
            self._steps.append(step)
            self._values.append(sparsity)


def as_schedule(config: Any) -> Ramp | Fold:
    """Return the schedule of a module's config, counted as coremltools counts.

    ``prepare()`` applies the initial sparsity, always; what is due at step 0 is done at the first
    ``step()``, which is step 1.
    """
    scheduler = config.scheduler
    asked = type(scheduler).compute_sparsity
    if asked is PolynomialDecayScheduler.compute_sparsity:
        ramp = scheduler.ramp()
        return ramp if ramp.last_step else PolynomialDecay([1], scheduler.power)
    if asked is ConstantSparsityScheduler.compute_sparsity:
        return ConstantSparsity(max(scheduler.begin_step, 1))
    return Fold(config)
