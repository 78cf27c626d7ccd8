"""The Pruner: the fold and resume laws, hooks, lifecycle, and the model that stays ordinary."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    Kernel,
    NaNError,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    SelectionError,
    Unstructured,
    apply_masks,
    compute_masks,
)
from purprune_adapters import Pruner, resolve


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 4, 4, generator=generator), torch.arange(8) % 3


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    x, y = batch(step)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32))


SCHEDULE = PolynomialDecay([1, 3, 5])
RULES = {
    "unstructured": Rule(0.8, SCHEDULE),
    "from 30 %": Rule(0.8, SCHEDULE, 0.3),
    "constant": Rule(0.6),
    "blocks": Rule(0.5, SCHEDULE, pattern=Block((2, -1))),
    "2:4 along dim 0": Rule(schedule=SCHEDULE, pattern=NM(2, 4, dim=0)),
    "taylor": Rule(0.7, SCHEDULE, score="taylor"),
    "random": Rule(0.7, SCHEDULE, score=Random(1)),
    "falling": Rule(0.2, SCHEDULE, 0.8),
    "callable": Rule(schedule=lambda t: min(0.9, t / 8)),
}
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, 0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("attached", [False, True], ids=["alone", "optimizer attached"])
def test_law_9_steps_of_the_pruner_are_the_pure_fold(rule, make, attached):
    """Defends that the adapter adds nothing: weights and masks are those of the pure functions."""
    model = net()
    optimizer = make(model.parameters())
    pruner = Pruner(model, rule, optimizer=optimizer if attached else None)
    config = resolve(model, rule)

    twin = copy.deepcopy(model)
    params = dict(twin.named_parameters())
    twin_optimizer = make(twin.parameters())
    grads: dict[str, Tensor | None] = dict.fromkeys(params)

    def fold(step: int, prev: dict[str, Tensor] | None) -> dict[str, Tensor]:
        masks = compute_masks(params, step, config, prev=prev, grads=grads)
        for name, new in apply_masks(params, masks).items():
            params[name].data.copy_(new.detach())
        return masks

    if rule is RULES["taylor"]:
        assert rule.sparsity_at(0) == 0, "no gradient is needed before the first one is there"
    pruner.prepare(inplace=True)
    masks = fold(0, None)
    for step in range(1, 8):
        train_step(model, optimizer, step)
        pruner.step()

        twin_optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(functional_call(twin, params, x), y).backward()
        for name, mask in masks.items():
            params[name].grad.masked_fill_(~mask, 0)
        grads = {name: p.grad for name, p in params.items()}
        twin_optimizer.step()
        masks = fold(step, masks)
        for name, param in model.named_parameters():
            assert same_bits(param, params[name]), (step, name)
        for name, mask in masks.items():
            assert torch.equal(pruner.masks[name], mask), (step, name)


@given(st.integers(0, 7), st.sampled_from(sorted(set(RULES))), st.booleans())
def test_law_10_a_resumed_run_ends_with_the_bits_of_the_run_that_never_stopped(
    stop: int, name: str, before_prepare: bool
):
    """Defends resume at every step, loaded before or after prepare, through weights_only=True."""
    rule = RULES[name]

    def start() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        return model, optimizer, Pruner(model, rule)

    model, optimizer, pruner = start()
    pruner.prepare(inplace=True)
    saved = b""
    for step in range(1, 8):
        if step == stop + 1:
            buffer = io.BytesIO()
            states = (model.state_dict(), optimizer.state_dict(), pruner.state_dict())
            torch.save(states, buffer)
            saved = buffer.getvalue()
        train_step(model, optimizer, step)
        pruner.step()
    if not saved:
        return
    weights, momenta, state = torch.load(io.BytesIO(saved), weights_only=True)
    again, optimizer, resumed = start()
    if before_prepare:
        resumed.load_state_dict(state)
    resumed.prepare(inplace=True)
    again.load_state_dict(weights)
    optimizer.load_state_dict(momenta)
    if not before_prepare:
        resumed.load_state_dict(state)
    assert resumed.step_count == stop
    for step in range(stop + 1, 8):
        train_step(again, optimizer, step)
        resumed.step()
    for param, expected in zip(again.parameters(), model.parameters(), strict=True):
        assert same_bits(param, expected)
    for key, mask in pruner.masks.items():
        assert torch.equal(resumed.masks[key], mask)
    assert resumed.report() == pruner.report()


def test_prepare_applies_the_masks_of_step_0_and_leaves_the_original_alone():
    """Defends inplace=False: a copy is pruned, the names of its state stay the same."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, Rule(0.5))
    prepared = pruner.prepare()
    assert prepared is pruner.model is not model
    assert int((prepared[3].weight == 0).sum()) == 96
    assert list(prepared.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_no_forward_sees_an_unmasked_weight_even_without_step():
    """Defends the forward hook: a weight that was written to is masked before it is read."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    pruned = ~pruner.masks["3.weight"]
    with torch.no_grad():
        model[3].weight.fill_(1.0)
    model(batch(0)[0])
    assert not bool(model[3].weight[pruned].any())
    with torch.no_grad():
        model[3].weight.fill_(1.0)
    model[3](torch.ones(1, 64))
    assert not bool(model[3].weight[pruned].any())
    model.load_state_dict({k: torch.ones_like(v) for k, v in model.state_dict().items()})
    model(batch(0)[0])
    assert not bool(model[3].weight[pruned].any())


def test_an_unchanged_weight_is_not_written_again():
    """Defends dense speed: a forward pass after step() writes nothing."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    version = model[3].weight._version
    model(batch(0)[0])
    model(batch(1)[0])
    assert model[3].weight._version == version


def test_an_attached_optimizer_leaves_zeros_right_after_its_step():
    """Defends what reads the weights between optimizer.step() and pruner.step(): EMA, logging."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train_step(model, optimizer, 0)  # momentum that moves the entries pruned next
    pruner = Pruner(model, Rule(0.5), optimizer=optimizer)
    pruner.prepare(inplace=True)
    train_step(model, optimizer, 1)
    assert not bool(model[3].weight[~pruner.masks["3.weight"]].any())


@pytest.mark.parametrize("mask_gradients", [True, False])
def test_gradients_of_pruned_entries_are_zero_unless_switched_off(mask_gradients: bool):
    """Defends gradient clipping and optimizer state; methods that regrow need the gradients."""
    model = net()
    pruner = Pruner(model, Rule(0.5), mask_gradients=mask_gradients)
    pruner.prepare(inplace=True)
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    assert bool(model[3].weight.grad[~pruner.masks["3.weight"]].any()) is not mask_gradients


def test_a_pruned_inf_becomes_zero_in_place_too():
    """Defends law 8 in the adapter: no inf * 0."""
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[math.inf, -math.inf, math.inf, 1.0]]))
    Pruner(model, Rule(1.0)).prepare(inplace=True)
    assert model.weight.tolist() == [[0.0] * 4]
    assert not bool(model.weight.signbit().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_dtype_is_masked_in_place_as_purely(dtype: torch.dtype):
    """Defends the integer view of the weights, non-contiguous ones too."""
    model = nn.Linear(6, 5, bias=False).to(dtype)
    model.weight = nn.Parameter(torch.randn(6, 5).t().to(dtype))
    params = {k: v.detach().clone() for k, v in model.named_parameters()}
    expected = apply_masks(params, compute_masks(params, 0, Rule(0.5)))["weight"]
    Pruner(model, Rule(0.5)).prepare(inplace=True)
    assert torch.equal(model.weight, expected)


def test_finalize_returns_a_model_without_a_trace():
    """Defends the end: zeros baked in, no hook left, the same class and state names."""
    model = net()
    hooked = model[3].register_forward_pre_hook(lambda module, args: None)
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    final = pruner.finalize()
    assert final is not model
    assert [len(m._forward_pre_hooks) for m in final.modules()] == [0, 0, 0, 0, 1]
    assert final.load_state_dict(model.state_dict()) is not None
    train_step(model, torch.optim.SGD(model.parameters(), 0.1), 0)
    pruner.step()  # training goes on
    assert pruner.finalize(inplace=True) is model
    assert hooked.id in model[3]._forward_pre_hooks, "the hooks of others stay"
    assert not model._forward_pre_hooks
    model.zero_grad()
    x, y = batch(0)
    nn.functional.cross_entropy(model(x), y).backward()
    assert bool(model[3].weight.grad[model[3].weight == 0].any()), "gradients are whole again"
    for call in (pruner.step, pruner.finalize, pruner.state_dict):
        with pytest.raises(RuntimeError, match=r"after finalize\(inplace=True\)"):
            call()


def test_finalize_takes_another_model_of_the_same_names():
    """Defends averaged copies: their zeros are baked in too."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        average.module[3].weight.fill_(1.0)
    final = pruner.finalize(average.module)
    assert int((final[3].weight == 0).sum()) == 96
    with pytest.raises(ValueError, match=r"Linear without '0.weight'"):
        pruner.finalize(nn.Linear(2, 2))


def test_a_deepcopy_and_a_pickle_of_a_prepared_model_work_by_themselves():
    """Defends whole-module copies: they carry their masks and keep masking."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin[3].weight.fill_(1.0)
        twin(batch(0)[0])
        assert int((twin[3].weight == 0).sum()) == 96
        assert int((model[3].weight == 0).sum()) == 96


@pytest.mark.parametrize("fused", [False, True])
def test_a_training_with_a_fused_optimizer_is_seen(fused: bool):
    """Defends that only real mistakes warn: torch does not count a fused optimizer's writes."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, fused=fused)
    for step in range(3):
        train_step(model, optimizer, step)
        pruner.step()
    pruner.finalize()  # a warning is an error here


def test_step_before_the_optimizers_is_warned_of():
    """Defends weights that momentum leaves dense: only the next forward pass would mask them."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = Pruner(model, Rule(0.5, PolynomialDecay([2, 4, 6])))
    pruner.prepare(inplace=True)

    def run(steps: range) -> None:
        for step in steps:
            x, y = batch(step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            pruner.step()
            optimizer.step()

    run(range(3))  # the first finds nothing moved
    with pytest.warns(UserWarning, match=r"between the backward pass and optimizer\.step\(\)"):
        run(range(3, 4))
    run(range(4, 8))  # once is enough
    assert not bool((model[0].weight[~pruner.masks["0.weight"]] == 0).all())


@pytest.mark.parametrize("attached", [True, False])
def test_a_forward_pass_between_the_two_steps_is_no_reason_to_warn(attached: bool):
    """Defends validation before step(), and an attached optimizer in any order."""
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = Pruner(model, Rule(0.5), optimizer=optimizer if attached else None)
    pruner.prepare(inplace=True)
    for step in range(8):
        if attached:
            pruner.step()
        train_step(model, optimizer, step)
        if not attached:
            model(batch(step)[0])
            pruner.step()
    assert bool((model[0].weight[~pruner.masks["0.weight"]] == 0).all())


def test_lifecycle_mistakes_get_a_clear_word():
    """Defends the order of calls."""
    pruner = Pruner(net(), Rule(0.8, PolynomialDecay([0, 10])))
    for call in (pruner.step, pruner.finalize):
        with pytest.raises(RuntimeError, match=r"call pruner.prepare\(\) first"):
            call()
    pruner.prepare()
    with pytest.warns(UserWarning, match="prepared already"):
        assert pruner.prepare() is pruner.model
    with pytest.warns(UserWarning, match=r"at step 0, before the schedule's end at step 10"):
        pruner.finalize()
    for _ in range(10):
        pruner.step()
    with pytest.warns(UserWarning, match=r"called 10 times, but no pruned weight ever changed"):
        pruner.finalize()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"prepare\(inplace=True\) with optimizer"):
        Pruner(model, Rule(0.5), optimizer=optimizer).prepare()


def test_nan_stops_a_step_before_anything_changed():
    """Defends the state of pruner and model when training diverged."""
    model = net()
    pruner = Pruner(model, Rule(0.8, PolynomialDecay([1, 2])))
    pruner.prepare(inplace=True)
    with torch.no_grad():
        model[0].weight.view(-1)[3] = math.nan
    masks = {k: v.clone() for k, v in pruner.masks.items()}
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(NaNError, match=r"'0.weight'; got 1 NaN of 36"):
        pruner.step()
    assert pruner.step_count == 0
    assert all(torch.equal(masks[k], v) for k, v in pruner.masks.items())
    assert all(same_bits(weights[k], v) for k, v in model.state_dict().items())
    fresh = net()
    with torch.no_grad():
        fresh[3].weight.fill_(math.nan)
    with pytest.raises(NaNError, match=r"'3\.weight'"):
        Pruner(fresh, Rule(0.5)).prepare(inplace=True)
    assert not fresh._forward_pre_hooks
    assert bool(fresh[0].weight.all()), "nothing is half-changed"


def test_the_report_counts_zeros_now_and_says_what_is_dense():
    """Defends integers: neither masks nor signed sums stand in for the weights."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    with torch.no_grad():
        model[3].weight.fill_(1.0)
    report = pruner.report()
    assert report["3.weight"].weight.zeros == 0
    assert report["3.weight"].mask.zeros == 96
    assert report["0.weight"].weight.zeros == 18
    assert report.total.entries == 36 + 192
    assert report.skipped["3.bias"] == "the global rule is not for 'bias' of Linear"
    assert "3.weight" in str(report)
    assert report.as_dict()["parameters"]["0.weight"]["zeros"] == 18


class Custom(nn.Module):
    """A module of its own kind, with parameters of its own names."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 4))
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel @ self.weight


def zoo() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "conv1": nn.Conv1d(2, 2, 2),
            "conv2": nn.Conv2d(2, 2, 2),
            "conv3": nn.Conv3d(2, 2, 2),
            "up1": nn.ConvTranspose1d(2, 2, 2),
            "up2": nn.ConvTranspose2d(2, 2, 2),
            "up3": nn.ConvTranspose3d(2, 2, 2),
            "embed": nn.Embedding(4, 4),
            "attn": nn.MultiheadAttention(4, 2),
            "cross": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            "lstm": nn.LSTM(4, 4, num_layers=2, proj_size=2),
            "gru": nn.GRU(4, 4),
            "rnn": nn.RNN(4, 4),
            "norm": nn.BatchNorm2d(4),
            "custom": Custom(),
        }
    )


def test_the_global_rule_is_for_the_supported_parameters():
    """Defends the list: layers, attention and recurrent nets; no norms, no embeddings."""
    names = list(resolve(zoo(), Rule(0.5)).module_name_configs)
    assert names == [
        "linear.weight", "conv1.weight", "conv2.weight", "conv3.weight", "up1.weight",
        "up2.weight", "up3.weight", "attn.in_proj_weight", "attn.out_proj.weight",
        "cross.q_proj_weight", "cross.k_proj_weight", "cross.v_proj_weight",
        "cross.out_proj.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_hr_l0",
        "lstm.weight_ih_l1", "lstm.weight_hh_l1", "lstm.weight_hr_l1", "gru.weight_ih_l0",
        "gru.weight_hh_l0", "rnn.weight_ih_l0", "rnn.weight_hh_l0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (PruneConfig().set_module_type(nn.Embedding, Rule(0.5)), ["embed.weight"]),
        (PruneConfig().set_module_name("embed", Rule(0.5)), ["embed.weight"]),
        (PruneConfig().set_module_type("Custom", Rule(0.5)), ["custom.weight"]),
        (PruneConfig().set_module_name("custom.kernel", Rule(0.5)), ["custom.kernel"]),
        (
            PruneConfig().set_module_type(nn.MultiheadAttention, Rule(0.5)),
            [
                "attn.in_proj_weight", "attn.out_proj.weight", "cross.q_proj_weight",
                "cross.k_proj_weight", "cross.v_proj_weight", "cross.out_proj.weight",
            ],
        ),
        (PruneConfig().set_module_type("GRU", Rule(0.5)), ["gru.weight_ih_l0", "gru.weight_hh_l0"]),
        (PruneConfig().set_module_name("linear", Rule(0.5, param_name="bias")), ["linear.bias"]),
        (PruneConfig().set_module_name("norm", Rule(0.5)), ["norm.weight"]),
        (
            PruneConfig(Rule(0.5), {nn.Module: None, "Linear": Rule(0.6)}, {"attn": None}),
            ["linear.weight", "cross.out_proj.weight"],
        ),
    ],
)  # fmt: skip
def test_types_and_names_select_their_parameters(config, names):
    """Defends name over type over global, subclasses, custom modules and named parameters."""
    assert list(resolve(zoo(), config).module_name_configs) == names


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (PruneConfig().set_module_type("Linaer", Rule(0.5)), "Did you mean 'Linear'"),
        (PruneConfig().set_module_type(nn.Bilinear, Rule(0.5)), "'torch.nn.Bilinear' matches"),
        (PruneConfig().set_module_name("atn", Rule(0.5)), "Did you mean 'attn'"),
        (PruneConfig(), "at least one rule"),
    ],
)
def test_selectors_that_match_nothing_raise(config, says):
    """Defends against a mis-spelt layer that stays dense."""
    with pytest.raises(SelectionError, match=says):
        Pruner(zoo(), config)


def test_parameters_without_data_or_without_floats_raise():
    """Defends lazy, meta and integer parameters."""
    with pytest.raises(SelectionError, match=r"'weight' is lazy.*one forward pass"):
        Pruner(nn.LazyLinear(3), Rule(0.5))
    with pytest.raises(SelectionError, match="'weight' is on the meta device"):
        Pruner(nn.Linear(2, 2, device="meta"), Rule(0.5))
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
    with pytest.raises(SelectionError, match=r"'table' of torch.int64"):
        Pruner(model, PruneConfig().set_module_name("table", Rule(0.5)))
    assert "table" not in resolve(model, Rule(0.5)).module_name_configs
    with pytest.raises(TypeError, match=r"Expected a torch.nn.Module; got dict"):
        Pruner({}, Rule(0.5))
    with pytest.raises(ConfigError, match=r"'weight': Expected a dim"):
        Pruner(model, Rule(0.5, pattern=Channel(3)))


def test_tied_weights_are_pruned_once_under_their_first_name():
    """Defends counts of tied embeddings, selected by either name; the global rule leaves them."""
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    for config in (
        PruneConfig().set_module_type("Linear", Rule(0.5)),
        PruneConfig().set_module_name("head", Rule(0.5)),
    ):
        pruner = Pruner(model, config)
        assert list(pruner.resolved_config.module_name_configs) == ["embed.weight"]
    with pytest.raises(SelectionError, match=r"the global rule is not for 'weight' of Embedding"):
        Pruner(model, Rule(0.5))
    split = PruneConfig().set_module_name("head", Rule(0.5)).set_module_name("embed", Rule(0.6))
    with pytest.raises(SelectionError, match=r"tied .* 'embed\.weight' and 'head\.weight'"):
        Pruner(model, split)


def test_attention_and_recurrent_nets_train_pruned():
    """Defends modules that read their weights without calling the owner, or flatten them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "lstm": nn.LSTM(8, 8)})
    pruner = Pruner(model, Rule(0.5, PolynomialDecay([1, 2])))
    pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.randn(3, 2, 8)
        out, _ = model["lstm"](model["attn"](x, x, x)[0])
        out.square().sum().backward()
        optimizer.step()
        pruner.step()
    with torch.no_grad():
        model["attn"].out_proj.weight.fill_(1.0)
    model["attn"](x, x, x)
    assert int((model["attn"].out_proj.weight == 0).sum()) == 32
    assert all(row.weight.zeros == row.weight.entries // 2 for row in pruner.report().rows)


def test_the_prepared_model_compiles_whole_and_new_masks_do_not_recompile():
    """Defends torch.compile(fullgraph=True): the hook steps aside, weights are masked by step()."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = net()
    pruner = Pruner(model, Rule(0.8, PolynomialDecay([1, 2, 3])))
    pruner.prepare(inplace=True)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        pruner.step()
    assert counter.frame_count == 1
    assert pruner.report().total.zeros == math.floor(36 * 0.8) + math.floor(192 * 0.8)


def test_several_pruners_share_a_model():
    """Defends hooks by pruner: finalizing one leaves the other's masks on."""
    model = net()
    first = Pruner(model, PruneConfig().set_module_name("0", Rule(0.5, pattern=Kernel())))
    second = Pruner(model, PruneConfig().set_module_name("3", Rule(0.5, pattern=Unstructured())))
    first.prepare(inplace=True)
    second.prepare(inplace=True)
    first.finalize(inplace=True)
    with torch.no_grad():
        model[3].weight.fill_(1.0)
        model[0].weight.fill_(1.0)
    model(batch(0)[0])
    assert int((model[3].weight == 0).sum()) == 96
    assert int((model[0].weight == 0).sum()) == 0


def test_a_parameter_that_is_replaced_or_thawed_is_hooked_again():
    """Defends gradients after load_state_dict(assign=True), and of layers frozen at first."""
    model = net()
    model[3].weight.requires_grad_(False)
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    model[3].weight.requires_grad_(True)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.zero_grad()
        x, y = batch(0)
        twin(x)  # any forward pass or step() finds the new parameter
        nn.functional.cross_entropy(twin(x), y).backward()
        for name in ("0.weight", "3.weight"):
            grad = twin.get_parameter(name).grad
            assert not bool(grad[~pruner.masks[name]].any()), name
            assert bool(grad.any())


def test_a_pruner_with_its_optimizer_survives_a_pickle():
    """Defends whole-object checkpoints: the copy trains on to the same bits."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = Pruner(model, Rule(0.8, SCHEDULE), optimizer=optimizer)
    pruner.prepare(inplace=True)
    for step in range(1, 3):
        train_step(model, optimizer, step)
        pruner.step()
    twin, its_optimizer, its_pruner = pickle.loads(pickle.dumps((model, optimizer, pruner)))
    for step in range(3, 8):
        for m, o, p in ((model, optimizer, pruner), (twin, its_optimizer, its_pruner)):
            o.zero_grad()
            x, y = batch(step)
            nn.functional.cross_entropy(m(x), y).backward()
            torch.nn.utils.clip_grad_norm_(m.parameters(), 0.1)
            o.step()
            p.step()
    for mine, its in zip(model.parameters(), twin.parameters(), strict=True):
        assert same_bits(mine, its)


def test_functional_calls_of_a_prepared_model_leave_the_callers_tensors_alone():
    """Defends torch.func on a prepared model: only its own parameters are written to."""
    model = net()
    Pruner(model, Rule(0.5)).prepare(inplace=True)
    params = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    functional_call(model, params, batch(0)[0])
    assert all(bool(p.all()) for p in params.values())
    torch.func.grad(lambda p: functional_call(model, p, batch(0)[0]).sum())(params)


def test_tied_weights_are_masked_by_either_module_and_none_by_name_holds():
    """Defends a head that is called by itself, and an exception by one of two names."""
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    by_type = PruneConfig().set_module_type("Linear", Rule(0.5))
    Pruner(model, by_type).prepare(inplace=True)
    with torch.no_grad():
        model["head"].weight.fill_(1.0)
    model["head"](torch.ones(1, 4))
    assert int((model["head"].weight == 0).sum()) == 12
    dense = PruneConfig(Rule(0.5)).set_module_name("embed", None)
    with pytest.raises(SelectionError, match=r"embed.weight: 'embed' is set to None"):
        resolve(model, dense)


def test_float8_and_expanded_parameters_are_pruned_or_refused_by_name():
    """Defends rare tensors: nothing fails after hooks were installed."""
    model = nn.Linear(4, 4, bias=False)
    model.weight = nn.Parameter(torch.randn(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    for pattern in (Unstructured(), Channel()):
        Pruner(model, Rule(0.5, pattern=pattern)).prepare()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    pruner.finalize(inplace=True)
    assert int((model.weight.float() == 0).sum()) >= 8
    model.weight = nn.Parameter(torch.ones(1, 4).expand(4, 4))
    with pytest.raises(SelectionError, match="'weight' is an expanded view"):
        Pruner(model, Rule(0.5))


def test_an_optimizer_of_another_model_is_refused():
    """Defends against training a copy that is not pruned."""
    with pytest.raises(ValueError, match=r"does not hold '0.weight'"):
        Pruner(net(), Rule(0.5), optimizer=torch.optim.SGD(net().parameters(), 0.1))


def test_finalize_checks_shapes_and_numbers_before_it_writes():
    """Defends a model that is half finalized, and NaN that came after the last update."""
    model = net()
    pruner = Pruner(model, Rule(0.5))
    pruner.prepare(inplace=True)
    other = net()
    other[3] = nn.Linear(32, 3)
    with pytest.raises(ValueError, match=r"'3.weight' of shape \(3, 64\); got \(3, 32\)"):
        pruner.finalize(other, inplace=True)
    assert bool(other[0].weight.all())
    with pytest.raises(ValueError, match=r"pass its \.module"):
        pruner.finalize(torch.optim.swa_utils.AveragedModel(model))
    with torch.no_grad():
        model[3].weight[~pruner.masks["3.weight"]] = math.nan
    with pytest.raises(NaNError, match=r"'3.weight'; got 96 NaN"):
        pruner.finalize()


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ("*", ["0.weight", "2.weight"]),
        ("*.weight", ["0.weight", "2.weight"]),
        ("1", ["1.weight"]),
        ("0.bias", ["0.bias"]),
    ],
)
def test_globs_take_no_biases_and_no_norms(selector: str, names: list[str]):
    """Defends layer norms and biases under "layers.*"; by their exact name they can be had."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    config = PruneConfig().set_module_name(selector, Rule(0.5))
    assert list(resolve(model, config).module_name_configs) == names


def test_models_without_anything_to_prune_say_why():
    """Defends the reason: the config has a rule, but nothing that it is for."""
    with pytest.raises(SelectionError, match=r"the global rule is not for 'weight' of Embedding"):
        Pruner(nn.Embedding(4, 4), Rule(0.5))
    wrapped = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    with pytest.raises(SelectionError, match=r"'weight' is computed from"):
        Pruner(wrapped, Rule(0.5))
    with pytest.raises(SelectionError, match=r"'BatchNorm2d' matches nothing\. It is there"):
        Pruner(nn.BatchNorm2d(4), PruneConfig().set_module_type("BatchNorm2d", Rule(0.5)))
