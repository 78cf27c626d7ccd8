"""Sensitivity of a module over a loader, and its picture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.func import functional_call

from purprune import PruneConfig, Rule, Sensitivity, mean_sensitivity, sensitivity
from purprune.sensitivities import as_levels
from purprune_adapters.resolve import resolve

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def measure_sensitivity(
    model: nn.Module,
    loss: Callable[[Any, Tensor], Tensor],
    batches: Iterable[Sequence[Any]],
    levels: Iterable[float | Fraction],
    config: PruneConfig | Rule | Mapping[str, Any],
    **options: Any,
) -> Sensitivity:
    """Return the mean :func:`purprune.sensitivity` of a module over batches, which stays as it is.

    Args:
        model: the module, in eval mode: dropout and running statistics make another loss each time.
        loss: ``loss(output, targets) -> scalar``, a mean, such as ``F.cross_entropy``.
        batches: pairs of an input and targets, such as a DataLoader; each counts by its targets.
        levels: sparsities in [0, 1], ascending.
        config: a config with rules by name, type or globally, as :class:`Pruner` takes.
        options: ``grads``, ``stats``, ``chunk_bytes`` and ``vectorize`` of ``sensitivity``.

    Raises:
        ValueError: the model is in training mode.
        SelectionError, ConfigError: as ``resolve`` and ``sensitivity`` do.

    >>> import torch
    >>> from torch.nn import functional as F
    >>> model = nn.Linear(2, 2, bias=False).eval()
    >>> _ = model.weight.data.copy_(torch.eye(2))
    >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
    >>> print(measure_sensitivity(model, F.cross_entropy, batches, [0.5, 1], Rule()))
    loss 0.3133 dense; with one tensor pruned to:
    parameter |    0.5 |      1
    ----------+--------+-------
    weight    | 0.3133 | 0.6931
    """
    if model.training:
        raise ValueError("Expected a model in eval mode; got one in training mode. Call .eval().")
    resolved, levels = resolve(model, config), as_levels(levels)
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss_fn(params: dict[str, Tensor], batch: Sequence[Any]) -> Tensor:
        return loss(functional_call(model, params, (batch[0],)), batch[1])

    return mean_sensitivity(
        sensitivity(loss_fn, params, batch, levels, resolved, weight=len(batch[1]), **options)
        for batch in batches
    )


def plot_sensitivity(curves: Sensitivity, axes: Axes) -> None:
    """Draw into matplotlib axes by how much the loss grows, a line for each tensor."""
    levels = [100 * float(level) for level in curves.levels]
    for name, losses in curves.losses.items():
        grown = {0.0: 0.0, **dict(zip(levels, (losses - curves.dense).tolist(), strict=True))}
        axes.plot([*grown], [*grown.values()], marker="o", markersize=4, linewidth=1.5, label=name)
    axes.set_xlabel("sparsity of that tensor alone, %")
    axes.set_ylabel("growth of the loss")
    axes.legend(frameon=False)
