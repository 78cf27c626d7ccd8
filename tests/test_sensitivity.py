"""The losses of tensors pruned alone: against the plain loop, in chunks, pure, and refused."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from purprune import (
    NM,
    Channel,
    ConfigError,
    NaNError,
    PolynomialDecay,
    PruneConfig,
    Rule,
    SelectionError,
    Sensitivity,
    Unstructured,
    apply_masks,
    compute_masks,
    mean_sensitivity,
    sensitivity,
)

MODEL = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
SHAPES = {name: p.shape for name, p in MODEL.named_parameters()}
PATTERNS = [Unstructured(), Channel(), NM(2, 4), Unstructured(scope="global")]
levels_of = st.sets(st.integers(0, 20).map(lambda n: n / 20), min_size=1, max_size=5).map(sorted)


def loss_fn(params, batch):
    return functional_call(MODEL, params, batch).square().mean()


def _case(seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return params, torch.randn(7, 6, generator=generator)


def _bits(tensors):
    return [tensor.clone() for tensor in tensors]


@given(st.integers(0, 99), levels_of, st.sampled_from(PATTERNS), st.sampled_from([0, 250, 1 << 28]))
def test_every_loss_is_that_of_masks_for_one_tensor_alone(seed, levels, pattern, chunk_bytes):
    """Defends the definition, whatever the chunk; vmap may round in the last bits."""
    params, batch = _case(seed)
    found = sensitivity(
        loss_fn, params, batch, levels, Rule(pattern=pattern), chunk_bytes=chunk_bytes
    )
    assert found.levels == tuple(Fraction(str(level)) for level in levels)
    for name in ("0.weight", "2.weight"):
        for level, loss in zip(levels, found.losses[name].tolist(), strict=True):
            alone = Rule(schedule=lambda step, s=level: s, pattern=pattern)
            masks = compute_masks(params, 0, PruneConfig().set_module_name(name, alone))
            expected = float(loss_fn(apply_masks(params, masks), batch))
            assert loss == pytest.approx(expected, rel=1e-5)
            if bool(masks[name].all()):
                assert loss == found.dense


@pytest.mark.parametrize("chunk_bytes", [0, 130, 1 << 28])
def test_without_vmap_the_losses_are_the_plain_loops_to_the_bit(chunk_bytes):
    """Defends the loop, which chunks must not change at all."""
    params, batch = _case()
    found = sensitivity(
        loss_fn, params, batch, [0, 0.3, 1], Rule(), chunk_bytes=chunk_bytes, vectorize=False
    )
    for name, curve in found.losses.items():
        for level, loss in zip([0.0, 0.3, 1.0], curve.tolist(), strict=True):
            masks = compute_masks(params, 0, PruneConfig().set_module_name(name, Rule(level)))
            assert loss == float(loss_fn(apply_masks(params, masks), batch))
    assert found.dense == float(loss_fn(params, batch))


def test_measuring_changes_nothing():
    """Defends law 4: no argument, no gradient, no random state."""
    params, batch = _case()
    leaves = {name: p.requires_grad_() for name, p in params.items()}
    before, state = _bits([*leaves.values(), batch]), torch.get_rng_state()
    one, two = (sensitivity(loss_fn, leaves, batch, [0.2, 0.9], Rule()) for _ in range(2))
    assert one == two
    assert not any(curve.requires_grad for curve in one.losses.values())
    assert all(map(torch.equal, [*leaves.values(), batch], before))
    assert all(p.grad is None for p in leaves.values())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rule_of_each_tensor_is_its_own_and_its_target_and_schedule_do_not_matter():
    """Defends what a level stands in for."""
    params, batch = _case()
    gradual = Rule(0.7, PolynomialDecay(range(5, 50, 5)), initial_sparsity=0.1, pattern=Channel())
    cfg = PruneConfig().set_module_name("2", gradual)
    plain = PruneConfig().set_module_name("2", Rule(pattern=Channel()))
    found = sensitivity(loss_fn, params, batch, [0.5], cfg)
    assert found == sensitivity(loss_fn, params, batch, [0.5], plain)
    assert list(found.losses) == ["2.weight"]


def test_scores_that_need_gradients_and_statistics_get_them():
    """Defends that both are passed on."""
    params, batch = _case()
    cfg = PruneConfig().set_module_name("0", Rule(score="taylor"))
    cfg = cfg.set_module_name("2", Rule(score="wanda"))
    grads = {"0.weight": params["0.weight"].flip(0)}
    stats = {"2.weight": {"input_norm": torch.arange(5.0)}}
    found = sensitivity(loss_fn, params, batch, [0.4], cfg, grads=grads, stats=stats)
    at = PruneConfig(
        module_name_configs={n: Rule(0.4, score=rule.score) for n, rule in cfg.rules.items()}
    )
    masks = compute_masks(params, 0, at, grads=grads, stats=stats)
    for name, mask in masks.items():
        expected = float(loss_fn(apply_masks(params, {name: mask}), batch))
        assert float(found.losses[name]) == pytest.approx(expected, rel=1e-5)


def test_any_batch_goes_to_the_loss_function_as_it_is():
    """Defends that a batch is whatever the loss function takes."""
    params, batch = _case()
    seen = []

    def spy(params, batch):
        seen.append(batch)
        return loss_fn(params, batch["x"][0])

    given_batch = {"x": [batch], "note": "text"}
    sensitivity(spy, params, given_batch, [0.5], Rule())
    assert len(seen) == 3
    assert all(b is given_batch for b in seen)


def test_the_mean_of_batches_is_weighted_and_takes_one_at_a_time():
    """Defends streaming over a loader: the weighted mean, of a generator."""
    params, batch = _case()
    parts = [batch[:2], batch[2:]]
    held: list[int] = []

    def measured():
        for part in parts:
            held.append(len(part))
            yield sensitivity(loss_fn, params, part, [0.3, 0.8], Rule(), weight=len(part))

    mean = mean_sensitivity(measured())
    whole = sensitivity(loss_fn, params, batch, [0.3, 0.8], Rule())
    assert held == [2, 5]
    assert mean.weight == 7
    assert mean.dense == pytest.approx(whole.dense, rel=1e-5)
    for name, curve in mean.losses.items():
        torch.testing.assert_close(curve, whole.losses[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        ([], "at least one Sensitivity; got none"),
        ([({"a": [1.0]}, [0.5]), ({"b": [1.0]}, [0.5])], "same tensors and levels"),
        ([({"a": [1.0]}, [0.5]), ({"a": [1.0]}, [0.6])], "same tensors and levels"),
    ],
)
def test_means_of_different_measurements_are_refused(measured, says):
    """Defends against averages of what is not the same."""
    values = [Sensitivity(0.0, levels, losses) for losses, levels in measured]
    with pytest.raises(ConfigError, match=says):
        mean_sensitivity(values)


def test_a_measurement_goes_through_json_and_keeps_exact_levels():
    """Defends files: a third stays a third, and a decimal the decimal."""
    found = Sensitivity(1 / 3, [0.1, Fraction(1, 3), 0.9], {"a": [1.0, 2.0, 3.3]}, 2)
    plain = json.loads(json.dumps(found.as_dict()))
    assert plain["levels"] == [0.1, "1/3", 0.9]
    assert Sensitivity.from_dict(plain) == found
    assert hash(Sensitivity.from_dict(plain)) == hash(found)
    assert Sensitivity.from_dict(plain).losses["a"].dtype == torch.float64
    assert found != Sensitivity(1 / 3, [0.1, Fraction(1, 3), 0.9], {"a": [1.0, 2.0, 3.4]}, 2)
    assert found != "text"


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ([], "at least one; got"),
        ([0.5, 0.5], "ascending order"),
        ([0.9, 0.1], r"got \(0.9, 0.1\)"),
        ([1.5], r"levels.0: expected a sparsity .* got 1.5"),
        ([-0.1], r"in \[0, 1\]"),
        ([math.nan], "finite"),
        (0.5, r"levels as a list of sparsities; got 0.5. Write \[0.5, 0.7, 0.9\]"),
    ],
)
def test_bad_levels_are_refused_before_the_loss_is_run(levels, says):
    """Defends against hours of measuring for nothing."""
    params, batch = _case()

    def never(params, batch):
        raise AssertionError("was run")

    with pytest.raises(ConfigError, match=says):
        sensitivity(never, params, batch, levels, Rule())


def _run(loss, cfg=None, **options):
    params, batch = _case()
    return sensitivity(loss, params, batch, [0.5, 0.9], cfg or Rule(), **options)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: _run(lambda p, b: p["0.weight"]), TypeError, r"got shape \(5, 6\)"),
        (lambda: _run(lambda p, b: 1.0), TypeError, "got float"),
        (lambda: _run(lambda p, b: 1.0, vectorize=False), TypeError, "got float"),
        (lambda: _run(loss_fn, chunk_bytes=-1), ValueError, "got -1"),
        (lambda: _run(loss_fn, weight=0), ConfigError, "greater than 0"),
        (lambda: _run(loss_fn, PruneConfig().set_module_name("3", Rule())), SelectionError, "'3'"),
        (lambda: _run(loss_fn, Rule(score="taylor")), ValueError, "'0.weight' needs a gradient"),
        (lambda: _run(loss_fn, stats={"x": {}}), KeyError, "'x'"),
        (lambda: sensitivity(loss_fn, MODEL, None, [0.5], Rule()), TypeError, "named_parameters"),
        (lambda: Sensitivity(0.0, [0.5], {"w": [1.0, 2.0]}), ConfigError, "1 levels of 'w'"),
        (lambda: Sensitivity(math.inf, [0.5], {}), ConfigError, "finite dense loss; got inf"),
        (lambda: Sensitivity.from_dict({"levels": [0.5], "losses": {}}), ConfigError, "dense"),
        (lambda: Sensitivity.from_dict({"dens": 1}), ConfigError, "'dense'"),
    ],
)
def test_impossible_calls_are_refused_in_a_line(call, error, says):
    """Defends the errors: what was expected, what came, of which parameter."""
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused_with_the_tensor_and_the_level(bad):
    """Defends allocations: no curve has holes."""

    def breaks(params, batch):
        zeros = (params["2.weight"] == 0).sum() >= 18  # 0.9 of 20
        return torch.where(zeros, bad, loss_fn(params, batch))

    with pytest.raises(ConfigError, match=f"got {bad} for '2.weight' at sparsity 0.9"):
        _run(breaks)


def test_nan_in_a_weight_raises_as_masks_do():
    """Defends law 8 here."""
    params, batch = _case()
    params["2.weight"][0, 0] = math.nan
    with pytest.raises(NaNError, match=r"2\.weight"):
        sensitivity(lambda p, b: b.sum() * 0, params, batch, [0.5], Rule())


def test_a_loss_that_draws_random_numbers_raises_and_draws_none():
    """Defends purity: dropout would make another loss of each call."""
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="random") as caught:
        _run(lambda p, b: nn.functional.dropout(p["0.weight"]).sum())
    assert any("vectorize=False" in note for note in caught.value.__notes__)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_vmap_refuses_says_the_way_out_which_works():
    """Defends loss functions with Python control flow: nothing falls back silently."""

    def branching(params, batch):
        value = loss_fn(params, batch)
        return value * 2 if float(value.detach()) > 0 else value

    with pytest.raises(RuntimeError) as caught:
        _run(branching)
    assert any("vectorize=False" in note for note in caught.value.__notes__)
    found = _run(branching, vectorize=False)
    half = _run(loss_fn, vectorize=False)
    assert all(torch.equal(found.losses[n], 2 * curve) for n, curve in half.losses.items())


def test_measuring_leaves_pythons_random_state_alone():
    """Defends law 4 for the other generator."""
    state = random.getstate()
    _run(loss_fn)
    assert random.getstate() == state
