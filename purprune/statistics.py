"""Statistics that grow with each step of a training, for scores that look back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from purprune.context import full_precision

ACCUMULATED: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "movement": lambda weight, grad: -weight * grad,
    "squared_gradient": lambda weight, grad: grad * grad,
}
"""What each statistic gains in a step, from the weight and its gradient before the step."""


@torch.no_grad()
def accumulate(
    stats: Mapping[str, Tensor], weight: Tensor, grad: Tensor | None
) -> dict[str, Tensor]:
    """Return the statistics of one parameter after a step more; a step without gradient adds 0.

    ``movement`` is the sum of ``-w * g``: it falls where training draws a weight to zero (Sanh et
    al., 2020, arXiv:2005.07683). ``squared_gradient`` is the sum of ``g**2``, which orders entries
    as its mean does. Sums are float32 or better.

    >>> start = {"movement": torch.zeros(2)}
    >>> accumulate(start, torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
    {'movement': tensor([-1.,  3.])}
    """
    if grad is None:
        return dict(stats)
    weight, grad = full_precision(weight.detach()), full_precision(grad.detach())
    return {stat: total + ACCUMULATED[stat](weight, grad) for stat, total in stats.items()}
