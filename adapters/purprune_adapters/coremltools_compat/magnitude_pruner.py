"""The pruner: coremltools' calls and counting, at work on :class:`purprune_adapters.Pruner`."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from purprune import PruneConfig, Rule, SelectionError
from purprune.config import type_name
from purprune.coremltools_keys import CoremltoolsKeys
from purprune.errors import near_misses
from purprune.schedules import Ramp
from purprune.selection import refuse_unused
from purprune_adapters.coremltools_compat.configs import SUPPORTED
from purprune_adapters.coremltools_compat.configs import (
    MagnitudePrunerConfig as MagnitudePrunerConfig,
)
from purprune_adapters.coremltools_compat.configs import (
    ModuleMagnitudePrunerConfig as ModuleMagnitudePrunerConfig,
)
from purprune_adapters.coremltools_compat.pruning_scheduler import Fold, as_schedule
from purprune_adapters.coremltools_compat.report import PruningReport, report_on
from purprune_adapters.pruner import Pruner

VERSION_BUFFER = "_COREML_/metadata_version"
PRUNED = 1
"""The number by which the metadata says "pruned"."""


class MagnitudePruner:
    """Prunes the smallest weights while a model trains, as coremltools' pruner of that name.

    Args:
        model: the model to prune.
        config: None means the default config for all supported modules.

    Raises:
        SelectionError: a selector matches nothing, or nothing is left to prune.
        ConfigError: a config does not fit its parameter.

    >>> model = nn.Linear(8, 4)
    >>> pruner = MagnitudePruner(model)
    >>> _ = pruner.prepare(inplace=True)
    >>> pruner.step()  # after each optimizer.step()
    >>> pruner.report()["global"]["unstructured_weight_sparsity"]
    0.5
    >>> list(pruner.finalize(inplace=True).state_dict())[-1]
    '_COREML_/weight/compression_type'
    """

    def __init__(self, model: nn.Module, config: MagnitudePrunerConfig | None = None) -> None:
        """Resolve the config on the model; nothing is changed yet."""
        if config is None:
            config = MagnitudePrunerConfig()
        if not isinstance(config, MagnitudePrunerConfig):
            raise TypeError(
                f"Expected a MagnitudePrunerConfig; got {type(config).__name__}. Build one with "
                f"MagnitudePrunerConfig.from_dict(...)."
            )
        self._config = config
        self._phase = "new"  # then "prepared", then "finalized"
        self._build(model)

    def _build(self, model: nn.Module) -> None:
        """Make the pruner at work from the config as it is now."""
        self._configs = _select(model, self._config)
        self._pruner = Pruner(model, PruneConfig(module_name_configs=_rules(model, self._configs)))

    @property
    def pruner(self) -> Pruner:
        """The :class:`purprune_adapters.Pruner` at work: masks, checkpoints, plans.

        Raises:
            RuntimeError: before :meth:`prepare`, which reads the config anew.
        """
        if self._phase == "new":
            raise RuntimeError("Expected prepare() before pruner; call prepare() first.")
        return self._pruner

    @property
    def supported_modules(self) -> tuple[type[nn.Module], ...]:
        """The module classes that can be pruned."""
        return SUPPORTED

    def prepare(self, inplace: bool = False) -> nn.Module:
        """Apply the initial sparsity, install the hooks, and return the model to train.

        Args:
            inplace: False prunes and returns a deepcopy; make the optimizer from its parameters.

        Raises:
            NaNError: a weight holds NaN; nothing is changed then.
        """
        if self._phase != "new":
            _warn(f"The model is {self._phase} already; prepare() changes nothing.")
            return self._pruner.model
        self._build(self._pruner.model)
        model = self._pruner.prepare(inplace=inplace)
        self._phase = "prepared"
        return model

    def step(self) -> None:
        """Count one optimizer step, and prune more where the scheduler says so.

        Call it after ``optimizer.step()``. Before prepare
        and after finalize it warns and does nothing.

        Raises:
            NaNError: a weight holds NaN; step and masks stay as they were.
        """
        if self._phase == "new":
            _warn("The model is not prepared; step() does nothing. Call prepare() first.")
        elif self._phase == "finalized":
            _warn("The model is finalized; step() does nothing. Make a new pruner to go on.")
        else:
            self._pruner.step()

    def finalize(self, model: nn.Module | None = None, inplace: bool = False) -> nn.Module:
        """Return a model with the zeros baked in, no hooks, and Core ML's metadata of pruning.

        The metadata are buffers below ``_COREML_/``, by which ``coremltools.convert`` knows pruned
        weights. :func:`purprune_adapters.export_coreml` does better, and removes them.

        Args:
            model: the model to finalize, for instance a copy with averaged weights; None means
                the pruned model itself.
            inplace: False finalizes a deepcopy, and training can go on. True ends this pruner.

        Raises:
            RuntimeError: before :meth:`prepare`, since nothing is pruned then.
        """
        if self._phase == "finalized" and model is None:
            _warn("The model is finalized already; finalize() changes nothing.")
            return self._pruner.model if inplace else copy.deepcopy(self._pruner.model)
        final = self._pruner.finalize(model, inplace)
        if final is self._pruner.model:
            self._phase = "finalized"
        _write_metadata(final, self._configs)
        return final

    def report(self) -> PruningReport:
        """Count the zeros in the weights as they are now.

        By module name: ``#params``, ``unstructured_weight_sparsity`` (zero entries),
        ``structured_weight_sparsity`` (indices along dim 0 with nothing but zeros) and
        ``block2_weight_sparsity`` (pairs of neighbours along dim 0 that are both zero; -1 when dim
        0 is odd); under ``"global"`` their means, weighted by the number of parameters.
        """
        model = self._pruner.model
        return report_on(
            {
                name: model.get_submodule(name).get_parameter(config.param_name)
                for name, config in self._configs.items()
            }
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _select(
    model: nn.Module, config: MagnitudePrunerConfig
) -> dict[str, ModuleMagnitudePrunerConfig]:
    """Return the configs by name of the module; raise when a selector is for nothing."""
    modules = dict(model.named_modules())
    known = {name: module for name, module in modules.items() if isinstance(module, SUPPORTED)}
    for regex, rule in config.module_name_configs.items():
        matched = [name for name in modules if re.fullmatch(regex, name)]
        refuse_unused([] if matched else [regex], "module_name_configs", known)
        if rule is not None and not known.keys() & set(matched):
            raise SelectionError(
                f"Expected module_name_configs[{regex!r}] to match a module that can be pruned; "
                f"it matches {matched[0]!r}, a {type(modules[matched[0]]).__name__}. Supported: "
                f"{', '.join(cls.__name__ for cls in SUPPORTED)}."
            )
    there = {selector for m in modules.values() for selector in (type(m), type(m).__name__)}
    unused = {type_name(s) for s in config.module_type_configs if s not in there}
    refuse_unused(unused, "module_type_configs", {type_name(type(m)) for m in modules.values()})
    found = {name: config.get_module_config(name, module) for name, module in known.items()}
    chosen = {name: rule for name, rule in found.items() if rule is not None}
    if not chosen:
        raise SelectionError(
            f"Expected at least one module to prune in {type(model).__name__}; got none: the "
            f"config leaves all of its {len(known)} supported modules dense. Supported: "
            f"{', '.join(cls.__name__ for cls in SUPPORTED)}."
        )
    return chosen


def _rules(
    model: nn.Module, configs: Mapping[str, ModuleMagnitudePrunerConfig]
) -> dict[str, Rule | None]:
    """Return purprune's rules by parameter name; modules with one config share its schedule."""
    schedules: dict[int, Ramp | Fold] = {}
    rules: dict[str, Rule | None] = {}
    for name, config in configs.items():
        params = dict(model.get_submodule(name).named_parameters(recurse=False))
        if config.param_name not in params:
            raise SelectionError(
                f"Expected param_name to be a parameter of {name!r}: {', '.join(params)}; got "
                f"{config.param_name!r}.{near_misses(config.param_name, params)}"
            )
        schedule = schedules.setdefault(id(config), as_schedule(config))
        dims = params[config.param_name].dim()
        rules[f"{name}.{config.param_name}".lstrip(".")] = _rule(config, schedule, dims)
    return rules


def _rule(config: ModuleMagnitudePrunerConfig, schedule: Ramp | Fold, dims: int) -> Rule:
    granularity = "per_scalar" if dims == 2 else config.granularity  # kernels need 3 dims
    keys = CoremltoolsKeys(granularity, config.block_size, config.n_m_ratio, config.dim)
    if isinstance(schedule, Fold):
        return Rule(schedule=schedule, pattern=keys.pattern())
    target = None if config.n_m_ratio else config.target_sparsity
    return Rule(target, schedule, config.initial_sparsity, keys.pattern())


def _write_metadata(model: nn.Module, configs: Mapping[str, ModuleMagnitudePrunerConfig]) -> None:
    """Register the buffers that Core ML documents; what they say already is kept."""
    model.register_buffer(VERSION_BUFFER, torch.tensor(1))
    for name, config in configs.items():
        module = model.get_submodule(name)
        buffer = f"_COREML_/{config.param_name}/compression_type"
        before = dict(module.named_buffers(recurse=False)).get(buffer)
        kinds = [] if before is None else before.tolist()
        kinds += [] if PRUNED in kinds else [PRUNED]
        module.register_buffer(buffer, torch.tensor(kinds))
