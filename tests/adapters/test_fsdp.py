"""The Pruner under fully_shard: laws 9 and 10, hooks, and the model that stays an FSDP model."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks, run_ranks, same_on_all_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from purprune import (
    NM,
    SET,
    Channel,
    ConfigError,
    NaNError,
    PolynomialDecay,
    PruneConfig,
    Random,
    RigL,
    Rule,
    StraightThrough,
    compute_masks,
    update_masks,
)
from purprune_adapters import Pruner, save_pruner

SCHEDULE = PolynomialDecay([0, 2, 3, 5])
CONFIG = (
    PruneConfig()
    .set_global(Rule(0.8, SCHEDULE, 0.2))
    .set_module_name("layers.0.linear1", Rule(0.5, SCHEDULE, pattern=Channel(0)))
    .set_module_name("layers.1.linear1", Rule(schedule=SCHEDULE, pattern=NM(2, 4)))
    .set_module_name("layers.0.linear2", Rule(0.7, SCHEDULE, score=Random(2)))
    .set_module_name("layers.1.linear2", Rule(0.7, SCHEDULE, score="taylor"))
    .set_module_name("layers.*.self_attn", Rule(0.6, SCHEDULE, budget="erk"))
)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 12)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(12, 2, 21, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.head = nn.Linear(12, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.flatten(0, 1))  # FSDP warns of views


def sharded(**options: Any) -> Transformer:
    """Return a model that is sharded layer by layer, the rest at the root."""
    return shard_(Transformer(), **options)


def shard_(model: Transformer, **options: Any) -> Transformer:
    mesh = options.pop("mesh", None) or init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def backward(model: nn.Module, step: int) -> None:
    seed = step if not dist.is_initialized() else step * 100 + dist.get_rank()
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(seed))
    nn.functional.cross_entropy(model(tokens), tokens.flatten()).backward()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gather tensors: for tests only."""
    return {
        name: (t.detach().full_tensor() if isinstance(t, DTensor) else t.detach()).clone()
        for name, t in tensors.items()
    }


def check_steps(model: nn.Module, pruner: Pruner, optimizer: Any, steps: range) -> None:
    """Train, and compare every step with the pure fold of the gathered weights."""
    for step in steps:
        masks = whole(dict(pruner.masks))
        optimizer.zero_grad()
        backward(model, step)
        params = dict(model.named_parameters())
        grads = whole({name: params[name].grad for name in masks})
        assert all(bool((grads[name][~mask] == 0).all()) for name, mask in masks.items())
        assert any(bool((grad != 0).any()) for grad in grads.values())
        optimizer.step()
        if step in SCHEDULE.update_steps:
            weights = whole({name: params[name] for name in masks})
            config = pruner.resolved_config
            masks = compute_masks(weights, step, config, prev=masks, grads=grads)
        pruner.step()
        found = whole(dict(pruner.masks))
        assert found.keys() == masks.keys()
        assert all(torch.equal(found[name], masks[name]) for name in masks)
        weights = whole({name: params[name] for name in masks})
        assert all(bool((weights[name][~mask] == 0).all()) for name, mask in masks.items())
    same_on_all_ranks(*found.values())


@on_ranks(2)
def test_exchanges_of_shards_are_those_of_the_whole_weights():
    """Defends RigL and SET under fully_shard, and the state of what comes back."""
    model = sharded()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    exchange = RigL(every=2, end_step=7, fraction=0.9)
    config = (
        PruneConfig()
        .set_global(Rule(0.8, regrow=exchange))
        .set_module_name("layers.0.linear2", Rule(0.7, regrow=SET(every=2, fraction=0.5)))
        .set_module_name("layers.1.linear1", Rule(pattern=NM(2, 4), regrow=exchange))
    )
    pruner = Pruner(model, config, optimizer=optimizer)
    pruner.prepare(inplace=True)
    params, back = dict(model.named_parameters()), 0
    for step in range(1, 8):
        masks = whole(dict(pruner.masks))
        optimizer.zero_grad()
        backward(model, step)
        grads = whole({name: params[name].grad for name in masks})
        optimizer.step()
        weights = whole({name: params[name] for name in masks})
        expected = update_masks(weights, masks, step, pruner.resolved_config, grads=grads)
        pruner.step()
        found = whole(dict(pruner.masks))
        assert all(torch.equal(found[name], expected[name]) for name in masks)
        for name in masks:
            new = found[name] & ~masks[name]
            back += int(new.sum())
            state = whole({"m": optimizer.state[params[name]]["exp_avg"], "w": params[name]})
            assert not bool(state["m"][new].any() or state["w"][new].any())
    assert back > 0
    other = sharded()
    sgd = torch.optim.SGD(other.parameters(), 0.1)
    straight = Pruner(other, Rule(0.5, regrow=StraightThrough()), optimizer=sgd)
    with pytest.raises(ValueError, match=r"Expected whole weights .* is in shards"):
        straight.prepare(inplace=True)


@on_ranks(2, 4)
def test_every_step_of_a_sharded_training_is_the_pure_fold_of_the_whole_weights():
    """Defends law 9 under fully_shard: masks, zeros and gradients, bf16 compute among them."""
    policies = (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    for policy, reshard in zip(policies, (True, False), strict=True):
        model = sharded(mp_policy=policy, reshard_after_forward=reshard)
        pruner = Pruner(model, CONFIG)
        assert pruner.prepare(inplace=True) is model
        first = compute_masks(
            whole(dict(Transformer().named_parameters())), 0, pruner.resolved_config
        )
        assert all(
            torch.equal(mask, first[name]) for name, mask in whole(dict(pruner.masks)).items()
        )
        placements = {name: param.placements for name, param in model.named_parameters()}
        assert all(m.placements == placements[name] for name, m in pruner.masks.items())
        check_steps(model, pruner, torch.optim.AdamW(model.parameters(), 0.01), range(1, 7))
        report = pruner.report()
        same_on_all_ranks(str(report))
        weights = whole({name: dict(model.named_parameters())[name] for name in pruner.masks})
        assert report.total.zeros == sum(int((w == 0).sum()) for w in weights.values())
        assert report.total.entries == sum(w.numel() for w in weights.values())


@on_ranks(4)
def test_replicas_of_shards_train_as_the_pure_fold():
    """Defends HSDP: nothing is counted twice."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh=mesh)
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    check_steps(model, pruner, torch.optim.AdamW(model.parameters(), 0.01), range(1, 7))


@on_ranks(2)
def test_a_forward_never_sees_a_pruned_weight_that_came_back():
    """Defends the hooks: shards are masked before FSDP gathers them, and after an evaluation."""
    model = sharded()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    seen: list[int] = []

    def look(module: nn.Module, args: Any) -> None:
        assert type(module.weight) is nn.Parameter
        seen.append(int((module.weight == 0).sum()))

    model.head.register_forward_pre_hook(look)
    model.layers[0].linear1.register_forward_pre_hook(look)
    for param in model.parameters():
        with torch.no_grad():
            param.add_(1)
    backward(model, 1)
    assert seen == [126, 66]
    assert not isinstance(model.head.weight, DTensor) or model.head.weight.grad is not None
    with torch.no_grad():
        model(torch.zeros(1, 2, dtype=torch.int64))
    assert not isinstance(model.head.weight, DTensor), "the root stays gathered"
    pruner.step()
    assert isinstance(model.head.weight, DTensor)
    assert pruner.report()["head.weight"].weight.zeros == 66


@on_ranks(2)
def test_a_model_that_was_prepared_before_it_was_sharded_goes_on_the_same():
    """Defends either order: masks follow the weights into their shards."""
    model = Transformer()
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    shard_(model)
    check_steps(model, pruner, torch.optim.SGD(model.parameters(), 0.1), range(1, 7))
    assert all(isinstance(mask, DTensor) for mask in pruner.masks.values())


@on_ranks(2)
def test_sharded_models_are_prepared_and_finalized_in_place():
    """Defends clear errors where FSDP has no deepcopy, and a final model without hooks."""
    model = sharded()
    pruner = Pruner(model, Rule(0.5))
    with pytest.raises(ValueError, match=r"prepare\(inplace=True\).*fully_shard"):
        pruner.prepare()
    pruner.prepare(inplace=True)
    with pytest.raises(ValueError, match=r"finalize\(inplace=True\).*fully_shard"):
        pruner.finalize()
    with pytest.raises(ValueError, match=r"whole mask for 'layers.0.self_attn.in_proj_weight'"):
        pruner.finalize(Transformer(), inplace=True)
    before = {name: len(m._forward_pre_hooks) for name, m in sharded().named_modules()}
    assert pruner.finalize(inplace=True) is model
    assert {name: len(m._forward_pre_hooks) for name, m in model.named_modules()} == before
    weight = model.head.weight.full_tensor()
    assert int((weight == 0).sum()) == weight.numel() // 2


@on_ranks(2)
def test_nan_in_one_shard_stops_every_process_and_changes_nothing():
    """Defends law 8 in training: step, masks and weights stay as they were, on all ranks."""
    model = sharded()
    pruner = Pruner(model, CONFIG.set_module_name("layers.1.linear2", None))
    pruner.prepare(inplace=True)
    pruner.step()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.head.weight.to_local()[0, :2] = float("nan")
    masks = whole(dict(pruner.masks))
    for call in (pruner.step, lambda: pruner.finalize(inplace=True)):
        with pytest.raises(NaNError, match=r"'head.weight'; got 2 NaN of 132"):
            call()
    assert pruner.step_count == 1
    assert all(torch.equal(mask, masks[name]) for name, mask in whole(dict(pruner.masks)).items())


@on_ranks(2)
def test_a_rule_that_does_not_fit_the_shards_is_refused_before_training():
    """Defends that the error comes from prepare(), at sparsity 0 too."""
    pruner = Pruner(sharded(), Rule(0.5, PolynomialDecay([5, 6]), pattern=Channel(1)))
    with pytest.raises(ConfigError, match=r"cross the borders"):
        pruner.prepare(inplace=True)


def trained(model: Transformer, pruner: Pruner, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        pruner.step()


def states(model: Transformer, pruner: Pruner) -> dict[str, Any]:
    return {"model": model.state_dict(), "pruner": pruner.state_dict()}


def loaded(model: Transformer, folder: Path, **options: Any) -> Pruner:
    """Return a pruner that goes on from a distributed checkpoint."""
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    state = states(model, pruner)
    dcp.load(state, checkpoint_id=folder, **options)
    model.load_state_dict(state["model"])
    pruner.load_state_dict(state["pruner"])
    return pruner


def save_at_step_3() -> None:
    folder = Path(os.environ["PURPRUNE_TEST_FOLDER"])
    model = sharded()
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    trained(model, pruner, range(1, 4))
    dcp.save(states(model, pruner), checkpoint_id=folder / "dcp")
    masks = whole(dict(pruner.masks))
    weights = whole(dict(model.named_parameters()))
    if dist.get_rank() == 0:
        torch.save({"masks": masks, "weights": weights}, folder / "whole.pt")


def load_and_go_on() -> None:
    folder = Path(os.environ["PURPRUNE_TEST_FOLDER"])
    model = sharded()
    pruner = loaded(model, folder / "dcp")
    check_loaded(model, pruner, folder)
    check_steps(model, pruner, torch.optim.SGD(model.parameters(), 0.1), range(4, 7))


def check_loaded(model: Transformer, pruner: Pruner, folder: Path) -> None:
    saved = torch.load(folder / "whole.pt", weights_only=True)
    assert pruner.step_count == 3
    for name, tensors in (("masks", pruner.masks), ("weights", dict(model.named_parameters()))):
        found = whole(dict(tensors))
        assert found.keys() == saved[name].keys()
        assert all(torch.equal(found[n], t) for n, t in saved[name].items())


save_at_step_3.body = save_at_step_3  # type: ignore[attr-defined]
load_and_go_on.body = load_and_go_on  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_goes_on_in_four_and_in_one(tmp_path, monkeypatch):
    """Defends law 10 across sizes: masks reshard with the weights, bit for bit."""
    monkeypatch.setenv("PURPRUNE_TEST_FOLDER", str(tmp_path))
    for world, name in ((2, "save_at_step_3"), (4, "load_and_go_on")):
        assert run_ranks(world, [f"{__name__}:{name}"], tmp_path)[f"{__name__}:{name}"] == []
    model = Transformer()
    pruner = loaded(model, tmp_path / "dcp", no_dist=True)
    check_loaded(model, pruner, tmp_path)
    trained(model, pruner, range(4, 7))
    assert pruner.report()["head.weight"].weight.zeros == 132 * 8 // 10


@on_ranks(2)
def test_a_state_goes_on_in_the_same_shards_and_damage_is_found_in_all_processes():
    """Defends resume without files, and counts over all shards."""
    model = sharded()
    pruner = Pruner(model, CONFIG)
    pruner.prepare(inplace=True)
    trained(model, pruner, range(1, 4))
    state = copy.deepcopy(pruner.state_dict())
    again = sharded()
    again.load_state_dict(model.state_dict())
    resumed = Pruner(again, CONFIG)
    resumed.load_state_dict(state)
    resumed.prepare(inplace=True)
    full = {**state, "masks": whole(state["masks"])}
    from_whole = Pruner(sharded(), CONFIG)
    from_whole.load_state_dict(full)
    from_whole.prepare(inplace=True)
    for other in (resumed, from_whole):
        assert all(
            torch.equal(other.masks[name].to_local(), mask.to_local())
            for name, mask in pruner.masks.items()
        )
    for one, own in ((model, pruner), (again, resumed)):
        trained(one, own, range(4, 7))
    ours, theirs = whole(dict(model.named_parameters())), whole(dict(again.named_parameters()))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    if dist.get_rank() == 0:
        state["masks"]["head.weight"].to_local().fill_(True)
    with pytest.raises(ValueError, match=r"units pruned in 'head.weight'.*damaged"):
        Pruner(sharded(), CONFIG).load_state_dict(state)
    other = {**state["masks"], "head.weight": state["masks"]["head.weight"].redistribute(
        placements=[Shard(1)])}  # fmt: skip
    with pytest.raises(ValueError, match=r"mask in the shards of 'head.weight'"):
        Pruner(sharded(), CONFIG).load_state_dict({**state, "masks": other})
    with pytest.raises(ValueError, match=r"whole mask for"):
        Pruner(Transformer(), CONFIG).load_state_dict(state)


@on_ranks(2)
def test_masks_that_hold_are_kept_in_shards_and_come_back_with_the_state():
    """Defends masks= and keep_zeros in shards: the fold with a floor, before and after resume."""
    plain = Transformer()
    given = compute_masks(dict(plain.named_parameters()), 0, Rule(0.5, score=Random(4)))
    given = {name: given[name] for name in ("head.weight", "layers.0.linear2.weight")}
    for name, mask in given.items():
        plain.get_parameter(name).data.mul_(mask)
    rule = Rule(0.9, SCHEDULE, score=Random(5))
    model = shard_(copy.deepcopy(plain))
    pruner, early = Pruner(model, rule, masks=given), Pruner(plain, rule, masks=given)
    zeros = Pruner(shard_(copy.deepcopy(plain)), rule, keep_zeros=True)
    shard_(plain)
    for one in (pruner, early, zeros):
        one.prepare(inplace=True)
        masks: dict[str, Tensor] = {}
        for step in range(6):
            if step:
                one.step()
            weights = whole({name: one.model.get_parameter(name) for name in one.masks})
            config = one.resolved_config
            masks = compute_masks(weights, step, config, prev=masks, floor=given)
            found = whole(dict(one.masks))
            assert all(torch.equal(found[name], mask) for name, mask in masks.items()), step
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="packed=False for masks in shards"):
        pruner.state_dict(packed=True)
    with pytest.raises(ValueError, match=r"'.*weight' is in shards.* torch.distributed.checkpoint"):
        save_pruner(pruner, "never written")
    resumed = Pruner(sharded(), rule, keep_zeros=True)
    shapes = resumed.state_dict()["floor"]
    assert {name: mask.shape for name, mask in shapes.items()} == {
        name: mask.shape for name, mask in zeros.state_dict()["floor"].items()
    }
    resumed.load_state_dict(state)
    resumed.prepare(inplace=True)
    found = whole(dict(resumed.state_dict()["floor"]))
    assert all(torch.equal(found[name], mask) for name, mask in given.items())
    if dist.get_rank() == 0:
        mask, floor = (state[part]["head.weight"].to_local() for part in ("masks", "floor"))
        mask[~floor] = True
    says = "prune what floor" if dist.get_rank() == 0 else "fits in every process"
    with pytest.raises(ValueError, match=says):
        resumed.load_state_dict(state)


def test_a_model_in_one_process_imports_nothing_of_shards():
    """Defends the border: what is for shards is imported for shards."""
    code = """
import sys
import torch
from purprune import Rule
from purprune_adapters import Pruner
pruner = Pruner(torch.nn.Linear(4, 4), Rule(0.5))
model = pruner.prepare()
model(torch.ones(1, 4)).sum().backward()
pruner.step()
pruner.report()
pruner.load_state_dict(pruner.state_dict())
pruner.finalize()
shards = {f"purprune_adapters.{name}" for name in ("shards", "shard_tasks", "sharded")}
assert not shards & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
