"""Weights that a module computes from other parameters: parametrizations, and their old hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm, _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from purprune import SelectionError

_REMOVE = "torch.nn.utils.parametrize.remove_parametrizations"


class Computed(NamedTuple):
    """A parameter from which a weight is computed."""

    weight: str
    """The dotted name of the weight, which is no parameter."""
    carrier: bool
    """Whether a rule for the weight is a rule for this parameter, if it can be one at all."""
    zeros_stay: bool
    """Whether a zero here is a zero of the weight, and nothing else changes for it."""
    way_out: str


def computed_weights(model: nn.Module) -> dict[str, Computed]:
    """Return what is computed from a parameter, by each name of the parameter."""
    found: dict[str, Computed] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        dot = f"{path}." if path else ""
        for leaf, item in (*_parametrized(module), *_hooked(module)):
            found[dot + leaf] = item._replace(weight=dot + item.weight)
    return found


def _parametrized(module: nn.Module) -> Iterator[tuple[str, Computed]]:
    """Yield what torch.nn.utils.parametrize registered."""
    if not nn.utils.parametrize.is_parametrized(module):
        return
    for name, steps in module.parametrizations.items():  # type: ignore[operator, union-attr]
        assert isinstance(steps, ParametrizationList)
        originals = [leaf for leaf, _ in steps.named_parameters(recurse=False)]
        kinds = {type(step) for step in steps}
        way_out = f"remove it with {_REMOVE}(module, {name!r})"
        if kinds == {_WeightNorm}:
            way_out += _weight_norm_hint(f"parametrizations.{name}.original1")
        for leaf in originals:
            yield (
                f"parametrizations.{name}.{leaf}",
                Computed(name, leaf == originals[-1], kinds == {_SpectralNorm}, way_out),
            )


def _hooked(module: nn.Module) -> Iterator[tuple[str, Computed]]:
    """Yield what the older torch.nn.utils.weight_norm, spectral_norm and prune left."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            way_out = f"remove it with torch.nn.utils.remove_weight_norm(module, {hook.name!r})"
            way_out += _weight_norm_hint(f"{hook.name}_v")
            for leaf in ("g", "v"):
                yield f"{hook.name}_{leaf}", Computed(hook.name, leaf == "v", False, way_out)
        elif isinstance(hook, SpectralNorm):
            yield f"{hook.name}_orig", Computed(hook.name, True, True, "")
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            way_out = f"make its zeros permanent with torch.nn.utils.prune.remove(module, {name!r})"
            yield f"{name}_orig", Computed(name, True, False, way_out)


def _weight_norm_hint(leaf: str) -> str:
    return f" (or name {leaf!r}, whose zeros stay; but a row pruned whole becomes NaN)"


def refuse_computed(name: str, item: Computed, selector: str) -> None:
    """Raise for a rule whose weight is no parameter, and where zeros would not stay."""
    raise SelectionError(
        f"Expected a parameter for {selector!r}; {item.weight!r} is computed from {name!r}. "
        f"Either {item.way_out}, or set {item.weight!r} to None."
    )
