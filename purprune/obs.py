"""SparseGPT: prune a layer in one shot, and let the weights that stay make up for those that go.

The layer's inputs x come as the Hessian of its squared error, ``H = sum of x x^T``. Columns are
pruned from left to right; the error of each is spread over the columns to its right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from purprune.errors import ConfigError
from purprune.groups import EveryGroup, Layout, RowGroup, TensorGroup
from purprune.patterns import EntryUnit, Pattern
from purprune.ranking import count, keep_all_but_lowest, refuse_nan
from purprune.scoring import readable, refuse_parts
from purprune.values import exact

_CALL = "sparsegpt(weight, hessian, Unstructured(), 0.5)"


class Span(NamedTuple):
    """Columns whose mask is decided together, when the sweep comes to the first of them."""

    start: int
    stop: int
    rows: bool
    """Whether each row is a group by itself; else all rows are one."""
    sparsity: Fraction


@torch.no_grad()
def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    pattern: Pattern,
    sparsity: float | Fraction | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """Return a weight that is pruned and updated so that the layer's outputs change little.

    With ``H' = H + damping * mean(diag(H)) * I`` and ``U`` upper triangular, ``H'^-1 = U^T U``: the
    first entries by ``|w[i, j]| / U[j, j]`` go, and column after column
    ``w[i, j:] -= w[i, j] / U[j, j] * U[j, j:]`` where ``w[i, j]`` goes. Counts are exact: with one
    group for the tensor or for each row, of the columns up to c ``floor(rows * c * s)`` have gone
    when a block ends there; N:M decides each group of m when the sweep comes to it.

    Entries of an input that was never seen (``H[j, j] = 0``) cost nothing and go first; those that
    stay are as they were, where the authors' code zeroes them: so zeros are what the mask prunes.

    Args:
        weight: (out, in, ...), of floats; outputs along dim 0.
        hessian: (n, n) with n = in * ..., in the order of ``weight.flatten(1)``, of float32 or
            better. A factor changes nothing: a power of two no bit, another only the rounding.
        pattern: single entries in one group for the tensor, in rows along dim 0, or N:M along an
            input dim: ``Unstructured()``, ``Unstructured(scope="row")``, ``NM(2, 4)``.
        sparsity: the fraction of entries to prune; None means what the pattern sets.
        block_size: so many columns are updated at a time, and without N:M ranked together. With
            N:M it changes nothing but rounding: no group is cut.
        damping: what is added to the diagonal, as a share of its mean.

    Returns:
        The weight in its own dtype, zero where it is pruned, and the mask, True = keep. Arithmetic
        is in float64 (mps: float32) and takes ``16 * n**2 + 16 * weight.numel()`` bytes and some.
        Other numbers of threads may round otherwise in the last bits of the linear algebra.

    Raises:
        ConfigError: a shape, a pattern or an option does not fit, or the Hessian is not finite, not
            symmetric or, with the damping, not positive definite.
        NaNError: the weight or the Hessian holds NaN.

    Source: Frantar and Alistarh, "SparseGPT: Massive language models can be accurately pruned in
    one-shot", 2023 (arXiv:2301.00774), algorithm 1.

    >>> from purprune import NM
    >>> x = torch.tensor([[1.0, 1.0], [2.0, 2.0], [1.0, 1.1]])  # two inputs that are nearly equal
    >>> pruned, mask = sparsegpt(torch.tensor([[1.0, 2.0]]), x.T @ x, NM(1, 2), damping=1e-4)
    >>> mask.tolist(), f"{pruned[0, 1]:.1f}"  # one of them does the work of both
    ([[False, True]], '3.0')
    """
    _refuse_unfit(weight, hessian, block_size, damping)
    refuse_pattern(pattern, weight)
    share = _share(pattern, sparsity)
    order = _column_order(pattern, weight)
    blocks = _blocks(pattern, weight.shape, share, block_size)
    if weight.numel() == 0:
        return weight.detach().clone(), torch.ones_like(weight, dtype=torch.bool)
    wide = torch.float32 if weight.device.type == "mps" else torch.float64
    matrix = hessian.detach().to(weight.device, wide)[order][:, order]
    columns = readable("weight", weight).flatten(1).to(wide)[:, order].T.contiguous()
    factor, pivots = _inverse_factor(matrix, damping)
    kept = _sweep(columns, factor, pivots, blocks)
    back = torch.argsort(order)
    pruned, mask = (t[back].T.reshape(weight.shape) for t in (columns, kept))
    return pruned.to(weight.dtype), mask


def _sweep(
    columns: Tensor, factor: Tensor, pivots: Tensor, blocks: Sequence[Sequence[Span]]
) -> Tensor:
    """Prune and update the columns, which are overwritten; return which entries stay."""
    keep = torch.ones(columns.shape, dtype=torch.bool, device=columns.device)
    for block in blocks:
        start, stop = block[0].start, block[-1].stop
        errors = torch.zeros_like(columns[start:stop])
        for span in block:
            part = slice(span.start, span.stop)
            scores = (columns[part] / pivots[part, None]).T
            keep[part] = keep_all_but_lowest(scores, True, _layout(span), span.sparsity).T
            for j in range(span.start, span.stop):
                error = (columns[j] / pivots[j]).masked_fill(keep[j], 0)
                columns[j:stop] -= torch.outer(factor[j, j:stop], error)
                errors[j - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    columns.masked_fill_(~keep, 0)
    return keep


def _layout(span: Span) -> Layout:
    group = RowGroup(dim=0) if span.rows else TensorGroup()
    return group.layout((0, 0))


def _inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return U, upper triangular, for which U^T U is the inverse of the damped Hessian.

    And by what to divide the entries of each column: U's diagonal, for unseen inputs infinity.

    With rows and columns reversed a Cholesky factor is upper triangular: ``H = R R^T``, ``U =
    R^-1``. A power of two brings the diagonal's largest entry to [0.5, 1), so that a factor of the
    Hessian moves no bit and nothing leaves the range of the floats.
    """
    exponent = int(torch.frexp(hessian.diagonal().max()).exponent)
    scaled = torch.ldexp(hessian, torch.tensor(-exponent, device=hessian.device))
    scaled = (scaled + scaled.T) / 2
    unseen = scaled.diagonal() == 0
    scaled.diagonal().add_(damping * scaled.diagonal().mean()).masked_fill_(unseen, 1)
    flipped, failed = torch.linalg.cholesky_ex(scaled.flip(0, 1))
    noise = len(scaled) * torch.finfo(scaled.dtype).eps * scaled.diagonal().max()
    if int(failed) or bool(flipped.diagonal().square().min() <= noise):
        raise ConfigError(
            f"Expected a Hessian that is positive definite with damping={damping:g}; got one that "
            f"is not. Collect it from more inputs than it has rows ({len(scaled)}), or raise the "
            f"damping (the paper has 0.01)."
        )
    one = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    factor = torch.linalg.solve_triangular(flipped.flip(0, 1), one, upper=True)
    return factor, factor.diagonal().masked_fill(unseen, math.inf)


def _share(pattern: Pattern, sparsity: float | Fraction | None) -> Fraction:
    """Return the sparsity that is wanted, exactly."""
    wanted = pattern.target if sparsity is None else exact(sparsity)
    if wanted is None:
        raise ConfigError(
            f"Expected a sparsity with {pattern}, which sets none; got None. Write {_CALL}."
        )
    if not 0 <= wanted <= 1:
        raise ConfigError(f"Expected a sparsity in [0, 1]; got {sparsity}.")
    return wanted


def _column_order(pattern: Pattern, weight: Tensor) -> Tensor:
    """Return the columns of ``weight.flatten(1)`` in an order in which N:M groups are runs."""
    columns = torch.arange(math.prod(weight.shape[1:]), device=weight.device)
    if not isinstance(pattern.group, EveryGroup):
        return columns
    dim = pattern.group.dim % weight.dim() - 1
    return columns.view(weight.shape[1:]).movedim(dim, -1).flatten()


def _blocks(
    pattern: Pattern, shape: Sequence[int], sparsity: Fraction, block_size: int
) -> list[list[Span]]:
    """Return the spans of columns in which masks are decided, by the block that they are in."""
    columns, group = math.prod(shape[1:]), pattern.group
    if isinstance(group, EveryGroup):
        return _blocks_of_groups(group.m, shape[group.dim], columns, sparsity, block_size)
    rows = isinstance(group, RowGroup)
    members = 1 if rows else shape[0]
    blocks = []
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        gone, to_go = (count(members * c, sparsity) for c in (start, stop))
        share = Fraction(to_go - gone, max(members * (stop - start), 1))
        blocks.append([Span(start, stop, rows, share)])
    return blocks


def _blocks_of_groups(
    m: int, length: int, columns: int, sparsity: Fraction, block_size: int
) -> list[list[Span]]:
    """Return groups of m columns, cut anew every ``length``; blocks hold whole groups."""
    blocks: list[list[Span]] = []
    for line in range(0, columns, max(length, 1)):
        for start in range(line, line + length, m):
            span = Span(start, min(start + m, line + length), True, sparsity)
            if blocks and span.stop - blocks[-1][0].start <= block_size:
                blocks[-1].append(span)
            else:
                blocks.append([span])
    return blocks


def refuse_pattern(pattern: Pattern, weight: Tensor) -> None:
    """Raise for a pattern that the sweep over columns has no groups for."""
    if not isinstance(pattern, Pattern):
        raise TypeError(f"Expected a pattern; got {type(pattern).__name__}. Write {_CALL}.")
    group, shape = pattern.group, weight.shape
    fits = isinstance(group, TensorGroup) or (
        isinstance(group, RowGroup | EveryGroup) and group.layout(shape).order[0] == 0
    )
    if not fits or not isinstance(pattern.unit, EntryUnit):
        raise ConfigError(
            f"Expected single entries in one group, in rows along dim 0 or N:M along an input dim; "
            f"got {pattern}. SparseGPT has no other: write Unstructured(), NM(2, 4) or "
            f"Unstructured(scope='row'), or use compute_masks, which takes any pattern."
        )


def _refuse_unfit(weight: Tensor, hessian: Tensor, block_size: int, damping: float) -> None:
    for name, tensor in (("weight", weight), ("hessian", hessian)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"Expected a tensor of floats as {name}; got {got}.")
        refuse_parts(name, tensor)
        readable(name, tensor)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ConfigError(f"Expected block_size as an int >= 1; got {block_size!r}.")
    if not 0 <= damping < math.inf:
        raise ConfigError(f"Expected a finite damping >= 0; got {damping!r}.")
    if weight.dim() < 2:
        raise ConfigError(f"Expected a weight of 2 or more dims; got shape {tuple(weight.shape)}.")
    n = math.prod(weight.shape[1:])
    if hessian.shape != (n, n):
        raise ConfigError(
            f"Expected a Hessian of shape {(n, n)} for a weight of shape {tuple(weight.shape)}; "
            f"got {tuple(hessian.shape)}. It is the sum of x x^T over inputs x of {n} features."
        )
    _refuse_numbers(weight, hessian)


def _refuse_numbers(weight: Tensor, hessian: Tensor) -> None:
    """Raise where the values are none to calculate with."""
    for name, tensor in (("weight", weight), ("Hessian", hessian)):
        refuse_nan(tensor.detach(), f"the {name}")
        if bad := int(tensor.isinf().sum()):
            raise ConfigError(f"Expected finite numbers in the {name}; got {bad} infinite.")
    if hessian.itemsize < 4:
        raise ConfigError(
            f"Expected a Hessian of float32 or better; got {hessian.dtype}, in which sums over "
            f"inputs lose what they add. Sum it in float32."
        )
    if hessian.numel() == 0:
        return
    largest = hessian.abs().max()
    if bool((hessian - hessian.T).abs().max() > 1e-3 * largest):
        raise ConfigError("Expected a symmetric Hessian, the sum of x x^T; got another matrix.")
    if bool(largest == 0):
        raise ConfigError("Expected a Hessian of inputs that were seen; got zeros alone.")
