"""Resolving a config on a model: rules by module type become rules by parameter name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from purprune import PruneConfig, Rule, SelectionError
from purprune.config import as_config, type_name
from purprune.selection import (
    NameMatcher,
    Selection,
    is_weight,
    known_names,
    refuse_empty,
    refuse_integers,
    refuse_nothing,
    refuse_unused,
)
from purprune_adapters.computed import computed_weights, refuse_computed

SUPPORTED: Mapping[type[nn.Module], str] = {
    nn.Linear: "weight",
    nn.Conv1d: "weight",
    nn.Conv2d: "weight",
    nn.Conv3d: "weight",
    nn.ConvTranspose1d: "weight",
    nn.ConvTranspose2d: "weight",
    nn.ConvTranspose3d: "weight",
    nn.MultiheadAttention: "*_proj_weight",
    nn.RNNBase: "weight_*",
    nn.RNNCellBase: "weight_*",
}
"""The parameters that a type rule or the global rule is for, as glob patterns by module type."""

NAMED_ONLY: Mapping[type[nn.Module], str] = {nn.Embedding: "weight", nn.EmbeddingBag: "weight"}
"""As :data:`SUPPORTED`, but the global rule is not for them, nor for what is tied to them."""


def resolve(model: nn.Module, config: PruneConfig | Rule | Mapping[str, Any]) -> PruneConfig:
    """Return a config that names every parameter to prune, for use in the pure core.

    Name beats type beats global. A type rule is for instances of the class and its subclasses;
    of several the nearest class counts. The global rule is for the modules in :data:`SUPPORTED`.
    Tied parameters are pruned once, under the first of their names; the global rule is not for
    those that are an embedding too.

    Raises:
        SelectionError: a selector matches nothing, a rule is for a parameter without
            floating-point numbers or a shape, or tied parameters have different rules.

    >>> from purprune import PruneConfig, Rule
    >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    >>> config = PruneConfig().set_module_type(nn.Conv2d, Rule(0.7)).set_module_type("Linear", None)
    >>> list(resolve(model, config).module_name_configs)
    ['0.weight']
    """
    return PruneConfig(module_name_configs=resolve_rules(model, config).rules)


def resolve_rules(model: nn.Module, config: PruneConfig | Rule | Mapping[str, Any]) -> Selection:
    """Return the rules by parameter name, and why each other parameter stays dense."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module; got {type(model).__name__}.")
    config = as_config(config)
    refuse_empty(config)
    search = _Search(model, config)
    names: dict[int, list[str]] = {}
    params: dict[int, Tensor] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
        params[id(param)] = param
    rules: dict[str, Rule] = {}
    skipped: dict[str, str] = {}
    for key, tied in names.items():
        found = _strongest(tied, [search.find(name, params[key]) for name in tied])
        if found.rule is None:
            skipped[tied[0]] = found.why
        else:
            _refuse_unfit(tied[0], params[key], found.why)
            rules[tied[0]] = found.rule
    search.refuse_unused()
    refuse_nothing(rules, skipped)
    return Selection(rules, skipped)


class _Found(NamedTuple):
    """A rule (None: leave dense) with its selector or the reason, and how strong that is."""

    rule: Rule | None
    why: str
    strength: int  # 3 by name, 2 by type, 1 kept out of the global rule, 0 by it, -1 by none


def _strongest(names: Sequence[str], found: Sequence[_Found]) -> _Found:
    """Return what holds for a parameter of several names: name beats type beats global."""
    strength = max(f.strength for f in found)
    best = [(name, f) for name, f in zip(names, found, strict=True) if f.strength == strength]
    (first, chosen), *others = best
    for name, other in others:
        if other.rule != chosen.rule:
            raise SelectionError(
                f"Expected one rule for the tied parameters {first!r} and {name!r}; got two. Set "
                f"both names to the rule that is meant, or to None."
            )
    return chosen


class _Search:
    """Finds the rule for a parameter of a model."""

    def __init__(self, model: nn.Module, config: PruneConfig) -> None:
        self.config = config
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.params = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self.names = NameMatcher(config.module_name_configs)
        self.unused_types = set(config.module_type_configs)
        self.computed = computed_weights(model)

    def find(self, name: str, param: Tensor) -> _Found:
        """Return the rule for one name of a parameter."""
        dims = 0 if is_lazy(param) else param.dim()
        if name in self.computed and not self._is_spelt_out(name, dims):
            return self._find_computed(name, param)
        types = [self._type_selector(*holder, dims) for holder in self._holders(name)]
        found = self.names.match(name, dims)
        if found and not (found.distance > 1 and self._fits(NAMED_ONLY, name)):
            return _found(self.config.module_name_configs, found.selector, 3)
        for selector in filter(None, types):
            return _found(self.config.module_type_configs, selector, 2)
        rule = self.config.global_config
        owner, leaf = next(self._holders(name))
        if rule is None:
            return _Found(None, f"no rule is for {leaf!r} of {type(owner).__name__}", -1)
        if self._fits(SUPPORTED, name, rule.param_name):
            return _Found(rule, "global_config", 0)
        why = f"the global rule is not for {leaf!r} of {type(owner).__name__}"
        return _Found(None, why, 1 if self._fits(NAMED_ONLY, name) else -1)

    def _is_spelt_out(self, name: str, dims: int) -> bool:
        """Tell whether a selector means this very parameter, and not the weight made of it."""
        found = self.names.match(name, dims)
        if found is None:
            return False
        rule = self.config.module_name_configs[found.selector]
        named = found.distance == 0 and name.rpartition(".")[2] in found.selector
        return named or (rule is not None and rule.param_name is not None)

    def _find_computed(self, name: str, param: Tensor) -> _Found:
        """Return the rule for the weight that is computed from a parameter, or refuse it."""
        item = self.computed[name]
        found = self.find(item.weight, param)
        if found.rule is not None and not item.carrier:
            return _Found(None, f"{item.weight!r} is computed from it", -1)
        if found.rule is not None and not item.zeros_stay:
            refuse_computed(name, item, found.why)
        return found

    def _holders(self, name: str) -> Iterator[tuple[nn.Module, str]]:
        """Yield the module that owns the parameter, behind an attention that reads it itself."""
        path, _, leaf = name.rpartition(".")
        above, _, child = path.rpartition(".")
        if isinstance(self.modules.get(above), nn.MultiheadAttention) and child == "out_proj":
            yield self.modules[above], f"out_proj_{leaf}"
        yield self.modules[path], leaf

    def _type_selector(self, owner: nn.Module, leaf: str, dims: int) -> str | None:
        """Return the selector of the nearest class of the owner that has a rule for the leaf."""
        for cls in type(owner).__mro__:
            if leaf.startswith("out_proj_") and not issubclass(cls, nn.MultiheadAttention):
                break  # a rule for all modules is no rule for attention
            for selector in (type_name(cls), cls.__name__):
                if selector not in self.config.module_type_configs:
                    continue
                rule = self.config.module_type_configs[selector]
                if self._leaf_fits(owner, leaf, dims, rule):
                    self.unused_types.discard(selector)
                    return selector
        return None

    @staticmethod
    def _leaf_fits(owner: nn.Module, leaf: str, dims: int, rule: Rule | None) -> bool:
        if rule is not None and rule.param_name is not None:
            return fnmatchcase(leaf, rule.param_name)
        for cls, pattern in {**SUPPORTED, **NAMED_ONLY}.items():
            if isinstance(owner, cls):
                return fnmatchcase(leaf, pattern)
        return is_weight(leaf) and dims >= 2

    def _fits(
        self, table: Mapping[type[nn.Module], str], name: str, param_name: str | None = None
    ) -> bool:
        return any(
            isinstance(owner, cls) and fnmatchcase(leaf, param_name or pattern)
            for owner, leaf in self._holders(name)
            for cls, pattern in table.items()
        )

    def refuse_unused(self) -> None:
        """Raise when a selector matched nothing."""
        known = [*self.params, *(item.weight for item in self.computed.values())]
        refuse_unused(self.names.unused, "module_name_configs", known_names(known), globs=True)
        kinds = dict.fromkeys(type(module).__name__ for module in self.modules.values())
        refuse_unused(self.unused_types, "module_type_configs", kinds)


def _found(configs: Mapping[str, Rule | None], selector: str, strength: int) -> _Found:
    rule = configs[selector]
    return _Found(rule, selector if rule else f"{selector!r} is set to None", strength)


def _refuse_unfit(name: str, param: Tensor, selector: str) -> None:
    if is_lazy(param):
        raise SelectionError(
            f"Expected parameters with a shape; {name!r} is lazy and has none yet. Run one "
            f"forward pass first."
        )
    refuse_integers(name, param, selector)
