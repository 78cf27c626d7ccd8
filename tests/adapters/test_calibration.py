"""Statistics of inputs and gradients: right to the sum, and a model that nobody touched."""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from purprune import NM, ConfigError, NaNError, PruneConfig, Rule, SelectionError, compute_masks
from purprune_adapters import collect_stats
from purprune_adapters.batches import tracked

BOTH = ("input_norm", "hessian")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_norms_and_hessians_are_sums_over_all_tokens_of_all_batches():
    """Defends the sums where batches have several dims and other sizes."""
    model = nn.Linear(5, 3).double()
    data = [numbers(2, 7, 5), numbers(1, 4, 5), numbers(3, 5)]
    tokens = torch.cat([x.reshape(-1, 5) for x in data])
    stats = collect_stats(model, data, needs=BOTH)["weight"]
    torch.testing.assert_close(stats["input_norm"], tokens.norm(dim=0))
    torch.testing.assert_close(stats["hessian"], tokens.T @ tokens)
    assert stats["input_norm"].dtype == stats["hessian"].dtype == torch.float64


CONVS: list[tuple[type[nn.Module], dict[str, Any], tuple[int, ...]]] = [
    (nn.Conv1d, {"kernel_size": 3, "padding": 1}, (4, 9)),
    (nn.Conv2d, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 1)}, (4, 7, 6)),
    (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": "same"}, (4, 6, 6)),
    (nn.Conv2d, {"kernel_size": (2, 3), "dilation": (3, 1), "stride": 2}, (4, 8, 7)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (4, 5, 5)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"}, (4, 5, 5)),
    (nn.Conv3d, {"kernel_size": 2, "stride": (1, 2, 1), "padding": "valid"}, (4, 3, 4, 5)),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}, (4, 5, 5)),
    (nn.Conv1d, {"kernel_size": 2, "stride": 2, "groups": 4}, (4, 9)),
]


@pytest.mark.parametrize(("kind", "options", "shape"), CONVS)
def test_patches_of_convolutions_are_what_their_weights_are_multiplied_with(
    kind: type[nn.Module], options: dict[str, Any], shape: tuple[int, ...]
):
    """Defends strides, paddings, dilations and groups: gradients of the weight show the patches.

    The gradient of one output with respect to the weight is the patch that it saw, so that the sum
    of its squares over all outputs of a channel is the squared norm.
    """
    conv: Any = kind(4, 8, bias=False, **options).double()
    data = [numbers(2, *shape), numbers(1, *shape)]
    found = collect_stats(conv, data, needs=["input_norm"])["weight"]["input_norm"]
    wanted = torch.zeros_like(conv.weight)
    for x in data:
        outputs = conv(x)
        for output in outputs.movedim(1, -1).reshape(-1, 8):
            for channel in output:
                [patch] = torch.autograd.grad(channel, conv.weight, retain_graph=True)
                wanted += patch.square()
    torch.testing.assert_close(found.square().expand_as(wanted), wanted)
    assert found.shape == (conv.weight.shape if conv.groups > 1 else conv.weight.shape[1:])


def test_the_hessian_of_a_convolution_fits_its_flattened_weight():
    """Defends the order of features: outputs made of patches are the convolution's."""
    conv = nn.Conv2d(3, 5, (2, 3), stride=2, padding=1, bias=False).double()
    x = numbers(2, 3, 6, 7)
    hessian = collect_stats(conv, [x], needs="hessian")["weight"]["hessian"]
    matrix = conv.weight.detach().flatten(1)
    torch.testing.assert_close((matrix @ hessian * matrix).sum(), conv(x).square().sum().detach())
    unbatched = collect_stats(conv, [x[0], x[1]], needs="hessian")["weight"]["hessian"]
    torch.testing.assert_close(unbatched, hessian)


def test_a_layer_with_its_inputs_along_dim_0_is_scored_along_dim_0():
    """Defends transformers' Conv1D: square ones would be scored along the wrong dim in silence."""
    layers = pytest.importorskip("transformers.pytorch_utils")
    module = layers.Conv1D(4, 4)
    x = torch.tensor([[100.0, 1, 1, 1]])
    stats = collect_stats(module, [x], {"module_type_configs": {"Conv1D": {"score": "wanda"}}})
    assert stats["weight"]["input_norm"].tolist() == [[100], [1], [1], [1]]
    weight = torch.ones(4, 4)
    for score in ("wanda", "ria"):
        rule = Rule(pattern=NM(3, 4, dim=0), score=score)
        masks = compute_masks({"weight": weight}, 0, rule, stats=stats)
        assert masks["weight"].nonzero()[:, 0].tolist() == [0, 0, 0, 0]


def test_groups_of_a_convolution_are_scored_by_the_inputs_that_they_see():
    """Defends grouped convolutions under Wanda: one norm for all groups would be another's."""
    conv = nn.Conv1d(2, 2, 1, groups=2)
    x = torch.tensor([[[1.0], [10.0]]])
    rule = Rule(0.5, score="wanda")
    stats = collect_stats(conv, [x], rule)
    masks = compute_masks({"weight": torch.tensor([[[2.0]], [[1.0]]])}, 0, rule, stats=stats)
    assert masks["weight"].flatten().tolist() == [False, True]


def test_self_attention_sees_the_input_of_its_projection():
    """Defends in_proj: the layer of torch has no module for it, but one input where q = k = v."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    config = PruneConfig().set_module_name("self_attn.in_proj_weight", Rule())
    config = config.set_module_name("linear1", Rule()).set_module_name("linear2", Rule())
    stats = collect_stats(layer, [x], config, needs=["input_norm"])
    found = {name: s["input_norm"].shape for name, s in stats.items()}
    assert found == {
        "self_attn.in_proj_weight": (8,),
        "linear1.weight": (8,),
        "linear2.weight": (16,),
    }
    torch.testing.assert_close(
        stats["self_attn.in_proj_weight"]["input_norm"].float(), x.reshape(-1, 8).norm(dim=0)
    )
    with pytest.raises(SelectionError, match=r"'self_attn.out_proj.weight' of Multihead"):
        collect_stats(layer, [x], needs=["input_norm"])

    def crossed(model: nn.Module, batch: Tensor) -> Any:
        return model(batch, batch + 1, batch)

    with pytest.raises(SelectionError, match="query, a key and a value that differ"):
        collect_stats(
            layer.self_attn, [x], {"module_name_configs": {"in_proj_weight": {}}},
            needs=["input_norm"], forward=crossed,
        )  # fmt: skip


class Net(nn.Module):
    """Has all that could be changed by a run: dropout, running statistics, modes that differ."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.body[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


ONLY = {"module_name_configs": {"body": {"score": "fisher"}, "head": {"score": "wanda"}}}
PAIRS = [(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])) for _ in range(3)]


def everything(model: nn.Module) -> list[Any]:
    tensors = [t.detach().clone() for t in (*model.parameters(), *model.buffers())]
    flags = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), m.training) for m in model.modules()
    ]
    return [*(t.tolist() for t in tensors), flags, hooks]


def test_nothing_of_the_model_changes():
    """Defends weights, buffers, modes, gradients, hooks and random state of the caller."""
    model = Net()
    model.body[0].weight.requires_grad_(False)
    before, state = everything(model), torch.random.get_rng_state()
    stats = collect_stats(model, PAIRS, ONLY, loss=F.cross_entropy)
    assert everything(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: list(s) for name, s in stats.items()} == {
        "body.0.weight": ["squared_gradient"],
        "head.weight": ["input_norm"],
    }
    assert not any(t.requires_grad for s in stats.values() for t in s.values())


@pytest.mark.parametrize("fails_in", ["forward", "loss", "loader"])
def test_nothing_of_the_model_changes_when_something_fails(fails_in: str):
    """Defends against hooks and modes that stay behind after an error."""
    model = Net()
    before = everything(model)

    def fail(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    def failing() -> Iterator[Any]:
        yield PAIRS[0]
        fail()

    options: dict[str, Any] = {"loss": F.cross_entropy}
    options |= {fails_in: fail} if fails_in != "loader" else {}
    with pytest.raises(RuntimeError, match="on purpose"):
        collect_stats(model, failing() if fails_in == "loader" else PAIRS, ONLY, **options)
    assert everything(model) == before


def test_statistics_of_gradients_are_those_of_the_batches():
    """Defends the mean of g, the mean of g**2 and the sum of -w * g, against plain autograd."""
    model = nn.Linear(6, 3)
    grads = [torch.autograd.grad(F.cross_entropy(model(x), y), [model.weight])[0] for x, y in PAIRS]
    needs = ("gradient", "squared_gradient", "movement")
    stats = collect_stats(model, PAIRS, needs=needs, loss=F.cross_entropy)["weight"]
    stacked = torch.stack(grads)
    torch.testing.assert_close(stats["gradient"], stacked.mean(0))
    torch.testing.assert_close(stats["squared_gradient"], stacked.square().mean(0))
    torch.testing.assert_close(stats["movement"], (-model.weight * stacked).sum(0).detach())
    rule = Rule(0.5, score="movement")
    compute_masks(dict(model.named_parameters()), 0, rule, stats={"weight": stats})


def test_batches_of_one_sample_give_the_fisher_information():
    """Defends what the documentation says of it, and that larger batches give another."""
    model = nn.Linear(6, 3)
    x, y = PAIRS[0]
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    needs = ["squared_gradient"]
    found = collect_stats(model, each, needs=needs, loss=F.cross_entropy)["weight"]
    grads = [torch.autograd.grad(F.cross_entropy(model(a), b), [model.weight])[0] for a, b in each]
    torch.testing.assert_close(found["squared_gradient"], torch.stack(grads).square().mean(0))
    whole = collect_stats(model, [(x, y)], needs=needs, loss=F.cross_entropy)["weight"]
    assert (whole["squared_gradient"] < found["squared_gradient"]).any()


class Named(nn.Module):
    """Takes its input by name, as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.fc(input=x * scale)
        return out


X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "batch", [X, (X,), [X], (X, 1), [X, 1], {"x": X}, UserDict(x=X), ({"x": X}, 1)], ids=str
)
def test_batches_are_taken_as_loaders_yield_them(batch: Any):
    """Defends tensors, pairs, dicts and what comes between them."""
    [stats] = collect_stats(Named(), [batch], needs=["input_norm"]).values()
    torch.testing.assert_close(stats["input_norm"].float(), X.norm(dim=0))


def test_a_loader_of_torch_and_a_forward_of_the_users_own():
    """Defends the two commonest calls."""
    loader = DataLoader(TensorDataset(torch.ones(6, 3), torch.zeros(6)), batch_size=4)
    [stats] = collect_stats(Named(), loader, needs=["input_norm"]).values()
    assert stats["input_norm"].tolist() == pytest.approx([math.sqrt(6)] * 3)

    def twice(model: nn.Module, batch: Any) -> Any:
        return model(batch[0], scale=2.0)

    [stats] = collect_stats(Named(), loader, needs=["input_norm"], forward=twice).values()
    assert stats["input_norm"].tolist() == pytest.approx([math.sqrt(24)] * 3)


def test_half_precision_is_summed_in_full():
    """Defends against sums of squares that bfloat16 can't hold: 300 ones would add up to 256."""
    model = nn.Linear(2, 2).bfloat16()
    data = [torch.ones(1, 2, dtype=torch.bfloat16)] * 300
    stats = collect_stats(model, data, needs=BOTH)["weight"]
    assert stats["hessian"].tolist() == [[300.0, 300.0]] * 2
    assert stats["input_norm"].square().tolist() == pytest.approx([300.0, 300.0])


def test_scores_that_need_nothing_run_nothing():
    """Defends a config of magnitudes, for which no data is read."""
    assert collect_stats(nn.Linear(2, 2), [], Rule(0.5)) == {}


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: collect_stats(Net(), PAIRS), ConfigError, "needs=\\['input_norm'\\]"),
        (lambda: collect_stats(Net(), [], needs=BOTH), ConfigError, "at least one batch"),
        (lambda: collect_stats(Net(), PAIRS, needs=BOTH), ConfigError, "'unused.weight'; its mod"),
        (
            lambda: collect_stats(Net(), PAIRS, needs=["input_nrom"]),
            ConfigError,
            "Did you mean 'input_norm'",
        ),
        (lambda: collect_stats(Net(), PAIRS, Rule(score="synflow")), ConfigError, "'synflow'"),
        (lambda: collect_stats(Net(), PAIRS, Rule(score="fisher")), ConfigError, "Pass loss="),
        (
            lambda: collect_stats(Net(), PAIRS, Rule(score="fisher"), loss=F.cross_entropy),
            ConfigError,
            "depends on 'unused.weight'",
        ),
        (
            lambda: collect_stats(Named(), [X], needs=["movement"], loss=lambda out, _: out),
            ConfigError,
            r"one number; got \(2, 2\)",
        ),
        (lambda: collect_stats(Named(), ["text"], needs=BOTH), TypeError, "forward=lambda"),
        (lambda: collect_stats(Named(), [(X, 1, 2)], needs=BOTH), TypeError, "got tuple of 3"),
        (lambda: collect_stats(Named(), [X * math.nan], needs=BOTH), NaNError, "'input_norm'"),
        (
            lambda: collect_stats(nn.GRU(3, 2), [X], needs=BOTH),
            SelectionError,
            "'weight_ih_l0', 'weight_hh_l0' of GRU",
        ),
        (
            lambda: collect_stats(nn.ConvTranspose1d(3, 2, 1), [X], needs=BOTH),
            SelectionError,
            "'weight' of ConvTranspose1d",
        ),
        (
            lambda: collect_stats(nn.Conv1d(2, 2, 1, groups=2), [X], needs=BOTH),
            SelectionError,
            "has groups=2",
        ),
    ],
)
def test_what_can_not_be_collected_is_refused(
    call: Callable[[], Any], error: type[Exception], says: str
):
    """Defends one clear line with the parameter and the way out."""
    with pytest.raises(error, match=says):
        call()


def test_no_bar_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]):
    """Defends logs: a bar in a file is noise."""
    assert list(tracked([1, 2], "counting", True)) == [1, 2]
    assert capsys.readouterr() == ("", "")
