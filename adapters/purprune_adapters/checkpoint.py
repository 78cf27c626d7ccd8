"""The pruner's state as tensors and plain values, checked before it is taken."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purprune import PruneConfig, Rule, pack_masks, unpack_masks
from purprune.given import refuse_unfit_masks, refuse_without_rule
from purprune_adapters.distributed import is_sharded, local, placed, summed
from purprune_adapters.memory import Memory

FORMAT = 1
PLAIN = ("format", "prepared", "step", "config", "packed", "floor_of")
TENSORS = ("masks", "floor", "memory")
_NONE = object()


class Held(NamedTuple):
    """What a pruner holds."""

    step: int
    masks: Mapping[str, Tensor]
    """The masks in force."""
    floor: Mapping[str, Tensor]
    """Those that hold at every step."""
    memory: Mapping[str, Tensor]
    """What is remembered beside: see :class:`purprune_adapters.memory.Memory`."""

    @classmethod
    def nothing(
        cls,
        params: Mapping[str, Tensor],
        floor: Mapping[str, Tensor] | None,
        memory: Mapping[str, Tensor],
    ) -> Held:
        """Return masks that keep everything; so does a floor of None, which is not known yet."""
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in params.items()}
        return cls(0, masks, masks if floor is None else floor, memory)


def pack_state(held: Held, config: PruneConfig, *, prepared: bool, packed: bool) -> dict[str, Any]:
    """Return a state that ``torch.save`` and ``torch.load(weights_only=True)`` carry."""
    if packed and any(map(is_sharded, held.masks.values())):
        raise ValueError(
            "Expected packed=False for masks in shards; got packed=True. "
            "torch.distributed.checkpoint stores each process's part as it is."
        )
    store = pack_masks if packed else _copied
    return {
        "format": FORMAT,
        "prepared": prepared,
        "step": held.step,
        "config": json.dumps(config.as_dict(), sort_keys=True),
        "packed": packed,
        # A checkpoint that fills the tensors which it finds here can't bring new names.
        "floor_of": json.dumps(sorted(held.floor)),
        "masks": store(held.masks),
        "floor": store(held.floor),
        "memory": _copied(held.memory),
    }


def unpack_state(
    state: Mapping[str, Any],
    config: PruneConfig,
    params: Mapping[str, Tensor],
    rules: Mapping[str, Rule],
    memory: Memory,
) -> Held | None:
    """Return what a state that fits holds, None of a pruner that was not prepared.

    Raises:
        ValueError: the state does not fit; says what differs.
    """
    _refuse_other_keys(state)
    step = state["step"]
    if type(step) is not int or step < 0:
        raise ValueError(f"Expected step >= 0 in the pruner state; got {step!r}.")
    for key in ("prepared", "packed"):
        if type(state[key]) is not bool:
            raise ValueError(f"Expected a bool as {key!r} of the pruner state; got {state[key]!r}.")
    _refuse_another_config(_loaded(state, "config"), config)
    masks, floor = (_masks(state, part) for part in ("masks", "floor"))
    remembered = _remembered(state["memory"], memory, params)
    held_names = _loaded(state, "floor_of")
    if held_names != sorted(floor):
        raise ValueError(
            f"Expected the masks that were given to the pruner that was saved, of {held_names}; "
            f"got them of {sorted(floor)}. Make this Pruner with masks= or keep_zeros= as that one."
        )
    masks = _fitting(masks, params, rules)
    floor = _fitting(floor, params, floor)
    if not state["prepared"]:
        return None
    refuse_without_rule(floor, rules)
    refuse_unfit_masks(
        _local(masks), step, rules, _local(floor), lambda counts: summed(counts, masks), masks
    )
    return Held(step, masks, floor, remembered)


def _local(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: local(mask) for name, mask in masks.items()}


def _copied(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = torch.contiguous_format  # an expanded view can't be loaded into
    return {name: mask.detach().clone(memory_format=plain) for name, mask in masks.items()}


def _refuse_other_keys(state: Any) -> None:
    keys = (*PLAIN, *TENSORS)
    if not isinstance(state, Mapping) or set(state) != set(keys):
        got = type(state).__name__
        if isinstance(state, Mapping):
            missing = [key for key in keys if key not in state]
            unknown = sorted(str(key) for key in state if key not in keys)
            got = f"one without {_few(missing)}, with {_few(unknown)} besides"
        raise ValueError(f"Expected a pruner state with keys {', '.join(keys)}; got {got}.")
    if type(state["format"]) is not int or state["format"] != FORMAT:
        raise ValueError(f"Expected format {FORMAT} of the pruner state; got {state['format']!r}.")


def _refuse_another_config(saved: Any, config: PruneConfig) -> None:
    differing = _differences(saved, json.loads(json.dumps(config.as_dict())))
    if differing:
        raise ValueError(
            "Expected the state of a pruner with the same config; these differ (saved, now): "
            + "; ".join(differing[:5])
            + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        )


def _loaded(state: Mapping[str, Any], key: str) -> Any:
    try:
        return json.loads(state[key])
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"Expected JSON as the {key} of the pruner state; it is damaged."
        ) from None


def _masks(state: Mapping[str, Any], part: str) -> Mapping[str, Tensor]:
    masks = state[part]
    if not isinstance(masks, Mapping):
        raise ValueError(f"Expected {part} by name; got {type(masks).__name__}.")
    return unpack_masks(masks) if state["packed"] else masks


def _fitting(
    masks: Mapping[str, Tensor], params: Mapping[str, Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """Return copies of the masks where their parameters are."""
    strangers = sorted(str(name) for name in {*masks} - {*params})
    missing = sorted({*names} - {*masks})
    if strangers or missing:
        raise ValueError(
            f"Expected masks of this model; missing {_few(missing)}, not in it {_few(strangers)}."
        )
    for name, mask in masks.items():
        plain = isinstance(mask, Tensor) and mask.layout is torch.strided and not mask.is_meta
        if not plain or mask.dtype != torch.bool:
            raise ValueError(f"Expected a bool mask for {name!r} in the pruner state.")
        if mask.shape != params[name].shape:
            raise ValueError(
                f"Expected a mask of shape {tuple(params[name].shape)} for {name!r}; the state "
                f"has {tuple(mask.shape)}."
            )
    return {name: placed(name, masks[name], params[name]) for name in names}


def _remembered(given: Any, memory: Memory, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of what was remembered where their parameters are."""
    keys = {key: name for key, name, _ in memory.items()}
    if not isinstance(given, Mapping) or set(given) != set(keys):
        got = _few(sorted(map(str, given))) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(
            f"Expected {_few(sorted(keys))} as the memory of the pruner state; got {got}."
        )
    for key, name in keys.items():
        tensor = given[key]
        shape, fits = params[name].shape, isinstance(tensor, Tensor)
        if not fits or tensor.shape != shape or not tensor.is_floating_point() or tensor.is_meta:
            raise ValueError(
                f"Expected floats of shape {tuple(shape)} as {key!r} in the memory of the pruner "
                f"state; it is damaged, or of another model."
            )
    return {key: placed(name, given[key], params[name]) for key, name in keys.items()}


def _few(names: Collection[str]) -> str:
    shown = ", ".join(repr(name) for name in [*names][:5])
    return f"[{shown}{' and more' if len(names) > 5 else ''}]"


def _differences(saved: Any, now: Any, path: str = "config") -> list[str]:
    """Return the paths at which two plain values differ."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(set(saved) | set(now))
            for line in _differences(saved.get(key, _NONE), now.get(key, _NONE), f"{path}.{key}")
        ]
    return [] if saved == now else [f"{path} ({_short(saved)}, {_short(now)})"]


def _short(plain: Any) -> str:
    text = "none" if plain is _NONE else repr(plain)
    return text if len(text) <= 80 else f"{text[:76]} ..."
