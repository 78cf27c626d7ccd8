"""torch.compile, torch.export, torch.func and inference mode around a pruner."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, vmap

from purprune import NM, PolynomialDecay, PruneConfig, Rule, apply_masks, compute_masks
from purprune_adapters import Pruner, resolve

RULE = Rule(0.75, PolynomialDecay([1, 2, 3, 4]))
EAGER = {"backend": "aot_eager"}
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script_method` is deprecated"
)  # inductor


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Watched(nn.Module):
    """A network that also returns what it reads of weights at the entries it is asked to watch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Linear(width, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.last = nn.Linear(width, 4)

    def forward(self, inputs: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
        x, watch = inputs
        x = torch.tanh(self.first(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.last(x), sum(
            ((self.get_parameter(name) * entries).abs().sum() for name, entries in watch.items()),
            torch.zeros(()),
        )


def net() -> Watched:
    torch.manual_seed(0)
    return Watched()


def batch(step: int) -> Tensor:
    return torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(step))


def pruned_entries(pruner: Pruner) -> dict[str, Tensor]:
    return {name: (~mask).float() for name, mask in pruner.masks.items()}


def count_unmasked(pruner: Pruner) -> int:
    params = dict(pruner.model.named_parameters())
    return sum(int(torch.count_nonzero(params[n][~mask])) for n, mask in pruner.masks.items())


def train(call, model: nn.Module, pruner: Pruner, optimizer=None, steps: int = 7) -> None:
    """Train, and assert that no forward pass reads anything at a pruned entry."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        out, unmasked = call((batch(step), pruned_entries(pruner)))
        assert float(unmasked.detach()) == 0, step
        out.square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize(
    ("how", "before"),
    [
        ("torch.compile", False),
        ("model.compile", True),
        pytest.param("torch.compile", True, marks=pytest.mark.slow),
        pytest.param("model.compile", False, marks=pytest.mark.slow),
        pytest.param("a layer alone", False, marks=pytest.mark.slow),
        pytest.param("a layer alone", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_training_is_masked_and_compiled_once(how: str, before: bool):
    """Defends fullgraph=True, one compilation for all masks, and the weights of eager training."""
    model = net()
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    pruner = Pruner(model, RULE)
    if not before:
        pruner.prepare(inplace=True)
    if how == "torch.compile":
        call = torch.compile(model, fullgraph=True, backend=counter)
    else:
        call, part = model, model if how == "model.compile" else model.first
        part.compile(fullgraph=True, backend=counter)
    if before:
        pruner.prepare(inplace=True)
    train(call, model, pruner)
    assert counter.frame_count == 1
    its_pruner = Pruner(twin, RULE)
    its_pruner.prepare(inplace=True)
    train(twin, twin, its_pruner)
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, its, atol=1e-6)
    for name, mask in pruner.masks.items():
        assert torch.equal(mask, its_pruner.masks[name])
    with torch.no_grad():  # a second graph, for inference
        out, unmasked = call((batch(0), pruned_entries(pruner)))
        assert torch.allclose(out, twin((batch(0), {}))[0], atol=1e-6)
        assert float(unmasked) == 0


@pytest.mark.slow
def test_inductor_trains_pruned_too():
    """Defends the real code generator: forward, backward and a compiled optimizer step."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = Pruner(model, RULE, optimizer=optimizer)
    pruner.prepare(inplace=True)
    train(torch.compile(model, fullgraph=True), model, pruner, optimizer)
    assert count_unmasked(pruner) == 0
    assert pruner.report().total.zeros == sum(
        int(row.weight.entries * 0.75) for row in pruner.report().rows
    )


@pytest.mark.parametrize("attached", [False, True], ids=["alone", "optimizer attached"])
@pytest.mark.parametrize("width", [16, pytest.param(400, marks=pytest.mark.slow)])
def test_a_compiled_optimizer_step_leaves_zeros(attached: bool, width: int):
    """Defends torch.compile(optimizer.step): its writes are counted, and the hook is no graph."""
    torch.manual_seed(0)
    model = nn.Linear(width, width)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    pruner = Pruner(model, RULE, optimizer=optimizer if attached else None)
    pruner.prepare(inplace=True)
    step = torch.compile(optimizer.step, **EAGER)
    moved = 0
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.ones(2, width)).square().mean().backward()
        step()
        moved += count_unmasked(pruner)
        model(torch.ones(2, width))
        assert count_unmasked(pruner) == 0
        pruner.step()
        assert count_unmasked(pruner) == 0
    assert bool(moved) is not attached


@pytest.mark.parametrize("inside", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_whole_training_step_may_be_compiled(inside: bool):
    """Defends one function for forward, backward and both steps: the pruner stays eager in it."""
    model, twin = net(), net()

    def trained(model: Watched, compiled: bool) -> Pruner:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        pruner = Pruner(model, RULE, optimizer=optimizer)
        pruner.prepare(inplace=True)

        def train_step(x: Tensor) -> None:
            optimizer.zero_grad()
            model((x, {}))[0].square().mean().backward()
            optimizer.step()
            if inside:
                pruner.step()

        call = torch.compile(train_step, **EAGER) if compiled else train_step
        for step in range(6):
            call(batch(step))
            assert count_unmasked(pruner) == 0
            if not inside:
                pruner.step()
        return pruner

    mine, its = trained(model, True), trained(twin, False)
    assert mine.step_count == its.step_count == 6
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        "model.compile",
        pytest.param("torch.compile", marks=pytest.mark.slow),
        pytest.param("of a Sequential", marks=pytest.mark.slow),
    ],
)
def test_weights_loaded_between_steps_are_masked_by_the_next_step_at_the_latest(how: str):
    """Defends the limit that is documented: a whole graph reads what was loaded."""
    model = net()
    pruner = Pruner(model, Rule(0.75))
    pruner.prepare(inplace=True)
    if how == "model.compile":
        model.compile(fullgraph=True, **EAGER)
        call = model
    else:
        root = nn.Sequential(model) if how == "of a Sequential" else model
        call = torch.compile(root, fullgraph=True, **EAGER)
    ones = {name: torch.ones_like(value) for name, value in model.state_dict().items()}

    def unmasked() -> float:
        return float(call((batch(0), pruned_entries(pruner)))[1].detach())

    assert unmasked() == 0
    model.load_state_dict(ones)
    if how != "torch.compile":  # some versions of torch run its hooks outside of the graph
        assert unmasked() > 0, "if this is 0, the documentation can go"
    pruner.load_state_dict(pruner.state_dict())
    assert unmasked() == 0, "this masks without counting a step"
    model.load_state_dict(ones)
    pruner.step()
    assert unmasked() == 0


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("finalized", [False, True])
def test_exported_programs_have_the_zeros(strict: bool, finalized: bool):
    """Defends torch.export of a model in training and of a finalized one."""
    model = net()
    pruner = Pruner(model, Rule(0.75))
    pruner.prepare(inplace=True)
    chosen = pruner.finalize() if finalized else model
    inputs = ((batch(0), {}),)
    program = torch.export.export(chosen.eval(), inputs, strict=strict)
    out, expected = program.module()(*inputs)[0], chosen(*inputs)[0]
    assert torch.allclose(out, expected, atol=1e-6)
    for name, mask in pruner.masks.items():
        assert torch.equal(program.state_dict[name] == 0, ~mask), name
    assert not any("mul_" in str(node.target) for node in program.graph.nodes), "no mask inside"


def test_inference_mode_prunes_and_masks():
    """Defends inference tensors, of whose writes torch keeps no count."""
    with torch.inference_mode():
        model = net()
        params = dict(model.named_parameters())
        masks = compute_masks(params, 4, resolve(model, RULE))
        pruner = Pruner(model, RULE)
        pruner.prepare(inplace=True)
        for _ in range(4):
            pruner.step()
        assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())
        assert pruner.report().total.zeros > 0
        model.first.weight.fill_(1.0)
        assert float(model((batch(0), pruned_entries(pruner)))[1]) == 0
    model = net()
    pruner = Pruner(model, Rule(0.75))
    pruner.prepare(inplace=True)
    with torch.no_grad():
        model.first.weight.fill_(1.0)
    with torch.inference_mode():
        assert float(model((batch(0), pruned_entries(pruner)))[1]) == 0
    train(model, model, pruner, steps=2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_masks_are_the_same_in_every_grad_mode(mode):
    """Defends compute_masks where it is called from evaluation code."""
    params = dict(net().named_parameters())
    config = PruneConfig().set_module_name("*", Rule(pattern=NM(2, 4)))
    expected = compute_masks(params, 0, config)
    with mode():
        masks = compute_masks(params, 0, config)
    assert all(torch.equal(expected[name], mask) for name, mask in masks.items())
    assert not any(mask.requires_grad for mask in masks.values())


def test_an_ensemble_of_masks_runs_under_vmap_and_grad():
    """Defends apply_masks as a pure function: one batched pass for several sparsities."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    params, inputs = {name: p.detach() for name, p in model.named_parameters()}, batch(0)
    config = [resolve(model, Rule(s)) for s in (0.25, 0.5, 0.75)]
    masks = [compute_masks(params, 0, c) for c in config]
    stacked = {name: torch.stack([m[name] for m in masks]) for name in masks[0]}

    def loss(params: dict[str, Tensor], masks: dict[str, Tensor]) -> Tensor:
        return functional_call(model, apply_masks(params, masks), inputs)[0].square().mean()

    losses = vmap(loss, in_dims=(None, 0))(params, stacked)
    grads = vmap(torch.func.grad(loss), in_dims=(None, 0))(params, stacked)
    for index, one in enumerate(masks):
        assert torch.allclose(losses[index], loss(params, one), atol=1e-6)
        for name, mask in one.items():
            assert not bool(grads[name][index][~mask].any())
            assert bool(grads[name][index][mask].any())
    assert len(set(losses.tolist())) == 3
