"""The configs under the names, defaults and meanings that coremltools documents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, model_validator
from torch import nn

from purprune.config import type_name
from purprune.values import SparsityValue, StrictInt
from purprune_adapters.coremltools_compat.pruning_scheduler import (
    ConstantSparsityScheduler,
    PruningScheduler,
    scheduler_from_dict,
    scheduler_to_dict,
)
from purprune_adapters.coremltools_compat.settings import (
    Dictable,
    as_keys,
    error_prefix,
    settings,
)

SUPPORTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""The modules that coremltools' pruner knows; subclasses count."""


def _as_float(sparsity: Any) -> Any:
    if not isinstance(sparsity, float):
        raise ValueError(f"expected a float in [0.0, 1.0]; got {sparsity!r}.")
    return sparsity


def _as_type(key: Any) -> Any:
    names = [cls.__name__ for cls in SUPPORTED]
    if key not in names and key not in SUPPORTED:
        shown = type_name(key)
        raise ValueError(
            f"expected one of {', '.join(names)}, as a class or by name; got {shown!r}. "
            f"purprune_adapters.Pruner prunes other modules too."
        )
    return key


def _as_regex(key: str) -> str:
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(
            f"expected a module name or regular expression; got {key!r} ({error})."
        ) from None
    return key


Sparsity = Annotated[SparsityValue, BeforeValidator(_as_float)]
ModuleType = Annotated[Any, AfterValidator(_as_type)]
NameRegex = Annotated[str, AfterValidator(_as_regex)]


@settings
class ModuleMagnitudePrunerConfig(Dictable):
    """How a module is pruned.

    Args:
        scheduler: when the sparsity changes. The default prunes at the first ``step()``.
        initial_sparsity: the sparsity that ``prepare()`` applies.
        target_sparsity: the sparsity in the end; not used with ``n_m_ratio``.
        granularity: what is pruned together: ``"per_scalar"``, ``"per_kernel"`` or
            ``"per_channel"``. Weights of two dims are always pruned per scalar.
        block_size: how many neighbours along dim 0 are pruned together.
        n_m_ratio: ``(n, m)``: of every m entries along ``dim``, n become zero.
        dim: 0 or 1, for ``n_m_ratio``.
        param_name: the parameter to prune.

    Raises:
        ConfigError: when built or changed, when a value is impossible or of a wrong type, or
            ``n_m_ratio`` stands beside ``block_size`` or ``granularity``.

    >>> config = ModuleMagnitudePrunerConfig(n_m_ratio=(2, 4))
    >>> config.dim = 0
    >>> ModuleMagnitudePrunerConfig.from_dict(config.as_dict()) == config
    True
    """

    scheduler: InstanceOf[PruningScheduler] = field(
        default_factory=lambda: ConstantSparsityScheduler(begin_step=0)
    )
    initial_sparsity: Sparsity = 0.0
    target_sparsity: Sparsity = 0.5
    granularity: Literal["per_scalar", "per_kernel", "per_channel"] = "per_scalar"
    block_size: Annotated[StrictInt, Field(ge=1)] = 1
    n_m_ratio: tuple[StrictInt, StrictInt] | None = None
    dim: StrictInt = 1
    param_name: str = "weight"

    @model_validator(mode="after")
    def _check_n_m_ratio(self) -> Self:
        if self.n_m_ratio is None:
            return self
        n, m = self.n_m_ratio
        if not 0 <= n <= m or m == 0:
            raise ValueError(
                f"expected n_m_ratio=(n, m) with 0 <= n <= m and m > 0, n zeros in every m "
                f"entries; got {self.n_m_ratio}. 2:4 sparsity is n_m_ratio=(2, 4)."
            )
        if self.block_size != 1 or self.granularity != "per_scalar":
            raise ValueError(
                f"expected n_m_ratio alone, with block_size=1 and granularity='per_scalar'; got "
                f"n_m_ratio={self.n_m_ratio}, block_size={self.block_size}, granularity="
                f"{self.granularity!r}. Leave out the one or the others."
            )
        if self.dim not in (0, 1):
            raise ValueError(
                f"expected dim=0 (outputs) or dim=1 (inputs) with n_m_ratio; got dim={self.dim}. "
                f"purprune.NM(zeros, m, dim=...) takes any dim."
            )
        return self

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Build from a dict of field names and values, the scheduler's as a dict too.

        Raises:
            ConfigError: it is no dict, a key is unknown, or a value is impossible.

        >>> config = ModuleMagnitudePrunerConfig.from_dict(
        ...     {"scheduler": {"update_steps": [3, 5, 7]}, "target_sparsity": 0.75}
        ... )
        >>> config.scheduler
        PolynomialDecayScheduler(update_steps=tensor([3, 5, 7]), power=3)
        """
        given = as_keys(config_dict, cls.__name__)
        if isinstance(given.get("scheduler"), Mapping):
            given["scheduler"] = scheduler_from_dict(given["scheduler"])
        for key in ("initial_sparsity", "target_sparsity"):
            if type(given.get(key)) is int:  # YAML writes 1 for 1.0
                given[key] = float(given[key])
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """Return plain values; a scheduler that is neither of the two stays an object."""
        return {**super().as_dict(), "scheduler": scheduler_to_dict(self.scheduler)}


ModuleConfig = InstanceOf[ModuleMagnitudePrunerConfig] | None


@settings
class MagnitudePrunerConfig(Dictable):
    """Which module is pruned how. Name beats type beats global; None leaves dense.

    Args:
        global_config: for all supported modules without another config. With no config at all,
            the default :class:`ModuleMagnitudePrunerConfig`.
        module_type_configs: by class, or by its name; subclasses do not count.
        module_name_configs: by regular expression for whole module names; the first that
            matches counts.

    Raises:
        ConfigError: a module type is not supported, or a value is of a wrong type.

    >>> config = MagnitudePrunerConfig.from_dict({"module_type_configs": {"Linear": None}})
    >>> config.set_global(ModuleMagnitudePrunerConfig(target_sparsity=0.7)) is config
    True
    """

    global_config: ModuleConfig = None
    module_type_configs: dict[ModuleType, ModuleConfig] = field(default_factory=dict)
    module_name_configs: dict[NameRegex, ModuleConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Fill in the default config when there is none at all."""
        if not (self.global_config or self.module_type_configs or self.module_name_configs):
            self.global_config = ModuleMagnitudePrunerConfig()

    def set_global(self, global_config: ModuleConfig) -> Self:
        """Set the config for all other supported modules; returns self."""
        self.global_config = global_config
        return self

    def set_module_type(self, object_type: type | str, opt_config: ModuleConfig) -> Self:
        """Set the config for a module class, given itself or by name; returns self."""
        self.module_type_configs = {**self.module_type_configs, object_type: opt_config}
        return self

    def set_module_name(self, module_name: str, opt_config: ModuleConfig) -> Self:
        """Set the config for a module name or regular expression; returns self."""
        self.module_name_configs = {**self.module_name_configs, module_name: opt_config}
        return self

    def get_module_config(self, name: str, module: nn.Module) -> ModuleConfig:
        """Return the config for a module, None for dense."""
        for regex, config in self.module_name_configs.items():
            if re.fullmatch(regex, name):
                return config
        for selector in (type(module), type(module).__name__):
            if selector in self.module_type_configs:
                return self.module_type_configs[selector]
        return self.global_config

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any]) -> Self:
        """Build from nested dicts.

        Raises:
            ConfigError: it is no dict, a key is unknown, or a value is impossible; names the key.
        """
        given = as_keys(config_dict, cls.__name__)
        if "global_config" in given:
            given["global_config"] = _module_config("global_config", given["global_config"])
        for key in ("module_type_configs", "module_name_configs"):
            if isinstance(given.get(key), Mapping):
                given[key] = {s: _module_config(f"{key}[{s!r}]", c) for s, c in given[key].items()}
        return cls(**given)


def _module_config(key: str, given: Any) -> Any:
    with error_prefix(key):
        return ModuleMagnitudePrunerConfig.from_dict(given) if isinstance(given, Mapping) else given
