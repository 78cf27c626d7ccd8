"""Permutations of channels, in which N:M pruning keeps more.

Which channels are neighbours is an accident of training. With its input channels in another order,
and the outputs of the layers before it in the same one, a network computes what it did; but other
entries compete in the groups of N:M. :func:`search_permutation` looks for an order;
:func:`purprune.permuting.permute_inputs` puts a network into it, before anything is pruned.

Source: Pool and Yu, "Channel Permutations for N:M Sparsity", 2021: exchanges of channels between
groups by greedy choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from purprune.masks import compute_masks
from purprune.patterns import NM
from purprune.ranking import refuse_nan
from purprune.rules import Rule

_LEAST = 1e-9
"""The part of the kept sum by which an exchange has to raise it, so that it is no rounding."""


@torch.no_grad()
def kept_magnitude(weight: Tensor, zeros: int, m: int, *, dim: int = 1) -> float:
    """Return the sum of ``|weight|`` that ``NM(zeros, m, dim=dim)`` keeps, in float64.

    >>> kept_magnitude(torch.tensor([[4.0, 3.0, 1.0, 2.0]]), 1, 2)
    6.0
    """
    keep = compute_masks({"weight": weight}, 0, Rule(pattern=NM(zeros, m, dim=dim)))["weight"]
    return float(torch.where(keep, weight.detach().double().abs(), 0.0).sum())


@torch.no_grad()
def search_permutation(
    weight: Tensor,
    zeros: int,
    m: int,
    *,
    dim: int = 1,
    score: Tensor | None = None,
    rounds: int = 100,
    sample: int = 1024,
) -> Tensor:
    """Return an order of the channels along ``dim`` in which N:M keeps more, never less.

    In each round every group of ``m`` channels looks for the exchange of one of its channels with
    one of another group's that keeps the most; the best of these exchanges are made, one for each
    group, until none is left. That is no optimum of all orders: where there are two groups of two
    it is, elsewhere it is one that no single exchange improves. A tail of channels that ``m`` does
    not divide stays where it is. Of equal exchanges the first is made: the same weights give the
    same order.

    Args:
        weight: of two or more dims; all others than ``dim`` are rows, each of which is pruned.
        zeros: how many of every ``m`` go, as in :func:`NM`.
        m: the size of groups.
        dim: the dim of the channels: 1 for the inputs of a Linear or a convolution.
        score: what is to be kept, shaped like the weight; None: the magnitude.
        rounds: at most so many.
        sample: of more rows so many are looked at, evenly spread. The order that is found is held
            against the present one on all rows. Time grows as channels * channels * rows.

    Returns:
        The order, int64: ``weight.index_select(dim, order)`` is the weight in it. It is 0, 1, 2 ...
        where no better one was found.

    Raises:
        ConfigError: zeros, m or dim are impossible.
        NaNError: the score holds NaN.
        ValueError: the score has another shape, or holds infinities.

    >>> weight = torch.tensor([[5.0, 4.0, 0.0, 1.0], [0.0, 3.0, 1.0, 6.0]])
    >>> order = search_permutation(weight, 1, 2)
    >>> order, kept_magnitude(weight, 1, 2), kept_magnitude(weight.index_select(1, order), 1, 2)
    (tensor([2, 1, 0, 3]), 15.0, 18.0)
    """
    score = _checked(weight, weight if score is None else score, zeros, m, dim)
    columns = score.detach().double().abs().movedim(dim, 0).flatten(1)
    same = torch.arange(len(columns), device=weight.device)
    whole = len(columns) - len(columns) % m
    if zeros in (0, m) or whole <= m or not columns.numel():
        return same
    step = -(-columns.shape[1] // sample)
    found = _exchanged(columns[:whole, ::step].contiguous(), m - zeros, m, rounds)
    order = torch.cat([found, same[whole:]])
    before, after = (_kept(columns[o[:whole]], m - zeros, m).sum() for o in (same, order))
    return order if float(after) > float(before) * (1 + _LEAST) else same


def _checked(weight: Tensor, score: Tensor, zeros: int, m: int, dim: int) -> Tensor:
    NM(zeros, m, dim=dim).group.layout(weight.shape)  # raises
    if score.shape != weight.shape:
        raise ValueError(
            f"Expected scores of shape {tuple(weight.shape)}; got {tuple(score.shape)}."
        )
    refuse_nan(score, "the score")
    if bool(score.isinf().any()):
        raise ValueError("Expected finite scores to search an order; got an infinity.")
    return score


def _kept(columns: Tensor, stay: int, m: int) -> Tensor:
    """Return the sum that each group of m neighbours keeps: of every row the highest."""
    groups = columns.view(-1, m, columns.shape[1])
    return groups.sort(dim=1, descending=True).values[:, :stay].sum(dim=(1, 2))


def _exchanged(columns: Tensor, stay: int, m: int, rounds: int) -> Tensor:
    """Return the order after all exchanges; ``columns`` are the channels, each with its rows."""
    order = torch.arange(len(columns), device=columns.device)
    columns, kept = columns.clone(), _kept(columns, stay, m)
    groups = torch.arange(len(kept), device=columns.device)
    least = float(kept.sum()) * _LEAST
    instead = _instead(columns, groups, stay, m)
    for _ in range(rounds):
        pairs = _best_pairs(instead, kept, m, least)
        if not pairs.numel():
            break
        one, other = pairs[:, 0], pairs[:, 1]
        for what in (order, columns, instead.T):  # channels move, and what they are worth elsewhere
            what[one], what[other] = what[other], what[one].clone()
        changed = (pairs.flatten() // m).sort().values
        kept[changed] = _kept(_of(columns, changed, m), stay, m)
        slots = (changed[:, None] * m + torch.arange(m, device=changed.device)).flatten()
        instead[slots] = _instead(columns, changed, stay, m)
    return order


def _of(columns: Tensor, groups: Tensor, m: int) -> Tensor:
    return columns.view(-1, m, columns.shape[1])[groups].flatten(0, 1)


def _instead(columns: Tensor, groups: Tensor, stay: int, m: int) -> Tensor:
    """Return what a group keeps when a slot of it holds any other channel: slots x channels.

    Without the slot a row keeps its ``stay - 1`` highest, and of the next one and the newcomer x
    the higher: ``max(t, x) = (t + x + |t - x|) / 2``, where the last is an L1 distance.
    """
    members = _of(columns, groups, m).view(len(groups), m, -1)
    own = []
    for slot in range(m):
        others = [i for i in range(m) if i != slot]
        own.append(members[:, others].sort(dim=1, descending=True).values)
    ranked = torch.stack(own, dim=1).flatten(0, 1)  # slots x (m - 1) x rows
    sure, next_ = ranked[:, : stay - 1].sum(dim=(1, 2)), ranked[:, stay - 1]
    apart = torch.cdist(next_, columns, p=1.0)
    return sure[:, None] + (next_.sum(dim=1)[:, None] + columns.sum(dim=1) + apart) / 2


def _best_pairs(instead: Tensor, kept: Tensor, m: int, least: float) -> Tensor:
    """Return the slots to exchange: for each group at most one, the best gains first."""
    own = kept.repeat_interleave(m)
    gains = instead + instead.T - own - own[:, None]
    group = torch.arange(len(own), device=own.device) // m
    gains[group == group[:, None]] = -torch.inf
    best, at = gains.view(len(kept), -1).max(dim=1)
    slots = [(g * m + a // len(own), a % len(own)) for g, a in enumerate(at.tolist())]
    free, pairs = set(range(len(kept))), []
    for g in torch.sort(best, descending=True, stable=True).indices.tolist():
        other = slots[g][1] // m
        if float(best[g]) > least and g in free and other in free:
            free -= {g, other}
            pairs.append(slots[g])
    return torch.tensor(pairs, dtype=torch.int64, device=own.device).view(-1, 2)
