"""Scores against the formulas of their papers, written entry by entry."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from oracles import global_oracle, prune_oracle
from purprune import (
    LAMP,
    RIA,
    Fisher,
    Given,
    Gradient,
    Magnitude,
    Pattern,
    PruneConfig,
    Rule,
    ScoreContext,
    Unstructured,
    Wanda,
    compute_masks,
)
from purprune.layer_scores import _told_apart
from strategies import (
    any_values,
    exact_values,
    matrix_shapes,
    members,
    shapes,
    views,
    weights,
)

sizes = st.floats(0, 1e6, width=32)


def tensors(shape: tuple[int, ...], values: st.SearchStrategy[float]) -> st.SearchStrategy[Tensor]:
    n = math.prod(shape)
    drawn = st.lists(values, min_size=n, max_size=n)
    return drawn.map(lambda v: torch.tensor(v, dtype=torch.float32).reshape(shape))


def entries(weight: Tensor) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, weight.shape)))


def exactly(tensor: Tensor, index: tuple[int, ...] = ()) -> Fraction:
    return Fraction(tensor[index].item())


def context(name: str, **stats: Tensor) -> ScoreContext:
    return ScoreContext(name, 0, stats=stats)


@given(st.data())
def test_wanda_is_the_weight_times_the_norm_of_its_inputs(data):
    """Defends equation 1 of the paper, exactly in float64, for Linear and Conv weights."""
    w = data.draw(weights(matrix_shapes, exact_values, (torch.float32, torch.bfloat16)))
    assume(bool(w.isfinite().all()))
    norm = data.draw(tensors(tuple(w.shape[1:]), sizes))
    got = Wanda()(w, context("w", input_norm=norm))
    for index in entries(w):
        assert exactly(got, index) == abs(exactly(w, index)) * exactly(norm, index[1:])


@given(st.data(), st.sampled_from([0, 0.5, 1, 2.0]))
def test_ria_is_both_shares_of_the_weight_times_a_power_of_the_norm(data, power):
    """Defends the paper's equation by plain sums, all-zero channels and infinite weights."""
    w = data.draw(weights(matrix_shapes, exact_values, (torch.float32,)))
    norm = data.draw(tensors(tuple(w.shape[1:]), sizes))
    got = RIA(power)(w, context("w", input_norm=norm))
    finite = {i: abs(w[i].item()) for i in entries(w) if not math.isinf(w[i].item())}
    for i in entries(w):
        if i not in finite:
            assert math.isinf(got[i].item())
            continue
        column = sum(v for j, v in finite.items() if j[1:] == i[1:])
        row = sum(v for j, v in finite.items() if j[0] == i[0])
        share = sum(finite[i] / total for total in (column, row) if total)
        expected = share * norm[i[1:]].item() ** power
        assert got[i].item() == pytest.approx(expected, rel=1e-12)


@given(st.data(), st.integers(-80, 80))
def test_ria_and_lamp_do_not_change_with_the_scale_of_the_tensor(data, exponent):
    """Defends sums and squares that would leave float64: scores are shares."""
    w = data.draw(weights(matrix_shapes, exact_values, (torch.float64,)))
    norm = {"w": {"input_norm": torch.ones(w.shape[1:])}}
    for score in (RIA(), LAMP()):
        one, other = (score(v, context("w", **norm["w"])) for v in (w, w * 2.0 ** (12 * exponent)))
        assert torch.equal(one, other)


def lamp_oracle(weight: Tensor) -> Tensor:
    """Return ``w[u]**2 / sum of w[v]**2`` over all v at or after u, exactly."""
    flat = [Fraction(v) for v in weight.reshape(-1).tolist()]
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    found, rest = [Fraction(0)] * len(flat), Fraction(0)
    for u in reversed(order):
        rest += flat[u] ** 2
        found[u] = flat[u] ** 2 / rest if rest else Fraction(0)
    return torch.tensor([float(f) for f in found], dtype=torch.float64).reshape(weight.shape)


@given(weights(shapes, st.integers(-9, 9).map(float), (torch.float32, torch.float16)))
def test_lamp_is_the_share_of_what_is_left(w):
    """Defends the equation of the paper; shares of whole numbers are rounded once."""
    assert torch.equal(LAMP()(w, context("w")), lamp_oracle(w))


@given(members(shapes, st.integers(-9, 9).map(float)), st.integers(0, 100))
def test_lamp_prunes_all_tensors_by_their_shares(params, percent):
    """Defends the method as it is used: one count for all tensors."""
    config = PruneConfig(
        module_name_configs=dict.fromkeys(
            params, Rule(percent / 100, score="lamp", pattern=Unstructured(scope="global"))
        )
    )
    scores = {name: lamp_oracle(w) for name, w in params.items()}
    expected = global_oracle(scores, Unstructured(scope="global"), Fraction(percent, 100))
    got = compute_masks(params, 0, config)
    assert all(torch.equal(got[name], expected[name]) for name in params)


@given(weights(shapes, any_values), st.integers(0, 100))
def test_lamp_ranks_the_entries_of_one_tensor_as_magnitude_does(w, percent):
    """Defends the order where float64 would round scores together, or squares to 0 or inf."""
    params, target = {"w": w}, percent / 100
    masks = [
        compute_masks(params, 0, PruneConfig().set_module_name("w", Rule(target, score=score)))
        for score in (LAMP(), Magnitude())
    ]
    assert torch.equal(masks[0]["w"], masks[1]["w"])


def test_lamp_tells_entries_apart_that_differ_in_the_last_bit_or_in_their_place():
    """Defends the order against a sum that does not feel a single entry, and range against it."""
    one = torch.ones(5000, dtype=torch.float64)
    extremes = torch.tensor([1e300, 1e-300], dtype=torch.float64)
    near = torch.cat([torch.nextafter(one, 2 * one), one, extremes])
    got = LAMP()(near, context("w"))
    assert torch.equal(got.argsort(stable=True), near.argsort(stable=True))
    assert got.unique().numel() == near.numel()
    assert got.max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_scores_are_raised_by_single_bits(dtype):
    """Defends the least change that tells scores apart, also for devices without float64."""
    scores = torch.tensor([0.0, 0.25, 0.25, 0.2, 0.5], dtype=dtype)
    got = _told_apart(scores)
    assert bool((got[1:] > got[:-1]).all())
    assert torch.equal(got[[1, 4]], scores[[1, 4]])
    assert 0 < got[0] < 1e-40
    assert torch.allclose(got, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.5], dtype=dtype))


@given(st.data())
def test_fisher_gradient_and_given_are_their_formulas(data):
    """Defends w**2 * E[g**2], |g| and the statistic itself."""
    w = data.draw(weights(matrix_shapes, st.integers(-16, 16).map(lambda n: n / 8)))
    shape = tuple(w.shape)
    g = data.draw(tensors(shape, st.integers(-16, 16).map(lambda n: n / 8)))
    fisher = Fisher()(w, context("w", squared_gradient=g.square()))
    gradient = Gradient()(w, ScoreContext("w", 0, gradient=g))
    movement = Given("movement")(w, context("w", movement=-w * g))
    for i in entries(w):
        a, b = exactly(w, i), exactly(g, i)
        assert exactly(fisher, i) == a**2 * b**2
        assert exactly(gradient, i) == abs(b)
        assert exactly(movement, i) == -a * b


def test_fisher_of_one_gradient_prunes_as_taylor_does():
    """Defends that both are the same expansion of the loss."""
    generator = torch.Generator().manual_seed(3)
    w, g = torch.randn(2, 20, 30, generator=generator).unbind()
    config = [PruneConfig().set_module_name("w", Rule(0.7, score=s)) for s in ("fisher", "snip")]
    stats = {"w": {"squared_gradient": g.double().square()}}
    by_fisher = compute_masks({"w": w}, 0, config[0], stats=stats)
    by_taylor = compute_masks({"w": w}, 0, config[1], grads={"w": g})
    assert torch.equal(by_fisher["w"], by_taylor["w"])


def test_movement_prunes_what_moves_towards_zero():
    """Defends the sign: the sum of -w * g falls where training draws a weight to zero."""
    w, g = torch.tensor([[2.0, -2.0, 2.0, -2.0]]), torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    config = PruneConfig().set_module_name("w", Rule(0.5, score="movement"))
    mask = compute_masks({"w": w}, 0, config, stats={"w": {"movement": -w * g}})["w"]
    assert mask.tolist() == [[False, False, True, True]]


def test_rows_of_wanda_are_compared_within_each_output():
    """Defends the paper's comparison group, against the oracle of rows."""
    generator = torch.Generator().manual_seed(5)
    w, norm = torch.randn(6, 10, generator=generator), torch.rand(10, generator=generator)
    pattern = Pattern(group={"kind": "row", "dim": 0})
    config = PruneConfig().set_module_name("w", Rule(0.5, pattern=pattern, score="wanda"))
    mask = compute_masks({"w": w}, 0, config, stats={"w": {"input_norm": norm}})["w"]
    scores = w.abs().double() * norm.double()
    assert torch.equal(mask, prune_oracle(scores, pattern, Fraction(1, 2)))
    assert mask.sum(dim=1).tolist() == [5] * 6


@given(st.data())
def test_law_4_scores_of_layers_do_not_depend_on_strides_or_threads(data):
    """Defends sums in one order: the same bits from a view and with another thread count."""
    w = data.draw(weights(matrix_shapes, st.floats(-9, 9, width=32), (torch.float32,)))
    view = data.draw(views(w))
    norm = context("w", input_norm=torch.linspace(0, 3, w[0].numel()).view(w.shape[1:]))
    before = torch.get_num_threads()
    for score in (RIA(0.3), LAMP()):
        expected = score(w, norm)
        try:
            torch.set_num_threads(1 if before > 1 else 2)
            assert torch.equal(score(view, norm), expected)
        finally:
            torch.set_num_threads(before)
