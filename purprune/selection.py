"""Selection: which rule a config has for which parameter, by names alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor

from purprune.config import PruneConfig
from purprune.errors import SelectionError, near_misses
from purprune.rules import Rule


class Match(NamedTuple):
    """The selector that a parameter's name found, and how near: 0 itself, 1 its module, 2 above."""

    selector: str
    distance: int


class Selection(NamedTuple):
    """The rules by parameter name, and for every other parameter why it stays dense."""

    rules: dict[str, Rule]
    skipped: dict[str, str]


def _paths(name: str) -> Iterator[str]:
    """Yield the parameter's own name, its module's, and those of the modules above."""
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def is_weight(leaf: str) -> bool:
    """Tell whether a parameter's last name has the word "weight" in it."""
    return "weight" in leaf.split("_")  # weight, in_proj_weight, weight_ih_l0


class NameMatcher:
    """Finds the name selector that is for a parameter, and remembers which ones found nothing."""

    def __init__(self, configs: Mapping[str, Rule | None]) -> None:
        """Take the rules by selector."""
        self.configs = configs
        self.globs = [selector for selector in configs if set("*?[") & set(selector)]
        self.unused = set(configs)

    def match(self, name: str, dims: int) -> Match | None:
        """Return the selector for a parameter: exact before glob, near before far, new before old.

        A module stands for the weights at and below it: parameters named by ``param_name``, or
        else those with the word "weight" in their name, below the module itself only of 2 or more
        dims. Globs are for parameters of 2 or more dims, so that "*" takes no bias and no norm. A
        rule that is None, and so leaves dense, is for everything there.
        """
        leaf = name.rpartition(".")[2]
        exact: list[Match] = []
        globs: list[Match] = []
        for distance, path in enumerate(_paths(name)):
            if path in self.configs and self._for(path, leaf, dims, distance):
                exact.append(Match(path, distance))
            globs += [
                Match(selector, distance)
                for selector in reversed(self.globs)
                if fnmatchcase(path, selector) and self._for_glob(selector, leaf, dims, distance)
            ]
        self.unused.difference_update(m.selector for m in exact + globs)
        return next(iter(exact + globs), None)

    def _for_glob(self, selector: str, leaf: str, dims: int, distance: int) -> bool:
        rule = self.configs[selector]
        of_any_dims = rule is None or rule.param_name is not None
        return (of_any_dims or dims >= 2) and self._for(selector, leaf, dims, distance)

    def _for(self, selector: str, leaf: str, dims: int, distance: int) -> bool:
        rule = self.configs[selector]
        return rule is None or distance == 0 or _stands_for(rule, leaf, dims, distance)


def _stands_for(rule: Rule, leaf: str, dims: int, distance: int) -> bool:
    if rule.param_name is not None:
        return fnmatchcase(leaf, rule.param_name)
    return is_weight(leaf) and (distance == 1 or dims >= 2)


def known_names(params: Iterable[str]) -> list[str]:
    """Return what a name selector can select: modules, then their parameters."""
    return list(dict.fromkeys(path for name in params for path in [*_paths(name)][::-1]))


def refuse_empty(config: PruneConfig) -> None:
    """Raise when a config prunes nothing at all."""
    if not config.rules:
        raise SelectionError(
            "Expected a config with at least one rule; got none, so nothing would be pruned. "
            "Start with PruneConfig().set_global(Rule(0.5))."
        )


def refuse_unused(
    unused: Iterable[str], kind: str, candidates: Iterable[str], *, globs: bool = False
) -> None:
    """Raise when a selector matched nothing, and say what comes near.

    Args:
        unused: the selectors.
        kind: what they are called.
        candidates: what they could have matched.
        globs: whether they are globs, so that a regular expression is told.
    """
    known = list(candidates)
    lines = [
        f"Expected {kind} to match something; {selector!r} matches nothing."
        + (_NO_REGEX if globs and selector not in known and _is_regex(selector) else "")
        + _way_out(selector, known)
        for selector in sorted(unused)
    ]
    if lines:
        raise SelectionError("\n".join(lines))


_NO_REGEX = (
    " Names are globs, not regular expressions: '*' stands for any text, as in 'layers.*.mlp', and "
    "a module's name for all below it; each alternative is a name of its own."
)


def _is_regex(selector: str) -> bool:
    """Tell whether a selector has what regular expressions have and globs hardly ever."""
    return ".*" in selector or bool(set(r"\|+(^$") & set(selector))


def _way_out(selector: str, known: list[str]) -> str:
    if selector not in known:
        return near_misses(selector, known) or _some(known)
    below = [name for name in known if name.startswith(f"{selector}.")]
    return f" It is there, but has no weight that the rule is for.{_some(below)}"


def refuse_nothing(rules: Mapping[str, Rule], skipped: Mapping[str, str]) -> None:
    """Raise when no parameter got a rule, and say why none did."""
    if not rules:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in [*skipped.items()][:8])
        raise SelectionError(
            "Expected rules that are for at least one parameter; got none. "
            + (reasons or "There are no parameters at all.")
        )


def _some(known: list[str]) -> str:
    shown = ", ".join(map(repr, known[:8]))
    return f" There are {shown}{' and more' if len(known) > 8 else ''}." if known else ""


def refuse_integers(name: str, tensor: Tensor, selector: str) -> None:
    """Raise when a rule is for a parameter that holds no floating-point numbers."""
    if not tensor.is_floating_point():
        raise SelectionError(
            f"Expected a floating-point parameter for {selector!r}; got {name!r} of "
            f"{tensor.dtype}. Set {name!r} to None to leave it as it is."
        )


def select(config: PruneConfig, params: Mapping[str, Tensor]) -> Selection:
    """Resolve a config to parameter names; there are no modules here.

    Raises:
        SelectionError: when a selector matches nothing, a rule is for a parameter without
            floating-point numbers, or the config has rules by module type.
    """
    if config.module_type_configs:
        raise SelectionError(
            "Expected rules by name or a global one, since a flat dict of parameters has no "
            f"modules; got module types {', '.join(config.module_type_configs)}. Resolve them "
            "with purprune_adapters.resolve(model, config), or use Pruner."
        )
    refuse_empty(config)
    matcher = NameMatcher(config.module_name_configs)
    rules: dict[str, Rule] = {}
    skipped: dict[str, str] = {}
    for name, tensor in params.items():
        found = matcher.match(name, tensor.dim())
        rule = config.module_name_configs[found.selector] if found else config.global_config
        if rule is None:
            skipped[name] = f"{found.selector!r} is set to None" if found else "no rule is for it"
        elif found:
            refuse_integers(name, tensor, found.selector)
            rules[name] = rule
        elif reason := _not_global(name, tensor, rule):
            skipped[name] = reason
        else:
            rules[name] = rule
    refuse_unused(matcher.unused, "module_name_configs", known_names(params), globs=True)
    refuse_nothing(rules, skipped)
    return Selection(rules, skipped)


def _not_global(name: str, tensor: Tensor, rule: Rule) -> str | None:
    """Say why the global rule is not for a parameter."""
    if not tensor.is_floating_point():
        return f"{str(tensor.dtype).removeprefix('torch.')}: the global rule is for floats"
    if rule.param_name is not None:
        fits = fnmatchcase(name.rpartition(".")[2], rule.param_name)
        return None if fits else f"param_name is {rule.param_name!r}"
    if tensor.dim() < 2:
        return f"{tensor.dim()}-D: the global rule is for 2 or more dims"
    return None


class LazyParams(Mapping[str, Tensor]):
    """Parameters that are loaded when they are asked for, and dropped when nobody holds them.

    Two of them are equal where they are the same object: nothing is loaded to compare.
    """

    @abstractmethod
    def shapes(self) -> Mapping[str, Tensor]:
        """Return meta tensors of the same names; nothing is loaded."""

    def __eq__(self, other: object) -> bool:
        """Compare by identity."""
        return self is other

    def __hash__(self) -> int:
        """Hash by identity."""
        return object.__hash__(self)


def described(params: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return names, shapes and dtypes; raise when ``params`` is no flat mapping of tensors."""
    shapes = params.shapes() if isinstance(params, LazyParams) else params
    check_params(shapes)
    return shapes


def check_params(params: Mapping[str, Tensor]) -> None:
    """Raise when ``params`` is no flat mapping of names to tensors."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"Expected params as a dict of names to tensors; got {type(params).__name__}. Pass "
            f"dict(model.named_parameters())."
        )
    for name, tensor in params.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"Expected dotted names and tensors in params; got {name!r}: "
                f"{type(tensor).__name__}."
            )
