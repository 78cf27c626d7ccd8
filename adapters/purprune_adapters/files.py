"""The pruner's state in a safetensors file.

The flat form, for other readers: ``masks.<parameter>.bits`` (uint8, entry i in C order is bit
``i % 8`` of byte ``i // 8``, 1 = keep) and ``masks.<parameter>.shape`` (int64), and the same with
``floor.`` for masks that were given; dense weights and sums over the steps, where a rule asks for
them, are ``memory.<what>.<parameter>`` in floats. The metadata has one key, ``purprune``: a JSON
object of the plain values of :meth:`Pruner.state_dict`, ``step`` and ``config`` among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from purprune_adapters.checkpoint import PLAIN, TENSORS
from purprune_adapters.distributed import is_sharded
from purprune_adapters.places import check_folder
from purprune_adapters.pruner import Pruner

_KEY = "purprune"


def save_pruner(pruner: Pruner, filename: str | os.PathLike[str]) -> None:
    """Save step, masks and config in a safetensors file, masks at one bit per entry.

    It goes beside what ``safetensors.torch.save_model(model, ...)`` writes.

    Raises:
        TypeError: the first argument is no Pruner.
        ValueError: weights are in shards, which torch.distributed.checkpoint saves.
        OSError: the file can't be written.
        ImportError: safetensors is not installed; names the extra.
    """
    _refuse_no_pruner("save_pruner", pruner, filename)
    _refuse_shards(pruner)
    check_folder(filename)
    save_file, _, broken = _safetensors()
    state = pruner.state_dict(packed=True)
    tensors = {f"{part}.{key}": t for part in TENSORS for key, t in state[part].items()}
    plain = {key: state[key] for key in PLAIN}
    try:
        save_file(tensors, os.fspath(filename), metadata={_KEY: json.dumps(plain)})
    except broken as error:
        raise OSError(
            f"Expected a file that can be written at '{os.fspath(filename)}'; got {error}."
        ) from None


def load_pruner(pruner: Pruner, filename: str | os.PathLike[str]) -> None:
    """Load what :func:`save_pruner` saved, as :meth:`Pruner.load_state_dict` does.

    Raises:
        ValueError: the file is damaged, or of another config or other shapes; says what differs,
            and nothing is changed.
        TypeError: the first argument is no Pruner.
        ImportError: safetensors is not installed; names the extra.
    """
    _refuse_no_pruner("load_pruner", pruner, filename)
    _, safe_open, broken = _safetensors()
    try:
        with safe_open(os.fspath(filename), framework="pt") as file:
            metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except broken as error:
        raise ValueError(
            f"Expected a whole safetensors file in '{os.fspath(filename)}'; got {error}."
        ) from None
    pruner.load_state_dict(_state(metadata or {}, tensors, os.fspath(filename)))


def _refuse_no_pruner(call: str, pruner: object, filename: object) -> None:
    if not isinstance(pruner, Pruner) or not isinstance(filename, str | os.PathLike):
        raise TypeError(
            f"Expected {call}(pruner, filename); got {type(pruner).__name__} and "
            f"{type(filename).__name__}. The Pruner comes first."
        )


def _refuse_shards(pruner: Pruner) -> None:
    for name in pruner.resolved_config.module_name_configs:
        if is_sharded(pruner.model.get_parameter(name)):
            raise ValueError(
                f"Expected whole weights in save_pruner; {name!r} is in shards, of which no "
                f"process has all. Save the pruner with torch.distributed.checkpoint."
            )


def _state(metadata: Mapping[str, str], tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    try:
        plain = json.loads(metadata[_KEY])
    except (KeyError, ValueError, RecursionError):
        plain = None
    strangers = [key for key in tensors if key.partition(".")[0] not in TENSORS]
    if not isinstance(plain, dict) or strangers:
        raise ValueError(
            f"Expected a file of save_pruner in '{path}': tensors 'masks.*', 'floor.*', "
            f"'memory.*', and metadata with JSON at {_KEY!r}; got another one, or a damaged one."
        )
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in TENSORS}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    return {**plain, **parts}


def _safetensors() -> tuple[Any, Any, type[Exception]]:
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "Expected safetensors, in whose format the pruner's state is stored; install it with "
            '`pip install "purprune[safetensors]"`, or torch.save pruner.state_dict().'
        ) from error
    return save_file, safe_open, SafetensorError
