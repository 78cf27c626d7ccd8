"""The Pruner with one total for many tensors: the fold, resume, the report, tied weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from purprune import (
    GlobalGroup,
    PolynomialDecay,
    Rule,
    Unstructured,
    apply_masks,
    compute_masks,
)
from purprune_adapters import Pruner, resolve

RULE = Rule(0.7, PolynomialDecay([1, 3]), pattern=Unstructured(scope="global"))
ERK = Rule(0.7, PolynomialDecay([0, 1, 3]), budget="erk")
BOUNDED = Rule(
    0.7,
    PolynomialDecay([0, 1, 3]),
    pattern=Unstructured(scope=GlobalGroup(0.2, 0.75, normalize="l2")),
)
RULES = pytest.mark.parametrize("rule", [RULE, ERK, BOUNDED], ids=["global", "erk", "bounded"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def drift(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: w + 0.01 * torch.cos(w * 50) for name, w in params.items()}


@torch.no_grad()
def train(model: nn.Module, pruner: Pruner, steps: int) -> None:
    for _ in range(steps):
        params = dict(model.named_parameters())
        for name, new in drift(params).items():
            params[name].copy_(new)
        pruner.step()


@RULES
def test_law_9_the_pruner_is_the_fold_of_the_pure_functions(rule):
    """Defends the adapter: the masks of one total follow the schedule as the core says."""
    model = network()
    config = resolve(model, rule)
    params = {name: p.detach().clone() for name, p in model.named_parameters()}
    masks = compute_masks(params, 0, config)
    params = apply_masks(params, masks)
    for step in range(1, 5):
        params = drift(params)
        masks = compute_masks(params, step, config, prev=masks)
        params = apply_masks(params, masks)
    pruner = Pruner(model, rule)
    pruner.prepare(inplace=True)
    train(model, pruner, 4)
    for name, param in model.named_parameters():
        assert torch.equal(param, params[name]), name
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == 31  # floor(45 * 0.7)


@RULES
def test_law_10_a_resumed_run_ends_with_the_same_bits_and_damage_is_refused(rule):
    """Defends the check of a state's counts: of a global group's total, or of each tensor's own."""
    model = network()
    pruner = Pruner(model, rule)
    pruner.prepare(inplace=True)
    train(model, pruner, 2)
    state, again = copy.deepcopy(pruner.state_dict()), copy.deepcopy(model.state_dict())
    train(model, pruner, 2)
    other = network()
    other.load_state_dict(again)
    resumed = Pruner(other, rule)
    resumed.load_state_dict(state)
    resumed.prepare(inplace=True)
    train(other, resumed, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    state["masks"]["0.weight"].logical_not_()
    names = r"'0\.weight' and '2\.weight'" if rule.is_global else r"'0\.weight'"
    with pytest.raises(ValueError, match=f"units pruned in {names} at step 2"):
        Pruner(network(), rule).load_state_dict(state)


def test_masks_that_hold_are_kept_by_a_global_rule_and_come_back_with_the_state():
    """Defends masks= in one group: the larger of the group's count and theirs, at every step."""
    model = network()
    floor = {"0.weight": torch.arange(30).view(5, 6) % 3 > 0}  # 10 of 45 go
    pruner = Pruner(model, RULE, masks=floor)
    pruner.prepare(inplace=True)
    counts = []
    for _ in range(4):
        counts.append(sum(int((~mask).sum()) for mask in pruner.masks.values()))
        assert not bool((pruner.masks["0.weight"] & ~floor["0.weight"]).any())
        train(model, pruner, 1)
    assert counts == [10, 10, 10, 31]  # alone the schedule prunes 0, 0, 0, 31
    resumed = Pruner(network(), RULE)
    resumed.load_state_dict(pruner.state_dict(packed=True))
    resumed.prepare(inplace=True)
    assert torch.equal(resumed.state_dict()["floor"]["0.weight"], floor["0.weight"])
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in pruner.masks.items())


def test_the_report_says_that_the_target_is_of_all_tensors_together():
    """Defends against a tensor that seems to miss its target."""
    model = network()
    pruner = Pruner(model, Rule(0.7, pattern=Unstructured(scope="global")))
    pruner.prepare(inplace=True)
    report = pruner.report()
    assert "0.7 of all" in str(report)
    assert report.total.zeros == 31
    assert report.as_dict()["parameters"]["0.weight"]["shared"]
    assert pruner.plan().shared[0].pruned == 31


def test_reports_and_the_pruner_show_what_a_budget_gives_each_tensor():
    """Defends sparsities that differ under one rule: in force, in the end, and in the warning."""
    model = network()
    pruner = Pruner(model, ERK)
    pruner.prepare(inplace=True)
    train(model, pruner, 1)
    ends = {row.name: row.pruned_units / row.units for row in pruner.plan().tensors}
    assert ends == {"0.weight": 22 / 30, "2.weight": 9 / 15}
    rows = pruner.report().rows
    assert {row.name: row.target for row in rows} == ends
    assert {row.name: row.sparsity for row in rows} == pruner.sparsity_at(1)
    assert [row.weight.zeros for row in rows] == [round(row.sparsity * row.weight.entries) for row
        in rows] != [0, 0]  # fmt: skip
    with pytest.warns(UserWarning, match=r"0\.weight at .* of 0\.7333, 2\.weight at .* of 0\.6"):
        pruner.finalize()


def test_steps_without_an_update_divide_nothing(monkeypatch):
    """Defends the cost of a step: a budget is asked where masks are renewed."""
    model = network()
    pruner = Pruner(model, ERK)
    pruner.prepare(inplace=True)
    train(model, pruner, 3)
    monkeypatch.setattr("purprune.totals.kept_units", None)
    train(model, pruner, 2)
    assert pruner.step_count == 5


def test_tied_weights_count_once():
    """Defends the total against a parameter with two names."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    pruner = Pruner(model, Rule(0.5, pattern=Unstructured(scope="global")))
    assert (pruner.plan().shared[0].units, pruner.plan().shared[0].pruned) == (16, 8)
