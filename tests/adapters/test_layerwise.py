"""Blocks pruned one by one: exact masks, each layer with the inputs that it then has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import purprune_adapters.layerwise
from purprune import (
    NM,
    RIA,
    Channel,
    ConfigError,
    NaNError,
    Pattern,
    PruneConfig,
    Rule,
    SelectionError,
    Unstructured,
    compute_masks,
    sparsegpt,
)
from purprune.patterns import RowGroup
from purprune_adapters import Pruner, collect_stats, prune_layerwise


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=3, n_head=2, n_embd=16, vocab_size=40, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=32,
    )
    return transformers.LlamaForCausalLM(config)


def encoder() -> nn.Module:
    return nn.Sequential(
        *(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True) for _ in range(3))
    )


TOKENS = [{"input_ids": torch.randint(0, 40, (4, 12))} for _ in range(4)]
STATES = [torch.randn(3, 6, 8) for _ in range(4)]
CONV1D = PruneConfig().set_module_type("Conv1D", Rule(0.5))
FEED_FORWARD = (
    PruneConfig()
    .set_module_name("*.linear?", Rule(0.5))
    .set_module_name("*.in_proj_weight", Rule())
)


class Case:
    """A model, where its blocks are, data and a config."""

    def __init__(self, make: Callable[[], Any], blocks: str, data: Any, config: Any) -> None:
        self.make, self.blocks, self.data, self.config = make, blocks, data, config


CASES = {
    "gpt2": Case(gpt2, "transformer.h", TOKENS, CONV1D),
    "llama": Case(llama, "model.layers", TOKENS, Rule(0.5)),
    "encoder": Case(encoder, "", STATES, FEED_FORWARD),
}


@pytest.fixture(params=CASES, name="case")
def _case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def outputs(model: nn.Module, batch: Any) -> Tensor:
    found = model.eval()(batch) if isinstance(batch, Tensor) else model.eval()(**batch).logits
    return found.detach()


def test_every_layer_in_the_blocks_is_pruned_exactly_and_nothing_else_moves(case: Case):
    """Defends counts, zeros, the copy, modes and the other parameters, for three architectures."""
    model = case.make()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruned, masks, report = prune_layerwise(model, case.blocks, case.data, case.config)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(
        module.training == pruned.get_submodule(n).training for n, module in model.named_modules()
    )
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in pruned.modules())
    after = dict(pruned.named_parameters())
    assert list(masks) == [row.name for row in report.rows]
    for name, param in after.items():
        if name not in masks:
            assert torch.equal(param, before[name])
            continue
        assert int((~masks[name]).sum()) == param.numel() // 2 == report_zeros(report, name)
        assert torch.equal(param == 0, ~masks[name])
        assert not torch.equal(param[masks[name]], before[name][masks[name]])
    assert report.total.zeros == sum(int((~mask).sum()) for mask in masks.values())


def report_zeros(report: Any, name: str) -> int:
    row = report[name]
    return int(row.pruned.zeros)


def by_hand(model: nn.Module, case: Case, layers: list[list[str]]) -> None:
    """Prune block after block with nothing but the model run as a whole, in place."""
    for names in layers:
        config = PruneConfig(module_name_configs={name: Rule() for name in names})
        stats = collect_stats(model, case.data, config, needs=["hessian"])
        for name in names:
            weight, turned = model.get_parameter(name), "c_" in name
            matrix = weight.T if turned else weight
            found, _ = sparsegpt(matrix, stats[name]["hessian"], Unstructured(), 0.5)
            weight.data.copy_(found.T if turned else found)


def test_each_block_sees_the_outputs_of_the_pruned_blocks_before_it(case: Case):
    """Defends the order of things: the same as the whole model run anew for every block."""
    model = case.make()
    pruned, masks, _ = prune_layerwise(model, case.blocks, case.data, case.config)
    prefix = f"{case.blocks}." if case.blocks else ""
    layers = [[n for n in masks if n.startswith(f"{prefix}{i}.")] for i in range(3)]
    assert all(layers)
    by_hand(model, case, layers)
    for name in masks:
        torch.testing.assert_close(pruned.get_parameter(name), model.get_parameter(name))
    for batch in case.data:
        torch.testing.assert_close(outputs(pruned, batch), outputs(model, batch))


@pytest.mark.parametrize("pattern", [Pattern(group=RowGroup(0)), NM(2, 4)])
def test_the_error_of_sparsegpt_is_below_that_of_scores_at_the_same_pattern(pattern: Pattern):
    """Defends the comparison that the report makes, on inputs that a model makes itself."""
    model = llama()
    rule = Rule(pattern=pattern)
    errors = {
        method: prune_layerwise(model, "model.layers", TOKENS, rule, method=method).report.error
        for method in ("sparsegpt", "wanda", "magnitude", "random")
    }
    assert list(errors) == sorted(errors, key=errors.__getitem__)
    assert 0 < errors["sparsegpt"] < errors["random"] < 1.5


def test_scores_prune_by_the_statistics_of_the_block():
    """Defends method=score and method=None: the masks of compute_masks, weights else unchanged."""
    model = gpt2()
    rule = Rule(pattern=NM(2, 4, dim=0), score=RIA())
    config = PruneConfig().set_module_type("Conv1D", rule)
    pruned, masks, report = prune_layerwise(model, "transformer.h", TOKENS, config, method=None)
    first = {n: p for n, p in model.named_parameters() if n in masks and ".h.0." in n}
    only = PruneConfig(module_name_configs=dict.fromkeys(first, rule))
    stats = collect_stats(model, TOKENS, only)
    wanted = compute_masks(first, 0, only, stats=stats)
    for name, weight in first.items():
        assert torch.equal(masks[name], wanted[name])
        assert torch.equal(pruned.get_parameter(name), weight * wanted[name])
    same = prune_layerwise(model, "transformer.h", TOKENS, CONV1D_NM, method="ria")
    assert all(torch.equal(same.masks[name], masks[name]) for name in masks)
    assert str(same.report) == str(report)


CONV1D_NM = PruneConfig().set_module_type("Conv1D", Rule(pattern=NM(2, 4, dim=0)))


def test_patterns_of_conv1d_mean_the_weight_as_it_is_stored():
    """Defends 2:4 along the inputs, which are dim 0 there, and the Pruner that takes the masks."""
    pruned, masks, _ = prune_layerwise(gpt2(), "transformer.h", TOKENS, CONV1D_NM)
    for mask in masks.values():
        assert (mask.unflatten(0, (-1, 4)).sum(1) == 2).all()
    config = PruneConfig().set_module_type("Conv1D", Rule(pattern=NM(2, 4)))
    with pytest.raises(ConfigError, match=r"'transformer.h.0.attn.c_attn.weight': .* input dim"):
        prune_layerwise(gpt2(), "transformer.h", TOKENS, config)
    pruner = Pruner(pruned, CONV1D_NM, masks=masks)
    model: Any = pruner.prepare(inplace=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in TOKENS:
        optimizer.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        pruner.step()
    for name, mask in masks.items():
        assert torch.equal(pruner.masks[name], mask)
        assert not model.get_parameter(name)[~mask].any()


def test_a_budget_divides_the_total_of_the_blocks():
    """Defends rules that share a total by their shapes: exact for all of them together."""
    model = encoder()
    config = {"module_name_configs": {"*.linear?": Rule(0.6, budget="erk"), "*.in_proj_weight": {
        "target_sparsity": 0.6, "budget": "erk"}}}  # fmt: skip
    masks = prune_layerwise(model, "", STATES, config).masks
    pruned = {name: int((~mask).sum()) for name, mask in masks.items()}
    entries = sum(mask.numel() for mask in masks.values())
    assert sum(pruned.values()) == entries * 6 // 10
    assert len({pruned[name] / mask.numel() for name, mask in masks.items()}) > 1


def test_the_error_is_that_of_the_layers_outputs():
    """Defends the reported number against the outputs themselves."""
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(50, 6)
    pruned, _, report = prune_layerwise(nn.Sequential(layer), "", [x], Rule(0.5))
    wanted = (layer(x) - pruned(x)).norm() / layer(x).norm()
    assert report.rows[0].error == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert "0.weight" in str(report)


def test_what_lies_outside_of_the_blocks_is_named():
    """Defends against silence where a global rule reaches further than the blocks."""
    model = llama()
    _, masks, report = prune_layerwise(model, [*model.model.layers][:2], TOKENS, Rule(0.5))
    assert {name.split(".")[2] for name in masks} == {"0", "1"}
    assert report.skipped["lm_head.weight"] == "outside of the blocks"
    assert "outside of the blocks: model.layers.2" in str(report)


def test_caches_are_off_only_for_the_run():
    """Defends models of transformers, which by default keep keys and values between calls."""
    model = llama()
    assert model.config.use_cache
    pruned = prune_layerwise(model, model.model.layers, TOKENS, Rule(0.5), inplace=True).model
    assert pruned is model
    assert model.config.use_cache


def test_a_failure_leaves_every_weight_as_it_was(monkeypatch: pytest.MonkeyPatch):
    """Defends the model that is pruned in place against an error in a later block."""
    model = encoder()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    calls = iter(range(100))

    def failing(*args: Any, **options: Any) -> Any:
        if next(calls) == 5:
            raise NaNError("on purpose")
        return sparsegpt(*args, **options)

    monkeypatch.setattr(purprune_adapters.layerwise, "sparsegpt", failing)
    with pytest.raises(NaNError, match=r"'1.linear2.weight': on purpose"):
        prune_layerwise(model, "", STATES, FEED_FORWARD, inplace=True)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())


class Between(nn.Module):
    """Has a layer between its blocks, and calls one of them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(input=self.norm(self.one(x)))
        return out


X = [torch.randn(8, 4)]


def _nan_weight() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.data[0, 0] = math.nan  # type: ignore[operator, union-attr]
    return model


def test_blocks_may_be_any_modules_that_follow_each_other():
    """Defends single layers as blocks, called by name too."""
    model = Between()
    _, masks, _ = prune_layerwise(model, [model.one, model.norm, model.two], X, Rule(0.5))
    assert list(masks) == ["one.weight", "two.weight"]


def test_all_weights_whose_inputs_no_hook_sees_are_named_with_a_way_out_that_works():
    """Defends torch's own encoder: one error, and the config that it shows is taken."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    batches = [torch.randn(8, 5, 4)]
    with pytest.raises(SelectionError) as caught:
        prune_layerwise(model, "layers", batches, Rule())
    assert all(f"'layers.{i}.self_attn.out_proj.weight'" in str(caught.value) for i in (0, 1))
    way_out = "PruneConfig().set_global(rule).set_module_name('*.out_proj', None)"
    assert way_out in str(caught.value)
    config = PruneConfig().set_global(Rule()).set_module_name("*.out_proj", None)
    assert len(prune_layerwise(model, "layers", batches, config).masks) == 6
    some = PruneConfig().set_module_name("layers.0.self_attn", Rule())
    with pytest.raises(SelectionError, match=r"set_module_name\('layers.0.self_attn.out_proj.w"):
        prune_layerwise(model, "layers", batches, some)


SMALL = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
BETWEEN = Between()


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: prune_layerwise(SMALL, "layer", X, Rule()), SelectionError, "got 'layer'"),
        (lambda: prune_layerwise(SMALL, SMALL[0], X, Rule()), SelectionError, r"Pass \[block\]"),
        (lambda: prune_layerwise(SMALL, [nn.Linear(4, 4)], X, Rule()), SelectionError, "another"),
        (lambda: prune_layerwise(SMALL, [], X, Rule()), SelectionError, "at least one block"),
        (
            lambda: prune_layerwise(SMALL, [SMALL[0], SMALL[0]], X, Rule()),
            SelectionError,
            "each once",
        ),
        (
            lambda: prune_layerwise(SMALL, [SMALL[1], SMALL[0]], X, Rule()),
            ConfigError,
            "in that order",
        ),
        (
            lambda: prune_layerwise(BETWEEN, [BETWEEN.one, BETWEEN.two], X, Rule()),
            ConfigError,
            "blocks in sequence; block 1 does not get first what block 0",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(), forward=lambda m, b: m[0](b)),
            ConfigError,
            "all 2 blocks; got as far as 1",
        ),
        (
            lambda: prune_layerwise(
                SMALL, [SMALL[1]], X, PruneConfig().set_module_name("0", Rule())
            ),
            SelectionError,
            "for weights in the blocks; got none in 1. They are for 0.weight",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(pattern=Channel())),
            ConfigError,
            "'0.weight': Expected single entries",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(pattern=NM(2, 4, dim=3)), method="wanda"),
            ConfigError,
            "'0.weight': Expected a dim",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(pattern=Unstructured(scope="global"))),
            ConfigError,
            "scope='global'",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(schedule=lambda step: 0.5)),
            ConfigError,
            "'0.weight', since its schedule is a callable",
        ),
        (lambda: prune_layerwise(SMALL, "", X, Rule(score="wanda")), ConfigError, "method=None"),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(), method="fisher"),
            ConfigError,
            "needs squared_gradient",
        ),
        (lambda: prune_layerwise(SMALL, "", X, Rule(), method="wandb"), ConfigError, "'wanda'"),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(), method="gptq"),
            ConfigError,
            "Expected method='sparsegpt', None or a score: expected one .* got 'gptq'",
        ),
        (lambda: prune_layerwise(SMALL, "", [], Rule()), ConfigError, "at least one batch"),
        (
            lambda: prune_layerwise(_nan_weight(), "", X, Rule()),
            NaNError,
            "the weight '0.weight'",
        ),
        (
            lambda: prune_layerwise(SMALL, "", [torch.zeros(3, 4)], Rule()),
            ConfigError,
            "'0.weight': Expected a Hessian of inputs that were seen",
        ),
        (
            lambda: prune_layerwise(SMALL, "", X, Rule(), damping=-1.0),
            ConfigError,
            "damping",
        ),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Any], error: type[Exception], says: str):
    """Defends one clear line, and a model that is as it was."""
    before = [p.detach().clone() for p in SMALL.parameters()]
    with pytest.raises(error, match=says):
        call()
    assert all(map(torch.equal, SMALL.parameters(), before))
