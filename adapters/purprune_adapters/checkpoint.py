"""The pruner's state as tensors and plain values, checked before it is taken."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from purprune import Plan, PruneConfig, Rule, plan
from purprune_adapters.distributed import counted, placed

FORMAT = 1
_KEYS = ("format", "step", "config", "masks")


def pack_state(step: int, masks: Mapping[str, Tensor], config: PruneConfig) -> dict[str, Any]:
    """Return a state that ``torch.save`` and ``torch.load(weights_only=True)`` carry."""
    return {
        "format": FORMAT,
        "step": step,
        "config": json.dumps(config.as_dict(), sort_keys=True),
        "masks": {name: mask.detach().clone() for name, mask in masks.items()},
    }


def unpack_state(
    state: Mapping[str, Any],
    config: PruneConfig,
    params: Mapping[str, Tensor],
    rules: Mapping[str, Rule],
) -> tuple[int, dict[str, Tensor]]:
    """Return step and masks of a state that fits; raise and say what differs otherwise."""
    if not isinstance(state, Mapping) or set(state) != set(_KEYS):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"Expected a pruner state with keys {', '.join(_KEYS)}; got {got}.")
    if state["format"] != FORMAT:
        raise ValueError(f"Expected format {FORMAT} of the pruner state; got {state['format']!r}.")
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"Expected step >= 0 in the pruner state; got {step!r}.")
    differing = _differences(_loaded(state["config"]), json.loads(json.dumps(config.as_dict())))
    if differing:
        raise ValueError(
            "Expected the state of a pruner with the same config; these differ (saved, now): "
            + "; ".join(differing)
        )
    masks = _fitting_masks(state["masks"], params, rules)
    _refuse_other_counts(masks, plan(params, PruneConfig(module_name_configs=rules), step), step)
    return step, masks


def _refuse_other_counts(masks: Mapping[str, Tensor], planned: Plan, step: int) -> None:
    """Raise when masks do not prune what the schedule says, per tensor or group of tensors."""
    unit = {row.name: row.unit for row in planned.tensors}
    pruned = counted(masks, lambda name, mask: _pruned_units(mask, unit[name]))
    counts = [
        (repr(row.name), row.units, row.pruned_units, pruned[row.name])
        for row in planned.tensors
        if row.pruned_units is not None
    ]
    counts += [
        (" and ".join(map(repr, g.names)), g.units, g.pruned, sum(pruned[n] for n in g.names))
        for g in planned.shared
    ]
    for names, units, expected, got in counts:
        if got != expected:
            raise ValueError(
                f"Expected {expected} of {units} units pruned in {names} at step {step}; the masks "
                f"of the state prune {got}. It is damaged."
            )


def _pruned_units(mask: Tensor, unit: tuple[int, ...]) -> int:
    kept = mask[tuple(slice(None, None, n) for n in unit)]
    return kept.numel() - int(torch.count_nonzero(kept))


def _loaded(config: Any) -> Any:
    try:
        return json.loads(config)
    except (TypeError, ValueError):
        raise ValueError(
            "Expected JSON as the config of the pruner state; it is damaged."
        ) from None


def _fitting_masks(
    masks: Any, params: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    if not isinstance(masks, Mapping):
        raise ValueError(f"Expected masks by name; got {type(masks).__name__}.")
    if set(masks) != set(names):
        missing = sorted(set(names) - set(masks))
        extra = sorted(set(masks) - set(names))
        raise ValueError(f"Expected masks of this model; missing {missing}, not in it {extra}.")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise ValueError(f"Expected a bool mask for {name!r} in the pruner state.")
        if mask.shape != params[name].shape:
            raise ValueError(
                f"Expected a mask of shape {tuple(params[name].shape)} for {name!r}; the state "
                f"has {tuple(mask.shape)}."
            )
    return {name: placed(name, masks[name], params[name]) for name in names}


def _differences(saved: Any, now: Any, path: str = "config") -> list[str]:
    """Return the paths at which two plain values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(set(saved) | set(now))
            for line in _differences(saved.get(key), now.get(key), f"{path}.{key}")
        ]
    return [] if saved == now else [f"{path} ({saved!r}, {now!r})"]
