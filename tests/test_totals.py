"""Budgets: a total that shapes divide among tensors, exact at every step, and nested."""

from __future__ import annotations

import io
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import apportion_oracle, prune_oracle
from purprune import (
    NM,
    Channel,
    ConfigError,
    ErdosRenyi,
    Pattern,
    PolynomialDecay,
    PruneConfig,
    Rule,
    Uniform,
    Unstructured,
    compute_masks,
    plan,
)
from purprune.allocations import OwnTarget
from purprune.given import refuse_unfit_masks
from purprune.patterns import ChannelUnit, KernelUnit, RowGroup, TensorGroup
from purprune.totals import sparsities_at
from strategies import matrix_shapes, members, patterns_for, shapes, sparsities

BUDGETS = ("uniform", "er", "erk")
LENET = {"a": (300, 784), "b": (100, 300), "c": (10, 100)}


def config_for(params: dict[str, Tensor], rule: Rule) -> PruneConfig:
    return PruneConfig(module_name_configs=dict.fromkeys(params, rule))


def metas(sizes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}


def units_of(params: dict[str, Tensor], rule: Rule) -> list[int]:
    return [row.units for row in plan(params, config_for(params, rule), 0).tensors]


def weight_of(budget: str, shape: tuple[int, ...], units: int) -> Fraction:
    """Return the raw density times the units, straight from the formula."""
    if budget == "uniform" or not units:
        return Fraction(units)
    sides = list(shape[:2] if budget == "er" else shape) or [1]
    return units * Fraction(sum(sides), math.prod(sides))


@st.composite
def patterns_of_one_group(draw, dims: int) -> Pattern:
    """Draw a pattern whose group is the tensor."""
    found = draw(patterns_for(dims))
    return Pattern(unit=found.unit, group=TensorGroup(), norm=found.norm)


@given(st.data(), st.sampled_from(BUDGETS), sparsities)
def test_laws_1_and_2_counts_are_the_apportioned_ones_and_masks_the_stable_sort(data, budget, s):
    """Defends the whole way, for any unit, with empty tensors, vectors and scalars."""
    params = data.draw(members(data.draw(st.sampled_from([shapes, matrix_shapes]))))
    dims = min(w.dim() for w in params.values())
    rule = Rule(s, pattern=data.draw(patterns_of_one_group(dims)), budget=budget)
    units = units_of(params, rule)
    pruned = math.floor(sum(units) * Fraction(str(s)))
    raw = [
        weight_of(budget, tuple(w.shape), n) for w, n in zip(params.values(), units, strict=True)
    ]
    kept = apportion_oracle(raw, units, [1] * len(units))[sum(units) - pruned]
    got = compute_masks(params, 0, config_for(params, rule))
    for (name, w), n, left in zip(params.items(), units, kept, strict=True):
        own = Fraction(n - left, n) if n else Fraction(0)
        assert torch.equal(got[name], prune_oracle(w.double().abs(), rule.pattern, own)), name


@given(st.data(), st.sampled_from(BUDGETS), st.integers(2, 12))
def test_the_total_is_exact_at_every_step_of_a_ramp_and_masks_nest(data, budget, updates):
    """Defends house monotony where it counts: no unit comes back as the sparsity grows."""
    params = data.draw(members(matrix_shapes))
    rule = Rule(data.draw(sparsities), PolynomialDecay(range(updates)), budget=budget)
    config, before = config_for(params, rule), None
    units = sum(w.numel() for w in params.values())
    for step in range(updates):
        masks = compute_masks(params, step, config)
        pruned = sum(int((~mask).sum()) for mask in masks.values())
        assert pruned == math.floor(units * rule.sparsity_at(step))
        if before is not None:
            assert all(not bool((masks[name] & ~before[name]).any()) for name in masks)
            with_prev = compute_masks(params, step, config, prev=before)
            assert all(torch.equal(masks[name], with_prev[name]) for name in masks)
        before = masks


@given(members(), st.sampled_from(BUDGETS))
def test_law_6_zero_prunes_nothing_and_one_everything(params, budget):
    """Defends both ends."""
    for s in (0.0, 1.0):
        got = compute_masks(params, 0, config_for(params, Rule(s, budget=budget)))
        assert all(bool((mask == (s == 0)).all()) for mask in got.values())


@given(st.data(), st.sampled_from(BUDGETS))
def test_masks_that_are_given_hold_and_a_state_is_checked_by_each_tensors_count(data, budget):
    """Defends floor= in every tensor, and that damage of one bit is found."""
    params = data.draw(members(matrix_shapes))
    low, high = data.draw(sparsities), data.draw(sparsities)
    floor = compute_masks({n: w.flip(0) for n, w in params.items()}, 0, Rule(low))
    rule = Rule(high, budget=budget)
    rules = dict.fromkeys(params, rule)
    got = compute_masks(params, 0, config_for(params, rule), floor=floor)
    assert all(not bool((got[name] & ~floor[name]).any()) for name in got)
    refuse_unfit_masks(got, 0, rules, floor)
    name = data.draw(st.sampled_from([*params]))
    got[name].view(-1)[0] ^= True
    with pytest.raises(ValueError, match=f"'{name}'"):
        refuse_unfit_masks(got, 0, rules, floor)


def test_erdos_renyi_of_a_known_network():
    """Defends the formula: 26,620 of 266,200 stay, the last layer is full and gives away."""
    params = metas(LENET)
    kept = {
        budget: [row.units - row.pruned_units for row in plan(params, rule).tensors]
        for budget in BUDGETS
        for rule in [Rule(0.9, budget=budget)]
    }
    assert kept["er"] == kept["erk"] == [18714, 6906, 1000]  # 25,620 as 1,084 to 400
    assert kept["uniform"] == [23520, 3000, 100]


def test_a_kernel_is_a_part_of_the_shape_or_is_not():
    """Defends the difference between ER and ERK, and that units are what is divided."""
    params = metas({"a": (8, 4, 3, 3), "b": (16, 64)})
    assert ErdosRenyi().weight((8, 4, 3, 3), 288) == 18
    assert ErdosRenyi(kernel=False).weight((8, 4, 3, 3), 288) == 108
    channels = plan(params, Rule(0.5, pattern=Channel(), budget="erk")).tensors
    assert [(row.units, row.pruned_units) for row in channels] == [(8, 5), (16, 7)]


def test_only_equal_rules_share():
    """Defends two totals in one config, beside a rule without."""
    params = metas({"a": (4, 4), "b": (8, 8), "c": (4, 4), "d": (4, 4)})
    one, two = Rule(0.5, budget="erk"), Rule(0.25, budget="erk")
    config = PruneConfig(
        module_name_configs={"a": one, "b": Rule(0.5, budget="erk"), "c": two, "d": Rule(0.5)}
    )
    planned = plan(params, config)
    assert [(g.names, g.units, g.pruned) for g in planned.shared] == [
        (("a", "b"), 80, 40),
        (("c",), 16, 4),
    ]
    assert [row.pruned_units for row in planned.tensors] == [3, 37, 4, 8]


def test_the_plan_shows_each_tensors_own_sparsity_and_the_total():
    """Defends the dry run, as text and as plain values, at a step and in the end."""
    params = metas(LENET)
    rule = Rule(0.9, PolynomialDecay([0, 10]), budget="erk")
    planned = plan(params, rule)
    rows = planned.as_dict()["tensors"]
    assert [row["pruned_units"] for row in rows] == [216486, 23094, 0]
    assert rows[1]["sparsity"] == 23094 / 30000
    assert "together: 239,580 of 266,200 units of a, b, c" in str(planned)
    assert not any(row.pruned_units for row in plan(params, rule, step=9).tensors)


def test_the_sparsity_of_a_rule_stays_the_total():
    """Defends Rule.sparsity_at, and fractions whose floor is the count."""
    rule = Rule(0.9, budget="erk")
    assert rule.sparsity_at(0) == Fraction(9, 10)
    found = sparsities_at(dict.fromkeys(LENET, rule), metas(LENET), 0)
    assert found == {"a": Fraction(216486, 235200), "b": Fraction(23094, 30000), "c": 0}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ("own", OwnTarget()),
        ("uniform", Uniform()),
        ("er", ErdosRenyi(kernel=False)),
        ("erk", ErdosRenyi()),
        ({"kind": "erdos_renyi", "kernel": False}, ErdosRenyi(kernel=False)),
        (Uniform(), Uniform()),
    ],
)
def test_budgets_are_named_or_spelled_out(given_, expected):
    """Defends texts, dicts and values, and the way back."""
    rule = Rule(0.5, budget=given_)
    assert rule.budget == expected
    config = PruneConfig(global_config=rule)
    assert PruneConfig.from_dict(config.as_dict()) == config


def test_yaml_and_the_schema_know_budgets():
    """Defends files, beside the keys of coremltools."""
    text = "global_config: {target_sparsity: 0.5, granularity: per_kernel, budget: erk}"
    rule = Rule(0.5, pattern=Pattern(unit=KernelUnit()), budget="erk")
    assert PruneConfig.from_yaml(io.StringIO(text)).global_config == rule
    assert "ErdosRenyi" in str(PruneConfig.json_schema())
    assert "'erk'" in str(PruneConfig.json_schema())


@pytest.mark.parametrize(
    ("given_", "error"),
    [
        ("erks", r"^Rule\.budget: expected one of 'own', .*got 'erks'\. Did you mean 'erk'"),
        ({"kind": "erk"}, r"one of 'own', 'uniform', 'er', 'erk', or a dict like"),
        ({"kind": "erdos_renyi", "kernels": 1}, r"unknown key 'kernels'\. Did you mean 'kernel'"),
        (ErdosRenyi, "one of 'own'"),
        (0.5, "one of 'own'"),
    ],
)
def test_what_is_no_budget_is_refused_in_one_line(given_, error):
    """Defends against a budget that is silently another one."""
    with pytest.raises(ConfigError, match=error) as caught:
        Rule(0.5, budget=given_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "pattern",
    [
        NM(2, 4),
        Pattern(group=RowGroup()),
        Pattern(unit=ChannelUnit(1), group=RowGroup(1)),
        Unstructured(scope="global"),
    ],
)
def test_a_budget_needs_tensors_that_are_one_group(pattern):
    """Defends against two rules for one count, when the rule is built."""
    with pytest.raises(ConfigError, match=r"budget='own' for groups of kind .*Leave the budget"):
        Rule(pattern=pattern, budget="erk")


def test_errors_of_a_schedule_and_a_missing_end_name_the_parameter():
    """Defends the way of an error through the division."""
    params = metas({"a": (4, 4)})
    with pytest.raises(ConfigError, match="'a': Expected the sparsity of the schedule at step 3"):
        plan(params, Rule(schedule=lambda step: step, budget="erk"), step=3)
    with pytest.raises(ConfigError, match="Expected a step for 'a'"):
        plan(params, Rule(schedule=lambda step: 0.5, budget="erk"))
