"""SynFlow, GraSP and SNIP of a model: the pure functions on it, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from purprune import (
    ConfigError,
    ExponentialDecay,
    PruneConfig,
    Rule,
    Unstructured,
    compute_masks,
    grasp_scores,
    iterative_masks,
    sparsity,
    synflow_scores,
)
from purprune_adapters import Pruner, grasp_masks, resolve, snip_masks, synflow_masks

GLOBAL = Unstructured(scope="global")


def convolutional() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.0),
        nn.Flatten(),
        nn.Linear(6 * 4 * 4, 5),
    )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 6, 6, generator=generator)
    return x, torch.randint(0, 5, (8,), generator=generator)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return nn.functional.cross_entropy(model(x), y)


def snip(model: nn.Module, config: object) -> dict[str, Tensor]:
    return snip_masks(model, loss, batch(), config)


def grasp(model: nn.Module, config: object) -> dict[str, Tensor]:
    return grasp_masks(model, loss, batch(), config)


def synflow(model: nn.Module, config: object) -> dict[str, Tensor]:
    return synflow_masks(model, batch()[0], config)


METHODS = [snip, grasp, synflow]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(got) == list(expected)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


@pytest.mark.parametrize("mode", [True, False])
def test_snip_is_the_taylor_score_of_a_backward_pass(mode):
    """Defends the method against autograd on the model itself, in either mode."""
    model = convolutional().train(mode)
    rule = Rule(0.9, pattern=GLOBAL)
    got = snip(model, rule)
    other = copy.deepcopy(model)
    loss(other, batch()).backward()
    grads = {name: p.grad for name, p in other.named_parameters()}
    config = resolve(model, Rule(0.9, pattern=GLOBAL, score="taylor"))
    assert_same(got, compute_masks(dict(model.named_parameters()), 0, config, grads=grads))


def test_grasp_is_the_pure_function_on_the_model():
    """Defends the closure, parameters that no rule is for among what the Hessian sees."""
    model = convolutional().eval()
    x, y = batch()
    params = {name: p.detach() for name, p in model.named_parameters()}

    def closure(p: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, x), y)

    stats = {name: {"grasp": s} for name, s in grasp_scores(closure, params).items()}
    config = resolve(model, Rule(0.6, pattern=GLOBAL, score="grasp"))
    expected = compute_masks(params, 0, config, stats=stats)
    assert_same(grasp(model, Rule(0.6, pattern=GLOBAL)), expected)


def test_synflow_is_the_pure_function_on_ones_in_float64():
    """Defends the input of ones, eval mode, and BatchNorm at its start, which is a division."""
    model = convolutional().train()
    params = {name: p.detach() for name, p in model.named_parameters()}
    ones = torch.ones(1, 2, 6, 6, dtype=torch.float64)

    def forward(p: dict[str, Tensor]) -> Tensor:
        x = nn.functional.conv2d(ones, p["0.weight"]) / (1 + 1e-5) ** 0.5
        x = (x * p["1.weight"].view(-1, 1, 1) + p["1.bias"].view(-1, 1, 1)).relu()
        return x.flatten(1) @ p["5.weight"].T + p["5.bias"]

    rule = Rule(0.95, ExponentialDecay(range(6)), pattern=GLOBAL, score="synflow")
    expected = iterative_masks(
        lambda p: synflow_scores(forward, p), params, resolve(model, rule), stat="synflow"
    )
    assert_same(synflow(model, rule), expected)
    assert all(bool(mask.any()) for mask in expected.values())


def test_synflow_does_not_see_running_means():
    """Defends the linear BatchNorm: a mean that is subtracted would stop the flow."""
    model, rule = convolutional(), Rule(0.9, pattern=GLOBAL)
    expected = synflow(model, rule)
    model[1].running_mean += 100
    assert_same(synflow(model, rule), expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_untouched_and_every_module_is_in_its_mode(method):
    """Defends weights, buffers, gradients and modes, of modules that differ too."""
    model = convolutional().train()
    model[1].eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method(model, Rule(0.5))
    assert [m.training for m in model] == [True, False, True, True, True, True]
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [snip, grasp])
def test_batch_statistics_of_a_model_in_training_stay_in_copies(method):
    """Defends running means against the forward passes that scores need."""
    model = convolutional().train()
    method(model, Rule(0.5))
    assert int(model[1].num_batches_tracked) == 0
    assert not bool(model[1].running_mean.any())


def test_modes_come_back_after_an_error():
    """Defends against a model that is left in eval mode."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 2)).train()
    with pytest.raises(TypeError, match="a model that returns one tensor; got tuple"):
        synflow_masks(model, torch.rand(2, 3), Rule(0.5))
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_masks_go_into_a_pruner(method):
    """Defends the way on: training with the masks, with nothing more pruned."""
    model = convolutional()
    masks = method(model, Rule(0.75, pattern=GLOBAL))
    assert sparsity(masks).fraction == sparsity(masks).zeros / sparsity(masks).entries == 0.75
    pruner = Pruner(model, Rule(0.0), masks=masks)
    pruned = pruner.prepare(inplace=True)
    assert_same(dict(pruner.masks), masks)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    loss(pruned, batch()).backward()
    optimizer.step()
    pruner.step()
    for name, mask in masks.items():
        assert not bool(pruned.get_parameter(name)[~mask].any())


@pytest.mark.parametrize("method", METHODS)
def test_rules_by_type_and_name_are_resolved(method):
    """Defends the config of a Pruner: types, names and None."""
    model = convolutional()
    config = PruneConfig().set_module_type(nn.Conv2d, Rule(0.5)).set_module_name("5", None)
    assert list(method(model, config)) == ["0.weight"]


def test_the_loss_sees_the_model_itself():
    """Defends losses that read attributes and call submodules."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
            self.scale = 3.0

    def own(model: Odd, x: Tensor) -> Tensor:
        assert isinstance(model, Odd)
        return (model.head(model.body(x).relu()) * model.scale).square().mean()

    masks = snip_masks(Odd(), own, torch.rand(5, 4), Rule(0.5))
    assert {name: int(m.sum()) for name, m in masks.items()} == {
        "body.weight": 16,
        "head.weight": 16,
    }


def test_tied_weights_are_scored_through_all_their_uses():
    """Defends one gradient for a weight of two names."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight = model[0].weight
    x = torch.rand(6, 4)
    got = snip_masks(model, lambda m, b: m(b).square().sum(), x, Rule(0.5))
    model(x).square().sum().backward()
    config = resolve(model, Rule(0.5, score="snip"))
    params = dict(model.named_parameters())
    expected = compute_masks(params, 0, config, grads={"0.weight": model[0].weight.grad})
    assert_same(got, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_score_that_is_not_the_methods_is_refused(method):
    """Defends against a score that is silently replaced."""
    with pytest.raises(ConfigError, match=r"rule for '0.weight' without a score .* got Random"):
        method(convolutional(), Rule(0.5, score="random"))


@pytest.mark.parametrize("example", [torch.zeros(1, 4, dtype=torch.int64), [1.0, 2.0]])
def test_synflow_asks_for_an_example_of_floats(example):
    """Defends against ones in place of token ids."""
    with pytest.raises(TypeError, match="a floating-point tensor as example; got"):
        synflow_masks(nn.Linear(4, 2), example, Rule(0.5))


def test_half_models_are_scored():
    """Defends SynFlow of a model in bfloat16, whose masks are those of its upcast."""
    model = convolutional().bfloat16()
    got = synflow(model, Rule(0.9, pattern=GLOBAL))
    assert_same(got, synflow(model.float(), Rule(0.9, pattern=GLOBAL)))


def test_grasp_differentiates_fused_attention_twice():
    """Defends transformers: fused attention has a first derivative only."""
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    masks = grasp_masks(model, lambda m, b: m(b).square().mean(), x, Rule(0.5))
    assert int(masks["linear1.weight"].sum()) == 64
