"""Batches of data: how they reach a model, and a model that stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from purprune import ConfigError

Forward = Callable[[nn.Module, Any], Any]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and every module of it back as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def batches(model: nn.Module, loader: Iterable[Any], title: str, progress: bool) -> Iterator[Any]:
    """Yield the batches, on the model's device; raise when there is none."""
    device = next((param.device for param in model.parameters()), torch.device("cpu"))
    empty = True
    for batch in tracked(loader, title, progress):
        empty = False
        yield _moved(batch, device)
    if empty:
        raise ConfigError(
            "Expected at least one batch; the loader is empty. An iterator is used up by one pass: "
            "make a new one, or pass a list."
        )


def tracked(items: Iterable[Any], title: str, progress: bool) -> Iterator[Any]:
    """Yield the items beside a progress bar on standard error, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not (progress and console.is_terminal)) as bar:
        yield from bar.track(items, description=title)


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _moved(value, device) for key, value in batch.items()}
    if type(batch) in (tuple, list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch


def run(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch: a tensor, keyword arguments, or (input, target)."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list) and 1 <= len(batch) <= 2:
        return run(model, batch[0])
    got = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch)
    raise TypeError(
        f"Expected batches that are tensors, dicts or (input, target); got {got}. Pass "
        f"forward=lambda model, batch: model(...)."
    )


def target(batch: Any) -> Any:
    """Return what a loss compares with: of (input, target) the target, else the whole batch."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
