"""What a score may know beside the weight: gradients and statistics of the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from purprune.errors import ConfigError, near_misses
from purprune.ranking import refuse_nan


@dataclass(frozen=True)
class ScoreContext:
    """What a score may know beside the weight."""

    name: str
    """The parameter's dotted name."""
    step: int
    """The step for which masks are computed."""
    gradient: Tensor | None = None
    """The gradient given for this parameter, or None."""
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    """The statistics given for this parameter, by name; read them with :meth:`stat`."""

    @property
    def grad(self) -> Tensor:
        """The gradient, or else the statistic of that name; raises when none was given."""
        if self.gradient is None and "gradient" in self.stats:
            return self.stat("gradient")
        if self.gradient is None:
            raise ValueError(
                f"The score of {self.name!r} needs a gradient; got none. Pass "
                f"grads={{name: gradient}} to compute_masks, or call Pruner.step() after "
                f"loss.backward() and before zero_grad(); at step 0 there is none yet, so let the "
                f"schedule begin later: ConstantSparsity(begin_step=1)."
            )
        return self.gradient

    def stat(self, name: str, shape: Sequence[int] | None = None) -> Tensor:
        """Return a statistic of this parameter, detached; half precision comes in float32.

        Args:
            name: which one, such as ``"input_norm"``.
            shape: the shape that it must have; None: any.

        Raises:
            ValueError: it was not given.
            ConfigError: it is no tensor, or has another shape.
            NaNError: it holds NaN.
        """
        if name not in self.stats:
            raise ValueError(
                f"The score of {self.name!r} needs the statistic {name!r}; got none."
                f"{near_misses(name, self.stats)} Pass stats={{{self.name!r}: {{{name!r}: "
                f"tensor}}}} to compute_masks, or as Pruner(..., stats=...). Those of inputs "
                f"and gradients come from purprune_adapters.collect_stats(model, loader, config)."
            )
        found, what = self.stats[name], f"the statistic {name!r} of {self.name!r}"
        if not isinstance(found, Tensor):
            raise ConfigError(f"Expected a tensor as {what}; got {type(found).__name__}.")
        if shape is not None and tuple(found.shape) != tuple(shape):
            raise ConfigError(f"Expected {what} of shape {tuple(shape)}; got {tuple(found.shape)}.")
        refuse_nan(found, what)
        return full_precision(found.detach())


def full_precision(tensor: Tensor) -> Tensor:
    """Return bfloat16, float16 and smaller floats in float32; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, which holds products of float32 exactly, or what a device has (mps)."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in :func:`wide_dtype`."""
    return tensor.to(wide_dtype(tensor))


def wide_stat(weight: Tensor, context: ScoreContext, name: str, shape: Sequence[int]) -> Tensor:
    """Return a statistic that is finite and not below 0, in :func:`wide`, where the weight is.

    Raises:
        ConfigError: it is infinite or below 0, or what :meth:`ScoreContext.stat` raises.
    """
    found = wide(context.stat(name, shape).to(weight.device))
    bad = (found < 0) | found.isinf()
    if bool(bad.any()):
        raise ConfigError(
            f"Expected the statistic {name!r} of {context.name!r} finite and >= 0; got "
            f"{found[bad][0].item():g}."
        )
    return found
