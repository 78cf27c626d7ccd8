"""The Pruner where pruned entries come back: exchanges, dense weights, sums over the steps."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from purprune import (
    NM,
    SET,
    Alternating,
    Channel,
    ConstantSparsity,
    PolynomialDecay,
    Regrow,
    RigL,
    Rule,
    StraightThrough,
    Unstructured,
    apply_masks,
    straight_through,
    update_masks,
)
from purprune.statistics import accumulate
from purprune_adapters import Pruner, load_pruner, resolve, save_pruner

STEPS = 13
RULES = {
    "RigL": Rule(0.8, regrow=RigL(every=3, end_step=10, fraction=0.5)),
    "SET": Rule(0.8, regrow=SET(every=2, fraction=0.5)),
    "GraNet": Rule(0.8, PolynomialDecay([0, 4, 8]), 0.4, regrow=RigL(every=2, end_step=12)),
    "2:4 RigL": Rule(pattern=NM(2, 4), regrow=RigL(every=4, end_step=12, fraction=1.0)),
    "STE": Rule(0.7, regrow=StraightThrough()),
    "SR-STE 2:4": Rule(pattern=NM(2, 4), regrow=StraightThrough(every=2, decay=0.05)),
    "gradual STE": Rule(0.8, PolynomialDecay([2, 5, 8]), regrow=StraightThrough(every=3)),
    "AC/DC": Rule(0.8, Alternating(2, sparse_steps=3, dense_steps=2, end_step=10)),
    "STE by movement": Rule(
        0.7, ConstantSparsity(2), score="movement", regrow=StraightThrough(every=2, decay=0.1)
    ),
    "movement": Rule(0.8, PolynomialDecay([2, 5, 8]), score="movement"),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.arange(8) % 4


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


class Fold:
    """The pure fold by hand: dense weights, masks, sums, and an optimizer of torch's."""

    def __init__(self, model: nn.Module, rule: Rule, make) -> None:
        self.model, self.rule, self.config = model, rule, resolve(model, rule)
        self.params = dict(model.named_parameters())
        self.optimizer = make(model.parameters())
        self.dense = {n: p.detach().clone() for n, p in self.params.items()}
        self.sums = {n: {"movement": torch.zeros_like(p)} for n, p in self.params.items()}
        self.masks = self.update(0)
        self.write(apply_masks(self.dense, self.masks))

    @property
    def is_straight(self) -> bool:
        return isinstance(self.rule.regrow, StraightThrough)

    @torch.no_grad()
    def write(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.params[name].copy_(value)

    def update(self, step: int) -> dict[str, Tensor]:
        grads = {name: p.grad for name, p in self.params.items()}
        stats = self.sums if "movement" in str(self.rule.score) else None
        masks = getattr(self, "masks", {})
        return update_masks(self.dense, masks, step, self.config, grads=grads, stats=stats)

    @torch.no_grad()
    def state_where_pruned_is_zero(self) -> None:
        for name, mask in self.masks.items():
            for tensor in self.optimizer.state[self.params[name]].values():
                if isinstance(tensor, Tensor) and tensor.shape == mask.shape:
                    tensor.mul_(mask)

    def step(self, step: int) -> None:
        x, y = batch(step)
        self.optimizer.zero_grad()
        params = self.params
        if self.is_straight:
            self.write({name: self.dense[name] for name in self.masks})
            params = straight_through(params, self.masks)
        nn.functional.cross_entropy(functional_call(self.model, params, x), y).backward()
        exchanges = isinstance(self.rule.regrow, Regrow) and self.rule.regrow.changes_at(step)
        with torch.no_grad():
            for name, mask in self.masks.items():
                grad = self.params[name].grad
                if not self.is_straight and not exchanges:
                    grad.masked_fill_(~mask, 0)
                self.sums[name] = accumulate(self.sums[name], self.params[name], grad)
                if self.is_straight:
                    grad += self.rule.regrow.decay * self.dense[name].masked_fill(mask, 0)
        self.optimizer.step()
        self.dense = {name: p.detach().clone() for name, p in self.params.items()}
        masked = apply_masks(self.dense, self.masks)
        if not self.is_straight:
            self.dense = masked
        masks = self.update(step)
        if exchanges or self.rule.sparsity_at(step) < self.rule.sparsity_at(step - 1):
            self.state_where_pruned_is_zero()
        self.masks = masks
        self.write(apply_masks(self.dense, masks))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", RULES)
def test_law_9_steps_are_the_pure_fold_where_entries_come_back(name, make):
    """Defends the adapter for exchanges, dense weights and sums: it adds nothing."""
    model = net()
    fold = Fold(copy.deepcopy(model), RULES[name], make)
    optimizer = make(model.parameters())
    pruner = Pruner(model, RULES[name], optimizer=optimizer)
    pruner.prepare(inplace=True)
    came_back = 0
    for step in range(1, STEPS + 1):
        before = {n: mask.clone() for n, mask in pruner.masks.items()}
        train_step(model, optimizer, step)
        pruner.step()
        fold.step(step)
        for key, mask in pruner.masks.items():
            assert torch.equal(mask, fold.masks[key]), (step, key)
            came_back += int((mask & ~before[key]).sum())
        for key, param in model.named_parameters():
            assert same_bits(param, fold.params[key]), (step, key)
    assert (came_back > 0) == (name != "movement")


def states(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner) -> bytes:
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), pruner.state_dict()), buffer)
    return buffer.getvalue()


@given(st.integers(0, STEPS - 1), st.sampled_from(sorted(RULES)), st.booleans())
def test_law_10_a_resumed_run_ends_with_the_same_bits(stop: int, name: str, before_prepare: bool):
    """Defends that dense weights and sums are saved beside the masks."""
    model = net()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    pruner = Pruner(model, RULES[name], optimizer=optimizer)
    pruner.prepare(inplace=True)
    saved = states(model, optimizer, pruner)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        pruner.step()
        if step == stop:
            saved = states(model, optimizer, pruner)
    weights, momenta, state = torch.load(io.BytesIO(saved), weights_only=True)
    again = net()
    restarted = OPTIMIZERS["AdamW"](again.parameters())
    resumed = Pruner(again, RULES[name], optimizer=restarted)
    if before_prepare:
        resumed.load_state_dict(state)
    resumed.prepare(inplace=True)
    again.load_state_dict(weights)
    restarted.load_state_dict(momenta)
    if not before_prepare:
        resumed.load_state_dict(state)
    for step in range(stop + 1, STEPS + 1):
        train_step(again, restarted, step)
        resumed.step()
    for param, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert same_bits(param, expected)
    for key, tensor in pruner.state_dict()["memory"].items():
        assert same_bits(resumed.state_dict()["memory"][key], tensor)


def test_gradients_are_whole_only_where_entries_compete_by_them():
    """Defends clipping and momentum at all other steps."""
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    pruner = Pruner(model, RULES["RigL"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        pruned = ~pruner.masks["0.weight"]
        whole = bool(model[0].weight.grad[pruned].any())
        assert whole == (step in (3, 6, 9))
        pruner.step()


def test_entries_that_come_back_are_zero_and_have_no_momentum():
    """Defends the new start of regrown entries."""
    model = net()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    pruner = Pruner(model, RULES["RigL"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    for step in range(1, 4):
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        train_step(model, optimizer, step)
        pruner.step()
    for name, mask in pruner.masks.items():
        back, param = mask & ~before[name], model.get_parameter(name)
        assert bool(back.any())
        assert not bool(param[back].any())
        assert not bool(optimizer.state[param]["exp_avg"][back].any())
        assert bool(optimizer.state[param]["exp_avg"][mask & before[name]].any())


def test_weights_that_are_loaded_between_steps_are_the_dense_ones_where_they_are_kept():
    """Defends model.load_state_dict() and other writes beside a straight-through rule."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, Rule(0.5, regrow=StraightThrough()), optimizer=optimizer)
    pruner.prepare(inplace=True)
    with torch.no_grad():
        model[0].weight.fill_(7.0)
    mask = pruner.masks["0.weight"].clone()
    pruner.step()
    assert torch.equal(pruner.masks["0.weight"], mask)
    assert bool((model[0].weight[mask] == 7).all())
    assert not bool(model[0].weight[~mask].any())


@pytest.mark.parametrize("name", ["RigL", "STE", "movement"])
def test_rules_that_follow_the_optimizer_need_one(name: str):
    """Defends against momentum of regrown entries, and sums that nobody adds to."""
    with pytest.raises(ValueError, match=r"Expected optimizer=\.\.\. with .* '0.weight'") as caught:
        Pruner(net(), RULES[name])
    assert "\n" not in str(caught.value)


def test_a_closure_is_refused_before_anything_moves():
    """Defends against a forward pass on dense weights inside of optimizer.step()."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, RULES["STE"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: 0.0)
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_a_finalized_model_has_its_last_masks_and_no_hook_on_the_optimizer():
    """Defends the end: dense weights are gone, and the optimizer trains an ordinary model."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, RULES["STE"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    train_step(model, optimizer, 1)
    pruner.step()
    assert int((pruner.finalize(inplace=True)[0].weight == 0).sum()) == 67
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("name", ["STE", "movement", "GraNet"])
def test_a_pickled_pruner_and_a_file_go_on(name: str, tmp_path):
    """Defends copies of the whole training, and safetensors, with what is remembered."""
    model = net()
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    pruner = Pruner(model, RULES[name], optimizer=optimizer)
    pruner.prepare(inplace=True)
    for step in range(1, 5):
        train_step(model, optimizer, step)
        pruner.step()
    save_pruner(pruner, tmp_path / "pruner.safetensors")
    copied, others, twin = pickle.loads(pickle.dumps((model, optimizer, pruner)))
    load_pruner(twin, tmp_path / "pruner.safetensors")
    for step in range(5, 9):
        train_step(model, optimizer, step)
        pruner.step()
        train_step(copied, others, step)
        twin.step()
    for param, expected in zip(copied.parameters(), model.parameters(), strict=True):
        assert same_bits(param, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda memory: memory.clear(),
        lambda memory: memory.update({"dense.0.weight": torch.zeros(2, 2)}),
        lambda memory: memory.update({"dense.0.weight": torch.zeros(16, 6, dtype=torch.int32)}),
        lambda memory: memory.update({"dense.other": torch.zeros(2)}),
    ],
)
def test_a_damaged_memory_is_refused_and_changes_nothing(change):
    """Defends the state that a resumed straight-through training needs."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, RULES["STE"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    train_step(model, optimizer, 1)
    pruner.step()
    state, before = pruner.state_dict(), pruner.state_dict()
    change(state["memory"])
    with pytest.raises(ValueError, match="memory of the pruner state"):
        pruner.load_state_dict(state)
    after = pruner.state_dict()
    assert all(torch.equal(after["memory"][key], t) for key, t in before["memory"].items())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["movement", "SR-STE 2:4", "RigL"])
def test_mixed_precision_changes_nothing_but_by_rounding(name: str, fused: bool):
    """Defends sums and decays against a loss scale that fused optimizers undo by themselves."""

    def run(scale: float) -> tuple[nn.Module, Pruner]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
        pruner = Pruner(model, RULES[name], optimizer=optimizer)
        pruner.prepare(inplace=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            x, y = batch(step)
            loss = nn.functional.cross_entropy(model(x), y)
            if scale > 1 and step in (4, 6):  # a batch that overflows: the scaler skips it
                (loss * torch.inf).backward()
            else:
                scaler.scale(loss).backward()
            if scale > 1 or step not in (4, 6):
                scaler.step(optimizer)
                scaler.update(scale)
            pruner.step()
        return model, pruner

    (model, scaled), (twin, plain) = run(2.0**10), run(1.0)
    for key, tensor in plain.state_dict()["memory"].items():
        assert torch.allclose(scaled.state_dict()["memory"][key], tensor, rtol=1e-4, atol=1e-6), key
    if name != "RigL":  # which exchanges nothing in a step without a gradient
        for key, mask in plain.masks.items():
            assert torch.equal(scaled.masks[key], mask)
        for param, expected in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.allclose(param, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["SET", "STE", "AC/DC"])
def test_an_average_keeps_what_comes_back(name: str):
    """Defends copies of a model against masks of the moment at which they were made."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, RULES[name], optimizer=optimizer)
    pruner.prepare(inplace=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, step)
        pruner.step()
        average.update_parameters(model)
        before = [param.detach().clone() for param in average.parameters()]
        average(batch(step)[0])
        assert all(map(torch.equal, average.parameters(), before))
    final = pruner.finalize(average.module)
    for key, mask in pruner.masks.items():
        assert not bool(final.get_parameter(key)[~mask].any())
        if name != "SET":  # of which the last exchange brought zeros
            assert bool(final.get_parameter(key)[mask].all())


def test_gradients_that_were_zeroed_too_early_are_refused():
    """Defends growth against an order by index, which says nothing."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, Rule(0.8, regrow=RigL(every=2, end_step=9)), optimizer=optimizer)
    pruner.prepare(inplace=True)
    train_step(model, optimizer, 1)
    pruner.step()
    train_step(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match=r"all are zero. Call pruner.step\(\) after"):
        pruner.step()
    assert pruner.step_count == 1


def test_a_new_optimizer_has_to_be_followed():
    """Defends sums, dense weights and momentum of a training that goes on with another one."""
    model = net()
    old, new = (OPTIMIZERS["SGD"](model.parameters()) for _ in range(2))
    pruner = Pruner(model, RULES["STE"], optimizer=old)
    pruner.prepare(inplace=True)
    train_step(model, new, 1)
    with pytest.raises(RuntimeError, match=r"pruner\.follow\(optimizer\)"):
        pruner.step()
    assert pruner.step_count == 0
    pruner.follow(new)
    train_step(model, new, 1)
    pruner.step()
    assert pruner.step_count == 1
    assert not old._optimizer_step_post_hooks
    with pytest.raises(ValueError, match=r"does not hold '0.weight'"):
        pruner.follow(OPTIMIZERS["SGD"](net().parameters()))


def test_what_is_remembered_follows_the_model_to_another_dtype():
    """Defends dense weights of a model that becomes float64, and a state from bfloat16."""
    model = net().bfloat16()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    pruner = Pruner(model, RULES["STE"], optimizer=optimizer)
    pruner.prepare(inplace=True)
    state = pruner.state_dict()
    model.double()
    for step in range(1, 4):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        pruner.step()
    memory = pruner.state_dict()["memory"]["dense.0.weight"]
    assert memory.dtype == torch.float64
    assert not torch.equal(memory, memory.bfloat16().double())
    other = net()
    sgd = OPTIMIZERS["SGD"](other.parameters())
    loaded = Pruner(other, RULES["STE"], optimizer=sgd)
    loaded.load_state_dict(state)
    loaded.prepare(inplace=True)
    train_step(other, sgd, 1)
    loaded.step()
    assert loaded.state_dict()["memory"]["dense.0.weight"].dtype == torch.float32


def test_options_that_contradict_regrow_are_refused_when_the_pruner_is_made():
    """Defends one clear line for frozen weights, momentum, statistics and optimizers."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.raises(ValueError, match="mask_optimizer_state=False with StraightThrough"):
        Pruner(model, RULES["STE"], optimizer=optimizer, mask_optimizer_state=True)
    with pytest.raises(TypeError, match=r"Expected an optimizer of torch.optim; got str"):
        Pruner(model, RULES["STE"], optimizer="sgd")
    with pytest.raises(TypeError, match="Expected stats as a dict by parameter; got list"):
        Pruner(model, RULES["STE"], optimizer=optimizer, stats=[1])
    with pytest.raises(KeyError, match=r"statistics of known parameters; got '0.wieght'"):
        Pruner(model, RULES["STE"], optimizer=optimizer, stats={"0.wieght": {}})
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0.weight' is frozen"):
        Pruner(model, RULES["RigL"], optimizer=optimizer)


def test_a_sparse_gradient_is_refused_before_anything_moves():
    """Defends weights that would stay dense where an error comes between two hooks."""
    model = nn.Embedding(8, 4, sparse=True)
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    rule = Rule(0.5, regrow=StraightThrough(decay=0.1))
    config = {"module_name_configs": {"weight": rule}}
    pruner = Pruner(model, config, optimizer=optimizer)
    pruner.prepare(inplace=True)
    before = model.weight.detach().clone()
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match=r"Expected a strided gradient of 'weight'"):
        optimizer.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    "rule",
    [
        Rule(0.9, pattern=Unstructured(scope="row"), regrow=SET(every=1)),
        Rule(0.75, pattern=Channel(dim=1), regrow=SET(every=1, fraction=0.1)),
        Rule(0.5, regrow=SET(every=1, fraction=0.0)),
    ],
    ids=["rows", "channels", "nothing"],
)
def test_an_exchange_that_never_moves_anything_is_refused_when_the_pruner_is_made(rule: Rule):
    """Defends against sparse training that is static by rounding."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.raises(ValueError, match=r"Expected an exchange of at least one unit in 0.weight"):
        Pruner(model, rule, optimizer=optimizer)


def test_statistics_of_tensors_that_are_not_due_are_left_alone():
    """Defends rules whose updates come at different steps, given statistics and sums alike."""
    model = net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    config = {
        "module_name_configs": {
            "0": Rule(0.5, PolynomialDecay([1, 2]), score="wanda"),
            "2": Rule(0.5, PolynomialDecay([3, 5]), score="movement"),
        }
    }
    stats = {"0.weight": {"input_norm": torch.ones(6)}}
    pruner = Pruner(model, config, optimizer=optimizer, stats=stats)
    pruner.prepare(inplace=True)
    for step in range(1, 6):
        train_step(model, optimizer, step)
        pruner.step()
    assert [int((~mask).sum()) for mask in pruner.masks.values()] == [48, 32]
