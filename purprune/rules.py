"""Rules: what to do with one tensor. Frozen, validated values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from fractions import Fraction
from typing import Any, ClassVar, cast

from pydantic import GetJsonSchemaHandler, TypeAdapter, model_validator
from pydantic_core import ArgsKwargs, CoreSchema

from purprune.allocations import Budget, OwnTarget
from purprune.coremltools_keys import (
    DEFAULT_TARGET,
    PATTERN_KEYS,
    CoremltoolsKeys,
    fold_coremltools_keys,
)
from purprune.errors import ConfigError
from purprune.groups import EveryGroup, GlobalGroup, TensorGroup, TransposableGroup
from purprune.patterns import Pattern
from purprune.regrow import AnyRegrow, Regrow
from purprune.schedules import ConstantSparsity, Ramp, Schedule
from purprune.scores import Magnitude, Score
from purprune.values import SparsityValue, exact, value


@value
class Rule:
    """What to do with one tensor: a schedule, a score, and a pattern of units and groups.

    Args:
        target_sparsity: the fraction of units that are zero in the end, in [0, 1]. None means
            what the pattern sets (zeros / m) or else 0.5.
        schedule: a ramp between the two sparsities, or a callable ``step -> sparsity`` that
            brings its own (give no ends then).
        initial_sparsity: the sparsity before and at the first update.
        pattern: :func:`Unstructured`, :func:`Channel`, :func:`Kernel`, :func:`Block`,
            :func:`NM`, or any :class:`Pattern`.
        score: how much an entry matters: ``"magnitude"``, ``"taylor"`` or ``"snip"``,
            ``Random(seed)``, ``"gradient"``, ``"fisher"``, ``"movement"``, ``"wanda"``, ``"ria"``,
            ``"lamp"``, ``"synflow"``, ``"grasp"``, ``Given(stat)``, or a callable
            ``score(weight, context)``.
        param_name: the parameter below a selected module; None means its weights.
        regrow: how pruned entries come back: :class:`purprune.Regrow` (:func:`purprune.RigL`,
            :func:`purprune.SET`), :class:`purprune.StraightThrough`, or None, never.
            :func:`purprune.update_masks` and the Pruner follow it; :func:`purprune.compute_masks`,
            which knows no masks of before, does not.
        budget: ``"own"``: every tensor has this sparsity. ``"uniform"``, ``"er"`` or ``"erk"``
            (:class:`ErdosRenyi`): tensors whose rules are equal have it together, and the exact
            total of their units is divided by their shapes.

    Instead of ``pattern`` the keys of coremltools are taken too: ``granularity``, ``block_size``,
    ``n_m_ratio``, ``dim``; and ``scheduler`` for ``schedule``.

    Raises:
        ConfigError: when a value is impossible or two values contradict each other.

    >>> from purprune import PolynomialDecay
    >>> rule = Rule(0.8, PolynomialDecay(range(0, 900, 100)))
    >>> rule.sparsity_at(400)
    Fraction(7, 10)
    """

    target_sparsity: SparsityValue | None = None
    schedule: Schedule = ConstantSparsity()
    initial_sparsity: SparsityValue = 0.0
    pattern: Pattern = Pattern()
    score: Score = Magnitude()
    param_name: str | None = None
    budget: Budget = OwnTarget()
    regrow: AnyRegrow | None = None
    _also: ClassVar = ("scheduler", *PATTERN_KEYS)
    """The keys of coremltools, which are folded into others."""

    @model_validator(mode="before")
    @classmethod
    def _take_coremltools_keys(cls, given: Any) -> Any:
        if isinstance(given, ArgsKwargs):
            if any(isinstance(item, Pattern) for item in given.args[:3]):
                raise ValueError(
                    "expected a pattern by its name; got it without. Write Rule(0.5, pattern=...)."
                )
            return ArgsKwargs(given.args, fold_coremltools_keys(dict(given.kwargs or {})))
        return fold_coremltools_keys(dict(given)) if isinstance(given, Mapping) else given

    def __post_init__(self) -> None:
        """Check the target against what the pattern and the schedule set themselves."""
        own = self.pattern.target
        if self.target_sparsity is not None and own not in (None, exact(self.target_sparsity)):
            raise ValueError(
                f"expected no target_sparsity beside the pattern's own {own}; "
                f"got {self.target_sparsity}. Leave it out."
            )
        if not isinstance(self.schedule, Ramp) and (self.target_sparsity or self.initial_sparsity):
            raise ValueError(
                "expected no initial or target sparsity beside a callable schedule, which returns "
                f"the sparsity itself; got {self.initial_sparsity} and {self.target_sparsity}."
            )
        if self.is_divided and not isinstance(self.pattern.group, TensorGroup):
            raise ValueError(
                f"expected budget='own' for groups of kind {self.pattern.group.kind!r}, which set "
                f"the counts of each tensor themselves; got {self.budget!r}. Leave the budget out, "
                f"or take a pattern whose group is the tensor."
            )
        self._refuse_beyond_caps()
        self._refuse_idle_exchange()

    def _refuse_idle_exchange(self) -> None:
        """Refuse an exchange of which whole numbers leave nothing, or that a cap forbids."""
        group, regrow = self.pattern.group, self.regrow
        if not isinstance(regrow, Regrow):
            return
        first = regrow.fraction_at(regrow.every)
        if isinstance(group, EveryGroup | TransposableGroup) and group.m > group.zeros:
            kept = group.m - group.zeros
            if first * kept < 1:
                raise ValueError(
                    f"expected a fraction of at least 1/{kept} at the first exchange, which moves "
                    f"one of the {kept} that are kept in {group.m}; got {float(first):.3g} there. "
                    f"A cosine decays: raise regrow.fraction, or take decay='constant'."
                )
        if isinstance(group, GlobalGroup) and isinstance(self.schedule, Ramp):
            highest = self.target + first * (1 - self.target)
            if highest > exact(group.max_sparsity):
                raise ValueError(
                    f"expected max_sparsity of at least {float(highest):.4g} with regrow, which "
                    f"prunes so much before units come back; got {group.max_sparsity}."
                )

    def _refuse_beyond_caps(self) -> None:
        group = self.pattern.group
        if isinstance(group, GlobalGroup) and isinstance(self.schedule, Ramp):
            highest = max(self.target, exact(self.initial_sparsity))
            if highest > exact(group.max_sparsity):
                raise ValueError(
                    f"expected sparsities up to max_sparsity={group.max_sparsity} of the global "
                    f"group, which is what all its tensors reach; got {float(highest):g}."
                )

    @property
    def is_divided(self) -> bool:
        """Whether tensors with equal rules share a total that their shapes divide."""
        return not isinstance(self.budget, OwnTarget)

    @property
    def is_global(self) -> bool:
        """Whether tensors with equal rules share a total that their values divide."""
        return isinstance(self.pattern.group, GlobalGroup)

    @property
    def target(self) -> Fraction:
        """The sparsity in the end, exactly."""
        if self.pattern.target is not None:
            return self.pattern.target
        return exact(DEFAULT_TARGET if self.target_sparsity is None else self.target_sparsity)

    def sparsity_at(self, step: int) -> Fraction:
        """Return the sparsity in force at ``step``, exactly."""
        if isinstance(self.schedule, Ramp):
            found = self.schedule.between(step, exact(self.initial_sparsity), self.target)
        else:
            found = exact(self.schedule(step))
        if not 0 <= found <= 1:
            raise ConfigError(
                f"Expected the sparsity of the schedule at step {step} in [0, 1]; "
                f"got {float(found):g}."
            )
        return found

    def changes_at(self, step: int) -> bool:
        """Tell whether masks are computed anew at ``step``."""
        if self.regrow is not None and self.regrow.changes_at(step):
            return True
        if isinstance(self.schedule, Ramp):
            return self.schedule.changes_at(step)
        return step == 0 or self.sparsity_at(step) != self.sparsity_at(step - 1)

    @property
    def last_step(self) -> int | None:
        """The step from which on the sparsity is the target; None for a callable schedule."""
        return self.schedule.last_step if isinstance(self.schedule, Ramp) else None

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Describe coremltools' keys in the JSON schema too."""
        described = handler(schema)
        properties = handler.resolve_ref_schema(described)["properties"]
        properties.update(TypeAdapter(CoremltoolsKeys).json_schema()["properties"])
        properties["scheduler"] = properties["schedule"]
        return described


RULE_KEYS = {"scheduler", *PATTERN_KEYS, *(f.name for f in fields(cast("Any", Rule)))}
