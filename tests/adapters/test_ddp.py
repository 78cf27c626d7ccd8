"""DistributedDataParallel: every rank has all weights, and computes all masks by itself."""

from __future__ import annotations

import io
import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, same_on_all_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from purprune import PolynomialDecay, PruneConfig, Random, Rule, apply_masks, compute_masks
from purprune_adapters import Pruner

SCHEDULE = PolynomialDecay([1, 3, 5])
CONFIG = (
    PruneConfig()
    .set_module_name("fc1.weight", Rule(0.8, SCHEDULE))
    .set_module_name("fc2", Rule(0.5, SCHEDULE, score=Random(3)))
    .set_module_name("fc3", Rule(0.6, SCHEDULE, score="taylor"))
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2, self.fc3 = nn.Linear(6, 9), nn.Linear(9, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


def shard(step: int) -> Tensor:
    """Return this rank's share of a batch."""
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model(shard(step)).square().mean().backward()
    optimizer.step()


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@on_ranks(2, 4)
def test_every_rank_has_the_masks_of_the_pure_fold_whether_pruned_before_wrapping_or_after():
    """Defends law 9 under DDP, the user's names below the wrapper's prefix, and masked grads."""
    for way, bucket_view in itertools.product(("before", "after", "wrapper"), (False, True)):
        model = Net()
        if way == "before":
            pruner = Pruner(model, CONFIG)
            pruner.prepare(inplace=True)
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        if way != "before":
            pruner = Pruner(ddp if way == "wrapper" else ddp.module, CONFIG)
            assert pruner.prepare(inplace=True) is (ddp if way == "wrapper" else model)
        optimizer = torch.optim.AdamW(ddp.parameters(), 0.01)
        masks = compute_masks(params_of(model), 0, pruner.resolved_config)
        for step in range(1, 7):
            train_step(ddp, optimizer, step)
            grads = {name: p.grad.clone() for name, p in model.named_parameters()}
            same_on_all_ranks(*grads.values())
            assert all(bool((grads[name][~mask] == 0).all()) for name, mask in masks.items())
            params = params_of(model)
            if step in SCHEDULE.update_steps:
                masks = compute_masks(params, step, pruner.resolved_config, prev=masks, grads=grads)
            pruner.step()
            assert pruner.masks.keys() == masks.keys() == {f"fc{n}.weight" for n in (1, 2, 3)}
            assert all(torch.equal(pruner.masks[name], masks[name]) for name in masks)
            expected = apply_masks(params, masks)
            assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
        same_on_all_ranks(*pruner.masks.values(), *params_of(model).values())
        assert pruner.report().total.zeros == 43 + 31 + 8


@on_ranks(2)
def test_a_state_that_rank_0_saved_goes_on_anywhere_with_the_same_bits():
    """Defends the resume law under DDP: one file, loaded by every rank and without a wrapper."""
    ddp = DistributedDataParallel(Net())
    pruner = Pruner(ddp, CONFIG)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.1)
    for step in (1, 2):
        train_step(ddp, optimizer, step)
        pruner.step()
    saved: list[bytes] = [b""]
    if dist.get_rank() == 0:
        file = io.BytesIO()
        torch.save({"model": ddp.module.state_dict(), "pruner": pruner.state_dict()}, file)
        saved = [file.getvalue()]
    dist.broadcast_object_list(saved, 0)
    state = torch.load(io.BytesIO(saved[0]), weights_only=True)
    plain = Net()
    plain.load_state_dict(state["model"])
    resumed = Pruner(plain, CONFIG)
    resumed.load_state_dict(state["pruner"])
    resumed.prepare(inplace=True)
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in pruner.masks.items())
    again = DistributedDataParallel(plain)
    restarted = torch.optim.SGD(again.parameters(), 0.1)
    for step in (3, 4):
        for model, opt, own in ((ddp, optimizer, pruner), (again, restarted, resumed)):
            train_step(model, opt, step)
            own.step()
    assert all(map(torch.equal, ddp.parameters(), again.parameters()))
    assert all(torch.equal(resumed.masks[name], mask) for name, mask in pruner.masks.items())


@on_ranks(2)
def test_a_wrapped_model_is_prepared_in_place_and_finalized_without_the_wrapper():
    """Defends that prepare() never hands out a model whose gradients nobody averages."""
    model = Net()
    ddp = DistributedDataParallel(model)
    pruner = Pruner(ddp, Rule(0.5))
    with pytest.raises(ValueError, match=r"inplace=True.*DistributedDataParallel"):
        pruner.prepare()
    pruner.prepare(inplace=True)
    final = pruner.finalize()
    assert type(final) is Net
    assert final is not model
    assert pruner.finalize(inplace=True) is model


def test_a_compiled_model_is_pruned_under_the_names_of_the_model_inside():
    """Defends that a config fits with torch.compile and without it, DDP's wrapper around it too."""
    model = Net()
    compiled = torch.compile(model, backend="eager")
    pruner = Pruner(nn.DataParallel(compiled), CONFIG)
    assert pruner.model is model
    assert set(pruner.resolved_config.module_name_configs) == {f"fc{n}.weight" for n in (1, 2, 3)}
