"""Repair of a pruned network by data without labels: batch norms, and what the dense one said."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

from purprune_adapters import Pruner


@torch.no_grad()
def renew_norms(model: nn.Module, inputs: Tensor, batch: int = 64) -> None:
    """Measure the means and variances of the batch norms anew, since pruning has moved them."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    model.train()
    for x in torch.split(inputs, batch):
        model(x)
    model.eval()
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def tune(
    model: nn.Module, pruner: Pruner, inputs: Tensor, said: Tensor, steps: int, batch: int = 32
) -> None:
    """Train what is left to say what the dense network ``said``; norms hold what they measured."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pairs = list(zip(torch.split(inputs, batch), torch.split(said, batch), strict=True))
    for step in range(steps):
        x, wanted = pairs[step % len(pairs)]
        optimizer.zero_grad()
        torch.autograd.backward(F.binary_cross_entropy(model(x), wanted))
        optimizer.step()
        pruner.step()
        schedule.step()
