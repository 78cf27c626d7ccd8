"""Configuration: rules for tensors, and which tensors each rule is for. Frozen, validated values.

The dict and YAML form is the one that coremltools documents for its pruners, taken as it stands;
purprune's own keys (``schedule``, ``pattern``, ``score``) stand beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ArgsKwargs, CoreSchema

from purprune.allocations import Budget, OwnTarget
from purprune.errors import ConfigError, one_line
from purprune.patterns import (
    NM,
    Block,
    Channel,
    EveryGroup,
    GlobalGroup,
    Kernel,
    Pattern,
    TensorGroup,
    TransposableGroup,
    Unstructured,
)
from purprune.regrow import AnyRegrow, Regrow
from purprune.schedules import ConstantSparsity, Ramp, Schedule
from purprune.scores import Magnitude, Score
from purprune.values import KNOWN_KEYS, FrozenDict, SparsityValue, StrictInt, exact, value

DEFAULT_TARGET = 0.5
"""The target of a rule that names none; coremltools documents the same."""


@value
class CoremltoolsKeys:
    """The flat keys by which coremltools' dicts describe a pattern, with their documented meaning.

    The first number of ``n_m_ratio`` counts zeros, ``block_size`` runs along dim 0, and ``dim``
    belongs to ``n_m_ratio``.
    """

    granularity: Literal["per_scalar", "per_kernel", "per_channel"] = "per_scalar"
    block_size: StrictInt | tuple[StrictInt, ...] = 1
    n_m_ratio: tuple[StrictInt, StrictInt] | None = None
    dim: StrictInt | None = None

    def pattern(self) -> Pattern:
        """Return the pattern that the keys describe."""
        if self.n_m_ratio is not None:
            if self.block_size != 1 or self.granularity != "per_scalar":
                raise ValueError(
                    "expected n_m_ratio alone, or block_size / granularity without it; got "
                    f"n_m_ratio={self.n_m_ratio}, block_size={self.block_size}, "
                    f"granularity={self.granularity!r}."
                )
            return NM(*self.n_m_ratio, dim=1 if self.dim is None else self.dim)
        if self.granularity == "per_scalar":
            return Unstructured() if self.block_size == 1 else Block(self.block_size)
        if not isinstance(self.block_size, int):
            raise ValueError(
                f"expected a whole block_size with granularity={self.granularity!r}; "
                f"got {self.block_size}."
            )
        named = Channel if self.granularity == "per_channel" else Kernel
        return named(size=self.block_size)


_PATTERN_KEYS = ("granularity", "block_size", "n_m_ratio", "dim")


def _fold_coremltools_keys(keys: dict[str, Any]) -> dict[str, Any]:
    """Fold coremltools' flat keys into ``pattern``, and ``scheduler`` into ``schedule``."""
    if "scheduler" in keys:
        if "schedule" in keys:
            raise ValueError("expected schedule or scheduler; got both.")
        keys["schedule"] = keys.pop("scheduler")
    flat = {key: keys.pop(key) for key in _PATTERN_KEYS if key in keys}
    if not flat:
        return keys
    if "pattern" in keys:
        raise ValueError(f"expected pattern or {', '.join(flat)}; got both.")
    if flat.get("dim") and "n_m_ratio" not in flat:
        raise ValueError(
            f"expected dim with n_m_ratio only, as coremltools documents it; got dim={flat['dim']} "
            "without. For channels along another dim give pattern=Channel(dim=...), in a dict "
            "{'unit': {'kind': 'channel', 'dim': ...}}."
        )
    if flat.get("n_m_ratio") is not None and keys.get("target_sparsity") == DEFAULT_TARGET:
        del keys["target_sparsity"]  # coremltools writes its default here and ignores it
    return {**keys, "pattern": CoremltoolsKeys(**flat).pattern()}


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

    @model_validator(mode="before")
    @classmethod
    def _take_coremltools_keys(cls, given: Any) -> Any:
        if isinstance(given, ArgsKwargs):
            if any(isinstance(item, Pattern) for item in given.args[:3]):
                raise ValueError(
                    "expected a pattern by its name; got it without. Write Rule(0.5, pattern=...)."
                )
            return ArgsKwargs(given.args, _fold_coremltools_keys(dict(given.kwargs or {})))
        return _fold_coremltools_keys(dict(given)) if isinstance(given, Mapping) else given

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


_RULE_KEYS = {"scheduler", *_PATTERN_KEYS, *(f.name for f in fields(cast("Any", Rule)))}


def type_name(selector: Any) -> Any:
    """Return a module class's path, for torch.nn's own ``"torch.nn.Linear"``; texts as they are."""
    if not isinstance(selector, type):
        return selector
    module = selector.__module__
    module = "torch.nn" if module.startswith("torch.nn.modules.") else module
    return f"{module}.{selector.__qualname__}"


def _with_type_names(configs: Any) -> Any:
    if not isinstance(configs, Mapping):
        return configs
    return {type_name(selector): rule for selector, rule in configs.items()}


@value
class PruneConfig:
    """Which rule is for which parameter. Name beats type beats global; None leaves dense.

    Args:
        global_config: the rule for everything that no other rule is for. In the pure core: every
            floating-point parameter of two or more dims.
        module_type_configs: rules by module class or its name (``"Conv2d"``). They need modules:
            :func:`purprune_adapters.resolve` turns them into names.
        module_name_configs: rules by the name of a parameter (``"conv.weight"``) or of a module,
            which stands for the weights at and below it; glob patterns (``"layers.*.mlp"``) too.
            None stands for everything there, biases and norms too.
            An exact name beats a glob, a nearer module a farther one, a later glob an earlier one.

    Configs are values: ``set_*`` return a new one.

    >>> config = PruneConfig().set_global(Rule(0.5)).set_module_name("head", None)
    >>> config == PruneConfig.from_dict(config.as_dict())
    True
    """

    global_config: Rule | None = None
    module_type_configs: Annotated[
        Mapping[str, Rule | None], BeforeValidator(_with_type_names), AfterValidator(FrozenDict)
    ] = field(default_factory=dict)
    module_name_configs: Annotated[Mapping[str, Rule | None], AfterValidator(FrozenDict)] = field(
        default_factory=dict
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_keys_of_rules(cls, given: Any) -> Any:
        keys = (given.kwargs or {}) if isinstance(given, ArgsKwargs) else given
        flat = {key: keys[key] for key in keys if key in _RULE_KEYS}
        if flat:
            written = ", ".join(
                f"{key}: {item if isinstance(item, int | float | str) else '...'}"
                for key, item in flat.items()
            )
            raise ValueError(
                f"expected {', '.join(map(repr, flat))} in a rule; got a config without rules. "
                f"Write global_config: {{{written}}}."
            )
        return given

    def set_global(self, rule: Rule | None) -> Self:
        """Return a config with this global rule."""
        return replace(self, global_config=rule)

    def set_module_type(self, module_type: type | str, rule: Rule | None) -> Self:
        """Return a config with this rule for a module class, given itself or by name."""
        return replace(
            self, module_type_configs=_set(self.module_type_configs, type_name(module_type), rule)
        )

    def set_module_name(self, name: str, rule: Rule | None) -> Self:
        """Return a config with this rule for a parameter, module or glob pattern."""
        return replace(self, module_name_configs=_set(self.module_name_configs, name, rule))

    @property
    def rules(self) -> dict[str, Rule]:
        """All rules that prune, by the text that selects them (``global_config`` for all)."""
        found = {
            "global_config": self.global_config,
            **self.module_type_configs,
            **self.module_name_configs,
        }
        return {selector: rule for selector, rule in found.items() if rule is not None}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Build a config from a dict, coremltools' own form included.

        >>> PruneConfig.from_dict(
        ...     {"module_name_configs": {"conv1": {"target_sparsity": 0.75,
        ...      "scheduler": {"update_steps": [3, 5, 7]}, "granularity": "per_channel"}}}
        ... ).rules["conv1"].pattern == Channel(dim=0)
        True
        """
        if not isinstance(config, Mapping):
            raise ConfigError(f"Expected a dict of config keys; got {type(config).__name__}.")
        try:
            return cast("Self", _adapter(cls).validate_python(dict(config)))
        except ValidationError as error:
            keys = [f.name for f in fields(cls)]
            raise ConfigError(one_line(error, "config", keys, KNOWN_KEYS)) from None

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain dicts, lists, texts and numbers."""
        plain: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str] | IO[Any]) -> Self:
        """Read a config from a YAML file or an open text stream.

        Raises:
            ConfigError: when the file is no YAML, names a key twice, or holds impossible values.
        """
        return cls.from_dict(read_yaml(source))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the dict and YAML form."""
        return _adapter(cls).json_schema()


def read_yaml(source: str | os.PathLike[str] | IO[Any]) -> Any:
    """Read YAML 1.2 from a file or an open text stream; keys given twice raise."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    if not hasattr(source, "read") and not Path(source).is_file():
        raise FileNotFoundError(f"Expected the file {os.fspath(source)}; it is not there.")
    text = source.read() if hasattr(source, "read") else Path(source).read_bytes()
    stream = io.BytesIO(text) if isinstance(text, bytes) else io.StringIO(text)
    try:
        return YAML(typ="safe", pure=True).load(stream)
    except YAMLError as error:
        raise ConfigError(f"Expected YAML in {source!s}; got an error: {error}") from None


def _set(
    configs: Mapping[str, Rule | None], selector: str, rule: Rule | None
) -> dict[str, Rule | None]:
    """Return ``configs`` with ``selector`` set last, so that it is the latest."""
    return {**{s: r for s, r in configs.items() if s != selector}, selector: rule}


def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def as_config(config: PruneConfig | Rule | Mapping[str, Any]) -> PruneConfig:
    """Take a config, a rule for everything, or a dict."""
    if isinstance(config, PruneConfig):
        return config
    if isinstance(config, Rule):
        return PruneConfig(global_config=config)
    if isinstance(config, Mapping):
        return PruneConfig.from_dict(config)
    way_out = "Write Rule(0.5) for half of everything."
    if isinstance(config, str | os.PathLike):
        way_out = f"Write PruneConfig.from_yaml({str(config)!r})."
    got = type(config).__name__
    raise TypeError(f"Expected a PruneConfig, a Rule or a dict as config; got {got}. {way_out}")
