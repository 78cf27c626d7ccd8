"""The weights of a file, one at a time: safetensors, torch's state dicts, Core ML packages."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purprune_adapters.checkpoints import Checkpoint

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def load_weights(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Return the tensors of a checkpoint by name, mapped where the format can be.

    Args:
        path: what :class:`Checkpoint` takes, or a file of ``torch.save`` that holds tensors in
            dicts, which is loaded with ``weights_only=True``.

    Raises:
        FileNotFoundError, ValueError: there is nothing, or something else.
    """
    path = Path(path)
    if path.suffix not in _TORCH or path.is_dir():
        return Checkpoint(path)
    if not path.exists():
        raise FileNotFoundError(f"Expected the file {path}; it is not there.")
    try:
        found = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"Expected tensors in dicts, saved by torch.save, in {path}; {_why(str(error))}"
        ) from None
    tensors = dict(_flat("", found))
    if not tensors:
        raise ValueError(f"Expected tensors in dicts in {path}; got a {type(found).__name__}.")
    return tensors


def _why(error: str) -> str:
    """Say why torch did not load a file; its own advice, to run what is in it, is left out."""
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", error)
    if found:
        return (
            f"it holds an object, {found[1]}, not a state dict alone. Save model.state_dict() "
            f"instead."
        )
    return "it is damaged, or was not saved by torch.save."


def iter_weights(path: str | os.PathLike[str]) -> Iterator[tuple[str, Tensor, str]]:
    """Yield name, values and how they are stored of each floating-point tensor.

    Takes an ``.mlpackage`` too, which coremltools is needed for.
    """
    path = Path(path)
    if path.suffix == ".mlpackage":
        yield from _of_package(path)
        return
    weights = load_weights(path)
    shapes = weights.shapes() if isinstance(weights, Checkpoint) else weights
    for name, like in shapes.items():
        if like.is_floating_point():
            yield name, weights[name], "dense"


def _of_package(path: Path) -> Iterator[tuple[str, Tensor, str]]:
    from purprune_adapters.coreml.package import Package

    for stored in Package(path).stored():
        yield stored.name, torch.from_numpy(np.array(stored.array())), stored.kind


def _flat(prefix: str, found: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found, Tensor):
        yield prefix, found.detach()
    elif isinstance(found, Mapping):
        for key, item in found.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
