"""The pruner's state: formats that carry it, damage that is refused, and masks that are given."""

from __future__ import annotations

import builtins
import copy
import io
import math
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.stateful import Stateful

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    NaNError,
    Pattern,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    SelectionError,
    apply_masks,
    compute_masks,
    infer_masks,
    unpack_masks,
)
from purprune_adapters import Pruner, assert_sparse, load_pruner, resolve, save_pruner

# DCP warns of a single process, which is meant here, and in torch 2.7 of its own storage calls.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
SCHEDULE = PolynomialDecay([0, 2, 4])
CONFIG = (
    PruneConfig()
    .set_module_name("0", Rule(0.8, SCHEDULE, 0.4))
    .set_module_name("3", Rule(0.5, SCHEDULE, 0.25, Block((1, 4))))
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def sparse_net() -> nn.Module:
    pruner = Pruner(net(), Rule(0.6))
    pruner.prepare(inplace=True)
    return pruner.finalize(inplace=True)


def loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(x), torch.arange(8) % 3)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        pruner.step()


def trained(steps: int = 3, **more: object) -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
    model = net()
    pruner = Pruner(model, CONFIG, **more)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    train(model, optimizer, pruner, range(steps))
    return model, optimizer, pruner


def bits(pruner: Pruner) -> list[bytes]:
    """Return all that may not change: weights, masks in force and given, and the step."""
    held = pruner.state_dict(packed=True)
    tensors = [*pruner.model.state_dict().values(), *held["masks"].values()]
    tensors += held["floor"].values()
    return [t.clone().numpy().tobytes() for t in tensors] + [repr(held["step"]).encode()]


def through_torch(pruner: Pruner, packed: bool) -> dict[str, object]:
    file = io.BytesIO()
    torch.save(pruner.state_dict(packed=packed), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["torch", "torch, packed", "safetensors", "dcp"])
@pytest.mark.parametrize("when", ["before prepare", "after prepare"])
@pytest.mark.parametrize("given", [{}, {"keep_zeros": True}], ids=["", "keep_zeros"])
def test_every_format_resumes_to_the_bits_of_the_run_that_never_stopped(
    way: str, when: str, given: dict[str, bool], tmp_path: Path
):
    """Defends law 10 in all formats, loaded into a new pruner or one that counted elsewhere."""
    model, optimizer, pruner = trained(**given)
    weights, momenta = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    state = None
    if way == "safetensors":
        pytest.importorskip("safetensors")
        save_pruner(pruner, tmp_path / "pruner.safetensors")
    elif way == "dcp":
        dcp.save({"model": model.state_dict(), "pruner": pruner}, checkpoint_id=tmp_path)
    else:
        state = through_torch(pruner, packed=way != "torch")
    train(model, optimizer, pruner, range(3, 7))

    again = net(seed=1)
    resumed = Pruner(again, CONFIG, **given)
    if when == "after prepare":
        resumed.prepare(inplace=True)
        resumed.step()
    if way == "safetensors":
        again.load_state_dict(weights)
        load_pruner(resumed, tmp_path / "pruner.safetensors")
    elif way == "dcp":
        found = {"model": again.state_dict(), "pruner": resumed}
        dcp.load(found, checkpoint_id=tmp_path)
        again.load_state_dict(found["model"])
    else:
        again.load_state_dict(weights)
        resumed.load_state_dict(state)
    if when == "before prepare":
        resumed.prepare(inplace=True)
    restarted = torch.optim.Adam(again.parameters(), 0.01)
    restarted.load_state_dict(momenta)
    train(again, restarted, resumed, range(3, 7))
    assert bits(resumed) == bits(pruner)
    assert resumed.report() == pruner.report()


def test_a_packed_state_has_one_bit_per_entry():
    """Defends the size of checkpoints: ceil(n / 8) bytes for each mask."""
    _, _, pruner = trained()
    packed, plain = pruner.state_dict(packed=True), pruner.state_dict()
    for name, mask in plain["masks"].items():
        assert packed["masks"][f"{name}.bits"].nbytes == math.ceil(mask.nbytes / 8)
    assert {name: mask.nbytes for name, mask in plain["masks"].items()} == {
        "0.weight": 36,
        "3.weight": 192,
    }


def test_the_state_is_a_copy_and_dcp_knows_the_pruner():
    """Defends the pruner against a checkpoint that loads in place into what state_dict returns."""
    _, _, pruner = trained()
    assert isinstance(pruner, Stateful)
    before = bits(pruner)
    for part in pruner.state_dict()["masks"].values():
        part.fill_(False)
    assert bits(pruner) == before


def test_the_state_of_a_new_pruner_keeps_everything_and_takes_nothing():
    """Defends state_dict() before prepare: shapes to load into, and no masks to train with."""
    new = Pruner(net(), CONFIG)
    state = new.state_dict()
    assert state["step"] == 0
    assert state["prepared"] is False
    assert all(bool(mask.all()) for mask in state["masks"].values())
    again = Pruner(net(), CONFIG)
    again.load_state_dict(state)
    again.prepare(inplace=True)
    new.prepare(inplace=True)
    assert bits(again) == bits(new)
    with pytest.raises(ValueError, match="state of a prepared pruner; got one of a new pruner"):
        again.load_state_dict(state)
    _, _, pruner = trained()
    loaded = Pruner(net(), CONFIG)
    loaded.load_state_dict(pruner.state_dict())
    assert loaded.state_dict()["step"] == 3, "what was loaded is saved again, prepared or not"


def test_the_flat_form_in_a_safetensors_file_is_the_documented_one(tmp_path: Path):
    """Defends other readers of the file."""
    safetensors = pytest.importorskip("safetensors.torch")
    _, _, pruner = trained(masks={"0.weight": torch.ones(4, 1, 3, 3, dtype=torch.bool)})
    save_pruner(pruner, tmp_path / "pruner.safetensors")
    tensors = safetensors.load_file(tmp_path / "pruner.safetensors")
    assert sorted(tensors) == [
        "floor.0.weight.bits",
        "floor.0.weight.shape",
        "masks.0.weight.bits",
        "masks.0.weight.shape",
        "masks.3.weight.bits",
        "masks.3.weight.shape",
    ]
    masks = unpack_masks({k.removeprefix("masks."): v for k, v in tensors.items() if k[0] == "m"})
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in masks.items())


def test_without_safetensors_the_error_names_the_extra(monkeypatch, tmp_path: Path):
    """Defends users without the extra."""
    real = builtins.__import__

    def absent(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    for call in (save_pruner, load_pruner):
        with pytest.raises(ImportError, match=r"purprune\[safetensors\]"):
            call(Pruner(net(), CONFIG), tmp_path / "p.safetensors")


def masks_of(state: dict[str, object], packed: bool) -> dict[str, Tensor]:
    return unpack_masks(state["masks"]) if packed else state["masks"]


def _swap(masks: dict[str, Tensor]) -> None:
    """Cut a unit of four without a change of the total."""
    flat = masks["3.weight"].view(-1)
    flat[int(flat.nonzero()[0])] = False
    flat[int((~flat).nonzero()[-1])] = True


DAMAGE = {
    "a key is missing": (lambda s: s.pop("step"), r"without \['step'\]"),
    "a key too much": (lambda s: s.update(x=1), r"with \['x'\] besides"),
    "another format": (lambda s: s.update(format=9), "format 1 .* got 9"),
    "a format of another type": (lambda s: s.update(format=True), "format 1 .* got True"),
    "a step below 0": (lambda s: s.update(step=-1), "step >= 0 .* got -1"),
    "a step that is NaN": (lambda s: s.update(step=math.nan), "step >= 0 .* got nan"),
    "a step that is a bool": (lambda s: s.update(step=True), "step >= 0 .* got True"),
    "another step": (lambda s: s.update(step=1), r"14 of 36 units .* at step 1.*prune 2\d"),
    "prepared is no bool": (lambda s: s.update(prepared=1), "bool as 'prepared'"),
    "packed is no bool": (lambda s: s.update(packed=None), "bool as 'packed'"),
    "packed is wrong": (lambda s: s.update(packed=True), "pair '<name>.bits'"),
    "config is no JSON": (lambda s: s.update(config="{"), "JSON as the config"),
    "config is too deep": (lambda s: s.update(config="[" * 100_000), "JSON as the config"),
    "config is no text": (lambda s: s.update(config=None), "JSON as the config"),
    "config has NaN": (lambda s: s.update(config="NaN"), r"these differ \(saved, now\): config"),
    "masks are none": (lambda s: s.update(masks=None), "masks by name; got NoneType"),
    "a mask is missing": (lambda s: s["masks"].pop("3.weight"), r"missing \['3.weight'\]"),
    "a mask of nothing": (lambda s: s["masks"].update(x=torch.ones(1)), r"not in it \['x'\]"),
    "a mask of floats": (lambda s: s["masks"].update({"3.weight": torch.ones(3, 64)}), "bool mask"),
    "a mask without data": (
        lambda s: s["masks"].update({"3.weight": s["masks"]["3.weight"].to("meta")}),
        "bool mask for '3.weight'",
    ),
    "a mask of another shape": (
        lambda s: s["masks"].update({"3.weight": torch.ones(2, 2).bool()}),
        r"shape \(3, 64\) for '3.weight'; the state has \(2, 2\)",
    ),
    "a mask that keeps all": (
        lambda s: s["masks"]["0.weight"].fill_(True),
        r"of 36 units pruned in '0.weight' at step 3.*prune 0",
    ),
    "a flipped entry": (
        lambda s: s["masks"]["0.weight"].view(-1)[7].logical_not_(),
        "of 36 units pruned in '0.weight'",
    ),
    "a unit that is cut": (lambda s: _swap(s["masks"]), r"'3.weight'\] to prune whole units"),
    "a floor by another name": (
        lambda s: s["floor"].update({"0.weight": torch.ones(4, 1, 3, 3).bool()}),
        r"of \[\]; got them of \['0.weight'\]",
    ),
}


@pytest.mark.parametrize("prepared", [False, True], ids=["new", "prepared"])
@pytest.mark.parametrize(("change", "says"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_state_raises_one_line_and_changes_nothing(change, says, prepared: bool):
    """Defends model bits, masks and step against a damaged checkpoint."""
    _, _, saved = trained()
    state = saved.state_dict()
    change(state)
    pruner = Pruner(net(seed=1), CONFIG)
    if prepared:
        pruner.prepare(inplace=True)
    before = bits(pruner)
    with pytest.raises(ValueError, match=says) as caught:
        pruner.load_state_dict(state)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert bits(pruner) == before
    assert pruner.state_dict()["prepared"] is prepared


def test_every_flipped_bit_of_a_packed_state_is_found():
    """Defends against one flipped bit anywhere in the masks, by counts and whole units."""
    _, _, saved = trained()
    pruner = Pruner(net(), CONFIG)
    before = bits(pruner)
    for name, n in (("0.weight", 36), ("3.weight", 192)):
        for i in range(8 * math.ceil(n / 8)):
            state = saved.state_dict(packed=True)
            state["masks"][f"{name}.bits"][i // 8] ^= 1 << i % 8
            with pytest.raises(ValueError, match=f"'{name}'"):
                pruner.load_state_dict(state)
    assert bits(pruner) == before


def test_a_state_of_another_config_or_another_model_names_the_difference():
    """Defends against a schedule that goes on from another one's step."""
    saved = Pruner(net(), Rule(0.5))
    saved.prepare()
    state = saved.state_dict()
    with pytest.raises(ValueError, match=r"config.global_config.target_sparsity \(0.5, 0.6\)"):
        Pruner(net(), Rule(0.6)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"config.module_name_configs.0 \(none, .* \.\.\.\)"):
        Pruner(net(), CONFIG).load_state_dict(state)
    wide = net()
    wide[3] = nn.Linear(32, 3)
    with pytest.raises(ValueError, match=r"shape \(3, 32\) for '3\.weight'; .* \(3, 64\)"):
        Pruner(wide, Rule(0.5)).load_state_dict(state)
    shallow = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"missing \['1.weight'\], not in it \['3.weight'\]"):
        Pruner(shallow, Rule(0.5)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"keys format, .*; got Linear"):
        Pruner(net(), Rule(0.5)).load_state_dict(nn.Linear(1, 1))


def test_a_truncated_or_tampered_safetensors_file_raises_one_line_and_changes_nothing(
    tmp_path: Path,
):
    """Defends against every length that a killed writer leaves, and every flipped byte."""
    safetensors = pytest.importorskip("safetensors.torch")
    _, _, saved = trained()
    path = tmp_path / "pruner.safetensors"
    save_pruner(saved, path)
    whole = path.read_bytes()
    pruner = Pruner(net(seed=1), CONFIG)
    pruner.prepare(inplace=True)
    before = bits(pruner)
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1 :] for i in range(len(whole))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r".") as caught:
            load_pruner(pruner, path)
        assert "\n" not in str(caught.value)
        assert bits(pruner) == before
    path.write_bytes(whole)
    safetensors.save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="a file of save_pruner in"):
        load_pruner(pruner, tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        load_pruner(pruner, tmp_path / "none.safetensors")


def test_wrong_arguments_of_the_file_functions_raise_one_line_and_write_nothing(tmp_path: Path):
    """Defends against arguments that were swapped, and places where no file can be."""
    pytest.importorskip("safetensors")
    _, _, pruner = trained()
    path = tmp_path / "pruner.safetensors"
    cases: list[tuple[Any, tuple[Any, ...], type[Exception], str]] = [
        (save_pruner, (str(path), pruner), TypeError, "save_pruner(pruner, filename); got str and"),
        (load_pruner, (path, pruner), TypeError, "load_pruner(pruner, filename); got PosixPath"),
        (save_pruner, (net(), path), TypeError, "and PosixPath. The Pruner comes first"),
        (save_pruner, (pruner, tmp_path / "no" / "p"), FileNotFoundError, "Make it first"),
        (save_pruner, (pruner, tmp_path), OSError, "that can be written at"),
    ]
    for call, arguments, error, says in cases:
        with pytest.raises(error, match=re.escape(says)) as caught:
            call(*arguments)
        assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_a_dcp_checkpoint_that_does_not_fit_changes_nothing(tmp_path: Path):
    """Defends a pruner whose given masks, shapes or config are not those of the checkpoint."""
    _, _, saved = trained(keep_zeros=True)
    dcp.save({"pruner": saved}, checkpoint_id=tmp_path / "kept")
    _, _, plain = trained()
    dcp.save({"pruner": plain}, checkpoint_id=tmp_path / "plain")
    cases = [
        (Pruner(net(), CONFIG), "kept", ValueError, "with masks= or keep_zeros= as that one"),
        (Pruner(net(), CONFIG, keep_zeros=True), "plain", CheckpointException, "Missing key"),
        (Pruner(net(), CONFIG.set_global(Rule(0.1))), "plain", ValueError, "config.global_config"),
    ]
    for pruner, name, error, says in cases:
        before = bits(pruner)
        with pytest.raises((error, RuntimeError), match=says):
            dcp.load({"pruner": pruner}, checkpoint_id=tmp_path / name)
        assert bits(pruner) == before


def test_loading_after_finalize_is_refused_and_nothing_is_taken():
    """Defends a pruner that has ended."""
    _, _, pruner = trained(5)
    state = pruner.state_dict()
    pruner.finalize(inplace=True)
    for call in (lambda: pruner.load_state_dict(state), pruner.state_dict):
        with pytest.raises(RuntimeError, match=r"after finalize\(inplace=True\)"):
            call()
    assert pruner.step_count == 5


PATTERNS = {
    "unstructured": Rule(0.8, SCHEDULE),
    "rows from 40 %": Rule(0.8, SCHEDULE, 0.4, pattern=Pattern(group={"kind": "row", "dim": 0})),
    "random": Rule(0.7, SCHEDULE, score=Random(1)),
    "falling": Rule(0.1, SCHEDULE, 0.8, score=Random(1)),
    "2:4": Rule(schedule=SCHEDULE, pattern=NM(2, 4)),
    "nothing more": Rule(0.0),
}


@pytest.mark.parametrize("rule", PATTERNS.values(), ids=PATTERNS)
def test_law_9_with_masks_given_steps_are_the_pure_fold_with_a_floor(rule: Rule):
    """Defends a model that was pruned before: its zeros stay, whatever the schedule starts at."""
    model, twin = net(), net()
    floor = {"3.weight": torch.rand(3, 64, generator=torch.Generator().manual_seed(5)) > 0.45}
    config = resolve(model, rule)
    pruner = Pruner(model, rule, masks=floor)
    pruner.prepare(inplace=True)
    params = dict(twin.named_parameters())
    optimizers = [torch.optim.AdamW(m.parameters(), 0.01) for m in (model, twin)]
    masks: dict[str, Tensor] = {}
    for step in range(7):
        if step:
            train(model, optimizers[0], pruner, range(step, step + 1))
            loss(twin, step).backward()
            for name, mask in masks.items():
                params[name].grad.masked_fill_(~mask, 0)
            optimizers[1].step()
            optimizers[1].zero_grad()
        masks = compute_masks(params, step, config, prev=masks, floor=floor)
        for name, new in apply_masks(params, masks).items():
            params[name].data.copy_(new.detach())
        for name, param in model.named_parameters():
            assert torch.equal(param, params[name]), (step, name)
        assert all(torch.equal(pruner.masks[name], mask) for name, mask in masks.items())
        assert_sparse(model, floor)


def test_keep_zeros_is_a_floor_of_the_zeros_at_prepare():
    """Defends pruning further from sparse weights, loaded after the pruner was made."""
    first = sparse_net()
    model = net()
    pruner = Pruner(model, Rule(0.9, SCHEDULE), keep_zeros=True)
    model.load_state_dict(first.state_dict())
    pruner.prepare(inplace=True)
    inferred = infer_masks(dict(first.named_parameters()))
    assert all(torch.equal(pruner.masks[name], mask) for name, mask in inferred.items())
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    for step in range(6):
        train(model, optimizer, pruner, range(step, step + 1))
        assert_sparse(model, inferred)
    assert pruner.report()["3.weight"].mask.zeros == math.floor(192 * 0.9)
    named = Pruner(first, Rule(0.9, SCHEDULE), masks=inferred)
    named.prepare(inplace=True)
    assert all(torch.equal(named.masks[name], mask) for name, mask in inferred.items())


def test_without_keep_zeros_a_schedule_that_starts_at_zero_lets_zeros_come_back():
    """Defends the difference: masks are not guessed from weights."""
    model = sparse_net()
    pruner = Pruner(model, Rule(0.9, SCHEDULE))
    pruner.prepare(inplace=True)
    assert all(bool(mask.all()) for mask in pruner.masks.values())


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"masks": {"1.weight": torch.ones(1).bool()}}, SelectionError, r"got '1.weight'\. Did"),
        ({"masks": {"3.weight": torch.ones(3, 64)}}, TypeError, "bool mask for '3.weight'"),
        ({"masks": {"3.weight": None}}, TypeError, "bool mask for '3.weight'; got NoneType"),
        ({"masks": {"3.weight": torch.ones(2).bool()}}, ValueError, r"shape \(3, 64\)"),
        ({"masks": {"3.weight": torch.eye(3, 64).bool()}}, ConfigError, "whole units"),
        ({"masks": [1]}, TypeError, "masks as a dict by name; got list"),
        ({"masks": {}, "keep_zeros": True}, ValueError, "masks or keep_zeros=True; got both"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused_when_the_pruner_is_made(more, error, says):
    """Defends the model: nothing is changed by masks of another pattern or model."""
    with pytest.raises(error, match=says):
        Pruner(net(), CONFIG, **more)


def test_zeros_that_cut_units_and_nan_stop_prepare_before_it_changes_anything():
    """Defends keep_zeros with blocks on weights that were pruned entry by entry."""
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0] = 0
    pruner = Pruner(model, Rule(0.5, pattern=Channel()), keep_zeros=True)
    before = bits(pruner)
    with pytest.raises(ConfigError, match=r"masks\['3.weight'\] to prune whole units"):
        pruner.prepare(inplace=True)
    assert bits(pruner) == before
    with torch.no_grad():
        model[3].weight[0, 0] = math.nan
    with pytest.raises(NaNError, match=r"'3\.weight'"):
        pruner.prepare(inplace=True)
    assert pruner.state_dict()["prepared"] is False
    assert not model._forward_pre_hooks


@given(st.integers(0, 6), st.booleans())
def test_given_masks_are_copied_and_come_back_with_the_state(steps: int, packed: bool):
    """Defends the floor across a resume, in a pruner that was given none or others."""
    floor = {"3.weight": torch.ones(3, 64, dtype=torch.bool)}
    floor["3.weight"][1] = False
    pruner = Pruner(net(), CONFIG, masks=floor)
    floor["3.weight"].fill_(True)
    model = pruner.prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, pruner, range(steps))
    state = through_torch(pruner, packed)
    for more in ({}, {"keep_zeros": True}, {"masks": floor}):
        again = net()
        again.load_state_dict(model.state_dict())
        resumed = Pruner(again, CONFIG, **more)
        resumed.load_state_dict(state)
        resumed.prepare(inplace=True)
        assert bits(resumed) == bits(pruner)
        assert not bool(resumed.masks["3.weight"][1].any())


def test_assert_sparse_names_the_parameter_and_the_number():
    """Defends the assertion: -0.0 is zero, NaN is not, and every parameter is named."""
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    masks = {"0.weight": torch.zeros(2, 4).bool(), "1.weight": torch.zeros(2, 2).bool()}
    with pytest.raises(TypeError, match=r"dict of names to bool tensors; got float\."):
        assert_sparse(model, 0.5)
    with pytest.raises(AssertionError, match=r"8 of 8 not zero in '0\.weight', 4 of 4 .* '1\."):
        assert_sparse(model, masks)
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
        model[1].weight.copy_(torch.tensor([[0.0, math.nan], [0.0, math.inf]]))
    with pytest.raises(AssertionError, match=r"got 2 of 4 not zero in '1.weight'\.$"):
        assert_sparse(dict(model.named_parameters()), masks)
    masks["1.weight"] = torch.tensor([[False, True], [False, True]])
    assert_sparse(model, masks)
    with pytest.raises(KeyError, match=r"'2\.weight'.*Did you mean"):
        assert_sparse(model, {"2.weight": masks["1.weight"]})
    with pytest.raises(ValueError, match=r"shape \(2, 4\) for '0.weight'"):
        assert_sparse(model, {"0.weight": masks["1.weight"]})


def torch_saved(masks: object) -> Any:
    file = io.BytesIO()
    torch.save({"masks": masks}, file)
    file.seek(0)
    return torch.load(file, weights_only=True)["masks"]


@pytest.mark.parametrize(
    "copied", [lambda masks: pickle.loads(pickle.dumps(masks)), copy.deepcopy, torch_saved]
)
def test_the_masks_in_force_are_copied_and_saved(copied):
    """Defends masks in checkpoints and other processes: a view of the pruner's own is no value."""
    _, _, pruner = trained(3)
    again = copied(pruner.masks)
    assert list(again) == list(pruner.masks) == ["0.weight", "3.weight"]
    for name, mask in pruner.masks.items():
        assert torch.equal(again[name], mask)
        again[name].fill_(False)
        assert bool(mask.any())


def test_masks_that_were_asked_for_stay_and_cannot_be_set():
    """Defends a pruner against other masks behind its back, and what was asked for before."""
    model, optimizer, pruner = trained(1)
    masks = pruner.masks
    before = {name: mask.clone() for name, mask in masks.items()}
    train(model, optimizer, pruner, range(1, 4))
    assert not torch.equal(pruner.masks["0.weight"], before["0.weight"])
    assert all(torch.equal(masks[name], mask) for name, mask in before.items())
    for change in (lambda: masks.update(before), lambda: masks.pop("0.weight")):
        with pytest.raises(TypeError, match="stays as it is"):
            change()
    assert Pruner(net(), CONFIG).masks == {}
