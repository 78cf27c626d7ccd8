"""One count for many tensors: the laws again, against one stable sort of all units."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import global_oracle
from purprune import (
    Channel,
    ConfigError,
    GlobalGroup,
    Magnitude,
    NaNError,
    Pattern,
    PruneConfig,
    Random,
    Rule,
    ScoreContext,
    Taylor,
    Unstructured,
    compute_masks,
    iter_masks,
    plan,
)
from purprune.given import refuse_unfit_masks
from strategies import (
    any_values,
    exact_values,
    global_patterns_for,
    matrix_shapes,
    members,
    shapes,
    sparsities,
    squared,
)


def config_for(params: dict[str, Tensor], rule: Rule) -> PruneConfig:
    return PruneConfig(module_name_configs=dict.fromkeys(params, rule))


def masks_of(params: dict[str, Tensor], rule: Rule, **more: object) -> dict[str, Tensor]:
    return compute_masks(params, 0, config_for(params, rule), **more)


def magnitudes(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.double().abs() for name, w in params.items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@given(members(), sparsities)
def test_laws_1_and_2_entries_of_all_tensors_are_one_stable_sort(params, s):
    """Defends count and order over ties across tensors, mixed dtypes, empty and 0-d ones."""
    rule = Rule(s, pattern=Unstructured(scope="global"))
    got = masks_of(params, rule)
    assert_same(got, global_oracle(magnitudes(params), rule.pattern, Fraction(str(s))))
    units = sum(w.numel() for w in params.values())
    assert sum(int((~m).sum()) for m in got.values()) == math.floor(units * Fraction(str(s)))


@given(st.data(), sparsities)
def test_laws_1_2_and_3_units_of_mixed_shapes_are_counted_as_units(data, s):
    """Defends blocks of different sizes in one group, single entries and ragged ones too."""
    params = data.draw(members(matrix_shapes))
    dims = min(w.dim() for w in params.values())
    rule = Rule(s, pattern=data.draw(global_patterns_for(dims)))
    got = masks_of(params, rule)
    assert_same(got, global_oracle(magnitudes(params), rule.pattern, Fraction(str(s))))


@given(st.data())
def test_law_5_with_prev_nothing_comes_back_and_the_count_is_exact(data):
    """Defends prev as the leading digit of the order, some tensors without it."""
    before = data.draw(members(matrix_shapes))
    pattern = data.draw(global_patterns_for(min(w.dim() for w in before.values())))
    low, high = data.draw(sparsities), data.draw(sparsities)
    prev = masks_of(before, Rule(low, pattern=pattern))
    after = {name: w.flip(0) for name, w in before.items()}
    prev = {name: mask for name, mask in prev.items() if data.draw(st.booleans())}
    got = masks_of(after, Rule(high, pattern=pattern), prev=prev)
    s = Fraction(str(high))
    if s:  # at 0 nothing is pruned, whatever prev says
        assert_same(got, global_oracle(magnitudes(after), pattern, s, prev))


@given(st.data())
def test_a_floor_goes_first_in_the_one_group_and_the_count_is_the_larger_one(data):
    """Defends masks that are given: exactly max(k, theirs) of all units, some tensors without."""
    params = data.draw(members(matrix_shapes))
    pattern = data.draw(global_patterns_for(min(w.dim() for w in params.values())))
    low, middle, high = (data.draw(sparsities) for _ in range(3))
    drawn = [
        masks_of(params, Rule(s, pattern=pattern, score=Random(seed)))
        for seed, s in enumerate((low, middle))
    ]
    floor, prev = (
        {name: mask for name, mask in masks.items() if data.draw(st.booleans())} for masks in drawn
    )
    rule = Rule(high, pattern=pattern)
    got = masks_of(params, rule, prev=prev, floor=floor)
    s = Fraction(str(high))
    expected = global_oracle(magnitudes(params), pattern, s, prev if s else {}, floor)
    assert_same(got, expected)
    refuse_unfit_masks(got, 0, dict.fromkeys(params, rule), floor)
    assert all(not bool((got[name] & ~mask).any()) for name, mask in floor.items())


def test_a_floor_that_does_not_fit_a_global_group_is_refused():
    """Defends whole units in a group of many tensors, and the error's word."""
    params = {"a": torch.ones(2, 4), "b": torch.ones(3, 4)}
    cut = torch.tensor([[True, False, True, True]] * 2)
    with pytest.raises(ConfigError, match=r"floor\['a'\] to prune whole units"):
        masks_of(params, Rule(0.5, pattern=Channel(scope="global")), floor={"a": cut})


@given(st.data(), sparsities)
def test_law_4_views_and_threads_change_no_bit_and_no_argument_changes(data, s):
    """Defends one result for any memory layout and number of threads."""
    params = data.draw(members(matrix_shapes))
    rule = Rule(s, pattern=Unstructured(scope="global"))
    kept = {name: w.clone() for name, w in params.items()}
    expected = masks_of(params, rule)
    turned = {name: w.mT.contiguous().mT for name, w in params.items()}
    assert_same(masks_of(turned, rule), expected)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert_same(masks_of(params, rule), expected)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(params[name], kept[name]) for name in params)


@given(members(shapes, any_values))
def test_law_6_zero_prunes_nothing_and_one_everything(params):
    """Defends both ends."""
    for s in (0.0, 1.0):
        got = masks_of(params, Rule(s, pattern=Unstructured(scope="global")))
        assert all(bool((mask == (s == 0)).all()) for mask in got.values())


@given(st.data(), sparsities)
def test_law_7_half_tensors_give_the_masks_of_their_float32_upcasts(data, s):
    """Defends full precision where bfloat16, float16 and float32 are ranked as one."""
    halves = (torch.bfloat16, torch.float16, torch.float32)
    params = data.draw(members(matrix_shapes, any_values, halves))
    rule = Rule(s, pattern=data.draw(global_patterns_for(2)))
    upcast = {name: w.float() for name, w in params.items()}
    assert_same(masks_of(params, rule), masks_of(upcast, rule))


@given(st.data(), sparsities, st.integers(-60, 60))
def test_law_7_scaling_all_tensors_by_a_power_of_two_changes_no_mask(data, s, exponent):
    """Defends squares of all tensors on one scale, where float64 would over- or underflow."""
    params = data.draw(members(matrix_shapes, exact_values, (torch.float64,)))
    rule = Rule(s, pattern=data.draw(global_patterns_for(2)))
    scaled = {name: w * 2.0 ** (12 * exponent) for name, w in params.items()}
    assert_same(masks_of(scaled, rule), masks_of(params, rule))


@pytest.mark.parametrize("pattern", [Unstructured(scope="global"), Channel(scope="global")])
@pytest.mark.parametrize("s", [0.0, 0.001, 0.5, 1.0])
def test_law_8_nan_raises_and_names_the_parameter_and_the_count(pattern, s):
    """Defends against NaN that is ranked, or blamed on another tensor of the group."""
    params = {"a": torch.ones(3, 4), "b": torch.ones(5, 4), "c": torch.ones(2, 2)}
    params["b"][1, 1:3] = math.nan
    with pytest.raises(NaNError, match="'b'; got 2 NaN of 20"):
        masks_of(params, Rule(s, pattern=pattern))


@pytest.mark.parametrize("score", [Magnitude(), Taylor(), Random(3), squared])
@pytest.mark.parametrize("norm", ["l2", "l1", "sum"])
def test_every_score_is_ranked_across_tensors(score, norm):
    """Defends scores of other dtypes, integers among them, on one scale for all tensors."""
    generator = torch.Generator().manual_seed(0)
    params = {
        f"w{i}": torch.randint(-20, 21, shape, generator=generator) / 4
        for i, shape in enumerate([(4, 6), (3, 1), (5, 2)])
    }
    grads = {name: torch.flip(w, (0,)) for name, w in params.items()}
    scores = {name: score(w, ScoreContext(name, 0, grads[name])) for name, w in params.items()}
    for pattern in (Unstructured(scope="global"), Channel(norm=norm, scope="global")):
        got = masks_of(params, Rule(0.6, pattern=pattern, score=score), grads=grads)
        assert_same(got, global_oracle(scores, pattern, Fraction(3, 5)))


def test_scores_of_integers_in_one_tensor_and_floats_in_another_are_refused():
    """Defends integers above 2**53, which a float would round."""

    def mixed(weight: Tensor, context: ScoreContext) -> Tensor:
        return weight.to(torch.int32) if context.name == "b" else weight

    params = {"a": torch.ones(2, 2), "b": torch.ones(2, 2)}
    with pytest.raises(ConfigError, match=r"all integers.*int32 for 'b'"):
        masks_of(params, Rule(0.5, pattern=Unstructured(scope="global"), score=mixed))


def test_equal_rules_share_a_count_and_different_ones_do_not():
    """Defends two global groups in one config, beside a local rule."""
    params = {name: torch.arange(1.0, 5).view(2, 2) * 10**i for i, name in enumerate("abcd")}
    low, high = (Rule(s, pattern=Unstructured(scope="global")) for s in (0.5, 0.25))
    config = PruneConfig(module_name_configs={"a": low, "b": low, "c": high, "d": Rule(0.5)})
    config = config.set_module_name("c", high)
    masks = compute_masks(params, 0, config)
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    assert pruned == {"a": 4, "b": 0, "c": 1, "d": 2}


def test_the_order_of_the_params_decides_ties():
    """Defends the member order: the first of the mapping goes first, whatever its name."""
    rule = Rule(0.5, pattern=Unstructured(scope="global"))
    params = {"z": torch.ones(2, 2), "a": torch.ones(2, 2)}
    assert [bool(mask.any()) for mask in masks_of(params, rule).values()] == [False, True]


def test_iter_masks_yields_what_compute_masks_returns():
    """Defends one code path, and errors at the call and not at the first mask."""
    params = {"a": torch.randn(4, 4), "b": torch.randn(3, 3)}
    rule = Rule(0.5, pattern=Unstructured(scope="global"))
    assert_same(dict(iter_masks(params, 0, rule)), compute_masks(params, 0, rule))
    with pytest.raises(ValueError, match="step >= 0"):
        iter_masks(params, -1, rule)


def test_the_plan_has_the_total_of_a_group_and_no_count_of_its_tensors():
    """Defends honesty: which tensor loses how much is not known before values are seen."""
    params = {"a": torch.empty(3, 4, device="meta"), "b": torch.empty(5, 4, device="meta")}
    planned = plan(params, Rule(0.3, pattern=Unstructured(scope="global")))
    (shared,) = planned.shared
    assert (shared.names, shared.units, shared.pruned) == (("a", "b"), 32, 9)
    assert [(row.units, row.pruned_units, row.groups) for row in planned.tensors] == [
        (12, None, ()),
        (20, None, ()),
    ]
    assert "together: 9 of 32 units of a, b" in str(planned)
    assert planned.as_dict()["shared"] == [
        {"names": ["a", "b"], "sparsity": 0.3, "units": 32, "pruned": 9}
    ]


def test_dicts_and_yaml_know_the_global_group():
    """Defends the way through files, and the JSON schema."""
    rule = Rule(0.5, pattern=Unstructured(scope="global"))
    config = PruneConfig().set_global(rule)
    assert config.as_dict()["global_config"]["pattern"]["group"] == {
        "kind": "global",
        "min_sparsity": 0.0,
        "max_sparsity": 1.0,
        "normalize": None,
    }
    assert PruneConfig.from_dict(config.as_dict()) == config
    assert "GlobalGroup" in str(PruneConfig.json_schema())
    assert Pattern(group=GlobalGroup()) == rule.pattern


def test_an_unknown_scope_is_refused():
    """Defends against scope="all", which would silently be local."""
    with pytest.raises(ConfigError, match="'row', 'global' or a GlobalGroup; got 'all'"):
        Channel(scope="all")
