"""Configuration: rules for tensors, and which tensors each rule is for. Frozen, validated values.

The dict and YAML form is the one that coremltools documents for its pruners, taken as it stands;
purprune's own keys (``schedule``, ``pattern``, ``score``) stand beside it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import IO, Annotated, Any, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import ArgsKwargs

from purprune.errors import ConfigError, near_misses
from purprune.findings import one_line
from purprune.rules import RULE_KEYS
from purprune.rules import Rule as Rule
from purprune.values import FrozenDict, value


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
        flat = {key: keys[key] for key in keys if key in RULE_KEYS}
        if flat:
            written = ", ".join(
                f"{key}: {item if isinstance(item, int | float | str) else '...'}"
                for key, item in flat.items()
            )
            raise ValueError(
                f"expected {', '.join(map(repr, flat))} in a rule; got a config without rules. "
                f"Write global_config: {{{written}}}."
            )
        _refuse_names(keys, [f.name for f in fields(cast("Any", cls))])
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

        >>> from purprune import Channel
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
            raise ConfigError(one_line(error, "config", cls)) from None

    def as_dict(self) -> dict[str, Any]:
        """Return the config as plain dicts, lists, texts and numbers."""
        plain: dict[str, Any] = _adapter(type(self)).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str] | IO[Any]) -> Self:
        """Read a config from a YAML file or an open text stream.

        Raises:
            ConfigError: when the file is no YAML, names a key twice, or holds impossible values.
            OSError: when there is no such file, or it is a folder.
        """
        config = read_yaml(source)
        if config is None:
            raise ConfigError(
                f"Expected a dict of config keys in {_named(source)}; it is empty. Write for "
                "instance global_config: {target_sparsity: 0.8}."
            )
        return cls.from_dict(config)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON schema of the dict and YAML form."""
        return _adapter(cls).json_schema()


def _refuse_names(keys: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raise for rules that stand under names at once, which is a natural first try."""
    for name, rule in keys.items():
        is_rule = rule is None or isinstance(rule, Rule | Mapping)
        if is_rule and name not in own and not near_misses(str(name), own):
            written = "None" if rule is None else "Rule(0.5)"
            raise ValueError(
                f"unknown key {name!r}. Known here: {', '.join(own)}. A rule by name is "
                f"PruneConfig().set_module_name({name!r}, {written}), or in a dict "
                f"{{'module_name_configs': {{{name!r}: ...}}}}."
            )


def read_yaml(source: str | os.PathLike[str] | IO[Any]) -> Any:
    """Read YAML 1.2 from a file or an open text stream; keys given twice raise."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = source.read() if hasattr(source, "read") else _read(Path(source))
    stream = io.BytesIO(text) if isinstance(text, bytes) else io.StringIO(text)
    try:
        return YAML(typ="safe", pure=True).load(stream)
    except YAMLError as error:
        raise ConfigError(f"Expected YAML in {_named(source)}; got an error: {error}") from None


def _read(path: Path) -> bytes:
    """Read a file, or a pipe such as ``/dev/stdin``, which is no regular file."""
    if not path.exists():
        raise FileNotFoundError(f"Expected the file {path}; it is not there.")
    if path.is_dir():
        raise IsADirectoryError(f"Expected a YAML file; got the folder {path}. Name a file in it.")
    return path.read_bytes()


def _named(source: str | os.PathLike[str] | IO[Any]) -> str:
    """Name a file, or the stream by its name if it has one."""
    if not hasattr(source, "read"):
        return os.fspath(source)
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else "the stream"


def _set(
    configs: Mapping[str, Rule | None], selector: str, rule: Rule | None
) -> dict[str, Rule | None]:
    """Return ``configs`` with ``selector`` set last, so that it is the latest."""
    if not isinstance(selector, str):
        raise ConfigError(
            f"Expected one name or one class to select by; got {selector!r}. Call set_module_name "
            f"or set_module_type once for each."
        )
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
