"""Floors, caps and scales of the tensors of a global group: the total is exact all the same."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from oracles import apportion_oracle, balanced_oracle, global_oracle
from purprune import (
    Channel,
    ConfigError,
    GlobalGroup,
    NaNError,
    Pattern,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    Unstructured,
    compute_masks,
    plan,
)
from purprune.given import refuse_unfit_masks
from strategies import exact_values, global_patterns_for, matrix_shapes, members, sparsities

finite = exact_values.filter(math.isfinite)
fractions = st.integers(0, 20).map(lambda n: n / 20)
SCALES = ("l2", "mean", "max")


def masks_of(params: dict[str, Tensor], rule: Rule, step: int = 0, **more: object):
    config = PruneConfig(module_name_configs=dict.fromkeys(params, rule))
    return compute_masks(params, step, config, **more)


def magnitudes(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.double().abs() for name, w in params.items()}


def pruned(masks: dict[str, Tensor]) -> dict[str, int]:
    return {name: int((~mask).sum()) for name, mask in masks.items()}


def limits_of(group: GlobalGroup, units: dict[str, int], s: Fraction) -> dict[str, tuple[int, int]]:
    """Return what a group says of each tensor, straight from the definition."""
    low, high = (Fraction(str(b)) for b in (group.min_sparsity, group.max_sparsity))
    most = [math.floor(n * high) for n in units.values()]
    least = apportion_oracle([*units.values()], most, [1] * len(most))
    total = math.floor(sum(units.values()) * min(low, s))
    return dict(zip(units, zip(least[total], most, strict=True), strict=True))


@st.composite
def bounded(draw, params: dict[str, Tensor], **more: object) -> Rule:
    """Draw a rule with bounds that the tensors can reach."""
    low, s, high = sorted(draw(st.tuples(fractions, fractions, fractions)))
    low, s = draw(st.sampled_from([(low, s), (s, low)]))
    group = GlobalGroup(low, high, **more)
    pattern = draw(global_patterns_for(min(w.dim() for w in params.values())))
    rule = Rule(s, pattern=replace(pattern, group=group))
    units = units_of(params, rule.pattern)
    capped = sum(math.floor(n * Fraction(str(high))) for n in units.values())
    assume(math.floor(sum(units.values()) * Fraction(str(max(s, low)))) <= capped)
    return rule


def units_of(params: dict[str, Tensor], pattern: Pattern) -> dict[str, int]:
    rule = Rule(0.0, pattern=replace(pattern, group=GlobalGroup()))
    config = PruneConfig(module_name_configs=dict.fromkeys(params, rule))
    return {row.name: row.units for row in plan(params, config).tensors}


def of_one_kind(params: dict[str, Tensor], pattern: Pattern) -> bool:
    """Tell whether no unit is a single entry among larger ones, which the plain oracle is not."""
    blocks = [pattern.unit.block(tuple(w.shape)) for w in params.values()]
    return len({math.prod(block) == 1 for block in blocks}) == 1


@given(st.data())
def test_bounds_are_one_stable_sort_with_the_least_of_each_first_and_beyond_its_most_never(data):
    """Defends the rounds: counts, order and ties, with prev and masks that are given."""
    params = data.draw(members(matrix_shapes))
    rule = data.draw(bounded(params))
    assume(of_one_kind(params, rule.pattern))
    drawn = [
        masks_of(params, Rule(s, pattern=replace(rule.pattern, group=GlobalGroup()), score=score))
        for score, s in ((Random(1), data.draw(fractions)), (Random(2), data.draw(fractions)))
    ]
    prev, floor = (
        {name: mask for name, mask in masks.items() if data.draw(st.booleans())} for masks in drawn
    )
    units, s = units_of(params, rule.pattern), Fraction(str(rule.target_sparsity))
    limits = limits_of(rule.pattern.group, units, s)
    k = math.floor(sum(units.values()) * s)
    got = masks_of(params, rule, prev=prev, floor=floor)
    if s:
        expected = balanced_oracle(magnitudes(params), rule.pattern, k, limits, prev, floor)
        assert all(torch.equal(got[name], expected[name]) for name in got)
    refuse_unfit_masks(got, 0, dict.fromkeys(params, rule), floor)


@given(st.data(), st.sampled_from([None, *SCALES]))
def test_the_total_is_exact_at_every_step_of_a_ramp_and_masks_nest(data, scale):
    """Defends law 5 below the floor and above it, without prev and with it."""
    params = data.draw(members(matrix_shapes))
    rule = data.draw(bounded(params, normalize=scale))
    rule = replace(rule, schedule=PolynomialDecay(range(6), power=1))
    units, before, folded = units_of(params, rule.pattern), None, None
    for step in range(6):
        masks = masks_of(params, rule, step)
        kept = {name: plan_units(mask, rule.pattern) for name, mask in masks.items()}
        gone = sum(units.values()) - sum(kept.values())
        assert gone == math.floor(sum(units.values()) * rule.sparsity_at(step))
        after = {name: w.flip(0) for name, w in params.items()} if step % 2 else params
        again = masks_of(after, rule, step, prev=folded or {})
        for new, old in ((masks, before), (again, folded)):
            assert old is None or all(not bool((new[n] & ~old[n]).any()) for n in new)
        before, folded = masks, again


def plan_units(mask: Tensor, pattern: Pattern) -> int:
    """Return how many units a mask keeps."""
    block = pattern.unit.block(tuple(mask.shape))
    return int(mask[tuple(slice(None, None, b) for b in block)].sum())


@given(members(matrix_shapes, finite), fractions, st.sampled_from(SCALES))
def test_scaled_entries_are_one_stable_sort_of_quotients(params, s, scale):
    """Defends the formulas: with a largest entry of 2 all sums of eighths are exact."""
    for w in params.values():
        w.view(-1)[0] = 2.0
    rule = Rule(s, pattern=Unstructured(scope=GlobalGroup(normalize=scale)))
    quotients = {}
    for name, w in params.items():
        shares = w.double().abs() / 2
        of = {
            "l2": math.sqrt(math.fsum((shares * shares).view(-1).tolist())),
            "mean": math.fsum(shares.view(-1).tolist()) / w.numel(),
            "max": 1.0,
        }
        quotients[name] = shares / of[scale]
    expected = global_oracle(quotients, Unstructured(scope="global"), Fraction(str(s)))
    got = masks_of(params, rule)
    assert all(torch.equal(got[name], expected[name]) for name in got)


@given(st.data(), st.sampled_from(SCALES), sparsities, st.integers(-40, 40))
def test_scaling_one_tensor_by_a_power_of_two_changes_no_mask(data, scale, s, exponent):
    """Defends what a scale is for, with infinities, zeros and units of several entries."""
    params = data.draw(members(matrix_shapes, dtypes=(torch.float64, torch.float32)))
    pattern = replace(data.draw(global_patterns_for(2)), group=GlobalGroup(normalize=scale))
    larger = {name: w * 2.0**exponent if name == "w0" else w for name, w in params.items()}
    rule = Rule(s, pattern=pattern)
    expected, got = masks_of(params, rule), masks_of(larger, rule)
    assert all(torch.equal(got[name], expected[name]) for name in got)


def test_a_scale_never_changes_the_order_within_a_tensor():
    """Defends neighbours in float64 whose quotients are the same float."""
    base = 1.9 + torch.arange(64, dtype=torch.float64).flip(0) * 2.0**-52
    base = torch.cat([base, torch.zeros(4)]).view(4, 17)
    params, pattern = {"a": base, "b": 2 * base}, Unstructured(scope=GlobalGroup(normalize="mean"))
    quotients = base / base.max() / (base / base.max()).mean()
    assert len(quotients.unique()) < 50, "of 65 entries that differ"
    for k in range(8, 128, 3):
        masks = masks_of(params, Rule(Fraction(k, 136), pattern=pattern))
        for name, mask in masks.items():
            assert params[name][~mask].max() < params[name][mask].min()


def test_a_tensor_of_zeros_goes_first_and_an_infinity_last():
    """Defends divisions by zero and by infinity, which would be NaN."""
    params = {"a": torch.zeros(2, 2), "b": torch.tensor([[1.0, math.inf]]), "c": torch.ones(1, 2)}
    for scale in SCALES:
        pattern = Unstructured(scope=GlobalGroup(normalize=scale))
        assert pruned(masks_of(params, Rule(0.5, pattern=pattern))) == {"a": 4, "b": 0, "c": 0}
        kept = masks_of(params, Rule(0.875, pattern=pattern))
        assert kept["b"].tolist() == [[False, True]]


def test_nan_is_named_through_scales_and_bounds():
    """Defends law 8 in every way of counting."""
    params = {"a": torch.ones(3, 4), "b": torch.ones(5, 4)}
    params["b"][1, 1:3] = math.nan
    for group in (GlobalGroup(0.1, 0.9), GlobalGroup(0.6), GlobalGroup(normalize="l2")):
        with pytest.raises(NaNError, match="'b'; got 2 NaN of 20"):
            masks_of(params, Rule(0.5, pattern=Channel(scope=group)))


def test_bounds_keep_every_tensor_alive():
    """Defends the purpose: a tensor of small weights is not pruned away, nor a large one spared."""
    params = {"small": torch.full((4, 5), 0.01), "large": torch.ones(8, 10)}
    plain = Rule(0.5, pattern=Unstructured(scope="global"))
    assert pruned(masks_of(params, plain)) == {"small": 20, "large": 30}
    rule = Rule(0.5, pattern=Unstructured(scope=GlobalGroup(max_sparsity=0.75)))
    assert pruned(masks_of(params, rule)) == {"small": 15, "large": 35}
    rule = Rule(0.25, pattern=Unstructured(scope=GlobalGroup(min_sparsity=0.2)))
    assert pruned(masks_of(params, rule)) == {"small": 9, "large": 16}
    rule = Rule(0.1, pattern=Unstructured(scope=GlobalGroup(min_sparsity=0.2)))
    assert pruned(masks_of(params, rule)) == {"small": 2, "large": 8}


def test_a_state_beyond_a_bound_is_refused():
    """Defends a check that the total alone would pass."""
    rule = Rule(0.5, pattern=Unstructured(scope=GlobalGroup(max_sparsity=0.75)))
    masks = {"a": torch.zeros(2, 4, dtype=torch.bool), "b": torch.ones(2, 4, dtype=torch.bool)}
    with pytest.raises(ValueError, match="Expected 6 of 8 units pruned in 'a'"):
        refuse_unfit_masks(masks, 0, dict.fromkeys(masks, rule), {})


def test_caps_that_rounding_puts_out_of_reach_are_refused_before_the_end():
    """Defends an early error: of two tensors of 3 units caps of a half leave 2 to go, not 3."""
    params = {"a": torch.ones(3, 1), "b": torch.ones(1, 3)}
    rule = Rule(
        0.5, PolynomialDecay([0, 9]), pattern=Unstructured(scope=GlobalGroup(max_sparsity=0.5))
    )
    with pytest.raises(ConfigError, match=r"^'a': Expected at most 2 of 6 units.*got 3\. Lower"):
        plan(params, rule, step=0)
    late = replace(rule, schedule=lambda step: step / 20, target_sparsity=None)
    plan(params, late, step=0)
    with pytest.raises(ConfigError, match=r"at most 2 of 6 units"):
        plan(params, late, step=15)


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda: GlobalGroup(0.5, 0.4), r"min_sparsity <= max_sparsity; got 0\.5 and 0\.4"),
        (lambda: GlobalGroup(max_sparsity=90), r"in \[0, 1\]; got 90\. 90 % is 0\.9"),
        (lambda: GlobalGroup(normalize="l3"), "normalize: expected 'l2', 'mean' or 'max'"),
        (
            lambda: Rule(0.9, pattern=Unstructured(scope=GlobalGroup(max_sparsity=0.8))),
            r"sparsities up to max_sparsity=0\.8 of the global group.*got 0\.9",
        ),
    ],
)
def test_impossible_bounds_are_refused_when_they_are_built(build, error):
    """Defends one line that says what is reachable."""
    with pytest.raises(ConfigError, match=error) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_dicts_know_bounds_and_scales():
    """Defends files."""
    keys = {"kind": "global", "min_sparsity": 0.1, "max_sparsity": "9/10", "normalize": "l2"}
    config = PruneConfig.from_dict({"global_config": {"pattern": {"group": keys}}})
    group = GlobalGroup(0.1, Fraction(9, 10), "l2")
    assert config.rules["global_config"].pattern == Unstructured(scope=group)
    assert PruneConfig.from_dict(config.as_dict()) == config
