"""Schedules: closed form against a walk through all steps, and every bad value."""

from __future__ import annotations

import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import cosine_oracle, exponential_oracle, polynomial_oracle
from purprune import (
    ConfigError,
    ConstantSparsity,
    CosineDecay,
    ExponentialDecay,
    PolynomialDecay,
    PruneConfig,
    Rule,
)

decimals = st.integers(0, 1000).map(lambda n: n / 1000)
update_steps = st.sets(st.integers(0, 60), min_size=1, max_size=12).map(sorted)


@given(update_steps, st.integers(1, 5), decimals, decimals, st.integers(0, 70))
def test_polynomial_decay_is_the_walk_of_a_training_loop(updates, power, initial, target, step):
    """Defends the closed form: it holds between updates and has no memory."""
    rule = Rule(target, PolynomialDecay(updates, power), initial)
    expected = polynomial_oracle(
        step, updates, power, Fraction(str(initial)), Fraction(str(target))
    )
    assert rule.sparsity_at(step) == expected
    assert rule.changes_at(step) == (step in updates)


@given(update_steps, st.floats(0.25, 6), decimals, st.lists(st.integers(0, 70), min_size=2))
def test_the_sparsity_never_falls_on_the_way_up(updates, power, target, steps):
    """Defends monotonic sparsity for fractional powers too, and the exact end (law 6)."""
    rule = Rule(target, PolynomialDecay(updates, power))
    values = [rule.sparsity_at(t) for t in sorted(steps)]
    assert values == sorted(values)
    assert rule.sparsity_at(updates[-1]) == rule.sparsity_at(10**9) == Fraction(str(target))


ORACLES = {CosineDecay: cosine_oracle, ExponentialDecay: exponential_oracle}
STEPWISE = [PolynomialDecay, *ORACLES]


@pytest.mark.parametrize("ramp", ORACLES)
@given(update_steps, decimals, decimals, st.integers(0, 70))
def test_cosine_and_exponential_ramps_are_the_walk_of_a_training_loop(
    ramp, updates, initial, target, step
):
    """Defends the formulas of both in closed form, up and down, from and to 0 and 1."""
    rule = Rule(target, ramp(updates), initial)
    expected = ORACLES[ramp](step, updates, initial, target)
    assert float(rule.sparsity_at(step)) == pytest.approx(expected, abs=1e-12)
    assert rule.changes_at(step) == (step in updates)


@pytest.mark.parametrize("ramp", ORACLES)
@given(update_steps, decimals, decimals, st.lists(st.integers(0, 70), min_size=2))
def test_ramps_are_monotonic_and_their_ends_are_exact(ramp, updates, initial, target, steps):
    """Defends nested masks (law 5) and the exact end (law 6), whichever way the ramp goes."""
    rule = Rule(target, ramp(updates), initial)
    values = [rule.sparsity_at(t) for t in sorted(steps)]
    assert values == sorted(values, reverse=initial > target)
    assert rule.sparsity_at(updates[-1]) == rule.sparsity_at(10**9) == Fraction(str(target))
    if len(updates) > 1:
        assert rule.sparsity_at(updates[0]) == Fraction(str(initial))


def test_an_exponential_ramp_is_exact_where_its_densities_are_decimals():
    """Defends counts against a density of 0.1 that rounding left a little above."""
    rule = Rule(0.999, ExponentialDecay(range(4)))
    found = [rule.sparsity_at(t) for t in range(4)]
    assert found == [0, Fraction(9, 10), Fraction(99, 100), Fraction(999, 1000)]
    rule = Rule(0.6, ExponentialDecay([0, 5, 9]), 0.1)
    assert rule.sparsity_at(5) == Fraction(4, 10)  # the root of 0.9 * 0.4


def test_a_cosine_ramp_is_symmetric_and_half_way_in_the_middle():
    """Defends exact halves, and against a cosine of 90 degrees that is not 0."""
    schedule = CosineDecay(range(7))
    left = [schedule.remaining(t) for t in range(7)]
    assert [a + b for a, b in zip(left, left[::-1], strict=True)] == [1] * 7
    assert (left[2], left[3]) == (Fraction(3, 4), Fraction(1, 2))


@pytest.mark.parametrize("ramp", STEPWISE)
def test_a_single_update_goes_straight_to_the_target(ramp):
    """Defends against a division by L - 1 = 0."""
    schedule = ramp([5])
    assert [schedule(t, 0.1, 0.8) for t in (0, 4, 5, 6)] == [0.1, 0.1, 0.8, 0.8]


@pytest.mark.parametrize("ramp", STEPWISE)
def test_ramps_are_read_from_files_by_their_kind(ramp):
    """Defends the YAML form of each ramp, and a word that comes near its name."""
    rule = Rule(0.5, ramp(begin_step=2, end_step=8, frequency=3))
    config = PruneConfig(rule)
    plain = config.as_dict()
    assert plain["global_config"]["schedule"]["kind"] == rule.schedule.kind
    assert PruneConfig.from_dict(plain) == config
    plain["global_config"]["schedule"]["kind"] = f"{rule.schedule.kind}s"
    with pytest.raises(ConfigError, match=f"Did you mean '{rule.schedule.kind}'"):
        PruneConfig.from_dict(plain)


@pytest.mark.parametrize(
    "steps",
    [
        range(0, 900, 100),
        list(range(0, 900, 100)),
        "range(0, 900, 100)",
        " range( 0,900 , 100, ) ",
        np.arange(0, 900, 100),
        torch.arange(0, 900, 100),
        [np.int64(t) for t in range(0, 900, 100)],
    ],
)
def test_equal_update_steps_make_equal_schedules(steps):
    """Defends equality, and with it comparisons of configs on resume, over all ways to write."""
    assert PolynomialDecay(steps) == PolynomialDecay(range(0, 900, 100))
    assert hash(PolynomialDecay(steps)) == hash(PolynomialDecay(range(0, 900, 100)))
    assert PolynomialDecay(begin_step=0, end_step=800, frequency=100) == PolynomialDecay(steps)


def test_the_text_of_a_range_is_parsed_and_never_evaluated():
    """Defends against code in a config file."""
    for text in ("range(__import__('os').getpid())", "[1, 2]", "range(2**9)", "range(-1, 3)"):
        with pytest.raises(ConfigError, match="range"):
            PolynomialDecay(text)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: PolynomialDecay([3, 2]), "rising order"),
        (lambda: PolynomialDecay([2, 2]), "rising order"),
        (lambda: PolynomialDecay([-1, 2]), "update steps >= 0; got -1"),
        (lambda: PolynomialDecay([0.5, 2]), "whole update steps; got 0.5"),
        (lambda: PolynomialDecay([True, 2]), "whole update steps; got True"),
        (lambda: PolynomialDecay([]), "at least one update step"),
        (lambda: PolynomialDecay(range(0)), "at least one update step"),
        (lambda: PolynomialDecay(range(9, 0, -1)), "rising order"),
        (lambda: PolynomialDecay(7), "list of update steps; got 7"),
        (lambda: PolynomialDecay(), "or all of begin_step, end_step and frequency"),
        (lambda: PolynomialDecay(begin_step=0, end_step=9), "frequency=None"),
        (lambda: PolynomialDecay(begin_step=9, end_step=0, frequency=1), "begin_step <= end_step"),
        (lambda: PolynomialDecay([1], begin_step=0), "got both"),
        (lambda: PolynomialDecay([1], power=0), "power > 0; got 0"),
        (lambda: PolynomialDecay([1], power=float("nan")), "power > 0; got nan"),
        (lambda: PolynomialDecay([1], power="3"), "power"),
        (lambda: PolynomialDecay([1], "3"), "PolynomialDecay.power"),
        (
            lambda: CosineDecay([1], power=3),
            "key of RIA and PolynomialDecay. Known here: update_steps",
        ),
        (lambda: ExponentialDecay([3, 2]), "rising order"),
        (lambda: CosineDecay(), "or all of begin_step, end_step and frequency"),
        (lambda: ConstantSparsity(-1), "greater than or equal to 0; got -1"),
        (lambda: ConstantSparsity(1.5), "begin_step: expected a valid integer; got 1.5"),
    ],
)
def test_bad_schedules_raise_when_they_are_built(build, says):
    """Defends against schedules that would fail, or do nothing, in the middle of a training."""
    with pytest.raises(ConfigError, match=says):
        build()


def test_any_callable_is_a_schedule_and_its_values_are_checked():
    """Defends user schedules: they bring their values, change detection included."""
    rule = Rule(schedule=lambda step: 0.25 * (step // 2))
    assert [rule.sparsity_at(t) for t in range(5)] == [0, 0, Fraction(1, 4), Fraction(1, 4), 0.5]
    assert [rule.changes_at(t) for t in range(5)] == [True, False, True, False, True]
    with pytest.raises(ConfigError, match=r"step 10 in \[0, 1\]; got 1.25"):
        rule.sparsity_at(10)
    with pytest.raises(ConfigError, match="no initial or target sparsity beside a callable"):
        Rule(0.5, schedule=lambda step: 0.1)


def test_schedules_pickle_and_do_not_unroll_long_ranges():
    """Defends checkpoints, and memory."""
    long = PolynomialDecay(range(0, 10**12, 7))
    assert pickle.loads(pickle.dumps(long)) == long
    assert 0 < long(5 * 10**11, target_sparsity=0.9) < 0.9
