"""Scores that compare an entry with the rest of its layer, or with the layer's inputs.

Infinite weights rank highest and take no part in the sums of the others. Sums run in one order,
whatever the strides, the threads or the device.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import AfterValidator
from torch import Tensor

from purprune.context import ScoreContext, wide, wide_dtype, wide_stat
from purprune.units import exponent_of, unit_scores
from purprune.values import StrictFloat, StrictInt, value


@value
class Wanda:
    """``score = |w[i, j]| * ||x[j]||``: the weight times the norm of the inputs that it sees.

    Needs the statistic ``input_norm``, of shape ``weight.shape[1:]``: the L2 norm of each input
    feature over all tokens or patches, for layers with their outputs along dim 0. The paper
    compares within each output: use it with rows as groups,
    ``Pattern(group={"kind": "row", "dim": 0})``, or with ``NM``.

    Source: Sun et al., "A simple and effective pruning approach for large language models", 2023
    (arXiv:2306.11695), equation 1.

    >>> context = ScoreContext("w", step=0, stats={"input_norm": torch.tensor([8.0, 1.0])})
    >>> Wanda()(torch.tensor([[1.0, -3.0]]), context)
    tensor([[8., 3.]], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ("input_norm",)
    elementwise: ClassVar[bool] = False
    kind: Literal["wanda"] = field(default="wanda", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return ``|weight| * input_norm`` in float64 (mps: float32)."""
        return wide(weight).abs() * _input_norm(weight, context)


def _not_negative(power: float) -> float:
    if not 0 <= power < math.inf:
        raise ValueError(f"expected a power >= 0; got {power!r}.")
    return power


@value
class RIA:
    """The weight relative to its input and its output channel, times the norm of its inputs.

    ``score = (|w[i, j]| / sum_i |w[i, j]| + |w[i, j]| / sum_j |w[i, j]|) * ||x[j]|| ** power``,
    so that no channel is pruned as a whole because its weights are small. ``i`` runs along dim 0,
    ``j`` along all other dims together. In a channel of zeros the share is 0. Needs the statistic
    ``input_norm``, as :class:`Wanda` does; the paper uses it with ``NM`` and with rows as groups.

    Source: Zhang et al., "Plug-and-play: an efficient post-training pruning method for large
    language models", ICLR 2024; ``power`` is its ``a``.

    >>> context = ScoreContext("w", step=0, stats={"input_norm": torch.tensor([4.0, 1.0])})
    >>> RIA()(torch.tensor([[1.0, -3.0], [1.0, 0.0]]), context)
    tensor([[1.5000, 1.7500],
            [3.0000, 0.0000]], dtype=torch.float64)
    """

    power: Annotated[StrictInt | StrictFloat, AfterValidator(_not_negative)] = 0.5
    needs: ClassVar[tuple[str, ...]] = ("input_norm",)
    elementwise: ClassVar[bool] = False
    kind: Literal["ria"] = field(default="ria", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return the sum of both shares times ``input_norm ** power`` in float64 (mps: float32)."""
        norm = _input_norm(weight, context)
        if weight.numel() == 0:
            return wide(weight)
        infinite = weight.isinf()
        sizes = wide(weight).abs().masked_fill(infinite, 0)
        _scale_(sizes, exponent_of(sizes))  # the largest is 1 or less: no sum leaves float64
        column = [n if dim == 0 else 1 for dim, n in enumerate(weight.shape)]
        row = [1 if dim == 0 else n for dim, n in enumerate(weight.shape)]
        share = _share(sizes, column) + _share(sizes, row)
        return (share * _power(norm, self.power)).masked_fill(infinite, math.inf)


def _input_norm(weight: Tensor, context: ScoreContext) -> Tensor:
    """Return the norm of the input that each entry sees: of shape ``weight.shape[1:]``.

    Or of as many dims as the weight, where an extent of 1 is for the whole dim, for layers whose
    outputs are not along dim 0 or do not all see the same inputs.
    """
    given, shape = context.stats.get("input_norm"), weight.shape[1:]
    if isinstance(given, Tensor) and given.dim() == weight.dim():
        fits = all(n in (1, whole) for n, whole in zip(given.shape, weight.shape, strict=True))
        shape = given.shape if fits else shape
    return wide_stat(weight, context, "input_norm", shape)


def _share(sizes: Tensor, block: list[int]) -> Tensor:
    """Return what each entry has of the sum over its block."""
    total = unit_scores(sizes, block, "l1")
    return torch.where(total > 0, sizes / total, 0)


def _power(norm: Tensor, power: float) -> Tensor:
    """Raise to a power by numpy in one thread: vectors of torch round by where they begin."""
    raised = np.power(norm.cpu().contiguous().numpy(), power)
    return torch.as_tensor(raised, dtype=norm.dtype, device=norm.device)


@value
class LAMP:
    """``score = w[u]**2 / sum of w[v]**2`` over all v that come at or after u in the tensor.

    The order is that of magnitude and flat index. Within a tensor LAMP so prunes by magnitude, and
    between tensors by the share of what is left: use it with ``scope="global"``. No tensor loses
    its largest entry before all others lost all but theirs. Zeros have the score 0.

    Scores of one tensor are told apart where float64 would round them together: masks within a
    tensor are those of magnitude, whatever its size and range.

    Source: Lee et al., "Layer-adaptive sparsity for the magnitude-based pruning", ICLR 2021
    (arXiv:2010.07611).

    >>> LAMP()(torch.tensor([-3.0, 1.0, 0.0, 1.0]), ScoreContext("w", step=0))
    tensor([1.0000, 0.0909, 0.0000, 0.1000], dtype=torch.float64)
    """

    needs: ClassVar[tuple[str, ...]] = ()
    elementwise: ClassVar[bool] = False
    kind: Literal["lamp"] = field(default="lamp", repr=False, kw_only=True)

    def __call__(self, weight: Tensor, context: ScoreContext) -> Tensor:
        """Return scores in [0, 1], of infinite weights inf, in float64 (mps: float32)."""
        sizes = weight.detach().reshape(-1).cpu().abs()
        order = _order(sizes)
        ranked = sizes[order].double().numpy()
        first, last = ranked.searchsorted(0, "right"), ranked.searchsorted(math.inf)
        if first < last:
            shares = ranked[first:last]  # infinite ones and zeros have their scores
            _scale_(shares, -math.frexp(shares[-1])[1])
            shares *= shares
            shares /= shares[::-1].cumsum()[::-1]
        scores = torch.from_numpy(ranked).to(wide_dtype(weight))
        scores[first:last] = _told_apart(scores[first:last])
        found = torch.empty_like(scores).scatter_(0, order, scores)
        return found.to(weight.device).view(weight.shape)


def _order(sizes: Tensor) -> Tensor:
    """Return the stable order of numbers that are not below 0."""
    if sizes.dtype != torch.float32 or len(sizes) >= 1 << 32:
        return sizes.argsort(stable=True)
    # The bits of such floats order like them. With the index behind the bits no two are equal, and
    # numpy's sort, which is not stable and ten times as fast, gives the stable order.
    keys = sizes.view(torch.int32).numpy().astype(np.int64) << 32
    keys |= np.arange(len(keys))
    keys.sort()
    return torch.from_numpy(keys & 0xFFFFFFFF)


def _scale_(sizes: Any, exponent: int) -> None:
    """Multiply in place by a power of two, in two factors, each of which is a float."""
    sizes *= 2.0 ** (exponent // 2)
    sizes *= 2.0 ** (exponent - exponent // 2)


def _told_apart(scores: Tensor) -> Tensor:
    """Raise scores to the next floats where they would not rise strictly, the first above 0.

    Positive floats order like their bits: ``bits[i] = max(bits[i], bits[i - 1] + 1)``.
    """
    word = torch.int64 if scores.dtype == torch.float64 else torch.int32
    at = torch.arange(len(scores), dtype=word)
    bits = scores.view(word).clamp_min(1) - at
    return (bits.cummax(0).values + at if len(scores) else bits).view(scores.dtype)
