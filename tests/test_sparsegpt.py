"""SparseGPT: exact counts, the textbook's sequential solution, and smaller errors than without."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from purprune import NM, Channel, ConfigError, NaNError, Pattern, Rule, Unstructured, sparsegpt
from purprune.patterns import RowGroup, TransposableGroup

Matrix = NDArray[np.float64]
ROWS = Pattern(group=RowGroup(0))


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    """Return inputs whose features share a few causes, of scales that differ tenfold."""
    generator = torch.Generator().manual_seed(seed)
    causes = torch.randn(samples, max(1, features // 3), generator=generator, dtype=torch.float64)
    mix = torch.randn(causes.shape[1], features, generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-0.5, 0.5, features, dtype=torch.float64)
    return (causes @ mix + 0.3 * noise) * scales[torch.randperm(features, generator=generator)]


def layer(
    rows: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return a weight and the Hessian of correlated inputs."""
    x = correlated(4 * features + 8, features, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    return weight.to(dtype), x.T @ x


def damped(hessian: Tensor, damping: float) -> Matrix:
    h = hessian.double().numpy()
    return h + damping * np.diag(h).mean() * np.eye(len(h))


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """Return the squared error of each output over the inputs that made the Hessian."""
    difference = weight.double() - pruned.double()
    return ((difference @ hessian.double()) * difference).sum(1)


def sequential_solution(weight: Tensor, mask: Tensor, hessian: Matrix) -> Matrix:
    """Remove the masked entries from left to right; each time the OBS formula moves what is right.

    ``delta = -w[j] / [H_F^-1][j, j] * [H_F^-1][:, j]`` with H_F of the columns from j on, inverted
    anew for every column.
    """
    solved = weight.double().numpy().copy()
    for j in range(solved.shape[1]):
        inverse = np.linalg.inv(hessian[j:, j:])
        for row, keep in enumerate(mask[:, j].tolist()):
            if not keep:
                solved[row, j:] -= solved[row, j] / inverse[0, 0] * inverse[0]
                solved[row, j] = 0
    return solved


def reference(
    weight: Tensor, hessian: Matrix, cuts: list[int], k_of: Any
) -> tuple[Matrix, NDArray[np.bool_]]:
    """Decide masks where ``cuts`` say, in groups of ``k_of(start, stop)``, by a stable sort."""
    solved = weight.double().numpy().copy()
    keep = np.ones(solved.shape, dtype=bool)
    for start, stop in itertools.pairwise(cuts):
        pivots = [np.linalg.inv(hessian[j:, j:])[0, 0] for j in range(start, stop)]
        scores = solved[:, start:stop] ** 2 / np.array(pivots)
        rows, k = k_of(start, stop)
        scores = scores if rows else scores.reshape(1, -1)
        gone = np.argsort(scores, axis=1, kind="stable")[:, :k]
        part = np.ones(scores.shape, dtype=bool)
        np.put_along_axis(part, gone, False, axis=1)
        keep[:, start:stop] = part.reshape(-1, stop - start)
        mask = torch.ones(keep.shape, dtype=torch.bool)
        mask[:, start:stop] = torch.from_numpy(keep[:, start:stop])
        solved = sequential_solution(torch.from_numpy(solved), mask, hessian)
    return solved, keep


@pytest.mark.parametrize("block_size", [1, 3, 5, 128])
@pytest.mark.parametrize("damping", [0.0, 0.01, 0.5])
def test_masks_and_weights_are_those_of_the_formula_written_out(block_size: int, damping: float):
    """Defends the algorithm against a slow one that inverts a matrix for every column."""
    weight, hessian = layer(6, 11)
    pruned, mask = sparsegpt(
        weight.double(), hessian, Unstructured(), 0.6, block_size=block_size, damping=damping
    )
    cuts = [*range(0, 11, block_size), 11]
    share = Fraction(3, 5)
    wanted, keep = reference(
        weight,
        damped(hessian, damping),
        cuts,
        lambda start, stop: (False, math.floor(6 * stop * share) - math.floor(6 * start * share)),
    )
    assert np.array_equal(mask.numpy(), keep)
    np.testing.assert_allclose(pruned.numpy(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("block_size", [1, 4, 7, 128])
def test_nm_is_decided_group_by_group_whatever_the_block(block_size: int):
    """Defends N:M masks from weights that are up to date, the ragged tail, and uncut groups."""
    weight, hessian = layer(5, 14)
    pruned, mask = sparsegpt(weight.double(), hessian, NM(2, 4), block_size=block_size)
    wanted, keep = reference(
        weight, damped(hessian, 0.01), [0, 4, 8, 12, 14], lambda a, b: (True, (b - a) // 2)
    )
    assert np.array_equal(mask.numpy(), keep)
    np.testing.assert_allclose(pruned.numpy(), wanted, rtol=1e-8, atol=1e-10)


def test_rows_are_decided_block_by_block():
    """Defends the count of every row, and that it is spread over the blocks by floors."""
    weight, hessian = layer(5, 13)
    pruned, mask = sparsegpt(weight.double(), hessian, ROWS, 0.3, block_size=4)
    share = Fraction(3, 10)
    wanted, keep = reference(
        weight,
        damped(hessian, 0.01),
        [0, 4, 8, 12, 13],
        lambda a, b: (True, math.floor(b * share) - math.floor(a * share)),
    )
    assert np.array_equal(mask.numpy(), keep)
    np.testing.assert_allclose(pruned.numpy(), wanted, rtol=1e-8, atol=1e-10)
    assert (~mask).sum(1).tolist() == [3] * 5


def test_what_goes_first_is_made_up_for_as_least_squares_would():
    """Where all that goes lies left of all that stays, the sweep is the optimum of a solve."""
    weight, hessian = layer(4, 10)
    weight[:, :4] *= 1e-3  # so that these four go, in every row
    pruned, mask = sparsegpt(weight.double(), hessian, ROWS, 0.4, damping=0.0)
    assert (~mask).sum(0).tolist() == [4] * 4 + [0] * 6
    h, w = hessian.numpy(), weight.double().numpy()
    moved = w[:, 4:] + np.linalg.solve(h[4:, 4:], h[4:, :4] @ w[:, :4].T).T
    np.testing.assert_allclose(pruned[:, 4:].numpy(), moved, rtol=1e-8, atol=1e-12)


@given(
    rows=st.integers(1, 6),
    features=st.integers(1, 12),
    sparsity=st.one_of(st.integers(0, 100).map(lambda n: n / 100), st.floats(0, 1)),
    block_size=st.integers(1, 14),
    by_rows=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    ties=st.booleans(),
)
def test_counts_are_exact(
    rows: int,
    features: int,
    sparsity: float,
    block_size: int,
    by_rows: bool,
    dtype: torch.dtype,
    ties: bool,
):
    """Defends law 1 where masks are decided block by block: the parts add up to the floor."""
    weight, hessian = layer(rows, features, seed=rows * 100 + features, dtype=dtype)
    if ties:
        weight, hessian = weight.sign(), torch.eye(features)
    pattern = ROWS if by_rows else Unstructured()
    pruned, mask = sparsegpt(weight, hessian, pattern, sparsity, block_size=block_size)
    s = Fraction(str(sparsity))
    if by_rows:
        assert (~mask).sum(1).tolist() == [math.floor(features * s)] * rows
    else:
        assert int((~mask).sum()) == math.floor(rows * features * s)
    assert not pruned[~mask].any()
    assert mask.dtype == torch.bool
    assert pruned.dtype == dtype
    assert pruned.shape == mask.shape == weight.shape


@given(
    shape=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    m=st.integers(1, 5),
    data=st.data(),
)
def test_nm_counts_are_exact_along_every_input_dim(shape: list[int], m: int, data: st.DataObject):
    """Defends N:M of convolutions, whose groups are no neighbours in the flattened weight."""
    zeros, dim = data.draw(st.integers(0, m)), data.draw(st.integers(1, len(shape) - 1))
    matrix, hessian = layer(shape[0], math.prod(shape[1:]), seed=m)
    _, mask = sparsegpt(matrix.view(shape), hessian, NM(zeros, m, dim=dim), block_size=4)
    for group in mask.movedim(dim, -1).split(m, dim=-1):
        assert ((~group).sum(-1) == group.shape[-1] * zeros // m).all()


def test_a_convolution_is_the_matrix_of_its_patches():
    """Defends the order of a convolution's columns: channels of one place are N:M neighbours."""
    matrix, hessian = layer(3, 8 * 3)
    order = torch.arange(24).view(8, 3).T.flatten()  # (place, channel) as (channel, place)
    pruned, mask = sparsegpt(matrix.view(3, 8, 3), hessian, NM(2, 4))
    same, flat = sparsegpt(matrix[:, order], hessian[order][:, order], NM(2, 4))
    assert torch.equal(pruned.view(3, 24)[:, order], same)
    assert torch.equal(mask.view(3, 24)[:, order], flat)


def test_each_row_is_no_worse_than_its_mask_alone():
    """Defends the use of the update: the same mask on unchanged weights has the larger error."""
    weight, hessian = layer(16, 48)
    for pattern, sparsity in ((Unstructured(), 0.5), (NM(2, 4), None), (ROWS, 0.7)):
        pruned, mask = sparsegpt(weight, hessian, pattern, sparsity)
        alone = torch.where(mask, weight, 0)
        assert (error(weight, pruned, hessian) < error(weight, alone, hessian)).all()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_error_is_below_magnitude_and_below_weight_times_input(sparsity: float):
    """Defends the point of the method, on correlated inputs of different scales."""
    weight, hessian = layer(32, 64)
    pruned, mask = sparsegpt(weight, hessian, ROWS, sparsity)
    k = int((~mask).sum(1)[0])
    norms = hessian.diagonal().sqrt()
    errors = [float(error(weight, pruned, hessian).sum())]
    for scores in (weight.double().abs() * norms, weight.double().abs()):
        gone = scores.argsort(dim=1, stable=True)[:, :k]
        alone = weight.scatter(1, gone, 0)
        errors.append(float(error(weight, alone, hessian).sum()))
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[1]


def test_a_factor_of_the_hessian_changes_nothing():
    """Defends Hessians that are sums, means or twice either: powers of two move no bit."""
    weight, hessian = layer(6, 20)
    pruned, mask = sparsegpt(weight, hessian, Unstructured(), 0.5)
    for factor in (2.0**-60, 0.5, 2.0, 2.0**100):
        same = sparsegpt(weight, hessian * factor, Unstructured(), 0.5)
        assert torch.equal(pruned, same[0])
        assert torch.equal(mask, same[1])
    near, same_mask = sparsegpt(weight.double(), hessian / 3, Unstructured(), 0.5)
    assert torch.equal(mask, same_mask)
    torch.testing.assert_close(near.float(), pruned)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_calculated_in_full(dtype: torch.dtype):
    """Defends law 7: the mask of the upcast weight, and its values rounded once, at the end."""
    weight, hessian = layer(8, 24, dtype=dtype)
    pruned, mask = sparsegpt(weight, hessian, NM(2, 4))
    full, same = sparsegpt(weight.double(), hessian, NM(2, 4))
    assert torch.equal(mask, same)
    assert torch.equal(pruned, full.to(dtype))


def test_inputs_that_were_never_seen_are_pruned_first_and_else_left_alone():
    """Defends dead inputs without a special case: no error, exact counts, no weight invented."""
    weight, hessian = layer(6, 10)
    hessian[[2, 7]] = 0
    hessian[:, [2, 7]] = 0
    for damping in (0.0, 0.01):
        pruned, mask = sparsegpt(weight, hessian, ROWS, 0.1, damping=damping)
        assert (~mask).sum(0).tolist() == [0, 0, 6, 0, 0, 0, 0, 0, 0, 0]
        assert torch.equal(pruned, torch.where(mask, weight, 0))  # nothing to make up for
    pruned, mask = sparsegpt(weight, hessian, ROWS, 0.3)
    assert (~mask).sum(1).tolist() == [3] * 6
    assert not mask[:, [2, 7]].any()


def test_the_ends():
    """Defends law 6: nothing goes and not a bit moves, or everything goes."""
    weight, hessian = layer(5, 9)
    same, mask = sparsegpt(weight, hessian, Unstructured(), 0)
    assert torch.equal(same, weight)
    assert mask.all()
    none, mask = sparsegpt(weight, hessian, Unstructured(), 1.0)
    assert not none.any()
    assert not mask.any()
    empty, mask = sparsegpt(torch.zeros(0, 9), hessian, Unstructured(), 0.5)
    assert empty.shape == mask.shape == (0, 9)


def test_nothing_that_is_given_changes_and_views_give_the_same_bits():
    """Defends law 4 for weights and Hessians in another layout, of parameters too."""
    weight, hessian = layer(6, 12)
    before = weight.clone(), hessian.clone(), torch.random.get_rng_state()
    pruned, mask = sparsegpt(torch.nn.Parameter(weight), hessian, NM(2, 4))
    assert not pruned.requires_grad
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.equal(torch.random.get_rng_state(), before[2])
    again = sparsegpt(weight.T.contiguous().T, hessian.repeat(2, 2)[12:, :12], NM(2, 4))
    assert torch.equal(pruned, again[0])
    assert torch.equal(mask, again[1])


def _with(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = value
    return tensor


WEIGHT, HESSIAN = layer(4, 8)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((_with(WEIGHT, math.nan), HESSIAN), NaNError, "1 NaN of 32 entries"),
        ((_with(WEIGHT, math.inf), HESSIAN), ConfigError, "weight; got 1 infinite"),
        ((WEIGHT, _with(HESSIAN, math.nan)), NaNError, "the Hessian"),
        ((WEIGHT, _with(HESSIAN, math.inf)), ConfigError, "Hessian; got 1 infinite"),
        ((WEIGHT, torch.zeros(8, 8)), ConfigError, "got zeros alone"),
        ((WEIGHT, -HESSIAN), ConfigError, "positive definite with damping=0.01"),
        ((WEIGHT, HESSIAN - 1e3 * torch.eye(8)), ConfigError, "raise the damping"),
        ((WEIGHT, HESSIAN.triu()), ConfigError, "symmetric"),
        ((WEIGHT, HESSIAN[:4, :4]), ConfigError, r"shape \(8, 8\).*got \(4, 4\)"),
        ((WEIGHT, HESSIAN.bfloat16()), ConfigError, "float32 or better"),
        ((WEIGHT, HESSIAN.long()), TypeError, "tensor of floats as hessian"),
        ((WEIGHT[0], HESSIAN), ConfigError, "2 or more dims"),
        ((WEIGHT.to("meta"), HESSIAN), ConfigError, "meta"),
        ((WEIGHT, HESSIAN, Channel()), ConfigError, "Unstructured"),
        ((WEIGHT, HESSIAN, Unstructured(scope="global")), ConfigError, "Unstructured"),
        ((WEIGHT, HESSIAN, NM(2, 4, dim=0)), ConfigError, "along an input dim"),
        ((WEIGHT, HESSIAN, Pattern(group=TransposableGroup(2, 4))), ConfigError, "Unstructured"),
        ((WEIGHT, HESSIAN, NM(2, 4, dim=2)), ConfigError, "Expected a dim"),
        ((WEIGHT, HESSIAN, Pattern(group=RowGroup(1))), ConfigError, "rows along dim 0"),
        (
            (WEIGHT, HESSIAN, Unstructured(), None),
            ConfigError,
            "Expected a sparsity .* Write sparse",
        ),
        ((WEIGHT, HESSIAN, 0.5), TypeError, r"got float. Write .*hessian, Unstructured\(\), 0.5\)"),
        ((WEIGHT, HESSIAN, Rule(0.5)), TypeError, "Expected a pattern; got Rule. Write sparsegpt"),
        ((WEIGHT, HESSIAN, Unstructured(), 1.5), ConfigError, r"in \[0, 1\]; got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused(
    arguments: tuple[Any, ...], error: type[Exception], says: str
):
    """Defends one clear line with the way out, for everything that would give a wrong weight."""
    given = (*arguments, Unstructured(), 0.5)[: max(4, len(arguments))]
    given = given if len(arguments) != 3 else (*arguments, 0.5)
    with pytest.raises(error, match=says):
        sparsegpt(*given)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"block_size": 0}, "block_size"),
        ({"block_size": 1.5}, "block_size"),
        ({"damping": -0.1}, "damping"),
        ({"damping": math.nan}, "damping"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], says: str):
    """Defends against a sweep over no block and a Hessian made indefinite."""
    with pytest.raises(ConfigError, match=says):
        sparsegpt(WEIGHT, HESSIAN, Unstructured(), 0.5, **options)


def test_fewer_inputs_than_features_need_damping():
    """Defends against the inverse of a singular matrix, which floats would hide."""
    x = correlated(5, 8)
    with pytest.raises(ConfigError, match=r"more inputs than it has rows \(8\)"):
        sparsegpt(WEIGHT, x.T @ x, Unstructured(), 0.5, damping=0.0)
    pruned, _ = sparsegpt(WEIGHT, x.T @ x, Unstructured(), 0.5)
    assert pruned.isfinite().all()
