"""Wrappers around a model: what is inside is pruned, under the names that the user gave."""

from __future__ import annotations

import sys

from torch import nn

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and ``torch.compile``."""
    while (inside := _inside(model)) is not None:
        model = inside
    return model


def _inside(model: nn.Module) -> nn.Module | None:
    inside: nn.Module | None = None
    if isinstance(model, _WRAPPERS):
        inside = model.module
    # Where nobody compiled anything, the compiler is not imported for this question.
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None and isinstance(model, compiler.OptimizedModule):
        inside = model._orig_mod
    return inside
