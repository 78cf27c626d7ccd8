"""The adapters on another device: the CPU's training, bit by bit, without a wait for the device."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from purprune import (
    NM,
    SET,
    Channel,
    GlobalGroup,
    Kernel,
    PolynomialDecay,
    RigL,
    Rule,
    StraightThrough,
    Taylor,
    Unstructured,
)
from purprune_adapters import (
    Pruner,
    assert_sparse,
    collect_stats,
    grasp_masks,
    load_pruner,
    measure_sensitivity,
    prune_layerwise,
    save_pruner,
    snip_masks,
    synflow_masks,
)

RISING = PolynomialDecay(range(1, 6))
RULES = {
    "unstructured": Rule(0.8, RISING),
    "2:4": Rule(pattern=NM(2, 4), schedule=RISING),
    "channels": Rule(0.5, RISING, pattern=Channel()),
    "global": Rule(0.8, RISING, pattern=Unstructured(scope="global")),
    "balanced": Rule(0.8, RISING, pattern=Kernel(scope=GlobalGroup(0.2, normalize="l2"))),
    "budget": Rule(0.8, RISING, budget="erk"),
    "random": Rule(0.8, RISING, score="random"),
    "taylor": Rule(0.8, RISING, score=Taylor()),
    "movement": Rule(0.8, RISING, score="movement"),
    "RigL": Rule(0.8, regrow=RigL(every=2, end_step=7)),
    "SET": Rule(0.8, regrow=SET(every=2, seed=1)),
    "straight through": Rule(0.8, RISING, regrow=StraightThrough()),
}


def network() -> nn.Sequential:
    """Return the same small network at each call."""
    torch.manual_seed(0)
    convs = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*convs, nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))


def batch(device: str) -> tuple[Tensor, Tensor]:
    """Return the same images and classes at each call."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 1, 8, 8, generator=generator)
    return images.to(device), torch.randint(0, 4, (32,), generator=generator).to(device)


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss that all of these tests train with."""
    return F.cross_entropy(model(data[0]), data[1])


def train(pruner: Pruner, optimizer: torch.optim.Optimizer, device: str, steps: int) -> None:
    """Train as the README does."""
    data = batch(device)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(pruner.model, data).backward()
        optimizer.step()
        pruner.step()


def trained(device: str, rule: Rule, steps: int = 8, **options: Any) -> Pruner:
    """Return a pruner after so many steps."""
    model = network().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)  # which never divides
    pruner = Pruner(model, rule, optimizer=optimizer, **options)
    pruner.prepare(inplace=True)
    train(pruner, optimizer, device, steps)
    return pruner


def same(found: Any, expected: Any) -> bool:
    """Tell whether two mappings hold the same bits, wherever they are."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].cpu(), tensor.cpu()) for name, tensor in expected.items()
    )


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"trust_optimizer": True}], ids=["", "trusted"])
def test_training_leaves_the_weights_and_masks_of_the_cpu(
    device: str, is_exact: bool, rule: str, options: dict[str, bool]
) -> None:
    """Defends hooks, memory of scores and regrowth against tensors of two devices."""
    found, expected = (
        trained(device, RULES[rule], **options),
        trained("cpu", RULES[rule], **options),
    )
    assert {mask.device.type for mask in found.masks.values()} == {device}
    for name, mask in expected.masks.items():
        assert int(found.masks[name].sum()) == int(mask.sum())
    if is_exact:
        assert same(found.masks, expected.masks)
        assert same(found.model.state_dict(), expected.model.state_dict())


WAITING = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "is_nonzero"}
WAITING |= {"_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "allclose"}
"""Operations whose results have sizes or values that the host has to know."""


class _Waits(TorchDispatchMode):
    """Counts the operations that wait for the device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls, self.waits = device, 0, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name = func(*args, **(kwargs or {})), func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs, made)) if isinstance(leaf, Tensor)]
        there = {tensor.device.type == self.device for tensor in tensors if tensor.dim()}
        numbers = {tensor.device.type == self.device for tensor in tensors}
        by_bools = name.startswith(("index", "_index")) and any(
            leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]) if leaf is not None
        )
        self.calls += 1
        if True in numbers and (name in WAITING or by_bools or ("copy" in name and False in there)):
            self.waits[name] += 1
        return made


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.bincount(x.int()),
    ],
)
def test_what_waits_for_the_device_is_seen(device: str, wait: Callable[[Tensor], Any]) -> None:
    """Defends the next two tests against waits that they do not know."""
    x = torch.ones(8, device="cpu").to(device)
    with _Waits(device) as seen:
        _ = x * 2 + x
    assert not seen.waits
    with _Waits(device) as seen:
        wait(x)
    assert seen.waits


@pytest.mark.parametrize("trusted", [False, True])
def test_a_step_without_new_masks_never_waits_for_the_device(device: str, trusted: bool) -> None:
    """Defends the queue of the device: hooks, gradients and masks fetch nothing from it."""
    model = network().to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    rule = Rule(0.8, PolynomialDecay([0, 2]))
    pruner = Pruner(model, rule, optimizer=optimizer, trust_optimizer=trusted)
    pruner.prepare(inplace=True)
    train(pruner, optimizer, device, 4)
    data = batch(device)
    optimizer.zero_grad()
    with _Waits(device) as update:
        loss_of(model, data).backward()
        optimizer.step()
    assert update.calls > 50
    assert not update.waits
    with _Waits(device) as counted:
        pruner.step()
    assert counted.calls == 0


def test_new_masks_of_a_tensor_wait_once(device: str) -> None:
    """Defends the round trips of an update: one number of each tensor, which finds NaN."""
    pruner = trained(device, Rule(0.8, PolynomialDecay([0, 1])), steps=0)
    with _Waits(device) as update:
        pruner.step()
    assert update.waits == {"_local_scalar_dense": len(pruner.masks)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("back", [False, True], ids=["to the device", "to the cpu"])
def test_training_goes_on_on_another_device(
    device: str, is_exact: bool, packed: bool, back: bool
) -> None:
    """Defends law 10 when a checkpoint is loaded where it was not written."""
    places = (device, "cpu") if back else ("cpu", device)
    rule = RULES["unstructured"]
    first = trained(places[0], rule, steps=3)
    state = copy.deepcopy(first.state_dict(packed=packed))
    model = network()
    model.load_state_dict(first.model.state_dict())
    pruner = Pruner(model.to(places[1]), rule)
    pruner.load_state_dict(state)
    pruner.prepare(inplace=True)
    assert {mask.device.type for mask in pruner.masks.values()} == {places[1]}
    assert same(pruner.masks, first.masks)
    for both in (pruner, first):
        both.step()
    assert same(pruner.masks, first.masks)


def test_a_model_may_move_after_prepare(device: str) -> None:
    """Defends ``model.to(device)`` in the wrong place: masks follow."""
    model = network()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    model.to(device)
    loss_of(model, batch(device)).backward()
    pruner.step()
    assert {mask.device.type for mask in pruner.masks.values()} == {device}
    assert not model[0].weight.grad[~pruner.masks["0.weight"]].any()


def test_what_comes_after_training_works_on_the_device(device: str, tmp_path: Any) -> None:
    """Defends reports, files and finalize."""
    pruner = trained(device, RULES["unstructured"])
    assert pruner.report()["5.weight"].weight.zeros == 128 * 16 * 8 // 10
    assert_sparse(pruner.model, pruner.masks)
    save_pruner(pruner, tmp_path / "pruner.safetensors")
    again = network().to(device)
    again.load_state_dict(pruner.model.state_dict())
    loaded = Pruner(again, RULES["unstructured"])
    load_pruner(loaded, tmp_path / "pruner.safetensors")
    loaded.prepare(inplace=True)
    assert same(loaded.masks, pruner.masks)
    final = pruner.finalize()
    assert final is not pruner.model
    assert same(final.state_dict(), pruner.model.state_dict())
    assert_sparse(final, pruner.masks)


def test_methods_that_read_data_work_on_the_device(device: str, is_exact: bool) -> None:
    """Defends statistics, masks at initialisation, reconstruction and sensitivity."""

    def found(place: str) -> list[Any]:
        data, rule = batch(place), Rule(0.5)

        def layerwise(method: str) -> dict[str, Tensor]:
            found = prune_layerwise(network().to(place), "", [data[0]], rule, method=method)
            return {**found.model.state_dict(), **{f"mask {n}": m for n, m in found.masks.items()}}

        return [
            snip_masks(network().to(place), loss_of, data, rule),
            grasp_masks(network().to(place), loss_of, data, rule),
            synflow_masks(network().to(place), data[0][:1], rule),
            collect_stats(network().to(place), [data[0]], needs=["input_norm"])["5.weight"],
            layerwise("sparsegpt"),
            layerwise("wanda"),
        ]

    pairs = zip(found(device), found("cpu"), strict=True)
    for there, here in pairs:
        assert there.keys() == here.keys()
        if is_exact:
            assert same(there, here)
    model = network().to(device).eval()
    curves = measure_sensitivity(model, F.cross_entropy, [batch(device)], [0.5, 0.9], Rule())
    assert len(curves.losses) == 4
