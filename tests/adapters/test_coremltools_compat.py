"""The drop-in for coremltools' magnitude pruner, side by side with the original."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import itertools
import math
import pickle
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import purprune_adapters.coremltools_compat as ours
from purprune import (
    Channel,
    ConfigError,
    NaNError,
    PruneConfig,
    Rule,
    SelectionError,
    compute_masks,
)
from purprune_adapters import Pruner


@pytest.fixture(scope="module")
def ct() -> Iterator[ModuleType]:
    """coremltools, imported without its log lines."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield pytest.importorskip("coremltools")


@pytest.fixture(scope="module")
def theirs(ct: ModuleType) -> ModuleType:
    """coremltools.optimize.torch.pruning."""
    return pytest.importorskip("coremltools.optimize.torch.pruning")


def sequential(layer: nn.Module, seed: int = 1) -> nn.Module:
    """Put a layer with random normal weights into a model: no ties, in float32 norms neither."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in layer.parameters():
            param.copy_(torch.randn(param.shape, generator=generator))
    return nn.Sequential(OrderedDict(layer=layer))


def start(api: ModuleType, model: nn.Module, **keys: Any) -> Any:
    """Prepare a copy of the model with the pruner of one of the two libraries."""
    scheduler = keys.pop("scheduler", lambda api: api.ConstantSparsityScheduler(0))(api)
    config = api.ModuleMagnitudePrunerConfig(scheduler=scheduler, **keys)
    pruner = api.MagnitudePruner(
        copy.deepcopy(model), api.MagnitudePrunerConfig(global_config=config)
    )
    pruner.prepared = pruner.prepare(inplace=True)
    return pruner


def their_mask(pruner: Any) -> Tensor:
    layer = pruner.prepared.layer
    mask: Tensor = (layer.weight_mask != 0).expand(layer.weight_orig.shape)
    return mask


def our_mask(pruner: Any) -> Tensor:
    mask: Tensor = pruner.pruner.masks["layer.weight"]
    return mask


def in_both(
    theirs: ModuleType, model: nn.Module, steps: int = 1, **keys: Any
) -> tuple[Tensor, Tensor]:
    """Return coremltools' mask and ours after so many steps."""
    pair = start(theirs, model, **keys), start(ours, model, **keys)
    for _, pruner in itertools.product(range(steps), pair):
        pruner.step()
    return their_mask(pair[0]), our_mask(pair[1])


def zeros(mask: Tensor) -> int:
    return int((~mask).sum())


# ------------------------------------------------------------------ the same keys in PruneConfig


class Encoded(nn.Module):
    """An encoder of two layers, one with a name that begins alike, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.enc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8)


def pruned_by_keys(theirs: ModuleType, **names: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Return how many of 64 entries go in each layer: in coremltools, and by PruneConfig."""
    keys = {name: {"scheduler": {"update_steps": [0, 1]}, **given} for name, given in names.items()}
    torch.manual_seed(0)
    model = Encoded()
    their_pruner = theirs.MagnitudePruner(
        copy.deepcopy(model), theirs.MagnitudePrunerConfig.from_dict({"module_name_configs": keys})
    )
    their_pruner.prepare(inplace=True)
    their_pruner.step()
    there = their_pruner.finalize(inplace=True)
    pruner = Pruner(model, PruneConfig.from_dict({"module_name_configs": keys}))
    here = pruner.prepare(inplace=True)
    pruner.step()
    both = [
        [int((w == 0).sum()) for name, w in one.named_parameters() if name.endswith("weight")]
        for one in (there, here)
    ]
    return both[0], both[1]


HALF, QUARTER = {"target_sparsity": 0.5}, {"target_sparsity": 0.25}


@pytest.mark.parametrize(
    ("names", "there", "here"),
    [
        ({"head": HALF}, [0, 0, 0, 32], [0, 0, 0, 32]),
        ({"enc": HALF}, [0, 0, 0, 0], [32, 32, 0, 0]),
        ({"enc.*": HALF}, [32, 32, 32, 0], [32, 32, 0, 0]),
        ({"enc.*": QUARTER, "enc.0": HALF}, [16, 16, 16, 0], [32, 16, 0, 0]),
        ({"enc.0*": QUARTER, "enc.*": HALF}, [16, 32, 16, 0], [32, 32, 0, 0]),
    ],
    ids=["exact", "container", "glob", "nearer", "later"],
)
def test_known_difference_names_of_a_prune_config_are_globs(
    theirs: ModuleType, names: dict[str, Any], there: list[int], here: list[int]
) -> None:
    """Regular expressions there, of which the first counts; globs here, and a nearer name."""
    assert pruned_by_keys(theirs, **names) == (there, here)


def test_known_difference_per_channel_in_a_prune_config_prunes_rows_of_a_linear(
    theirs: ModuleType,
) -> None:
    """Single entries there and in the compat layer; whole rows by PruneConfig."""
    keys = {"target_sparsity": 0.5, "granularity": "per_channel"}
    layer = sequential(nn.Linear(8, 8))
    expected, _ = in_both(theirs, layer, **keys)
    pruner = Pruner(layer, PruneConfig.from_dict({"global_config": keys}))
    pruner.prepare(inplace=True)
    rows = [int((~mask.any(dim=1)).sum()) for mask in (expected, *pruner.masks.values())]
    assert rows == [0, 4]


# ------------------------------------------------------------------ the same masks, step by step

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(48, 16),
    "conv1d": lambda: nn.Conv1d(16, 48, 3),
    "conv2d": lambda: nn.Conv2d(16, 16, 3),
    "conv3d": lambda: nn.Conv3d(16, 16, (1, 2, 2)),
}
UNITS: dict[str, dict[str, Any]] = {
    "per_scalar": {},
    "per_kernel": {"granularity": "per_kernel"},
    "per_channel": {"granularity": "per_channel"},
    "per_scalar in blocks of 4": {"block_size": 4},
    "per_kernel in blocks of 2": {"granularity": "per_kernel", "block_size": 2},
    "per_channel in blocks of 2": {"granularity": "per_channel", "block_size": 2},
}
RATIOS = [(1, 2), (2, 4), (1, 3), (3, 4), (5, 8), (7, 8), (12, 16), (0, 4)]
SCHEDULERS: dict[str, Callable[[ModuleType], Any]] = {
    "constant": lambda api: api.ConstantSparsityScheduler(begin_step=0),
    "constant from 3": lambda api: api.ConstantSparsityScheduler(3),
    "polynomial from 0": lambda api: api.PolynomialDecayScheduler([0, 1, 3, 4, 6]),
    "polynomial as text": lambda api: api.PolynomialDecayScheduler("range(2, 7, 2)", power=2),
    "single update": lambda api: api.PolynomialDecayScheduler(update_steps=[2], power=1),
    "subclass": lambda api: _halving(api),
}
SPARSITIES = [(0.0, 0.31), (0.0, 0.57), (0.13, 0.77), (0.0, 0.93), (0.0, 0.0), (0.0, 1.0)]
STEPS = 7


def _halving(api: ModuleType) -> Any:
    """Write a scheduler of one's own for either library: half of the way at every second step."""
    path = "purprune_adapters.coremltools_compat" if api is ours else api.__name__
    base: Any = importlib.import_module(f"{path}.pruning_scheduler").PruningScheduler

    class Halving(base):  # type: ignore[misc]
        def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
            if step_count % 2:
                return prev_sparsity
            return prev_sparsity + (config.target_sparsity - prev_sparsity) / 2

    return Halving()


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_masks_equal_those_of_coremltools_at_every_step(
    theirs: ModuleType, layer: str, unit: str
) -> None:
    """Defends the drop-in. The sparsities are such that float32 counts right in coremltools."""
    model, keys = sequential(LAYERS[layer]()), UNITS[unit]
    counts = set()
    for scheduler, (initial, target) in itertools.product(SCHEDULERS, SPARSITIES):
        given = {"scheduler": SCHEDULERS[scheduler], "target_sparsity": target, **keys}
        given["initial_sparsity"] = initial
        original, pruner = start(theirs, model, **given), start(ours, model, **given)
        for step in range(STEPS):
            assert torch.equal(our_mask(pruner), their_mask(original)), (scheduler, target, step)
            counts.add(zeros(our_mask(pruner)))
            original.step()
            pruner.step()
    assert len(counts) >= 5, "the comparison has lost its cases"


@pytest.mark.parametrize("ratio", RATIOS, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("layer", LAYERS)
def test_n_m_masks_equal_those_of_coremltools_at_every_step(
    theirs: ModuleType, layer: str, dim: int, ratio: tuple[int, int]
) -> None:
    """Defends n:m along inputs and outputs, once floor(m * sparsity) has reached 1."""
    model = sequential(LAYERS[layer]())
    if model.layer.weight.shape[dim] % ratio[1]:
        model = sequential(LAYERS["linear"]() if dim else LAYERS["conv1d"]())
    seen: Counter[str] = Counter()
    for scheduler in SCHEDULERS.values():
        given = {"scheduler": scheduler, "n_m_ratio": ratio, "dim": dim}
        original, pruner = start(theirs, model, **given), start(ours, model, **given)
        rule = pruner.pruner.resolved_config.rules["layer.weight"]
        for step in range(STEPS):
            level = original._pruner_info["layer"].sparsity_level
            there = int(level * ratio[1])
            assert there == math.floor(rule.sparsity_at(step) * ratio[1])
            if there or level == 0:
                assert torch.equal(our_mask(pruner), their_mask(original)), (scheduler, step)
                seen["equal"] += 1
            else:
                seen["not yet n:m there"] += 1
            original.step()
            pruner.step()
    assert seen["equal"] >= 20, "the comparison has lost its cases"


def small_net(outputs: int = 5) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        OrderedDict(
            layer=nn.Conv2d(3, 8, 3),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(2),
            flatten=nn.Flatten(),
            dense=nn.Linear(32, outputs),
        )
    )


@pytest.mark.parametrize(
    "keys",
    [{}, {"granularity": "per_channel"}, {"block_size": 2}, {"n_m_ratio": (2, 4), "dim": 0}],
    ids=str,
)
def test_training_with_sgd_is_the_same_up_to_the_second_update(
    theirs: ModuleType, keys: dict[str, Any]
) -> None:
    """Defends hooks and order of calls: weights, masks and losses agree under real training."""
    data = torch.Generator().manual_seed(5)
    batches = [torch.randn(16, 3, 6, 6, generator=data) for _ in range(6)]
    steps: dict[str, Any] = {"scheduler": lambda api: api.PolynomialDecayScheduler([1, 3, 7])}
    seen = {}
    for api in (theirs, ours):
        pruner = start(api, small_net(8), target_sparsity=0.53, **{**keys, **steps})
        model = pruner.prepared
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses = []
        for batch in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), torch.arange(16) % 5)
            loss.backward()
            optimizer.step()
            pruner.step()
            losses.append(loss.item())
        final = pruner.finalize(inplace=True) if api is theirs else _finalize_early(pruner)
        seen[api.__name__] = losses, final.layer.weight, final.dense.weight
    (their_losses, *their_weights), (our_losses, *our_weights) = seen.values()
    assert our_losses == pytest.approx(their_losses, rel=1e-6)
    for expected, weight in zip(their_weights, our_weights, strict=True):
        assert 0 < int((weight == 0).sum()) < weight.numel()
        assert torch.equal(weight == 0, expected == 0)
        torch.testing.assert_close(weight, expected)


def _finalize_early(pruner: Any) -> nn.Module:
    with pytest.warns(UserWarning, match="before the schedule's end at step 7"):
        final: nn.Module = pruner.finalize(inplace=True)
    return final


# --------------------------------------------------------------------------- the tutorial's code


CONVERTS = (
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*has been renamed to:UserWarning"),
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning"),
)


def converts(test: Any) -> Any:
    """Let a test trace and convert; both warn of what a user can't change."""
    for mark in CONVERTS:
        test = mark(test)
    return test


def mnist_net(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            [
                ("conv", nn.Conv2d(1, 12, 3, padding="same")),
                ("relu", nn.ReLU()),
                ("pool", nn.MaxPool2d(2, stride=2, padding=0)),
                ("flatten", nn.Flatten()),
                ("dense", nn.Linear(2352, num_classes)),
                ("softmax", nn.LogSoftmax(dim=1)),
            ]
        )
    )


@converts
def test_the_tutorial_runs_with_the_import_changed_and_both_layers_are_stored_sparse(
    ct: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defends the promise to users of the tutorial, from the config to the saved operations."""
    from purprune_adapters.coremltools_compat import (
        MagnitudePruner,
        MagnitudePrunerConfig,
        ModuleMagnitudePrunerConfig,
        PolynomialDecayScheduler,
    )

    torch.manual_seed(0)
    model = mnist_net()
    scheduler = PolynomialDecayScheduler(update_steps=list(range(0, 9, 1)))
    conv_config = ModuleMagnitudePrunerConfig(scheduler, target_sparsity=0.7)
    linear_config = ModuleMagnitudePrunerConfig(scheduler, target_sparsity=0.8)
    config = MagnitudePrunerConfig().set_module_type(torch.nn.Conv2d, conv_config)
    config = config.set_module_type(torch.nn.Linear, linear_config)
    pruner = MagnitudePruner(model, config)
    pruner.prepare(inplace=True)
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-07)
    for _ in range(9):
        optimizer.zero_grad()
        F.nll_loss(model(torch.randn(16, 1, 28, 28)), torch.randint(10, (16,))).backward()
        optimizer.step()
        pruner.step()
    model.eval()
    pruner.finalize(inplace=True)
    assert int((model.conv.weight == 0).sum()) == 75
    assert int((model.dense.weight == 0).sum()) == 18816

    example_input = torch.rand(1, 1, 28, 28)
    traced_model = torch.jit.trace(model, example_input)
    coreml_model = ct.convert(
        traced_model,
        inputs=[ct.TensorType(shape=example_input.shape)],
        pass_pipeline=ct.PassPipeline.DEFAULT_PRUNING,
        minimum_deployment_target=ct.target.iOS16,
    )
    program = coreml_model.get_spec().mlProgram.functions["main"]
    (block,) = program.block_specializations.values()
    sparse = [
        tuple(dim.constant.size for dim in op.outputs[0].type.tensorType.dimensions)
        for op in block.operations
        if op.type == "constexpr_sparse_to_dense"
    ]
    assert sorted(sparse) == [(10, 2352), (12, 1, 3, 3)]
    capfd.readouterr()


@converts
def test_the_metadata_makes_core_ml_drop_small_survivors(
    ct: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    """Defends the warning in the docs: up to 9.77e-4 counts as zero, and only with the metadata."""
    model = sequential(nn.Conv2d(16, 16, 3))
    with torch.no_grad():
        model.layer.weight.view(-1)[::20] = 5e-4
    pruner = start(ours, model, granularity="per_channel")
    pruner.step()
    final = pruner.finalize(inplace=True).eval()
    survivors = int((final.layer.weight != 0).sum())
    large = int((final.layer.weight.abs() > torch.finfo(torch.float16).eps).sum())
    assert large < survivors - 50
    stored = []
    for with_metadata in (True, False):
        if not with_metadata:
            del final._buffers["_COREML_/metadata_version"]
            del final.layer._buffers["_COREML_/weight/compression_type"]
        saved = ct.convert(
            torch.jit.trace(final, torch.rand(1, 16, 8, 8)),
            inputs=[ct.TensorType(shape=(1, 16, 8, 8))],
            pass_pipeline=ct.PassPipeline.DEFAULT_PRUNING,
            minimum_deployment_target=ct.target.iOS16,
        )
        dense = ct.optimize.coreml.decompress_weights(saved)
        (weight,) = ct.optimize.coreml.get_weights_metadata(dense, weight_threshold=2000).values()
        stored.append(int((weight.val != 0).sum()))
    assert stored == [large, survivors]
    capfd.readouterr()


def test_finalize_writes_the_same_buffers_as_coremltools(theirs: ModuleType) -> None:
    """Defends the metadata: names, values, shapes and where they are."""
    finals = []
    for api in (theirs, ours):
        pruner = start(api, small_net())
        pruner.step()
        finals.append(pruner.finalize().state_dict())
    expected, state = finals
    assert set(state) == set(expected)
    buffers = {name: tensor for name, tensor in state.items() if "_COREML_" in name}
    assert len(buffers) == 3
    for name, tensor in buffers.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.dtype == expected[name].dtype


def test_metadata_of_another_compression_stays_and_is_not_doubled() -> None:
    """Defends joint compression, and a model that is pruned and finalized twice."""
    model = sequential(nn.Linear(8, 4))
    model.layer.register_buffer("_COREML_/weight/compression_type", torch.tensor([2]))
    for _ in range(2):
        pruner = start(ours, model)
        pruner.step()
        model = pruner.finalize()
        assert model.layer.get_buffer("_COREML_/weight/compression_type").tolist() == [2, 1]


# ----------------------------------------------------------------------------- known differences


def test_known_difference_coremltools_counts_in_float32(theirs: ModuleType) -> None:
    """20 of 50 are 40 %; float32 rounding makes it 19 there."""
    expected, mask = in_both(theirs, sequential(nn.Linear(10, 5)), target_sparsity=0.4)
    assert (zeros(expected), zeros(mask)) == (19, 20)


@pytest.mark.parametrize(("n", "m", "there"), [(15, 22, 14), (2, 49, 1)])
def test_known_difference_coremltools_cuts_n_of_m(
    theirs: ModuleType, n: int, m: int, there: int
) -> None:
    """int(n / m * m) is n - 1 for some ratios."""
    model = sequential(nn.Linear(m, 6))
    expected, mask = in_both(theirs, model, n_m_ratio=(n, m))
    assert set((~expected).sum(dim=1).tolist()) == {there}
    assert set((~mask).sum(dim=1).tolist()) == {n}


def test_known_difference_n_of_m_with_schedulers_of_ones_own_reaches_n() -> None:
    """The float 1 / 49 stands for the fraction, so that one of 49 goes."""

    class AtOnce(ours.PruningScheduler):
        def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
            return float(config.target_sparsity)

    pruner = start(
        ours, sequential(nn.Linear(49, 6)), scheduler=lambda api: AtOnce(), n_m_ratio=(1, 49)
    )
    pruner.step()
    assert set((~our_mask(pruner)).sum(dim=1).tolist()) == {1}


def test_known_difference_ties_are_pruned_to_the_exact_count(theirs: ModuleType) -> None:
    """coremltools keeps everything that equals the threshold: of equal weights none goes."""
    model = sequential(nn.Linear(10, 10))
    nn.init.constant_(model.layer.weight, 0.25)
    expected, mask = in_both(theirs, model, target_sparsity=0.5)
    assert (zeros(expected), zeros(mask)) == (0, 50)
    assert not mask.flatten()[:50].any(), "the first by index"


def test_known_difference_a_ragged_tail_of_n_m_is_made_of_real_entries(theirs: ModuleType) -> None:
    """coremltools pads with zeros, which are pruned first; here floor(r * n / m) real ones go."""
    expected, mask = in_both(theirs, sequential(nn.Linear(10, 6)), n_m_ratio=(2, 4))
    assert torch.equal(mask[:, :8], expected[:, :8])
    assert set((~expected[:, 8:]).sum(dim=1).tolist()) == {0}
    assert set((~mask[:, 8:]).sum(dim=1).tolist()) == {1}


def test_known_difference_a_ragged_block_is_one_unit(theirs: ModuleType) -> None:
    """coremltools counts entries where blocks don't divide dim 0, here blocks are counted."""
    model = sequential(nn.Linear(20, 10))
    expected, mask = in_both(theirs, model, block_size=4, target_sparsity=0.5)
    blocks = sum(zeros(part[::4]) for part in (mask,))  # one row of each block
    assert blocks == 30 == math.floor(3 * 20 * 0.5)
    assert zeros(expected) != zeros(mask)


def test_known_difference_n_equal_to_m_prunes_everything(theirs: ModuleType) -> None:
    """coremltools' config takes n = m, and its mask fails at the first step."""
    pruner = start(theirs, sequential(nn.Linear(8, 4)), n_m_ratio=(4, 4))
    with pytest.raises(AssertionError):
        pruner.step()
    mine = start(ours, sequential(nn.Linear(8, 4)), n_m_ratio=(4, 4))
    mine.step()
    assert zeros(our_mask(mine)) == 32


@pytest.mark.filterwarnings("ignore:step.. was called")  # nothing is trained here
def test_known_difference_before_the_first_zero_of_n_m_nothing_goes(theirs: ModuleType) -> None:
    """coremltools prunes without structure while floor(m * s) is 0: the pattern does not hold."""
    model = sequential(nn.Linear(16, 8))
    steps = {"scheduler": lambda api: api.PolynomialDecayScheduler(list(range(1, 21)), power=1)}
    expected, mask = in_both(theirs, model, steps=5, n_m_ratio=(2, 4), **steps)
    assert zeros(expected) == 13
    assert zeros(mask) == 0
    expected, mask = in_both(theirs, model, steps=20, n_m_ratio=(2, 4), **steps)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("keys", [{}, {"granularity": "per_channel"}], ids=str)
def test_known_difference_pruned_weights_do_not_come_back(
    theirs: ModuleType, keys: dict[str, Any]
) -> None:
    """coremltools ranks the dense weights behind its masks anew; here masks nest."""
    model = sequential(nn.Conv2d(4, 10, 3))
    steps = {"scheduler": lambda api: api.PolynomialDecayScheduler([0, 1, 2], power=1)}
    given = {"target_sparsity": 0.55, **keys, **steps}
    original, pruner = start(theirs, model, **given), start(ours, model, **given)
    original.step()
    pruner.step()
    before = our_mask(pruner).clone()
    assert torch.equal(before, their_mask(original))
    with torch.no_grad():  # as if training had made the pruned weights large
        original.prepared.layer.weight_orig[~before] = 100.0
        pruner.prepared.layer.weight[~before] = 100.0
    original.step()
    pruner.step()
    assert bool((their_mask(original) & ~before).any()), "revived there"
    assert not bool((our_mask(pruner) & ~before).any())
    assert zeros(our_mask(pruner)) > zeros(before)


def test_known_difference_a_falling_sparsity_frees_entries_that_are_zero(
    theirs: ModuleType,
) -> None:
    """There the old weights return; here they are gone, and training starts them from 0."""
    model = sequential(nn.Linear(10, 10))
    steps = {"scheduler": lambda api: api.PolynomialDecayScheduler([0, 1, 2], power=1)}
    given = {"initial_sparsity": 0.83, "target_sparsity": 0.23, **steps}
    original, pruner = start(theirs, model, **given), start(ours, model, **given)
    for _ in range(2):
        original.step()
        pruner.step()
    assert zeros(their_mask(original)) == zeros(our_mask(pruner)) == 23
    original.prepared(torch.zeros(1, 10))
    assert int((original.prepared.layer.weight == 0).sum()) == 23
    assert int((pruner.prepared.layer.weight == 0).sum()) == 83


def test_known_difference_a_single_update_at_step_0_is_done_at_the_first_step(
    theirs: ModuleType,
) -> None:
    """coremltools counts from 1, never meets step 0, and prunes nothing at all."""
    at_0 = {"scheduler": lambda api: api.PolynomialDecayScheduler([0])}
    model = sequential(nn.Linear(10, 10))
    assert [zeros(m) for m in in_both(theirs, model, steps=0, **at_0)] == [0, 0]
    assert [zeros(m) for m in in_both(theirs, model, steps=5, **at_0)] == [0, 50]


def test_prepare_applies_the_initial_sparsity_and_step_1_what_was_due_at_step_0(
    theirs: ModuleType,
) -> None:
    """The same in both, and unlike Pruner, whose prepare() does what is due at step 0."""
    model, keys = sequential(nn.Linear(10, 10)), {"initial_sparsity": 0.11}
    assert [zeros(m) for m in in_both(theirs, model, steps=0, **keys)] == [11, 11]
    assert [zeros(m) for m in in_both(theirs, model, steps=1, **keys)] == [50, 50]
    native = Pruner(model, Rule(0.5, initial_sparsity=0.11))
    native.prepare()
    assert zeros(native.masks["layer.weight"]) == 50


def test_per_channel_leaves_linear_per_scalar_as_in_coremltools(theirs: ModuleType) -> None:
    """A global per_channel must not cut classes off a head; Pruner's Channel() prunes rows."""
    model = sequential(nn.Linear(20, 10))
    expected, mask = in_both(theirs, model, granularity="per_channel", target_sparsity=0.53)
    assert torch.equal(mask, expected)
    assert mask.any(dim=1).all()
    rows = compute_masks({"w": model.layer.weight.detach()}, 0, Rule(0.53, pattern=Channel()))["w"]
    assert int((~rows.any(dim=1)).sum()) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_difference_norms_that_differ_do_not_tie(
    theirs: ModuleType, dtype: torch.dtype
) -> None:
    """coremltools rounds norms to the weight's dtype, where these are equal; here float64 ranks."""
    model = sequential(nn.Conv1d(2, 4, 1))
    with torch.no_grad():
        model.layer.weight[:, 0, 0] = 2.0**20
        model.layer.weight[:, 1, 0] = torch.tensor([4.0, 2.0, 3.0, 1.0])
    expected, mask = in_both(theirs, model.to(dtype), granularity="per_channel")
    assert zeros(expected) == 0
    assert mask[:, 0, 0].tolist() == [True, False, True, False]


def test_known_difference_the_model_keeps_its_keys_while_it_trains(theirs: ModuleType) -> None:
    """coremltools renames weight to weight_orig and adds buffers; here state_dict is the same."""
    model = sequential(nn.Linear(8, 4))
    keys = list(model.state_dict())
    assert list(start(ours, model).prepared.state_dict()) == keys
    assert "layer.weight_orig" in start(theirs, model).prepared.state_dict()


def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True)


@pytest.mark.parametrize("mine", [False, True])
def test_known_difference_attention_trains(theirs: ModuleType, mine: bool) -> None:
    """out_proj is a Linear whose forward is never called: coremltools' mask breaks backward."""
    pruner = (ours if mine else theirs).MagnitudePruner(attention())
    model = pruner.prepare(inplace=True)
    x = torch.randn(2, 3, 8)
    model(x, x, x)[0].sum().backward()
    pruner.step()
    if mine:
        model(x, x, x)[0].sum().backward()
        assert int((model.out_proj.weight == 0).sum()) == 32
    else:
        with pytest.raises(RuntimeError, match="second time"):
            model(x, x, x)[0].sum().backward()


def test_known_difference_update_steps_beyond_float32_are_exact(theirs: ModuleType) -> None:
    """coremltools stores steps as float32, where 2**24 + 1 is 2**24."""
    steps = [2**24 + 1, 2**24 + 3]
    assert [int(s) for s in theirs.PolynomialDecayScheduler(steps).update_steps] != steps
    assert ours.PolynomialDecayScheduler(steps).update_steps.tolist() == steps


def test_known_difference_nan_raises_before_anything_changed(theirs: ModuleType) -> None:
    """coremltools ranks NaN as the largest, and the count is off; here the name is told."""
    model = sequential(nn.Linear(8, 4))
    with torch.no_grad():
        model.layer.weight[1, 2] = math.nan
    start(theirs, model).step()
    with pytest.raises(NaNError, match=r"'layer\.weight'"):
        start(ours, model)


# ---------------------------------------------------------------------------------------- report


def test_report_has_the_shape_of_coremltools_report(theirs: ModuleType) -> None:
    """Defends names, keys and values, -1 for an odd number of outputs among them."""
    reports = []
    for api in (theirs, ours):
        pruner = start(api, small_net(), target_sparsity=0.53)
        pruner.step()
        pruner.prepared(torch.zeros(1, 3, 6, 6))  # coremltools reports what forward left
        reports.append(pruner.report())
    expected, report = reports
    assert list(report) == list(expected) == ["layer", "dense", "global"]
    for name, row in expected.items():
        assert list(report[name]) == list(row)
        assert report[name] == pytest.approx(row, abs=1e-7), name
    assert report["dense"]["block2_weight_sparsity"] == -1
    assert str(report).splitlines()[0].split() == str(expected).splitlines()[0].split()


def test_known_difference_report_counts_zeros_and_does_not_sum_signs(theirs: ModuleType) -> None:
    """[1, -1] sums to 0, which coremltools calls a pruned row."""
    model = sequential(nn.Linear(2, 2))
    with torch.no_grad():
        model.layer.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    rows = [start(api, model).report()["layer"] for api in (theirs, ours)]
    keys = ("structured_weight_sparsity", "block2_weight_sparsity")
    assert [rows[0][key] for key in keys] == [1.0, 1.0]
    assert [rows[1][key] for key in keys] == [0.0, 0.0]


def test_known_difference_report_is_of_now(theirs: ModuleType) -> None:
    """coremltools reports the mask of the last forward pass, and nothing outside of training."""
    pruners = [start(api, sequential(nn.Linear(8, 4))) for api in (theirs, ours)]
    for pruner in pruners:
        pruner.step()
    key = "unstructured_weight_sparsity"
    assert [pruner.report()["layer"][key] for pruner in pruners] == [0.0, 0.5]
    for pruner in pruners:
        pruner.finalize(inplace=True)
    assert [pruner.report()["global"][key] for pruner in pruners] == [-1, 0.5]


def test_report_counts_whole_rows_and_pairs() -> None:
    """Defends the three statistics on a mask that is known."""
    model = sequential(nn.Conv2d(4, 8, 2))
    pruner = start(ours, model, granularity="per_channel", block_size=2, target_sparsity=0.5)
    pruner.step()
    row = pruner.report()["layer"]
    assert row == {
        "#params": 128,
        "structured_weight_sparsity": 0.5,
        "unstructured_weight_sparsity": 0.5,
        "block2_weight_sparsity": 0.5,
    }


# --------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize("name", ["ModuleMagnitudePrunerConfig", "MagnitudePrunerConfig"])
def test_configs_have_the_fields_and_defaults_of_coremltools(theirs: ModuleType, name: str) -> None:
    """Defends constructor arguments, their order and what they default to."""
    expected, built = getattr(theirs, name)(), getattr(ours, name)()
    assert list(built.as_dict()) == list(expected.as_dict())
    assert built.as_dict() == expected.as_dict()


def test_the_default_config_is_filled_in_only_when_nothing_is_given(theirs: ModuleType) -> None:
    """A config that names one module must not prune all others; set_type after () keeps it."""
    for api in (theirs, ours):
        one = api.ModuleMagnitudePrunerConfig()
        assert api.MagnitudePrunerConfig(module_type_configs={"Linear": one}).global_config is None
        assert api.MagnitudePrunerConfig(module_name_configs={"a": None}).global_config is None
        assert api.MagnitudePrunerConfig().set_module_type("Linear", one).global_config == one


CONFIG: dict[str, Any] = {
    "global_config": {"target_sparsity": 0.6, "scheduler": {"begin_step": 4}},
    "module_type_configs": {"Linear": None, "Conv2d": {"n_m_ratio": [2, 4], "dim": 0}},
    "module_name_configs": {
        r"blocks\.\d+": {
            "scheduler": {"update_steps": [3, 5, 7], "power": 2},
            "target_sparsity": 0.75,
            "granularity": "per_channel",
        }
    },
}
YAML = r"""
global_config: {target_sparsity: 0.6, scheduler: {begin_step: 4}}
module_type_configs:
  Linear: null
  Conv2d: {n_m_ratio: [2, 4], dim: 0}
module_name_configs:
  blocks\.\d+:
    scheduler: {update_steps: "range(3, 8, 2)", power: 2}
    target_sparsity: 0.75
    granularity: per_channel
"""


def test_from_dict_from_yaml_and_as_dict_agree_with_coremltools(
    theirs: ModuleType, tmp_path: Path
) -> None:
    """Defends the dict form, there and back, and YAML from a path and a stream."""
    config = ours.MagnitudePrunerConfig.from_dict(CONFIG)
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    assert config == ours.MagnitudePrunerConfig.from_yaml(str(path))
    assert config == ours.MagnitudePrunerConfig.from_yaml(io.BytesIO(YAML.encode()))
    assert config == ours.MagnitudePrunerConfig.from_dict(config.as_dict())
    expected = theirs.MagnitudePrunerConfig.from_dict(CONFIG).as_dict()
    steps = expected["module_name_configs"][r"blocks\.\d+"]["scheduler"]
    steps["update_steps"] = [int(step) for step in steps["update_steps"]]
    expected["module_type_configs"]["Conv2d"]["n_m_ratio"] = (2, 4)
    assert config.as_dict() == expected


def test_an_empty_yaml_is_the_default_config() -> None:
    """As in coremltools."""
    config = ours.MagnitudePrunerConfig.from_yaml(io.StringIO(""))
    assert config == ours.MagnitudePrunerConfig()


def test_setters_change_the_config_and_return_it() -> None:
    """Users call them without using the result."""
    config = ours.MagnitudePrunerConfig()
    module_config = ours.ModuleMagnitudePrunerConfig(target_sparsity=0.3)
    assert config.set_global(None) is config
    assert config.set_module_type("Conv2d", module_config) is config
    assert config.set_module_name("head", None) is config
    assert config.global_config is None
    assert config.module_type_configs == {"Conv2d": module_config}
    assert config.module_name_configs == {"head": None}


def test_name_beats_type_beats_global_as_in_coremltools(theirs: ModuleType) -> None:
    """Regular expressions must match whole names, types are exact, the first match counts."""

    class MyLinear(nn.Linear):
        pass

    model = nn.Sequential(
        OrderedDict(
            head=nn.Linear(10, 10),
            head2=nn.Linear(10, 10),
            mine=MyLinear(10, 10),
            conv=nn.Conv1d(10, 10, 1),
            act=nn.ReLU(),
            other=nn.Conv2d(10, 1, (2, 5)),
            dense=nn.Conv3d(1, 100, 1),
        )
    )
    reports = []
    for api in (theirs, ours):
        to = api.ModuleMagnitudePrunerConfig
        config = api.MagnitudePrunerConfig(global_config=to(target_sparsity=0.11))
        config.set_module_type(nn.Linear, to(target_sparsity=0.23))
        config.set_module_type("Conv1d", to(target_sparsity=0.37))
        config.set_module_name("hea.", to(target_sparsity=0.43))
        config.set_module_name("(head|dense)", to(target_sparsity=0.59))
        config.set_module_name("dens.", None)
        pruner = api.MagnitudePruner(model, config)
        copied = pruner.prepare()
        pruner.step()
        for layer in copied:
            if isinstance(layer, nn.Linear):
                layer(torch.zeros(1, 10))
        copied.conv(torch.zeros(1, 10, 1))
        copied.other(torch.zeros(1, 10, 2, 5))
        copied.dense(torch.zeros(1, 1, 1, 1, 1))
        reports.append(
            {k: round(v["unstructured_weight_sparsity"], 4) for k, v in pruner.report().items()}
        )
    del reports[0]["global"], reports[1]["global"]
    assert reports[1] == reports[0]
    assert reports[1] == {
        "head": 0.43, "head2": 0.23, "mine": 0.11, "conv": 0.37, "other": 0.11, "dense": 0.59,
    }  # fmt: skip


def module(**keys: Any) -> Any:
    return ours.ModuleMagnitudePrunerConfig(**keys)


def typed(key: Any) -> Any:
    return ours.MagnitudePrunerConfig().set_module_type(key, module())


from_dict = ours.MagnitudePrunerConfig.from_dict
ALSO_THERE: list[tuple[str, Callable[[ModuleType], Any], list[str]]] = [
    ("n > m", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(5, 4)),
     ["n_m_ratio", "(5, 4)", "0 <= n <= m"]),
    ("m = 0", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(0, 0)),
     ["n_m_ratio", "(0, 0)", "m > 0"]),
    ("m < 0", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(-2, -1)),
     ["n_m_ratio", "(-2, -1)"]),
    ("fractional n", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(1.0, 4)),
     ["n_m_ratio", "integer", "1.0"]),
    ("three numbers", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(1, 2, 3)),
     ["n_m_ratio", "(1, 2, 3)"]),
    ("n:m in blocks", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(1, 2), block_size=2),
     ["n_m_ratio", "block_size=2", "Leave out"]),
    ("n:m of channels",
     lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(1, 2), granularity="per_channel"),
     ["n_m_ratio", "'per_channel'", "Leave out"]),
    ("int sparsity", lambda api: api.ModuleMagnitudePrunerConfig(target_sparsity=1),
     ["target_sparsity", "float", "got 1."]),
    ("text sparsity", lambda api: api.ModuleMagnitudePrunerConfig(initial_sparsity="0.5"),
     ["initial_sparsity", "'0.5'"]),
    ("fractional block", lambda api: api.ModuleMagnitudePrunerConfig(block_size=2.0),
     ["block_size", "integer", "2.0"]),
    ("unknown granularity", lambda api: api.ModuleMagnitudePrunerConfig(granularity="per_tensor"),
     ["granularity", "'per_channel'", "'per_tensor'"]),
    ("no scheduler", lambda api: api.ModuleMagnitudePrunerConfig(scheduler=None),
     ["scheduler", "PruningScheduler", "None"]),
    ("number as name", lambda api: api.ModuleMagnitudePrunerConfig(param_name=3),
     ["param_name", "3"]),
    ("misspelt key", lambda api: api.ModuleMagnitudePrunerConfig.from_dict({"target_sparsty": 0.5}),
     ["target_sparsty", "Did you mean 'target_sparsity'"]),
    ("negative step", lambda api: api.PolynomialDecayScheduler([-1, 3]),
     ["update_steps", ">= 0", "-1"]),
    ("fractional step", lambda api: api.PolynomialDecayScheduler([1.5]),
     ["update_steps", "whole", "1.5"]),
    ("no range", lambda api: api.PolynomialDecayScheduler("[0, 1]"),
     ["update_steps", "range(start, stop, stride)", "'[0, 1]'"]),
    ("2-D steps", lambda api: api.PolynomialDecayScheduler(torch.ones(1, 1)), ["update_steps"]),
    ("fractional power", lambda api: api.PolynomialDecayScheduler([1], power=2.0),
     ["power", "int", "2.0"]),
    ("fractional begin", lambda api: api.ConstantSparsityScheduler(1.0),
     ["begin_step", "integer", "1.0"]),
    ("unknown type", lambda api: api.MagnitudePrunerConfig(module_type_configs={"ReLU": None}),
     ["module_type_configs", "Conv3d", "'ReLU'", "Pruner"]),
    ("unknown class", lambda api: api.MagnitudePrunerConfig(module_type_configs={nn.ReLU: None}),
     ["module_type_configs", "Conv3d", "ReLU", "Pruner"]),
    ("dict for a config", lambda api: api.MagnitudePrunerConfig(global_config={}),
     ["global_config", "ModuleMagnitudePrunerConfig"]),
    ("unknown key", lambda api: api.MagnitudePrunerConfig.from_dict({"globl_config": {}}),
     ["globl_config", "Did you mean 'global_config'"]),
    ("unknown key in a scheduler",
     lambda api: api.MagnitudePrunerConfig.from_dict(
         {"module_name_configs": {"head": {"scheduler": {"update_step": [1]}}}}),
     ["module_name_configs['head']", "scheduler", "Did you mean 'update_steps'"]),
    ("bad step in a dict",
     lambda api: api.MagnitudePrunerConfig.from_dict(
         {"module_type_configs": {"Linear": {"scheduler": {"update_steps": [-1]}}}}),
     ["module_type_configs['Linear']", "update_steps", "-1"]),
    ("no dict", lambda api: api.MagnitudePrunerConfig.from_dict(None), ["dict", "None"]),
]  # fmt: skip
ONLY_HERE: list[tuple[str, Callable[[ModuleType], Any], list[str]]] = [
    ("n < 0", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(-1, 4)), ["(-1, 4)"]),
    ("dim of n:m", lambda api: api.ModuleMagnitudePrunerConfig(n_m_ratio=(1, 4), dim=2),
     ["dim=0", "dim=2", "purprune.NM"]),
    ("per_layer", lambda api: api.ModuleMagnitudePrunerConfig(granularity="per_layer"),
     ["granularity", "'per_kernel'", "'per_layer'"]),
    ("sparsity > 1", lambda api: api.ModuleMagnitudePrunerConfig(target_sparsity=70.0),
     ["target_sparsity", "[0, 1]", "70.0"]),
    ("NaN", lambda api: api.ModuleMagnitudePrunerConfig(target_sparsity=math.nan),
     ["target_sparsity", "nan"]),
    ("block of 0", lambda api: api.ModuleMagnitudePrunerConfig(block_size=0),
     ["block_size", "1", "got 0"]),
    ("unsorted steps", lambda api: api.PolynomialDecayScheduler([3, 1]),
     ["update_steps", "rising", "sort them"]),
    ("a step twice", lambda api: api.PolynomialDecayScheduler([1, 1]), ["update_steps", "twice"]),
    ("no steps", lambda api: api.PolynomialDecayScheduler([]), ["update_steps", "at least one"]),
    ("power 0", lambda api: api.PolynomialDecayScheduler([1], power=0), ["power", "> 0", "0"]),
    ("negative begin", lambda api: api.ConstantSparsityScheduler(-1), ["begin_step", "0", "-1"]),
    ("unknown type set later",
     lambda api: api.MagnitudePrunerConfig().set_module_type("ReLU", None), ["Conv3d", "'ReLU'"]),
    ("bad regular expression",
     lambda api: api.MagnitudePrunerConfig().set_module_name("head(", None), ["'head('"]),
    ("cut to an int", lambda api: api.ModuleMagnitudePrunerConfig.from_dict({"block_size": 2.7}),
     ["block_size", "2.7"]),
    ("text for a number",
     lambda api: api.ModuleMagnitudePrunerConfig.from_dict({"target_sparsity": "0.5"}),
     ["target_sparsity", "'0.5'"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("build", "words"), [pytest.param(*case[1:], id=case[0]) for case in ALSO_THERE + ONLY_HERE]
)
def test_impossible_values_raise_with_the_key_the_value_and_the_way_out(
    build: Callable[[ModuleType], Any], words: list[str]
) -> None:
    """Nothing is corrected silently, and the message is enough to fix the call."""
    with pytest.raises(ConfigError) as caught:
        build(ours)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


@pytest.mark.parametrize("build", [pytest.param(c[1], id=c[0]) for c in ALSO_THERE])
def test_what_raises_in_coremltools_raises_here(
    theirs: ModuleType, build: Callable[[ModuleType], Any]
) -> None:
    """Shows that the list above holds coremltools' own error cases."""
    with pytest.raises(Exception):  # noqa: B017, PT011  (AssertionError, ValueError, TypeError, ...)
        build(theirs)


@pytest.mark.parametrize("build", [pytest.param(c[1], id=c[0]) for c in ONLY_HERE])
def test_known_difference_these_values_pass_in_coremltools(
    theirs: ModuleType, build: Callable[[ModuleType], Any]
) -> None:
    """Shows that the second list is stricter than coremltools, as the docs say."""
    build(theirs)


def test_an_assignment_is_checked_and_a_bad_one_changes_nothing() -> None:
    """coremltools' configs are mutable; these are too, and stay valid."""
    config = module(n_m_ratio=(2, 4))
    before = config.as_dict()
    for name, value in [("block_size", 4), ("granularity", "x"), ("n_m_ratio", (5, 4))]:
        with pytest.raises(ConfigError, match=name):
            setattr(config, name, value)
        assert config.as_dict() == before
    with pytest.raises(AttributeError, match="Did you mean 'block_size'"):
        config.blok_size = 4
    config.dim = 0
    assert config.dim == 0


def test_steps_may_be_a_range_an_array_a_tensor_or_whole_floats() -> None:
    """coremltools takes all of these; equal steps make equal schedulers."""
    expected = ours.PolynomialDecayScheduler([0, 3, 6])
    for steps in (range(0, 9, 3), torch.tensor([0.0, 3.0, 6.0]), [0.0, 3.0, 6.0], (0, 3, 6)):
        assert ours.PolynomialDecayScheduler(steps) == expected
    assert expected != ours.PolynomialDecayScheduler([0, 3, 6], power=2)
    assert pickle.loads(pickle.dumps(expected)) == expected == copy.deepcopy(expected)


@pytest.mark.parametrize("name", ["constant from 3", "polynomial from 0", "polynomial as text"])
def test_schedulers_compute_the_sparsities_of_coremltools(theirs: ModuleType, name: str) -> None:
    """Defends compute_sparsity for those who call it, or override it and call super."""
    for initial, target in SPARSITIES:
        prev = {theirs.__name__: initial, ours.__name__: initial}
        for step, api in itertools.product(range(1, 9), (theirs, ours)):
            config = api.ModuleMagnitudePrunerConfig(
                initial_sparsity=initial, target_sparsity=target
            )
            prev[api.__name__] = SCHEDULERS[name](api).compute_sparsity(
                step, prev[api.__name__], config
            )
            if api is ours:
                assert prev[ours.__name__] == pytest.approx(prev[theirs.__name__], abs=1e-12)


class Capped(ours.PolynomialDecayScheduler):
    """A subclass that changes what its base computes."""

    def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
        return min(super().compute_sparsity(step_count, prev_sparsity, config), 0.25)


def test_a_subclass_of_a_scheduler_is_asked_and_not_its_base() -> None:
    """The closed form stands for the two classes themselves only."""
    pruner = start(ours, sequential(nn.Linear(10, 10)), scheduler=lambda api: Capped([0, 1, 2]))
    for _ in range(3):
        pruner.step()
    assert zeros(our_mask(pruner)) == 25
    config = module(scheduler=Capped([1, 2]))
    assert module(**config.as_dict()) == config, "as_dict keeps schedulers of one's own"


@pytest.mark.parametrize(
    ("returned", "words"), [(None, "prev_sparsity"), ("half", "'half'"), (1.5, r"\[0, 1\]")]
)
def test_a_scheduler_that_returns_no_sparsity_raises_and_tells_the_step(
    returned: Any, words: str
) -> None:
    """A scheduler of one's own that forgets to return must not prune anything."""

    class Forgetful(ours.PruningScheduler):
        def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
            return prev_sparsity if step_count < 2 else returned  # type: ignore[no-any-return]

    pruner = start(ours, sequential(nn.Linear(8, 4)), scheduler=lambda api: Forgetful())
    pruner.step()
    with pytest.raises(ConfigError, match=f"(?s)step 2.*{words}"):
        pruner.step()


def counting(api: ModuleType) -> Any:
    """Write a scheduler with a state: a tenth of the target more at every call."""
    path = "purprune_adapters.coremltools_compat" if api is ours else api.__name__
    base: Any = importlib.import_module(f"{path}.pruning_scheduler").PruningScheduler

    class Counting(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.calls: list[int] = []

        def compute_sparsity(self, step_count: int, prev_sparsity: float, config: Any) -> float:
            self.calls.append(step_count)
            assert self.calls == list(range(1, step_count + 1)), "each step once, in order"
            return config.target_sparsity * len(self.calls) / 10  # type: ignore[no-any-return]

    return Counting()


def test_known_difference_a_scheduler_keeps_its_attributes(theirs: ModuleType) -> None:
    """coremltools copies the scheduler for each module, and the copy loses them."""
    model = sequential(nn.Linear(10, 10))
    with pytest.raises(AttributeError, match="calls"):
        start(theirs, model, scheduler=counting).step()
    pruner = start(ours, model, scheduler=counting)
    for _ in range(6):
        pruner.step()
    assert zeros(our_mask(pruner)) == 30


def test_one_scheduler_in_two_configs_is_asked_for_each_by_itself() -> None:
    """A scheduler may have a state; modules must not advance each other's."""
    scheduler = counting(ours)
    config = ours.MagnitudePrunerConfig()
    config.set_module_type(nn.Conv2d, module(scheduler=scheduler, target_sparsity=0.8))
    config.set_module_type(nn.Linear, module(scheduler=scheduler, target_sparsity=0.4))
    pruner = ours.MagnitudePruner(small_net(), config)
    pruner.prepare(inplace=True)
    for _ in range(4):
        pruner.step()
    rows = pruner.pruner.report()
    assert (rows["layer.weight"].sparsity, rows["dense.weight"].sparsity) == pytest.approx(
        (0.32, 0.16)
    )
    assert scheduler.calls == [], "the user's own object is not touched"


# ------------------------------------------------------------------------------------- lifecycle


def named(selector: str, **keys: Any) -> ours.MagnitudePrunerConfig:
    return ours.MagnitudePrunerConfig(module_name_configs={selector: module(**keys)})


@pytest.mark.parametrize(
    ("model", "config", "words"),
    [
        (small_net(), named("laier"), ["module_name_configs", "Did you mean 'layer'"]),
        (small_net(), named("relu"), ["'relu'", "ReLU", "Conv3d"]),
        (small_net(), typed("Conv3d"), ["module_type_configs", "'Conv3d'", "torch.nn.Conv2d"]),
        (small_net(), typed(nn.Conv1d), ["module_type_configs", "torch.nn.Conv1d"]),
        (small_net(), named("layer", param_name="wait"), ["param_name", "'wait'", "weight, bias"]),
        (nn.ReLU(), None, ["at least one module", "Conv3d"]),
    ],
    ids=["name", "unsupported", "type", "class", "param_name", "nothing"],
)
def test_known_difference_a_selector_that_matches_nothing_raises(
    theirs: ModuleType, model: nn.Module, config: Any, words: list[str]
) -> None:
    """coremltools trains on without a word, and nothing is pruned."""
    with pytest.raises(SelectionError) as caught:
        ours.MagnitudePruner(model, config)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    theirs.MagnitudePruner(nn.ReLU()).prepare()


def test_a_config_that_is_no_config_raises_and_names_the_way() -> None:
    """A dict is taken by from_dict."""
    with pytest.raises(TypeError, match="from_dict"):
        ours.MagnitudePruner(small_net(), {"global_config": {}})  # type: ignore[arg-type]


def test_out_of_order_calls_warn_where_coremltools_only_logs(theirs: ModuleType) -> None:
    """step before prepare, prepare twice, and calls after finalize change nothing and say so."""
    pruner = ours.MagnitudePruner(small_net())
    with pytest.warns(UserWarning, match=r"not prepared; step\(\) does nothing"):
        pruner.step()
    model = pruner.prepare()
    with pytest.warns(UserWarning, match="prepared already"):
        assert pruner.prepare() is model
    pruner.step()
    assert pruner.pruner.step_count == 1
    final = pruner.finalize(inplace=True)
    assert final is model
    with pytest.warns(UserWarning, match=r"finalized; step\(\) does nothing"):
        pruner.step()
    with pytest.warns(UserWarning, match="finalized already"):
        assert pruner.finalize(inplace=True) is model
    with pytest.warns(UserWarning, match="finalized already"):
        assert pruner.finalize() is not model
    original = theirs.MagnitudePruner(small_net())
    original.step()
    for _ in range(2):
        original.prepare(inplace=True)
    for _ in range(2):
        final = original.finalize(inplace=True)
    assert final.layer.get_buffer("_COREML_/weight/compression_type").tolist() == [1, 1]
    assert model.layer.get_buffer("_COREML_/weight/compression_type").tolist() == [1]


def test_known_difference_finalize_before_prepare_raises(theirs: ModuleType) -> None:
    """coremltools returns the dense model, marked as compressed."""
    theirs.MagnitudePruner(small_net()).finalize()
    with pytest.raises(RuntimeError, match=r"pruner\.prepare\(\)"):
        ours.MagnitudePruner(small_net()).finalize()


def test_finalize_leaves_the_training_model_alone_unless_inplace() -> None:
    """A copy is finalized, and training goes on; another model can be finalized too."""
    pruner = start(ours, small_net())
    pruner.step()
    averaged = copy.deepcopy(pruner.prepared)
    for final in (pruner.finalize(), pruner.finalize(averaged, inplace=True)):
        assert "_COREML_/metadata_version" in final.state_dict()
        assert not final.layer._forward_pre_hooks
    assert "_COREML_/metadata_version" not in pruner.prepared.state_dict()
    assert pruner.prepared.layer._forward_pre_hooks
    pruner.step()


def test_the_config_is_read_at_prepare_as_in_coremltools() -> None:
    """A config that is changed in between is not ignored."""
    config = ours.MagnitudePrunerConfig()
    pruner = ours.MagnitudePruner(sequential(nn.Linear(10, 10)), config)
    assert config.global_config is not None
    config.global_config.target_sparsity = 0.25
    pruner.prepare()
    config.global_config.target_sparsity = 0.75
    pruner.step()
    assert zeros(our_mask(pruner)) == 25


@pytest.mark.parametrize("scheduler", [SCHEDULERS["polynomial from 0"], counting])
def test_a_run_that_is_saved_and_loaded_goes_on_as_if_never_stopped(
    scheduler: Callable[[ModuleType], Any],
) -> None:
    """Defends checkpoints through the pruner at work, for schedulers of one's own too."""
    runs = [start(ours, sequential(nn.Linear(10, 10)), scheduler=scheduler) for _ in range(2)]
    for _ in range(3):
        runs[0].step()
    runs[1].prepared.load_state_dict(runs[0].prepared.state_dict())
    runs[1].pruner.load_state_dict(runs[0].pruner.state_dict())
    for _ in range(3):
        for run in runs:
            run.step()
        assert torch.equal(our_mask(runs[0]), our_mask(runs[1]))
    assert zeros(our_mask(runs[1])) > 0
    with pytest.raises(RuntimeError, match=r"prepare\(\) first"):
        _ = ours.MagnitudePruner(nn.Linear(2, 2)).pruner


def test_a_model_that_is_one_layer_and_tied_weights_are_pruned() -> None:
    """The root module has the empty name; a weight that two modules share has one mask."""
    pruner = ours.MagnitudePruner(nn.Linear(10, 10))
    pruner.prepare(inplace=True)
    pruner.step()
    assert list(pruner.report()) == ["", "global"]
    tied = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    tied[1].weight = tied[0].weight
    pruner = ours.MagnitudePruner(
        tied, ours.MagnitudePrunerConfig(global_config=module(scheduler=_halving(ours)))
    )
    pruner.prepare(inplace=True)
    pruner.step()
    pruner.step()
    assert [row["unstructured_weight_sparsity"] for row in pruner.report().values()] == [0.25] * 3


def test_supported_modules_are_those_of_coremltools(theirs: ModuleType) -> None:
    """Defends the property that tools read."""
    original = theirs.MagnitudePruner(small_net()).supported_modules
    assert ours.MagnitudePruner(small_net()).supported_modules == original


def test_the_module_paths_of_coremltools_exist() -> None:
    """Replacing the prefix of the import is enough, whatever module it names."""
    from purprune_adapters.coremltools_compat.magnitude_pruner import (
        MagnitudePruner,
        MagnitudePrunerConfig,
        ModuleMagnitudePrunerConfig,
    )
    from purprune_adapters.coremltools_compat.pruning_scheduler import PruningScheduler

    assert MagnitudePruner is ours.MagnitudePruner
    assert MagnitudePrunerConfig is ours.MagnitudePrunerConfig
    assert ModuleMagnitudePrunerConfig is ours.ModuleMagnitudePrunerConfig
    assert PruningScheduler is ours.PruningScheduler


def test_coremltools_is_not_imported() -> None:
    """The drop-in must work where coremltools is not installed, finalize included."""
    code = (
        "import sys; sys.modules['coremltools'] = None\n"
        "from torch import nn\n"
        "from purprune_adapters.coremltools_compat import MagnitudePruner\n"
        "pruner = MagnitudePruner(nn.Linear(4, 4)); pruner.prepare(); pruner.step()\n"
        "pruner.finalize()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)
