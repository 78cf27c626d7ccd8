"""Scores of whole networks, against autograd and the theorems of their papers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from purprune import (
    ConfigError,
    ConstantSparsity,
    ExponentialDecay,
    PolynomialDecay,
    Rule,
    SelectionError,
    Unstructured,
    apply_masks,
    compute_masks,
    gradients,
    grasp_scores,
    iterative_masks,
    sparsity,
    synflow_scores,
)

GLOBAL = Unstructured(scope="global")
Params = dict[str, Tensor]


def perceptron(widths: list[int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"w{i}": (torch.randn(n, m, generator=generator) * (2 / m) ** 0.5).to(dtype)
        for i, (m, n) in enumerate(itertools.pairwise(widths))
    }


def forward(params: Params, x: Tensor) -> Tensor:
    """Return the outputs of a perceptron without biases; samples are columns."""
    *hidden, last = params.values()
    for w in hidden:
        x = (w @ x).relu()
    return last @ x


def flow(params: Params) -> Tensor:
    first = next(iter(params.values()))
    return forward(params, torch.ones(first.shape[1], 1, dtype=first.dtype))


def loss_of(inputs: int, outputs: int):
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(inputs, 32, generator=generator, dtype=torch.float64)
    y = torch.randint(0, outputs, (32,), generator=generator)
    return lambda params: torch.nn.functional.cross_entropy(forward(params, x).T, y)


def kept(masks: Params) -> list[int]:
    return [int(mask.sum()) for mask in masks.values()]


def paths(masks: Params) -> float:
    """Count the paths from inputs to outputs that masks leave."""
    return float(flow({name: mask.double() for name, mask in masks.items()}).sum())


@given(st.lists(st.integers(1, 6), min_size=3, max_size=6), st.integers(0, 2**31))
def test_synaptic_flow_is_conserved_from_layer_to_layer(widths, seed):
    """Defends the theorem of Tanaka et al.: the scores of every layer sum to R."""
    params = perceptron(widths, seed)
    total = flow({name: w.abs() for name, w in params.items()}).sum()
    for scores in synflow_scores(flow, params).values():
        assert float(scores.sum()) == pytest.approx(float(total), rel=1e-9)


def test_synflow_is_the_sum_over_paths():
    """Defends the score of each weight: all products of absolute weights along paths through it."""
    params = perceptron([2, 3, 2])
    a, b = (w.abs() for w in params.values())
    scores = synflow_scores(flow, params)
    for j, i in itertools.product(range(3), range(2)):
        through = sum(float(b[k, j]) * float(a[j, i]) for k in range(2))
        assert float(scores["w0"][j, i]) == pytest.approx(through, rel=1e-12)
    for k, j in itertools.product(range(2), range(3)):
        into = sum(float(b[k, j]) * float(a[j, i]) for i in range(2))
        assert float(scores["w1"][k, j]) == pytest.approx(into, rel=1e-12)


def test_iterative_synflow_leaves_no_layer_empty_where_one_step_does():
    """Defends the method at 99 %: one step of it empties layers, and SNIP breaks all paths."""
    widths = [32, 64, 64, 64, 64, 10]
    params, loss = perceptron(widths), loss_of(32, 10)

    def scores(masked: Params) -> Params:
        return synflow_scores(flow, masked)

    once = Rule(0.99, pattern=GLOBAL, score="synflow")
    often = Rule(0.99, ExponentialDecay(range(101)), pattern=GLOBAL, score="synflow")
    single, iterative = (
        iterative_masks(scores, params, rule, stat="synflow") for rule in (once, often)
    )
    assert sum(kept(single)) == sum(kept(iterative)) == 150
    assert min(kept(single)) == 0
    assert min(kept(iterative)) > 0
    assert paths(iterative) > 0
    snip = compute_masks(
        params, 0, Rule(0.995, pattern=GLOBAL, score="snip"), grads=gradients(loss, params)
    )
    magnitude = compute_masks(params, 0, Rule(0.995, pattern=GLOBAL))
    tighter = Rule(0.995, ExponentialDecay(range(101)), pattern=GLOBAL, score="synflow")
    assert paths(snip) == paths(magnitude) == 0
    assert paths(iterative_masks(scores, params, tighter, stat="synflow")) > 0


def test_grasp_is_the_weight_times_the_hessian_times_the_gradient():
    """Defends the product against the Hessian as it stands, over all tensors together."""
    params, loss = perceptron([3, 4, 2]), loss_of(3, 2)
    flat = torch.cat([w.reshape(-1) for w in params.values()])
    sizes = [w.numel() for w in params.values()]

    def of_flat(v: Tensor) -> Tensor:
        parts = v.split(sizes)
        return loss({n: p.view(w.shape) for (n, w), p in zip(params.items(), parts, strict=True)})

    hessian = torch.autograd.functional.hessian(of_flat, flat)
    gradient = torch.autograd.functional.jacobian(of_flat, flat)
    expected = flat * (hessian @ gradient)
    got = torch.cat([s.reshape(-1) for s in grasp_scores(loss, params).values()])
    assert torch.allclose(got, expected, rtol=1e-9, atol=1e-12)
    assert bool((expected < 0).any() and (expected > 0).any())


def test_grasp_keeps_what_carries_the_gradient():
    """Defends the sign: the paper removes the highest of -w * Hg, so that gradients stay large."""
    params, loss = perceptron([20, 30, 30, 5]), loss_of(20, 5)
    scores = grasp_scores(loss, params)
    good, bad = ({name: {"grasp": s * f} for name, s in scores.items()} for f in (1, -1))
    rule = Rule(0.3, pattern=GLOBAL, score="grasp")

    def norm_after(stats: dict[str, Params]) -> float:
        masks = compute_masks(params, 0, rule, stats=stats)
        found = gradients(loss, apply_masks(params, masks))
        return sum(float((g * masks[n]).square().sum()) for n, g in found.items())

    assert norm_after(good) > 2 * norm_after(bad)


def test_taylor_of_gradients_is_the_sensitivity_of_snip():
    """Defends |w * g| as |dL/dc| of a multiplier c = 1, by autograd on c."""
    params, loss = perceptron([5, 6, 3]), loss_of(5, 3)
    ones = {name: torch.ones_like(w).requires_grad_() for name, w in params.items()}
    loss({name: w * ones[name] for name, w in params.items()}).backward()
    grads = gradients(loss, params)
    for name, w in params.items():
        assert torch.allclose((w * grads[name]).abs(), ones[name].grad.abs(), rtol=1e-12)
    rule = Rule(0.5, pattern=GLOBAL, score="snip")
    sensitivity = {name: {"c": c.grad.abs()} for name, c in ones.items()}
    by_c = Rule(0.5, pattern=GLOBAL, score={"kind": "given", "stat": "c"})
    expected = compute_masks(params, 0, by_c, stats=sensitivity)
    got = compute_masks(params, 0, rule, grads=grads)
    assert all(torch.equal(got[name], expected[name]) for name in params)


def test_the_fold_over_a_schedule_is_written_out_here():
    """Defends iterative_masks: scores of masked parameters, masks that nest, every update once."""
    params, seen = perceptron([4, 6, 3]), []
    rule = Rule(0.8, PolynomialDecay([2, 5, 9]), 0.2, score={"kind": "given", "stat": "s"})

    def scores(masked: Params) -> Params:
        seen.append(masked)
        return {name: w.roll(len(seen)).abs() for name, w in masked.items()}

    got = iterative_masks(scores, params, rule, stat="s")
    masks: Params = {}
    for turn, step in enumerate((2, 5, 9), start=1):
        masked = apply_masks(params, masks)
        assert all(torch.equal(masked[name], seen[turn - 1][name]) for name in params)
        stats = {name: {"s": w.roll(turn).abs()} for name, w in masked.items()}
        masks = compute_masks(params, step, rule, prev=masks, stats=stats)
    assert len(seen) == 3
    assert all(torch.equal(got[name], masks[name]) for name in params)
    assert float(sparsity(got)) == pytest.approx(0.8, abs=0.05)


def test_parameters_that_are_no_floats_are_passed_on():
    """Defends closures that index or count with what a model keeps among its parameters."""
    params = {"w": torch.tensor([[3.0, -1.0]]), "at": torch.tensor([1, 0])}

    def loss(p: Params) -> Tensor:
        return p["w"][:, p["at"]].square()[0, 0]

    assert gradients(loss, params)["w"].tolist() == [[0, -2]]
    assert list(grasp_scores(loss, params)) == ["w"]
    assert synflow_scores(lambda p: p["w"][:, p["at"]], params)["w"].tolist() == [[3, 1]]


def test_saliency_is_pure_and_takes_parameters_that_require_grad():
    """Defends law 4: no .grad is left behind, no graph is kept, and nothing changes."""
    params = {name: w.requires_grad_() for name, w in perceptron([3, 4, 2]).items()}
    before = {name: w.detach().clone() for name, w in params.items()}
    loss = loss_of(3, 2)
    found = [gradients(loss, params), grasp_scores(loss, params), synflow_scores(flow, params)]
    for scores in found:
        assert all(not s.requires_grad for s in scores.values())
    again = [gradients(loss, params), grasp_scores(loss, params), synflow_scores(flow, params)]
    for name, w in params.items():
        assert w.grad is None
        assert torch.equal(w, before[name])
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, again, strict=True))


def test_synflow_computes_in_float64_whatever_the_weights_are():
    """Defends range: products of many layers of half weights are no numbers of half precision."""
    params = perceptron([4] + [64] * 12 + [2], dtype=torch.float16)
    scores = synflow_scores(flow, params)
    assert all(s.dtype == torch.float64 for s in scores.values())
    assert float(scores["w0"].sum()) > torch.finfo(torch.float16).max


def test_a_sum_over_paths_that_is_too_large_is_refused_with_the_way_out():
    """Defends the order of scores against inf."""
    params = {f"w{i}": torch.full((2, 2), 1e200, dtype=torch.float64) for i in range(3)}
    with pytest.raises(ValueError, match=r"finite SynFlow scores.*'w0'.*Divide the weights"):
        synflow_scores(flow, params)


@pytest.mark.parametrize("function", [gradients, grasp_scores])
def test_a_loss_that_is_no_number_is_refused(function):
    """Defends against a loss for each sample, or a model's output."""
    params = {"w": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"a loss that is one number; got \(2, 3\). Take its mean"):
        function(lambda p: p["w"], params)
    with pytest.raises(ValueError, match="a loss that is one number; got float"):
        function(lambda p: 0.5, params)


def test_the_fold_says_what_it_cannot_do():
    """Defends against masks that ignore the scores, or have no last update."""
    params = perceptron([2, 3, 2])

    def scores(masked: Params) -> Params:
        return synflow_scores(flow, masked)

    with pytest.raises(ConfigError, match=r"score reads 'synflow'; got Magnitude\(\) for 'w0'"):
        iterative_masks(scores, params, Rule(0.5), stat="synflow")
    endless = Rule(schedule=lambda step: 0.5, score="synflow")
    with pytest.raises(ConfigError, match="schedule with an end for 'w0'; got a callable"):
        iterative_masks(scores, params, endless, stat="synflow")
    rule = Rule(0.5, ConstantSparsity(3), score="synflow")
    with pytest.raises(ValueError, match="'w1' needs the statistic 'synflow'; got none"):
        iterative_masks(lambda p: {"w0": p["w0"].abs()}, params, rule, stat="synflow")
    with pytest.raises(SelectionError, match="matches nothing"):
        iterative_masks(scores, params, {"module_name_configs": {"x": {}}}, stat="synflow")


def test_nan_in_a_computed_score_is_named():
    """Defends law 8 where a loss diverged."""
    params = {"w": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="statistic 's' of 'w'; got 4 NaN"):
        iterative_masks(
            lambda p: {"w": p["w"] * math.nan},
            params,
            Rule(0.5, score={"kind": "given", "stat": "s"}),
            stat="s",
        )
