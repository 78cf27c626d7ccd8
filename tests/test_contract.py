"""What every score with every pattern must do; a new score or pattern joins by one line."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from oracles import prune_oracle
from purprune import (
    ConfigError,
    PolynomialDecay,
    PruneConfig,
    Rule,
    ScoreContext,
    apply_masks,
    compute_masks,
)
from purprune import plan as make_plan
from purprune.patterns import TensorGroup
from strategies import PATTERNS, SCORES, exact_sparsity, stats_for, target_of


@pytest.fixture(params=list(PATTERNS))
def pattern(request: pytest.FixtureRequest):
    return PATTERNS[request.param]


@pytest.fixture(params=list(SCORES))
def score(request: pytest.FixtureRequest):
    return SCORES[request.param]


def _case(pattern):
    shape = (12, 8, 3) if pattern.group.kind == "transposable" else (10, 7, 3)
    generator = torch.Generator().manual_seed(0)
    w = torch.randint(-20, 21, shape, generator=generator) / 4
    g = torch.randint(-20, 21, shape, generator=generator) / 4
    return {"w": w}, {"w": g}


def _mask(params, grads, rule, step=0, prev=None):
    config = PruneConfig().set_module_name("w", rule)
    stats = {"w": stats_for(params["w"])}
    return compute_masks(params, step, config, prev=prev, grads=grads, stats=stats)["w"]


@pytest.mark.parametrize("s", [0.0, 0.29, 0.5, 1.0])
def test_the_mask_is_the_oracles(score, pattern, s):
    """Defends count, order and shape of every score with every pattern."""
    params, grads = _case(pattern)
    rule = Rule(target_of(pattern, s), score=score, pattern=pattern)
    scores = score(params["w"], ScoreContext("w", 0, grads["w"], stats_for(params["w"])))
    expected = prune_oracle(scores, pattern, exact_sparsity(pattern, s))
    assert torch.equal(_mask(params, grads, rule), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_scored_as_their_float32_upcast(score, pattern, dtype):
    """Defends law 7 for every score, a user's among them."""
    params, grads = _case(pattern)
    half = {"w": (params["w"] * 1e-4).to(dtype)}
    rule = Rule(target_of(pattern, 0.5), score=score, pattern=pattern)
    upcast = {"w": half["w"].float()}
    assert torch.equal(_mask(half, grads, rule), _mask(upcast, grads, rule))


def test_counts_are_the_planned_ones(score, pattern):
    """Defends the dry run: what plan() says is what compute_masks() does."""
    params, grads = _case(pattern)
    config = PruneConfig().set_module_name(
        "w", Rule(target_of(pattern, 0.4), score=score, pattern=pattern)
    )
    planned = make_plan(params, config)
    (row,) = planned.tensors
    stats = {"w": stats_for(params["w"])}
    mask = compute_masks(params, 0, config, grads=grads, stats=stats)["w"]
    whole = torch.ones_like(params["w"]).masked_fill(~mask, 0)
    units = {
        tuple(i // b for i, b in zip(index, row.unit, strict=True))
        for index in (whole == 0).nonzero().tolist()
    }
    if planned.shared:
        assert (len(units), row.units) == (planned.shared[0].pruned, planned.shared[0].units)
    else:
        assert len(units) == row.pruned_units
        assert sum(g.groups * g.units for g in row.groups) == row.units


def test_masks_along_a_schedule_nest_and_end_at_the_target(score, pattern):
    """Defends the fold of a training loop: nothing comes back, and the end is exact."""
    params, grads = _case(pattern)
    schedule = PolynomialDecay([0, 2, 4, 6])
    rule = Rule(target_of(pattern, 0.7), schedule, score=score, pattern=pattern)
    masks = None
    for step in range(8):
        new = _mask(params, grads, rule, step, masks and {"w": masks["w"]})
        if masks is not None:
            assert not bool((new & ~masks["w"]).any())
        masks = {"w": new}
        params = apply_masks({"w": params["w"] + 0.125}, masks)
    fresh = make_plan(params, PruneConfig().set_module_name("w", rule)).tensors[0]
    assert rule.sparsity_at(7) == exact_sparsity(pattern, 0.7)
    assert fresh.sparsity == exact_sparsity(pattern, 0.7)


def test_the_same_call_gives_the_same_bits_and_changes_nothing(score, pattern):
    """Defends purity."""
    params, grads = _case(pattern)
    before = params["w"].clone(), grads["w"].clone()
    rule = Rule(target_of(pattern, 0.5), score=score, pattern=pattern)
    assert torch.equal(_mask(params, grads, rule), _mask(params, grads, rule))
    assert torch.equal(params["w"], before[0])
    assert torch.equal(grads["w"], before[1])


def test_an_empty_tensor_has_an_empty_mask(score, pattern):
    """Defends against divisions by zero and empty reductions."""
    params = {"w": torch.zeros(0, 4, 2)}
    mask = _mask(
        params,
        {"w": torch.zeros(0, 4, 2)},
        Rule(target_of(pattern, 0.5), score=score, pattern=pattern),
    )
    assert mask.shape == (0, 4, 2)


@pytest.mark.parametrize("budget", ["uniform", "er", "erk"])
def test_a_budget_gives_a_tensor_alone_its_whole_total(score, pattern, budget):
    """Defends budgets with every score and unit: one tensor has what it has without."""
    params, grads = _case(pattern)
    own = Rule(target_of(pattern, 0.4), score=score, pattern=pattern)
    if not isinstance(pattern.group, TensorGroup):
        with pytest.raises(ConfigError, match="budget='own'"):
            replace(own, budget=budget)
        return
    mask = _mask(params, grads, replace(own, budget=budget))
    assert torch.equal(mask, _mask(params, grads, own))


def test_fractions_of_a_pattern_are_exact():
    """Defends 1:3, which no float is."""
    assert Rule(pattern=PATTERNS["3:5 along dim 0"]).target == Fraction(3, 5)
