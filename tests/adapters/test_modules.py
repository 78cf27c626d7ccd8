"""Kinds of modules: tied, shared, attention, recurrent, parametrized, lazy, frozen, converted."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from purprune import Channel, PolynomialDecay, PruneConfig, Rule, SelectionError
from purprune_adapters import Pruner, resolve

RULE = Rule(0.75, PolynomialDecay([1, 2, 3]))


def train(model: nn.Module, pruner: Pruner, call: Callable[[], Tensor], steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        call().square().mean().backward()
        for name, mask in pruner.masks.items():
            assert not bool(model.get_parameter(name).grad[~mask].any()), name
        optimizer.step()
        pruner.step()


def assert_exact(pruner: Pruner, sparsity: float) -> None:
    for row in pruner.report().rows:
        assert row.weight.zeros == row.mask.zeros == int(row.weight.entries * sparsity), row.name


class Shared(nn.Module):
    """One layer under two names, called three times in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(self.first(x).tanh()).tanh()))


def test_a_shared_module_is_counted_and_masked_once():
    """Defends counts: one parameter under two names, whose gradients add up."""
    torch.manual_seed(0)
    model = Shared()
    pruner = Pruner(model, RULE)
    assert list(pruner.resolved_config.module_name_configs) == ["first.weight", "last.weight"]
    pruner.prepare(inplace=True)
    x = torch.randn(4, 8)
    train(model, pruner, lambda: model(x))
    assert_exact(pruner, 0.75)
    assert pruner.report().total.entries == 128
    final = pruner.finalize()
    assert final.first is final.second
    renamed = PruneConfig().set_module_name("second", Rule(0.5))
    assert list(resolve(Shared(), renamed).rules) == ["first.weight"]


def test_tied_embedding_and_head_train_pruned_when_one_of_them_is_named():
    """Defends language models: the head's gradient and the embedding's are masked as one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    pruner = Pruner(model, PruneConfig().set_module_name("1", RULE))
    pruner.prepare(inplace=True)
    train(model, pruner, lambda: model(torch.arange(12)))
    assert_exact(pruner, 0.75)
    assert model[0].weight is model[1].weight
    assert pruner.report().total.entries == 96


RECURRENT = {
    "LSTM": lambda: nn.LSTM(6, 8, num_layers=2, bidirectional=True, proj_size=4),
    "GRU": lambda: nn.GRU(6, 8, bidirectional=True),
    "RNN": lambda: nn.RNN(6, 8, batch_first=True),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_nets_train_pruned_and_finalize_flattened(name: str):
    """Defends all of their matrices: of both directions, both layers, and projections."""
    torch.manual_seed(0)
    model = RECURRENT[name]()
    pruner = Pruner(model, RULE)
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2]
    assert list(pruner.resolved_config.module_name_configs) == matrices
    pruner.prepare(inplace=True)
    x = torch.randn(5, 3, 6)
    train(model, pruner, lambda: model(x)[0])
    model.flatten_parameters()
    assert_exact(pruner, 0.75)
    final = pruner.finalize()
    assert torch.equal(final(x)[0], model(x)[0])


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells_train_pruned(kind: type[nn.RNNCellBase]):
    """Defends cells that a loop of the user calls many times per step."""
    torch.manual_seed(0)
    cell = kind(6, 8)
    pruner = Pruner(cell, RULE)
    pruner.prepare(inplace=True)

    def run() -> Tensor:
        state = None
        for x in torch.ones(3, 2, 6):
            state = cell(x, state)
        return state[0] if isinstance(state, tuple) else state

    train(cell, pruner, run)
    assert_exact(pruner, 0.75)


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_transformer_encoders_use_their_fast_path_again_once_finalized(monkeypatch):
    """Defends inference: the fused kernel, which calls no child, reads masked weights or none."""
    fused = []
    kernel = torch._transformer_encoder_layer_fwd

    def spy(*args: object, **kwargs: object) -> Tensor:
        fused.append(1)
        return kernel(*args, **kwargs)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", spy)
    model = transformer()
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    x = torch.randn(3, 5, 8)
    train(model, pruner, lambda: model(x))
    assert_exact(pruner, 0.75)
    model.eval()
    with torch.no_grad():
        for layer in model.layers:  # in eval mode these are read by the layer above them
            layer.linear1.weight.fill_(1.0)
            layer.self_attn.in_proj_weight.fill_(1.0)
            layer.self_attn.out_proj.weight.fill_(1.0)
        out = model(x)
        assert_exact(pruner, 0.75)
        model.layers[0].self_attn.out_proj.weight.fill_(1.0)
        model.layers[0](x)  # called by itself
        assert_exact(pruner, 0.75)
        assert not fused, "hooks are there: each module is called"
        final = pruner.finalize()
        assert torch.allclose(final(x), out, atol=1e-6)
        assert len(fused) == 2


def test_transformer_decoders_train_pruned():
    """Defends attention to another sequence, and layers of layers."""
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 2)
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    x, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
    train(model, pruner, lambda: model(x, memory))
    assert_exact(pruner, 0.75)
    assert len(pruner.masks) == 12


@pytest.mark.parametrize("wrap", ["parametrizations", "hooks"])
def test_spectral_norm_is_pruned_by_its_original(wrap: str):
    """Defends a weight that is its original divided by a number: zeros stay, also when removed."""
    torch.manual_seed(0)
    norm = parametrizations.spectral_norm if wrap == "parametrizations" else nn.utils.spectral_norm
    model = nn.Sequential(norm(nn.Linear(8, 8)), nn.Tanh(), nn.Linear(8, 4))
    original = "0.parametrizations.weight.original" if wrap == "parametrizations" else (
        "0.weight_orig"
    )  # fmt: skip
    for config in (
        RULE,
        PruneConfig().set_module_type("Linear", RULE),
        PruneConfig().set_module_name("0", RULE).set_module_name("2", RULE),
        PruneConfig().set_module_name("0.weight", RULE).set_module_name("2", RULE),
        PruneConfig().set_module_name("*", RULE),
    ):
        assert list(resolve(model, config).rules) in (
            [original, "2.weight"],
            ["2.weight", original],
        ), config
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    x = torch.randn(5, 8)
    train(model, pruner, lambda: model(x))
    assert_exact(pruner, 0.75)
    with torch.no_grad():
        model.get_parameter(original).fill_(1.0)
    model[0](x)
    assert int((model[0].weight == 0).sum()) == 48, "the weight of this very forward pass"
    final = pruner.finalize(inplace=True)
    if wrap == "parametrizations":
        parametrize.remove_parametrizations(final[0], "weight")
    else:
        nn.utils.remove_spectral_norm(final[0])
    assert int((final[0].weight == 0).sum()) == 48
    assert torch.equal(final[0].weight == 0, ~pruner.masks[original])


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecated, but found in many models
        return nn.utils.weight_norm(layer)


class Doubled(nn.Module):
    """A parametrization of the user."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.mean()


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, r"original1', whose zeros stay"),
    "old weight_norm": (old_weight_norm, r"remove_weight_norm.*'weight_v', whose zeros stay"),
    "orthogonal": (parametrizations.orthogonal, r"remove_parametrizations\(module, 'weight'\)"),
    "of the user": (doubled, r"remove_parametrizations\(module, 'weight'\)"),
    "pruned by torch": (lambda m: prune.l1_unstructured(m, "weight", 0.5), r"prune\.remove\(mod"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_are_computed_are_refused_with_the_way_out(kind: str):
    """Defends against a layer that stays dense unseen, and against zeros that do not stay."""
    wrap, says = COMPUTED[kind]
    model = nn.Sequential(wrap(nn.Linear(8, 8)), nn.Linear(8, 8))
    for config in (
        PruneConfig(Rule(0.5)),
        PruneConfig().set_module_type("Linear", Rule(0.5)),
        PruneConfig().set_module_name("0", Rule(0.5)),
        PruneConfig().set_module_name("0.weight", Rule(0.5)),
        PruneConfig().set_module_name("*", Rule(0.5)),
    ):
        with pytest.raises(SelectionError, match=rf"'0\.weight' is computed from.*{says}"):
            Pruner(model, config)
    for name in ("0", "0.weight"):
        config = PruneConfig(Rule(0.5)).set_module_name(name, None)
        assert list(resolve(model, config).rules) == ["1.weight"]


@pytest.mark.parametrize("old", [True, False])
def test_weight_norm_is_pruned_where_its_direction_is_named(old: bool):
    """Defends the way out: zeros of v are zeros of g * v / |v|, in training and when removed."""
    torch.manual_seed(0)
    norm = old_weight_norm if old else parametrizations.weight_norm
    model = nn.Sequential(norm(nn.Linear(16, 4)), nn.Tanh(), nn.Linear(4, 4))
    name = "0.weight_v" if old else "0.parametrizations.weight.original1"
    by_leaf = PruneConfig().set_module_name("0", Rule(0.5, param_name=name.rpartition(".")[2]))
    assert list(resolve(model, by_leaf).rules) == [name]
    config = PruneConfig(Rule(0.5)).set_module_name(name, Rule(0.5))
    pruner = Pruner(model, config)
    assert set(pruner.resolved_config.module_name_configs) == {name, "2.weight"}
    pruner.prepare(inplace=True)
    x = torch.randn(5, 16)
    train(model, pruner, lambda: model(x))
    final = pruner.finalize(inplace=True)
    if old:
        nn.utils.remove_weight_norm(final[0])
    else:
        parametrize.remove_parametrizations(final[0], "weight")
    assert torch.equal(final[0].weight == 0, ~pruner.masks[name])


def test_masks_of_torch_made_permanent_can_be_pruned_on():
    """Defends the way out of nn.utils.prune, whose zeros are among ours then."""
    torch.manual_seed(0)
    layer = prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5)
    prune.remove(layer, "weight")
    zeros = layer.weight == 0
    pruner = Pruner(layer, Rule(0.75))
    pruner.prepare(inplace=True)
    assert not bool(pruner.masks["weight"][zeros].any())


def test_lazy_modules_are_refused_until_they_have_a_shape():
    """Defends the order: one forward pass, then the pruner."""
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(3))
    with pytest.raises(SelectionError, match=r"'0\.weight' is lazy.*one forward pass first"):
        Pruner(model, Rule(0.5))
    x = torch.randn(2, 1, 5, 5)
    model(x)
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    train(model, pruner, lambda: model(x))
    assert_exact(pruner, 0.75)


def test_frozen_layers_are_pruned_and_train_masked_once_they_are_thawed():
    """Defends fine-tuning: no gradient, no trouble; later the gradient is masked."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model[0].requires_grad_(False)
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    x = torch.randn(5, 8)
    for step in range(5):
        if step == 2:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert (model[0].weight.grad is None) is (step < 2)
        if step >= 2:
            assert not bool(model[0].weight.grad[~pruner.masks["0.weight"]].any())
        optimizer.step()
        pruner.step()
    assert_exact(pruner, 0.75)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_prepared_model_may_change_its_dtype(dtype: torch.dtype):
    """Defends model.half() and its like: masks, hooks and counts go on with the new numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    pruner = Pruner(model, RULE)
    pruner.prepare(inplace=True)
    pruner.step()
    model.to(dtype)
    x = torch.randn(5, 8).to(dtype)
    train(model, pruner, lambda: model(x), steps=2)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    model(x)
    assert_exact(pruner, 0.75)
    assert model[0].weight.dtype == dtype


def test_a_saved_whole_model_masks_itself_and_trains_on():
    """Defends torch.save(model): the copy has its own masks and gradient hooks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(5, 8)
    for twin in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        optimizer = torch.optim.AdamW(twin.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            twin(x).square().mean().backward()
            assert not bool(twin[0].weight.grad[~pruner.masks["0.weight"]].any())
            optimizer.step()
            twin(x)
            assert int((twin[0].weight == 0).sum()) == 32
        assert not torch.equal(twin[0].weight, model[0].weight)


def test_two_pruners_on_one_parameter_are_refused_before_anything_changed():
    """Defends exact counts: the masks of both would work together. One after the other is fine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    first = Pruner(model, PruneConfig().set_module_name("1", Rule(0.5)))
    first.prepare(inplace=True)
    before = copy.deepcopy(model.state_dict())
    second = Pruner(model, Rule(0.75, pattern=Channel(0)))
    for inplace in (True, False):
        with pytest.raises(ValueError, match=r"'1\.weight' has a pruner\. End that one first"):
            second.prepare(inplace=inplace)
    with pytest.raises(ValueError, match=r"'weight' has a pruner"):
        Pruner(model[1], Rule(0.5)).prepare(inplace=True)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    disjoint = Pruner(model, PruneConfig().set_module_name("0", Rule(0.5)))
    disjoint.prepare(inplace=True)
    x = torch.randn(5, 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        first.step()
        disjoint.step()
    assert first.report().total.zeros == 16
    assert disjoint.report().total.zeros == 32
    first.finalize(inplace=True)
    disjoint.finalize(inplace=True)
    second.prepare(inplace=True)
    assert [row.mask.zeros for row in second.report().rows] == [48, 24]


def test_finalize_leaves_the_hooks_of_others():
    """Defends hooks of every kind that the user or a library registered."""
    model = nn.Sequential(nn.Linear(8, 8))
    seen: list[str] = []
    model[0].register_forward_pre_hook(lambda m, a: seen.append("before"))
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    model[0].register_forward_pre_hook(lambda m, a: seen.append("after"), prepend=True)
    model[0].register_forward_hook(lambda m, a, out: seen.append("forward"))
    model[0].weight.register_hook(lambda g: seen.append("gradient"))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    final = pruner.finalize(inplace=True)
    final(torch.ones(2, 8)).sum().backward()
    assert seen == ["after", "before", "forward", "gradient", "accumulated"]
    assert bool(final[0].weight.grad.all()), "ours is gone"


def test_a_conversion_that_swaps_parameters_is_refused_by_torch_after_prepare():
    """Defends the limit that is documented: torch swaps no tensor that is referred to weakly."""
    model = nn.Sequential(nn.Linear(8, 8))
    pruner = Pruner(model, Rule(0.5))
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(torch.float64)
        pruner.prepare(inplace=True)
        with pytest.raises(RuntimeError, match=r"Couldn't swap Linear\.weight"):
            model.to(torch.float32)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[0].weight.dtype == torch.float64
    assert pruner.report().total.zeros == 32
