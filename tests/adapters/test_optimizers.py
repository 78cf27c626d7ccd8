"""Pruned entries stay at zero under every optimizer, and under what loops do around it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from purprune import NaNError, PolynomialDecay, PruneConfig, Rule
from purprune_adapters import Pruner

Params = Iterable[nn.Parameter]
RULE = Rule(0.8, PolynomialDecay([1, 3, 5]), 0.4)
OPTIMIZERS: dict[str, Callable[[Params], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, 0.1),
    "SGD momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "SGD foreach": lambda p: optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "Adam": lambda p: optim.Adam(p, 0.01, weight_decay=0.1),
    "Adam amsgrad": lambda p: optim.Adam(p, 0.01, amsgrad=True),
    "Adam maximize": lambda p: optim.Adam(p, 0.01, maximize=True),
    "Adam foreach": lambda p: optim.Adam(p, 0.01, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, 0.01, fused=True),
    "AdamW": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, foreach=True),
    "AdamW fused": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.1, lr_decay=0.01, weight_decay=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, 0.1, fused=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, weight_decay=0.1),
    "RMSprop momentum": lambda p: optim.RMSprop(p, 0.01, momentum=0.9),
    "RMSprop centered": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "RMSprop foreach": lambda p: optim.RMSprop(p, 0.01, momentum=0.9, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, 0.01, weight_decay=0.1),
    "NAdam decoupled": lambda p: optim.NAdam(
        p, 0.01, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "RAdam": lambda p: optim.RAdam(p, 0.01, weight_decay=0.1),
    "RAdam decoupled": lambda p: optim.RAdam(
        p, 0.01, weight_decay=0.1, decoupled_weight_decay=True
    ),
    "Adamax": lambda p: optim.Adamax(p, 0.01, weight_decay=0.1),
    "Adadelta": lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1),
    "Rprop": lambda p: optim.Rprop(p, 0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.1, lambd=0.1, t0=2, weight_decay=0.1),
    "Adafactor": lambda p: optim.Adafactor(p, 0.1, weight_decay=0.1),
    "LBFGS": lambda p: optim.LBFGS(p, 0.1, max_iter=3),
    "LBFGS wolfe": lambda p: optim.LBFGS(p, max_iter=3, line_search_fn="strong_wolfe"),
}
if hasattr(optim, "Muon"):  # of torch 2.9 and newer; it mixes the entries of a matrix
    OPTIMIZERS["Muon"] = lambda p: optim.Muon(p, 0.1)
FUSED = {name for name in OPTIMIZERS if "fused" in name}


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(12, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    return nn.Sequential(*layers)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator)
    return nn.functional.cross_entropy(model(x), torch.arange(8) % 4)


def train_step(model: nn.Module, optimizer: optim.Optimizer, step: int) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    optimizer.step(closure)


def count_unmasked(pruner: Pruner, model: nn.Module | None = None) -> int:
    params = dict((model or pruner.model).named_parameters())
    return sum(int(torch.count_nonzero(params[n][~mask])) for n, mask in pruner.masks.items())


def without_hooks(model: nn.Module) -> nn.Module:
    twin = net()
    twin.load_state_dict(model.state_dict())
    return twin


class Probe:
    """Looks at the weights as each forward pass reads them: a hook that runs after ours."""

    def __init__(self, pruner: Pruner) -> None:
        self.pruner = pruner
        self.seen = 0
        for layer in (pruner.model[0], pruner.model[2]):
            layer.register_forward_pre_hook(self)

    def __call__(self, module: nn.Module, args: object) -> None:
        names = {id(p): name for name, p in self.pruner.model.named_parameters()}
        mask = self.pruner.masks[names[id(module.weight)]]
        assert not bool(module.weight[~mask].any()), "an unmasked weight is read"
        self.seen += 1


def prepared(make: Callable[[Params], optim.Optimizer], attached: bool, rule: Rule = RULE):
    """Return a pruned model whose optimizer has moments for the entries that are pruned."""
    model = net()
    optimizer = make(model.parameters())
    for step in (100, 101):
        train_step(model, optimizer, step)
    pruner = Pruner(model, rule, optimizer=optimizer if attached else None)
    pruner.prepare(inplace=True)
    return model, optimizer, pruner


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "optimizer attached"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_in_every_forward_pass_and_after_every_step(name: str, attached: bool):
    """Defends zeros under momentum, weight decay and re-evaluations, with growing masks."""
    model, optimizer, pruner = prepared(OPTIMIZERS[name], attached)
    probe = Probe(pruner)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(1, 8):
        train_step(model, optimizer, step)
        if attached:
            assert count_unmasked(pruner) == 0, "right after optimizer.step()"
        pruner.step()
        assert count_unmasked(pruner) == 0
    assert probe.seen >= 14
    assert pruner.report().total.zeros == math.floor(192 * 0.8) + math.floor(64 * 0.8)
    for old, new in zip(before, model.parameters(), strict=True):
        assert bool((old != new)[new != 0].any()), "the survivors train"
    pruner.finalize()  # says nothing: the weights changed


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - FUSED))
def test_forward_passes_are_masked_although_nobody_calls_step(name: str):
    """Defends loops that step the optimizer several times before the pruner's step."""
    model, optimizer, pruner = prepared(OPTIMIZERS[name], attached=False)
    probe = Probe(pruner)
    moved = 0
    for step in range(3):
        train_step(model, optimizer, step)
        moved += count_unmasked(pruner)
    assert probe.seen >= 6
    if name in ("SGD momentum", "Adam", "RMSprop momentum"):
        assert moved, "the test is worth something: the optimizer moves pruned entries"


@pytest.mark.parametrize("name", sorted(FUSED))
def test_an_attached_fused_optimizer_keeps_every_forward_pass_masked(name: str):
    """Defends fused optimizers, whose writes torch does not count, between two steps of ours."""
    model, optimizer, pruner = prepared(OPTIMIZERS[name], attached=True)
    probe = Probe(pruner)
    for step in range(3):
        train_step(model, optimizer, step)
    assert probe.seen == 6


@pytest.mark.parametrize("name", ["SGD nesterov", "Adam fused", "AdamW", "RAdam", "Adafactor"])
def test_training_is_that_of_a_loop_which_multiplies_by_the_masks(name: str):
    """Defends that nothing else is changed: the same bits as weights and gradients times masks."""
    model, optimizer, pruner = prepared(OPTIMIZERS[name], attached=False, rule=Rule(0.6))
    twin, masks = without_hooks(model), pruner.masks
    its_optimizer = OPTIMIZERS[name](twin.parameters())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for step in range(5):
        train_step(model, optimizer, step)
        pruner.step()
        its_optimizer.zero_grad()
        loss_of(twin, step).backward()
        for key, param in twin.named_parameters():
            param.grad.masked_fill_(~masks[key], 0)
        its_optimizer.step()
        for key, param in twin.named_parameters():
            param.data.masked_fill_(~masks[key], 0)
            assert torch.equal(param, model.get_parameter(key))


def masked_norm(model: nn.Module, pruner: Pruner) -> Tensor:
    grads = [p.grad * pruner.masks[name] for name, p in model.named_parameters()]
    return torch.stack([g.norm() for g in grads]).norm()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_accumulated_gradients_stay_masked_and_clipping_sees_no_pruned_one(set_to_none: bool):
    """Defends the norm that is clipped: that of the masked sum of all micro batches."""
    model, optimizer, pruner = prepared(OPTIMIZERS["SGD momentum"], attached=False)
    for step in range(1, 6):
        plain = without_hooks(model)
        optimizer.zero_grad(set_to_none=set_to_none)
        for micro in range(3):
            loss_of(model, 10 * step + micro).backward()
            loss_of(plain, 10 * step + micro).backward()
        loss = loss_of(model, step)
        loss.backward(retain_graph=True)
        loss.backward()
        for _ in range(2):
            loss_of(plain, step).backward()
        expected = masked_norm(plain, pruner)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        assert torch.allclose(norm, expected)
        assert norm < torch.stack([p.grad.norm() for p in plain.parameters()]).norm()
        optimizer.step()
        pruner.step()
        assert count_unmasked(pruner) == 0


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "optimizer attached"])
def test_mixed_precision_with_skipped_steps_keeps_the_zeros(attached: bool):
    """Defends autocast and a real GradScaler: a skipped step leaves the weights alone."""
    model, optimizer, pruner = prepared(OPTIMIZERS["AdamW"], attached)
    probe = Probe(pruner)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    skipped = 0
    for step in range(1, 8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step) * (math.inf if step in (2, 5) else 1.0)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        skipped += same
        assert same is (step in (2, 5))
        scaler.update()
        pruner.step()
        assert count_unmasked(pruner) == 0
    assert skipped == 2
    assert probe.seen == 14


def test_an_overflow_in_pruned_gradients_alone_skips_no_step():
    """Defends the scaler against gradients that nobody reads: a pruned inf is a zero."""
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.1, 1.0]]))
    Pruner(model, Rule(0.5)).prepare(inplace=True)
    optimizer = optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    x = torch.tensor([[3e38, 1.0]])  # times the scale this is inf
    scaler.scale(model(x).sum()).backward()
    assert model.weight.grad.tolist() == [[0.0, 2.0]]
    scaler.step(optimizer)
    assert model.weight.tolist() == [[0.0, pytest.approx(0.9)]]


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "optimizer attached"])
def test_averages_start_with_the_zeros_and_are_finalized_with_the_masks_of_the_end(attached: bool):
    """Defends EMA and SWA: the copy trains nothing, and its zeros are baked in by finalize."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, RULE, optimizer=optimizer if attached else None)
    pruner.prepare(inplace=True)
    early = {name: mask.clone() for name, mask in pruner.masks.items()}
    averages = (AveragedModel(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)))
    for step in range(1, 8):
        train_step(model, optimizer, step)
        pruner.step()
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        for name, mask in early.items():
            assert not bool(average.module.get_parameter(name)[~mask].any())
        update_bn([torch.randn(8, 12)], average)
        final = pruner.finalize(average.module)
        assert count_unmasked(pruner, final) == 0
        assert not any(module._forward_pre_hooks for module in final.modules())
        assert final(torch.randn(2, 12)).shape == (2, 4)


def test_averaged_weights_are_those_of_the_average_not_of_the_model():
    """Defends finalize(average): the survivors keep the bits of the average."""
    model, optimizer, pruner = prepared(OPTIMIZERS["SGD"], attached=False, rule=Rule(0.5))
    average = AveragedModel(model)
    for step in range(1, 4):
        train_step(model, optimizer, step)
        pruner.step()
        average.update_parameters(model)
    final = pruner.finalize(average.module)
    for name, mask in pruner.masks.items():
        expected = average.module.get_parameter(name)
        assert torch.equal(final.get_parameter(name), expected * mask)
        assert not torch.equal(final.get_parameter(name), model.get_parameter(name))


@pytest.mark.parametrize("first", [True, False], ids=["hooked before prepare", "hooked after"])
def test_an_optimizer_step_inside_backward_leaves_forward_passes_masked(first: bool):
    """Defends steps from gradient hooks, which save memory: no gradient is left after backward."""
    model = net()
    optimizers = {p: optim.SGD([p], 0.1, momentum=0.9) for p in model.parameters()}

    def step_and_free(param: nn.Parameter) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    pruner = Pruner(model, RULE)
    if not first:
        pruner.prepare(inplace=True)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step_and_free)
    if first:
        pruner.prepare(inplace=True)
    probe = Probe(pruner)
    for step in range(1, 8):
        loss_of(model, step).backward()
        assert all(p.grad is None for p in model.parameters())
        pruner.step()
        assert count_unmasked(pruner) == 0
    assert probe.seen == 14
    pruner.finalize()


def test_sparse_gradients_are_left_alone_and_the_weights_are_masked():
    """Defends embeddings with sparse gradients, which are pruned when they are named."""
    torch.manual_seed(0)
    model = nn.Embedding(10, 4, sparse=True)
    optimizer = optim.SparseAdam(model.parameters(), 0.1)
    pruner = Pruner(model, PruneConfig().set_module_name("weight", Rule(0.5)), optimizer=optimizer)
    pruner.prepare(inplace=True)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.arange(step, step + 4)).square().sum().backward()
        assert model.weight.grad.is_sparse
        optimizer.step()
        assert count_unmasked(pruner) == 0
        pruner.step()
    assert int((model.weight == 0).sum()) == 20


def test_a_fused_optimizer_is_not_taken_for_micro_batches():
    """Defends the silence beside writes that torch does not count, and some that it does."""
    model, optimizer, pruner = prepared(OPTIMIZERS["SGD fused"], False)
    for batch in range(60):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if batch % 10 == 0:
            with torch.no_grad():  # an average that is copied back
                for param in model.parameters():
                    param.mul_(1.0)
        pruner.step()


@pytest.mark.parametrize(
    ("name", "attached", "warned"),
    [("SGD", False, 1), ("SGD", True, 1), ("SGD fused", True, 1), ("SGD fused", False, 1)],
)
def test_a_step_for_each_micro_batch_warns_once(name: str, attached: bool, warned: int):
    """Defends the schedule under gradient accumulation, where the optimizer's writes are seen."""
    model, optimizer, pruner = prepared(OPTIMIZERS[name], attached)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in range(1, 61):
            loss_of(model, batch).backward()
            if batch % 4 == 0:
                optimizer.step()
                optimizer.zero_grad()
            pruner.step()
    assert len(caught) == warned
    assert all("not after each batch" in str(w.message) for w in caught)
    assert all(w.filename == __file__ for w in caught)


@pytest.mark.parametrize("skipped", [range(2, 18), range(2, 60, 3)], ids=["at first", "each third"])
def test_steps_that_a_scaler_skips_are_no_reason_to_warn(skipped: range):
    """Defends mixed precision: many skipped steps while the scale is found, some later."""
    model, optimizer, pruner = prepared(OPTIMIZERS["SGD"], attached=False)
    for step in range(1, 61):
        if step not in skipped:
            train_step(model, optimizer, step)
        pruner.step()


@pytest.mark.parametrize("name", ["SGD", "AdamW fused"])
def test_an_optimizer_of_the_model_before_the_copy_is_found_at_the_end(name: str):
    """Defends prepare() without inplace, whose copy nobody trains then."""
    model = net()
    optimizer = OPTIMIZERS[name](model.parameters())
    pruner = Pruner(model, RULE)
    copied = pruner.prepare()
    for step in range(1, 8):
        loss_of(copied, step).backward()
        optimizer.step()
        pruner.step()
    with pytest.warns(UserWarning, match="no pruned weight ever changed"):
        pruner.finalize()


@pytest.mark.parametrize(
    ("eps", "dtype"), [(0.0, torch.float32), (1e-8, torch.float16)], ids=["eps 0", "float16"]
)
def test_zero_by_zero_at_pruned_entries_is_written_over_by_an_attached_optimizer(eps, dtype):
    """Defends 0 / (sqrt(0) + eps) where eps is 0 in the weight's numbers; alone it is found."""
    for attached in (True, False):
        model = net().to(dtype)
        optimizer = optim.Adam(model.parameters(), 0.01, eps=eps)
        pruner = Pruner(model, RULE, optimizer=optimizer if attached else None)
        pruner.prepare(inplace=True)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 12, dtype=dtype)).square().sum().backward()
            optimizer.step()
            if not attached:
                with pytest.raises(NaNError, match=r"'0\.weight'"):
                    pruner.step()
                break
            pruner.step()
            assert not any(bool(p.isnan().any()) for p in model.parameters())
            assert count_unmasked(pruner) == 0
