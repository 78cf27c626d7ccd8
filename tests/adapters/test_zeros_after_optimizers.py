"""Zeros after a step of an attached optimizer: proven to be there, or written."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from purprune import PolynomialDecay, PruneConfig, Rule
from purprune_adapters import Pruner, hooks
from purprune_adapters.inplace import is_zero_where_pruned

KEEPING = {
    "sgd": lambda p: SGD(p, 0.1),
    "sgd, decay": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "sgd, maximize": lambda p: SGD(p, 0.1, momentum=0.9, dampening=0.1, maximize=True),
    "sgd, fused": lambda p: SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "adam": lambda p: Adam(p, 0.01),
    "adam, amsgrad": lambda p: Adam(p, 0.01, weight_decay=0.1, amsgrad=True, maximize=True),
    "adam, foreach": lambda p: Adam(p, 0.01, weight_decay=0.1, foreach=True),
    "adam, fused": lambda p: Adam(p, 0.01, weight_decay=0.1, fused=True, amsgrad=True),
    "adamw": lambda p: AdamW(p, 0.01, weight_decay=0.1),
    "adamw, fused": lambda p: AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "adagrad": lambda p: Adagrad(p, 0.01, lr_decay=0.1, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, 0.01, momentum=0.9, centered=True, weight_decay=0.1),
}
WRITING = {
    "decay that flips the sign of zero": lambda p: AdamW(p, 1.0, weight_decay=1.5),
    "epsilon of zero": lambda p: Adam(p, 0.01, eps=0.0),
    "rate in a tensor": lambda p: Adam(p, torch.tensor(0.01), foreach=False),
    "state that starts above zero": lambda p: Adagrad(p, 0.01, initial_accumulator_value=0.1),
    "another class": lambda p: torch.optim.NAdam(p, 0.01),
    "a subclass": lambda p: type("Own", (SGD,), {})(p, 0.1),
}


@pytest.fixture
def written(monkeypatch):
    """Return the list of tensors that zeros were written into, weights and gradients."""
    seen = []
    original = hooks.zero_pruned_
    monkeypatch.setattr(hooks, "zero_pruned_", lambda t, m: (seen.append(t), original(t, m))[1])
    return seen


def make(optimizer, rule=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    made = optimizer(model.parameters())
    options = {"trust_optimizer": True, **options}
    pruner = Pruner(model, rule or Rule(0.7), optimizer=made, **options)
    pruner.prepare(inplace=True)
    return model, made, pruner


def train(model, optimizer, pruner, steps=4, between=None):
    for step in range(steps):
        optimizer.zero_grad()
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        if between is not None:
            between(model)
        optimizer.step()
        for name, mask in pruner.masks.items():
            pruned = model.get_parameter(name).detach()[~mask]
            assert torch.equal(pruned.view(torch.int32), torch.zeros_like(pruned).view(torch.int32))
        pruner.step()


def weight_passes(written, model):
    params = {id(p) for p in model.parameters()}
    return sum(id(t) in params for t in written)


@pytest.mark.parametrize("optimizer", KEEPING.values(), ids=KEEPING)
def test_zeros_that_stay_by_themselves_are_not_written_again(optimizer, written):
    """Defends the proof per optimizer: every bit is +0 after each step, without a pass."""
    model, made, pruner = make(optimizer)
    written.clear()
    train(model, made, pruner)
    assert weight_passes(written, model) == 0
    assert len(written) == 8  # the gradients of two weights at four steps


@pytest.mark.parametrize("optimizer", WRITING.values(), ids=WRITING)
def test_zeros_are_written_where_nothing_is_proven(optimizer, written):
    """Defends the borders of the proof."""
    model, made, pruner = make(optimizer)
    written.clear()
    train(model, made, pruner)
    assert weight_passes(written, model) >= 6  # the first step may meet no state yet


@pytest.mark.parametrize(
    "between",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        lambda model: [p.grad.add_(1.0) for p in model.parameters()],
        lambda model: [setattr(p, "grad", torch.ones_like(p)) for p in model.parameters()],
    ],
    ids=["clipping", "noise", "another gradient"],
)
def test_a_gradient_that_somebody_touched_proves_nothing(between, written):
    """Defends masking after gradients were changed behind the hook."""
    model, made, pruner = make(KEEPING["adam"])
    written.clear()
    train(model, made, pruner, between=between)
    assert weight_passes(written, model) == 8


def test_momentum_of_entries_that_were_just_pruned_makes_zeros_be_written(written):
    """Defends gradual schedules: the state of newly pruned entries is not zero."""
    rule = Rule(0.9, PolynomialDecay([1, 2, 3]))
    model, made, pruner = make(KEEPING["adam"], rule)
    train(model, made, pruner, steps=3)
    written.clear()
    train(model, made, pruner, steps=3)
    assert weight_passes(written, model) == 6
    assert not all(
        is_zero_where_pruned(made.state[model.get_parameter(n)]["exp_avg"], m)
        for n, m in pruner.masks.items()
    )


def test_masked_optimizer_state_is_zero_where_pruned_and_saves_the_pass(written):
    """Defends ``mask_optimizer_state``: zero at each update, and proven from then on."""
    rule = Rule(0.9, PolynomialDecay([1, 2, 3]))
    model, made, pruner = make(KEEPING["adam"], rule, mask_optimizer_state=True)
    for _ in range(3):
        train(model, made, pruner, steps=1)
        for name, mask in pruner.masks.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                assert is_zero_where_pruned(made.state[model.get_parameter(name)][moment], mask)
    written.clear()
    train(model, made, pruner)
    assert weight_passes(written, model) == 0


def test_the_step_count_of_an_optimizer_is_no_state_of_an_entry():
    """Defends bias correction where a parameter has the shape of the count."""
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(2.0))
    made = Adam(model.parameters(), 0.01)
    rule = Rule(1.0, PolynomialDecay([1, 3]))
    pruner = Pruner(
        model,
        PruneConfig().set_module_name("scale", rule),
        optimizer=made,
        mask_optimizer_state=True,
    )
    pruner.prepare(inplace=True)
    for count in range(1, 5):
        made.zero_grad()
        model.scale.square().backward()
        made.step()
        pruner.step()
        assert int(made.state[model.scale]["step"]) == count
    assert int(made.state[model.scale]["exp_avg"]) == 0


def test_a_state_that_is_loaded_is_looked_at_again(written):
    """Defends against a proof that outlives the state that it was about."""
    model, made, pruner = make(KEEPING["sgd, decay"])
    train(model, made, pruner, steps=2)
    other = copy.deepcopy(made.state_dict())
    for state in other["state"].values():
        state["momentum_buffer"] += 1.0
    made.load_state_dict(other)
    written.clear()
    train(model, made, pruner, steps=2)
    assert weight_passes(written, model) == 4


def test_a_closure_may_write_to_weights(written):
    """Defends zeros after a closure that changes the weights behind its forward pass."""
    model, made, pruner = make(KEEPING["sgd"])

    def closure():
        made.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        with torch.no_grad():
            model[0].weight.add_(1.0)
        return loss

    made.step(closure)
    pruner.step()
    made.step(closure=closure)
    pruned = model[0].weight.detach()[~pruner.masks["0.weight"]]
    assert torch.equal(pruned, torch.zeros_like(pruned))


def test_weights_written_before_the_step_are_masked_after_it(written):
    """Defends against weights that were changed between forward pass and optimizer step."""
    model, made, pruner = make(KEEPING["sgd"])

    def disturb(model):
        with torch.no_grad():
            model[0].weight.add_(1.0)

    written.clear()
    train(model, made, pruner, steps=2, between=disturb)
    assert weight_passes(written, model) == 2


def test_a_pass_or_none_changes_no_bit():
    """Defends law 9 under the proof: the run without an attached optimizer writes every time."""
    models = []
    for attached in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        made = AdamW(model.parameters(), 0.01)
        rule = Rule(0.9, PolynomialDecay([1, 3]))
        pruner = Pruner(model, rule, optimizer=made if attached else None, trust_optimizer=attached)
        pruner.prepare(inplace=True)
        for step in range(6):
            made.zero_grad()
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            model(x).square().sum().backward()
            made.step()
            pruner.step()
        models.append(model)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("option", ["mask_optimizer_state", "trust_optimizer"])
def test_options_about_an_optimizer_need_one(option):
    """Defends the error of a forgotten optimizer."""
    with pytest.raises(ValueError, match=f"with {option}=True"):
        Pruner(nn.Linear(2, 2), Rule(0.5), **{option: True})


def _nonzero(model, pruner):
    return sum(
        int(torch.count_nonzero(model.get_parameter(name).detach()[~mask]))
        for name, mask in pruner.masks.items()
    )


@pytest.mark.parametrize("what", ["weight", "gradient", "state"])
def test_writes_through_data_are_undone_by_an_attached_optimizer(what):
    """Defends zeros against writes that torch does not count, which only trust would miss."""
    model, made, pruner = make(KEEPING["adamw"], trust_optimizer=False)
    train(model, made, pruner, steps=2)
    model(torch.ones(2, 6)).sum().backward()
    for param in model.parameters():
        if what == "weight":
            param.data.add_(1.0)
        elif what == "gradient":
            param.grad.data.add_(1.0)
        else:
            made.state[param]["exp_avg"].data.add_(1.0)
    made.step()
    pruner.step()
    assert _nonzero(model, pruner) == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_on_the_optimizer_prove_nothing(when):
    """Defends zeros against weights that a step hook of somebody else writes."""

    def disturb(optimizer, args, kwargs):
        with torch.no_grad():
            for param in optimizer.param_groups[0]["params"]:
                param.add_(1.0)

    model, made, pruner = make(KEEPING["sgd"])
    register = made.register_step_pre_hook if when == "before" else made.register_step_post_hook
    register(disturb)
    for _ in range(2):
        made.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        made.step()
        pruner.step()
        assert _nonzero(model, pruner) == 0


def test_another_fused_optimizer_may_train_instead_of_the_attached_one():
    """Defends step() where the optimizer that it was attached to is not the one that trains."""
    model, _, pruner = make(KEEPING["sgd"])
    other = Adam(model.parameters(), 0.1, fused=True)
    for param in model.parameters():  # a state from a training without masks
        other.state[param] = {
            "step": torch.tensor(1.0),
            "exp_avg": torch.ones_like(param),
            "exp_avg_sq": torch.ones_like(param),
        }
    for _ in range(2):
        other.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        other.step()
        pruner.step()
        assert _nonzero(model, pruner) == 0


def test_gradient_hooks_do_not_pile_up_on_parameters_that_change_places():
    """Defends the number of hooks where functional_call lends other parameters."""
    model, _, _ = make(KEEPING["sgd"])
    lent = dict(copy.deepcopy(model).named_parameters())
    for _ in range(5):
        torch.func.functional_call(model, lent, (torch.ones(2, 6),))
        model(torch.ones(2, 6))
    hooks_of = model[0].weight._post_accumulate_grad_hooks
    assert len(hooks_of) == 1


@pytest.mark.parametrize("value", [1.0, -1.0, math.nan, math.inf])
def test_what_is_not_zero_where_pruned_is_found(value):
    """Defends the check behind the proof, over several chunks and any strides."""
    tensor = torch.zeros(700, 900)
    mask = torch.ones(900, 700, dtype=torch.bool).t()
    mask[3:699, 5] = False
    tensor[mask] = 2.0
    assert is_zero_where_pruned(tensor, mask)
    tensor[698, 5] = value
    assert not is_zero_where_pruned(tensor, mask)
    tensor[698, 5] = -0.0
    assert is_zero_where_pruned(tensor, mask)
