"""Targets from measurements: exact totals, the cheapest division, and the paper's densities."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from statistics import mean

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from purprune import (
    NM,
    Channel,
    ConfigError,
    NaNError,
    Pattern,
    PolynomialDecay,
    PruneConfig,
    Rule,
    Sensitivity,
    Unstructured,
    allocate_by_outliers,
    allocate_by_sensitivity,
    compute_masks,
    plan,
    sparsity,
)
from purprune.envelopes import envelope
from purprune.patterns import RowGroup
from purprune.quanta import nearest
from purprune_adapters import Pruner

ROWS = Pattern(group=RowGroup(0))
decimals = st.integers(0, 20).map(lambda n: n / 20)


def _isotonic(values):
    """Return the nearest rising values by the min-max formula."""
    n = len(values)
    return [
        max(min(mean(values[i : j + 1]) for j in range(k, n)) for i in range(k + 1))
        for k in range(n)
    ]


def _lowest_chord(points, x):
    """Return the lower convex hull at x: the least of all chords over it."""
    heights = [y for at, y in points if at == x]
    for (a, low), (b, high) in itertools.combinations(points, 2):
        if a < x < b:
            heights.append(low + (high - low) * (x - a) / (b - a))
    return min(heights)


@st.composite
def measurements(draw):
    """Draw a few small tensors, levels, and losses with ties, dips and gains."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
    levels = draw(st.sets(decimals, min_size=1, max_size=4).map(sorted))
    losses = {
        f"w{i}": [float(draw(st.integers(-3, 12))) for _ in levels] for i in range(len(sizes))
    }
    params = {f"w{i}": torch.ones(1, n) for i, n in enumerate(sizes)}
    return params, Sensitivity(float(draw(st.integers(-1, 3))), levels, losses)


def _points(curves, name):
    pairs = zip(curves.levels, map(Fraction, curves.losses[name].tolist()), strict=True)
    known = [(s, loss - Fraction(curves.dense)) for s, loss in pairs if s]
    points = [(Fraction(0), Fraction(0)), *known]
    return [*zip([s for s, _ in points], _isotonic([y for _, y in points]), strict=True)]


@given(measurements(), decimals)
def test_the_division_is_the_cheapest_of_all_that_there_are(case, target):
    """Defends exactness and the minimum, against every division of the total."""
    params, curves = case
    points = {name: _points(curves, name) for name in params}
    sizes = {name: p.numel() for name, p in params.items()}
    caps = [math.floor(n * curves.levels[-1]) for n in sizes.values()]
    total = math.floor(sum(sizes.values()) * Fraction(str(target)))
    if total > sum(caps):
        with pytest.raises(ConfigError, match=f"reach {total:,} units"):
            allocate_by_sensitivity(curves, params, Rule(target))
        return

    def cost(counts):
        return sum(
            _lowest_chord(points[name], Fraction(k, max(1, sizes[name])))
            for name, k in zip(params, counts, strict=True)
        )

    divisions = [c for c in itertools.product(*(range(cap + 1) for cap in caps)) if sum(c) == total]
    found = allocate_by_sensitivity(curves, params, Rule(target))
    masks = compute_masks(params, 0, found)
    counts = [sparsity(masks).tensors[name].zeros for name in params]
    assert sum(counts) == total
    assert cost(counts) == min(map(cost, divisions))


@given(measurements())
def test_an_envelope_rises_bends_upwards_and_is_the_hull_of_the_nearest_rising_curve(case):
    """Defends what is said of curves: PAVA and the monotone chain, against their formulas."""
    _, curves = case
    points = _points(curves, "w0")
    corners = envelope(curves, "w0")
    slopes = [(d - b) / (c - a) for (a, b), (c, d) in itertools.pairwise(corners)]
    assert slopes == sorted(slopes)
    assert all(slope >= 0 for slope in slopes)
    for s, _ in points:
        expected = _lowest_chord(points, s)
        assert next((y for at, y in corners if at == s), expected) == expected
    assert {s for s, _ in corners} >= {points[0][0], points[-1][0]}


def test_ties_go_by_the_order_of_the_tensors():
    """Defends that equal curves give one answer."""
    params = {name: torch.ones(2, 5) for name in "abc"}
    curves = Sensitivity(0.0, [1], {name: [1.0] for name in "cba"})
    found = allocate_by_sensitivity(curves, params, Rule(0.5))
    assert [rule.target for rule in found.rules.values()] == [1, Fraction(1, 2), 0]


def test_the_result_keeps_the_rule_and_works_with_masks_plan_and_pruner():
    """Defends that targets alone change: schedule, score and pattern stay."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5))
    params = {n: p for n, p in model.named_parameters() if "weight" in n}
    rule = Rule(0.7, PolynomialDecay([0, 2, 4]), 0.35, score={"kind": "random", "seed": 3})
    curves = Sensitivity(0.0, [0.5, 1], {"0.weight": [0.1, 0.9], "2.weight": [0.0, 3.0]})
    found = allocate_by_sensitivity(curves, params, rule)
    assert {(r.schedule, r.score, r.pattern) for r in found.rules.values()} == {
        (rule.schedule, rule.score, rule.pattern)
    }
    total = math.floor(78 * 0.7)
    assert sum(row.pruned_units for row in plan(params, found).tensors) == total
    pruner = Pruner(model, found)
    pruned = pruner.prepare(inplace=True)
    first = sum(int((p == 0).sum()) for p in pruned.parameters() if p.dim() == 2)
    assert abs(first - 78 * 0.35) < 2
    for _ in range(4):
        pruner.step()
    assert pruner.report().total.zeros == total


def test_the_result_goes_through_a_dict_and_scales_what_the_schedule_starts_from():
    """Defends saved configs, also where a tensor goes whole or not at all."""
    params = {name: torch.ones(4, 8) for name in "abc"}
    curves = Sensitivity(0.0, [1], {"a": [0.0], "b": [1.0], "c": [2.0]})
    for rule in (Rule(0.5, initial_sparsity=0.25), Rule(pattern=NM(2, 4), initial_sparsity=0.25)):
        found = allocate_by_sensitivity(curves, params, rule)
        assert PruneConfig.from_dict(found.as_dict()) == found
        assert [r.target for r in found.rules.values()] == [1, Fraction(1, 2), 0]
        assert [r.initial_sparsity for r in found.rules.values()] == [Fraction(1, 2), 0.25, 0]


def test_the_budget_of_a_rule_is_replaced_by_what_was_measured():
    """Defends the targets: shapes do not divide them once more."""
    params = {"a": torch.ones(20, 30), "b": torch.ones(4, 5)}
    curves = Sensitivity(0.0, [1], {"a": [1.0], "b": [1.0]})
    found = allocate_by_sensitivity(curves, params, Rule(0.5, budget="erk"))
    assert found == allocate_by_sensitivity(curves, params, Rule(0.5))
    assert sparsity(compute_masks(params, 0, found)).tensors["b"].zeros == 0


def test_tensors_that_the_config_leaves_dense_stay_dense():
    """Defends None, which beats the global rule."""
    params = {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4), "a.bias": torch.ones(4)}
    cfg = PruneConfig().set_global(Rule(0.5)).set_module_name("b", None)
    curves = Sensitivity(0.0, [0.9], {"a.weight": [1.0]})
    found = allocate_by_sensitivity(curves, params, cfg)
    assert found.module_name_configs["b"] is None
    assert list(compute_masks(params, 0, found)) == ["a.weight"]
    assert found.rules["a.weight"].target == Fraction(1, 2)


def test_each_rule_has_its_own_total():
    """Defends that tensors with other rules share nothing."""
    params = {name: torch.ones(10, 10) for name in ("a", "b", "c")}
    cfg = PruneConfig().set_global(Rule(0.5)).set_module_name("c", Rule(0.3))
    curves = Sensitivity(0.0, [1], {"a": [1.0], "b": [2.0], "c": [0.0]})
    found = allocate_by_sensitivity(curves, params, cfg)
    assert {n: r.target for n, r in found.rules.items()} == {"a": 1, "b": 0, "c": Fraction(3, 10)}


@given(
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 12)), min_size=1, max_size=4),
    decimals,
    st.sampled_from([ROWS, Channel(), NM(1, 2)]),
    st.integers(0, 99),
)
def test_rows_channels_and_n_m_patterns_meet_what_the_rule_prunes_by_itself(
    shapes, target, pattern, seed
):
    """Defends totals in whole steps: each group of a tensor loses the same."""
    if pattern == NM(1, 2):
        shapes = [(rows, 2 * columns) for rows, columns in shapes]
    generator = torch.Generator().manual_seed(seed)
    params = {f"w{i}": torch.rand(s, generator=generator) for i, s in enumerate(shapes)}
    rule = Rule(None if pattern.target else target, pattern=pattern)
    losses = {name: torch.rand(3, generator=generator) for name in params}
    curves = Sensitivity(0.0, [0.3, 0.6, 1], losses)
    found = allocate_by_sensitivity(curves, params, rule)
    before, after = (plan(params, cfg).tensors for cfg in (rule, found))
    units = sum(row.units for row in before)
    expected = (
        math.floor(units * rule.target)
        if pattern == Channel()
        else sum(row.pruned_units for row in before)
    )
    assert sum(row.pruned_units for row in after) == expected
    zeros = sparsity(compute_masks(params, 0, found)).tensors
    if pattern != Channel():
        assert [zeros[row.name].zeros for row in after] == [row.pruned_units for row in after]


def test_n_m_gets_its_zeros_by_the_tensor():
    """Defends mixed N:M, where the total is that of the pattern."""
    params = {name: torch.rand(4, 16) for name in "ab"}
    curves = Sensitivity(0.0, [0.5, 0.75, 1], {"a": [0.1, 0.2, 5.0], "b": [1.0, 2.0, 5.0]})
    found = allocate_by_sensitivity(curves, params, Rule(pattern=NM(2, 4)))
    assert [rule.pattern for rule in found.rules.values()] == [NM(3, 4), NM(1, 4)]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.integers(0, 6), st.floats(0, 8)), min_size=1, max_size=3
    ),
    st.integers(0, 40),
)
def test_whole_multiples_reach_every_total_that_there_is(rows, total):
    """Defends the search: it finds numbers wherever there are some, and refuses otherwise."""
    quanta = [q for q, _, _ in rows]
    caps = [q * room for q, room, _ in rows]
    counts = [Fraction(x) for *_, x in rows]
    reachable = any(
        sum(map(int.__mul__, quanta, numbers)) == total
        for numbers in itertools.product(*(range(room + 1) for _, room, _ in rows))
    )
    if not reachable:
        with pytest.raises(ConfigError, match=f"got {total}"):
            nearest(total, counts, caps, quanta)
        return
    found = nearest(total, counts, caps, quanta)
    assert sum(found) == total
    assert all(n % q == 0 and 0 <= n <= cap for n, q, cap in zip(found, quanta, caps, strict=True))


def test_whole_multiples_are_the_nearest_in_the_window():
    """Defends that the search minimises the squares, and not just any sum."""
    counts = [Fraction(31), Fraction(23), Fraction(46)]
    found = nearest(100, counts, [100, 100, 100], [10, 5, 2])
    pairs = itertools.product(range(0, 101, 10), range(0, 101, 5), range(0, 101, 2))
    best = min(
        sum((n - c) ** 2 for n, c in zip(pair, counts, strict=True))
        for pair in pairs
        if sum(pair) == 100
    )
    assert sum((n - c) ** 2 for n, c in zip(found, counts, strict=True)) == best


PARAMS = {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(3, 4)}
CURVES = Sensitivity(0.0, [0.5], {"a.weight": [1.0], "b.weight": [1.0]})


@pytest.mark.parametrize(
    ("curves", "rule", "says"),
    [
        (Sensitivity(0.0, [0.5], {"a.weigth": [1.0]}), Rule(), "Did you mean 'a.weigth'"),
        (CURVES, Rule(0.75), "reach 18 units of a.weight, b.weight; up to 0.5 of each are 12"),
        (CURVES, Rule(0.5, pattern=Unstructured(scope="global")), "'a.weight'.*Leave the scope"),
        (CURVES, Rule(pattern=NM(1, 3)), "groups of 3 without a tail for 'a.weight'"),
        (CURVES, Rule(0.75, pattern=ROWS), "reach 18 units"),
        (CURVES, Rule(schedule=lambda step: 0.5), "Expected a step for 'a.weight'"),
    ],
)
def test_what_can_not_be_divided_is_refused(curves, rule, says):
    """Defends the errors, which name the tensor and the way out."""
    with pytest.raises(ConfigError, match=says):
        allocate_by_sensitivity(curves, PARAMS, rule)


def _owl(metrics, target, threshold, spread):
    """Return the densities of layers by the formula of the paper's authors, in plain numpy."""
    ratios = np.array([(m > threshold * m.mean()).mean() for m in metrics])
    scaled = (ratios - ratios.min()) / (ratios.max() - ratios.min()) * 2 * spread
    return scaled - scaled.mean() + 1 - target


def _outlying(seed, layers=5, shape=(40, 50)):
    rng = np.random.default_rng(seed)
    params = {f"{i}.weight": torch.from_numpy(rng.normal(size=shape)) for i in range(layers)}
    stats = {
        name: {"input_norm": torch.from_numpy(np.abs(rng.standard_t(2 + i, size=shape[1])))}
        for i, name in enumerate(params)
    }
    return params, stats


@given(st.integers(0, 200), st.sampled_from([0.5, 0.7]), st.sampled_from([3.0, 5.0]))
def test_densities_by_outliers_are_those_of_the_paper_before_rounding(seed, target, threshold):
    """Defends OWL: layers of one size have the densities of its formula, to a unit or two."""
    params, stats = _outlying(seed)
    found = allocate_by_outliers(params, stats, Rule(target), threshold=threshold, spread=0.1)
    metrics = [(params[name].abs() * stats[name]["input_norm"]).numpy() for name in params]
    assume(len({(m > threshold * m.mean()).mean() for m in metrics}) > 1)
    expected = 1 - _owl(metrics, target, threshold, 0.1)
    targets = [found.rules[name].target for name in params]
    assert [float(t) for t in targets] == pytest.approx(list(expected), abs=2.5 / 2000)
    assert sum(t * 2000 for t in targets) == math.floor(10_000 * Fraction(str(target)))


def test_layers_may_be_blocks_whose_tensors_share_one_ratio():
    """Defends ``by``: the paper's layer is a block, its metric that of all its tensors together."""
    params, stats = _outlying(1, layers=6)
    found = allocate_by_outliers(
        params, stats, Rule(0.6), spread=0.1, by=lambda name: int(name[0]) // 2
    )
    metrics = [(params[n].abs() * stats[n]["input_norm"]).numpy() for n in params]
    blocks = [np.concatenate([metrics[i], metrics[i + 1]]) for i in (0, 2, 4)]
    expected = np.repeat(1 - _owl(blocks, 0.6, 5.0, 0.1), 2)
    targets = [float(found.rules[name].target) for name in params]
    assert targets == pytest.approx(list(expected), abs=2.5 / 2000)


def test_larger_layers_count_more_in_the_mean():
    """Defends the total where layers differ in size, where the paper's plain mean misses it."""
    params = {"a": torch.ones(2, 10), "b": torch.ones(6, 10)}
    norms = torch.tensor([200.0, *[1.0] * 9])
    stats = {"a": {"input_norm": norms}, "b": {"input_norm": torch.ones(10)}}
    found = allocate_by_outliers(params, stats, Rule(0.5), spread=0.1)
    assert [r.target for r in found.rules.values()] == [Fraction(7, 20), Fraction(33, 60)]


def test_layers_without_outliers_are_all_pruned_alike():
    """Defends against 0 / 0, where the formula has no answer."""
    params = {name: torch.ones(4, 5) for name in "ab"}
    stats = {name: {"input_norm": torch.ones(5)} for name in "ab"}
    found = allocate_by_outliers(params, stats, Rule(0.4))
    assert [rule.target for rule in found.rules.values()] == [Fraction(2, 5)] * 2


def test_rows_as_groups_take_outliers_too():
    """Defends Wanda's comparison group: exact in every row, for rows of several numbers."""
    params, stats = _outlying(3, layers=3)
    params["2.weight"] = params["2.weight"][:7]
    rule = Rule(0.7, score="wanda", pattern=ROWS)
    found = allocate_by_outliers(params, stats, rule)
    masks = compute_masks(params, 0, found, stats=stats)
    assert sparsity(masks).zeros == 87 * 35
    for name, mask in masks.items():
        assert set((~mask).sum(dim=1).tolist()) == {50 * found.rules[name].target}


def test_measuring_outliers_changes_nothing_and_takes_views_and_halves():
    """Defends law 4 and law 7."""
    params, stats = _outlying(5)
    before = [t.clone() for t in params.values()]
    wide = {n: p.bfloat16().float() for n, p in params.items()}
    half = {n: p.bfloat16().t().contiguous().t() for n, p in params.items()}
    assert allocate_by_outliers(wide, stats, Rule(0.5)) == allocate_by_outliers(
        half, stats, Rule(0.5)
    )
    assert all(map(torch.equal, params.values(), before))


@pytest.mark.parametrize(
    ("options", "stats", "error", "says"),
    [
        ({}, {}, ValueError, "'0.weight' needs the statistic 'input_norm'"),
        ({}, {"0.weight": {"input_norm": torch.ones(3)}}, ConfigError, r"\(50,\); got \(3,\)"),
        ({}, {"0.weight": {"input_norm": torch.full((50,), math.nan)}}, NaNError, "'0.weight'"),
        ({"threshold": -1}, None, ConfigError, "threshold >= 0; got -1"),
        ({"spread": 1.5}, None, ConfigError, r"spread in \[0, 1\]; got 1.5"),
        ({"spread": 0.5}, None, ConfigError, "spread of at most .* around 0.9"),
    ],
)
def test_impossible_statistics_and_spreads_are_refused(options, stats, error, says):
    """Defends the errors, and that no density is cut off silently."""
    params, good = _outlying(0)
    with pytest.raises(error, match=says):
        allocate_by_outliers(params, good if stats is None else stats, Rule(0.9), **options)
