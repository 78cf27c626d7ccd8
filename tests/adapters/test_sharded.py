"""DTensor and fully_shard: masks from shards are the masks of the whole weights, bit for bit."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    GlobalGroup,
    Kernel,
    NaNError,
    Pattern,
    PruneConfig,
    Random,
    Rule,
    Unstructured,
    compute_masks,
)
from purprune.patterns import RowGroup
from purprune_adapters.sharded import sharded_masks
from purprune_adapters.shards import Processes


def square(weight: Tensor, context: Any) -> Tensor:
    return weight * weight - 1


square.elementwise = True  # type: ignore[attr-defined]

RULES = {
    "magnitude": Rule(0.6),
    "random": Rule(0.6, score=Random(5)),
    "taylor": Rule(0.6, score="taylor"),
    "gradient": Rule(0.6, score="gradient"),
    "callable": Rule(0.6, score=square),
    "channels": Rule(0.6, pattern=Channel(0)),
    "channels of dim 1": Rule(0.6, pattern=Channel(1, norm="l1")),
    "taylor channels": Rule(0.6, pattern=Channel(0, norm="l1"), score="taylor"),
    "kernels": Rule(0.6, pattern=Kernel()),
    "blocks": Rule(0.6, pattern=Block((2, 3))),
    "2:4": Rule(pattern=NM(2, 4)),
    "1:2 along dim 0": Rule(pattern=NM(1, 2, dim=0)),
    "rows": Rule(0.6, pattern=Pattern(group=RowGroup())),
    "nothing": Rule(0.0),
    "everything": Rule(1.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((5, 3), (8, 8), (4, 12), (1, 9), (3, 1), (0, 4), (7, 6, 3), (16, 6))


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return a weight with many ties, zeros of both signs and an infinity."""
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=generator) * 3).round() / 2
    if weight.numel() > 4:
        weight.view(-1)[seed % weight.numel()] = math.inf
        weight.view(-1)[0] = -0.0
    return weight.to(dtype)


def fold(masks_at: Callable[..., dict[str, Tensor]], given: Any, rule: Rule) -> list[Tensor]:
    """Return the masks of a sparsity that grows, falls, and ends at the rule's own.

    Then once more, with the masks of the lowest sparsity as a floor.
    """
    ends = (0.3, 0.7, 0.2) if rule.pattern.target is None and rule.target not in (0, 1) else ()
    prev = None
    masks = []
    for sparsity in (*ends, None):
        now = rule if sparsity is None else Rule(sparsity, pattern=rule.pattern, score=rule.score)
        prev = masks_at(given[0], 3, now, prev=prev, grads=given[1])
        masks.append(prev["w"])
    floor = {"w": masks[0]}
    masks.append(masks_at(given[0], 3, rule, prev=prev, grads=given[1], floor=floor)["w"])
    low = rule if not ends else Rule(0.1, pattern=rule.pattern, score=rule.score)
    masks.append(masks_at(given[0], 3, low, prev=prev, grads=given[1], floor=floor)["w"])
    return masks


def compare(mesh: DeviceMesh, placements: tuple[Any, ...], seed: int) -> set[str]:
    """Compare folds from shards with folds of the whole; return the rules that fit the shards."""
    fitting = set()
    choose = random.Random(seed)
    for name, rule in RULES.items():
        shape, dtype = choose.choice(SHAPES), choose.choice(DTYPES)
        if rule.pattern.norm == "l2" and rule.pattern.unit.kind != "entry":
            dtype = torch.float32
        weight = weight_of(shape, dtype, seed)
        grad = weight_of(shape, dtype, seed + 1).nan_to_num(posinf=2)
        weight = weight.nan_to_num(posinf=9) if rule.score != Rule().score else weight
        here = [{"w": distribute_tensor(tensor, mesh, placements)} for tensor in (weight, grad)]
        before = here[0]["w"].to_local().clone()
        try:
            masks = fold(sharded_masks, here, rule)
        except ConfigError as error:
            if "cross the borders" not in str(error):
                raise
            continue
        fitting.add(name)
        expected = fold(compute_masks, ({"w": weight}, {"w": grad}), rule)
        for mask, whole in zip(masks, expected, strict=True):
            assert isinstance(mask, DTensor)
            assert mask.dtype == torch.bool
            assert mask.placements == placements
            assert torch.equal(mask.full_tensor(), whole), (name, shape, dtype, placements)
        assert torch.equal(before, here[0]["w"].to_local())
    return fitting


def sweep(mesh: DeviceMesh, placements: list[tuple[Any, ...]], seeds: range) -> None:
    for there in placements:
        fitting = set().union(*(compare(mesh, there, seed) for seed in seeds))
        always = {"magnitude", "random", "taylor", "callable", "nothing", "everything", "kernels"}
        assert always <= fitting
        cut = {p.dim for p in there if isinstance(p, Shard)}
        if not cut:
            assert fitting == set(RULES)
        if cut == {0}:
            assert {"channels", "taylor channels", "2:4", "rows"} <= fitting
        if cut == {1}:
            assert {"channels of dim 1", "1:2 along dim 0"} <= fitting


@on_ranks(2)
def test_masks_from_the_shards_are_the_masks_of_the_whole_for_every_rule():
    """Defends exactness: ties, uneven and empty shards, every dtype, prev, along either dim."""
    mesh = init_device_mesh("cpu", (2,))
    sweep(mesh, [(Shard(0),), (Shard(1),), (Replicate(),)], range(3))


@on_ranks(2)
def test_transposable_masks_from_the_shards_are_those_of_the_whole():
    """Defends blocks that lie in one shard each, along either dim, prev and floor with them."""
    mesh = init_device_mesh("cpu", (2,))
    whole = {"w": weight_of((16, 8), torch.float32, 3)}
    for at in (Shard(0), Shard(1), Replicate()):
        cut = {"w": distribute_tensor(whole["w"], mesh, [at])}
        prev, expected = {}, {}
        for zeros in (1, 2, 1):
            rule = Rule(pattern=NM(zeros, 4, transposable=True))
            prev = sharded_masks(cut, 0, rule, prev=prev)
            expected = compute_masks(whole, 0, rule, prev=expected)
            assert torch.equal(prev["w"].full_tensor(), expected["w"])
        rule = Rule(pattern=NM(2, 4, transposable=True))
        held = sharded_masks(cut, 0, rule, floor=prev)["w"].full_tensor()
        assert torch.equal(held, compute_masks(whole, 0, rule, floor=expected)["w"])


@on_ranks(4)
def test_masks_from_two_dims_of_processes_are_the_masks_of_the_whole():
    """Defends exactness on 2-D meshes: both dims cut, one dim cut twice, and replicas (HSDP)."""
    sweep(init_device_mesh("cpu", (4,)), [(Shard(0),), (Shard(1),)], range(6))
    mesh = init_device_mesh("cpu", (2, 2))
    kinds = (Shard(0), Shard(1), Replicate())
    sweep(mesh, list(itertools.product(kinds, repeat=2)), range(4))


@on_ranks(2, 4)
def test_tensors_that_share_a_total_prune_in_shards_what_they_prune_whole():
    """Defends one total for many tensors: ties by the order of params, budgets by whole shapes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rules = {
        "entries": Rule(0.7, pattern=Unstructured(scope="global")),
        "random": Rule(0.7, pattern=Unstructured(scope="global"), score=Random(1)),
        "taylor": Rule(0.7, pattern=Unstructured(scope="global"), score="taylor"),
        "channels": Rule(0.7, pattern=Channel(0, scope="global")),
        "taylor channels": Rule(0.7, pattern=Channel(0, norm="l1", scope="global"), score="taylor"),
        "erk": Rule(0.7, budget="erk"),
        "uniform": Rule(0.7, pattern=Channel(0, norm="l1"), score="taylor", budget="uniform"),
    }
    for name, rule in rules.items():
        whole = {f"w{i}": weight_of(shape, torch.float32, i) for i, shape in enumerate(SHAPES)}
        whole = {n: w.nan_to_num(posinf=7) for n, w in whole.items()}
        grads = {n: w.flip(0) for n, w in whole.items()}
        here = {n: distribute_tensor(w, mesh, [Shard(0)]) for n, w in whole.items()}
        grads_here = {n: distribute_tensor(w, mesh, [Shard(0)]) for n, w in grads.items()}
        prev, expected = None, None
        for sparsity in (0.4, 0.8, 0.3):
            now = replace(rule, target_sparsity=sparsity)
            prev = sharded_masks(here, 2, now, prev=prev, grads=grads_here)
            expected = compute_masks(whole, 2, now, prev=expected, grads=grads)
            assert prev.keys() == expected.keys()
            for n, mask in prev.items():
                assert isinstance(mask, DTensor)
                assert torch.equal(mask.full_tensor(), expected[n]), (name, n, sparsity)
        for sparsity in (0.6, 0.2):  # with what is pruned now as a floor of half of the tensors
            now = replace(rule, target_sparsity=sparsity)
            held = [*whole][::2]
            got = sharded_masks(here, 2, now, floor={n: prev[n] for n in held}, grads=grads_here)
            exact = compute_masks(whole, 2, now, floor={n: expected[n] for n in held}, grads=grads)
            assert all(torch.equal(got[n].full_tensor(), exact[n]) for n in exact), (name, sparsity)
    mixed = {**here, "w1": distribute_tensor(whole["w1"], mesh, [Replicate()])}
    with pytest.raises(ConfigError, match=r"global group.*'w0' and 'w1' are not"):
        sharded_masks(mixed, 0, rules["entries"])


@on_ranks(4)
def test_fsdp_over_tensor_parallelism_gives_the_masks_of_the_whole():
    """Defends strided shards, which hold the same dim in the order of another mesh dim."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    for style in (ColwiseParallel(), RowwiseParallel()):
        torch.manual_seed(0)
        layer = nn.Linear(8, 12)
        whole = layer.weight.detach().mul(6).round()
        layer.weight.data.copy_(whole)
        layer = fully_shard(parallelize_module(layer, mesh["tp"], style), mesh=mesh["dp"])
        for rule in (Rule(0.55), Rule(0.4, pattern=Channel(0)), Rule(0.5, score=Random(1))):
            if isinstance(style, RowwiseParallel) and rule.pattern == Channel(0):
                continue
            mask = sharded_masks({"w": layer.weight}, 0, rule)["w"]
            assert torch.equal(mask.full_tensor(), compute_masks({"w": whole}, 0, rule)["w"])
    uneven = nn.Linear(8, 10)
    uneven = fully_shard(parallelize_module(uneven, mesh["tp"], ColwiseParallel()), mesh=mesh["dp"])
    with pytest.raises(ConfigError, match=r"'w'.*evenly"):
        sharded_masks({"w": uneven.weight}, 0, Rule(0.5))


@contextmanager
def counted_sums() -> Iterator[list[int]]:
    """Collect the bytes of each sum over processes."""
    sent: list[int] = []
    summed = Processes.summed

    def counting(self: Processes, counts: Tensor) -> Tensor:
        sent.append(counts.nbytes * len(self.over))
        return summed(self, counts)

    Processes.summed = counting  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        Processes.summed = summed  # type: ignore[method-assign]


def communication(size: int, tensors: int, ties: bool) -> tuple[int, int]:
    """Return bytes and calls of one update of tensors of ``size`` entries."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params: dict[str, Tensor] = {}
    for i in range(tensors):
        torch.manual_seed(i)
        whole = torch.randn(size // 1024, 1024)
        whole = whole.mul(4).round() if ties else whole
        params[f"w{i}"] = distribute_tensor(whole, mesh, [Shard(0)])
    comms = CommDebugMode()
    with counted_sums() as sent, comms:
        masks = sharded_masks(params, 0, Rule(0.75))
    counts = {str(op): n for op, n in comms.get_comm_counts().items()}
    assert counts == {"c10d.allreduce_": len(sent)}, counts
    pruned = sum(int((~m.to_local()).sum()) for m in masks.values())
    whole_count = torch.tensor([pruned])
    dist.all_reduce(whole_count)
    assert int(whole_count) == tensors * (size * 3 // 4)
    return sum(sent), len(sent)


@on_ranks(2)
def test_what_is_sent_does_not_grow_with_the_weight_and_tensors_share_the_calls():
    """Defends that no weight is gathered: only counts are summed, a few tens of KB per tensor."""
    sent, calls = communication(1 << 16, 1, ties=False)
    assert communication(1 << 20, 1, ties=False) == (sent, calls)
    assert sent < 40 << 10
    assert calls <= 5
    for ties in (False, True):
        sent, calls = communication(1 << 16, 1, ties)
        many, shared = communication(1 << 16, 5, ties)
        assert many <= 5 * sent + 1024
        assert shared <= calls + 1  # one group may need a round more than the first


@on_ranks(4)
def test_what_is_sent_is_the_same_for_one_and_for_sixteen_million_entries():
    """Defends the bound at the sizes of real layers; the place of the last tie costs log(size)."""
    assert communication(1 << 20, 1, ties=False) == communication(1 << 24, 1, ties=False)
    sent, calls = communication(1 << 24, 1, ties=True)
    assert sent < 72 << 10
    assert calls < 10


@on_ranks(2)
def test_nan_in_one_process_raises_in_all_with_the_count_over_all():
    """Defends law 8 without a process that waits for ever, for weights and for scores."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.ones(6, 4)
    weight[5, 1:] = math.nan
    for rule in (Rule(0.5), Rule(0.0), Rule(pattern=NM(2, 4))):
        with pytest.raises(NaNError, match=r"'w'; got 3 NaN of 24 entries"):
            sharded_masks({"w": distribute_tensor(weight, mesh, [Shard(0)])}, 0, rule)
    clean = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    grads = {"w": distribute_tensor(weight, mesh, [Shard(0)])}
    with pytest.raises(NaNError, match=r"score of 'w'; got 3 NaN of 24 entries"):
        sharded_masks({"w": clean}, 0, Rule(0.5, score="taylor"), grads=grads)


def fails_on_rank_1(weight: Tensor, context: Any) -> Tensor:
    if dist.get_rank() == 1:
        raise KeyError("here")
    return weight


fails_on_rank_1.elementwise = True  # type: ignore[attr-defined]


@on_ranks(2)
def test_an_error_of_one_process_ends_the_call_in_all():
    """Defends that no process waits in a sum for one that has left."""
    mesh = init_device_mesh("cpu", (2,))
    weight = {"w": distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])}
    expected = KeyError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(expected, match=r"here|another one failed"):
        sharded_masks(weight, 0, Rule(0.5, score=fails_on_rank_1))


def extreme_on_rank_1(weight: Tensor, context: Any) -> Tensor:
    largest = torch.iinfo(torch.int64).max
    return torch.full(weight.shape, largest if dist.get_rank() == 1 else 1, dtype=torch.int64)


extreme_on_rank_1.elementwise = True  # type: ignore[attr-defined]


@on_ranks(2)
def test_a_score_that_one_process_can_not_rank_is_refused_in_all():
    """Defends against a process that waits for another, which has left with an error."""
    mesh = init_device_mesh("cpu", (2,))
    weight = {"w": distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])}
    expected = ValueError if dist.get_rank() == 1 else RuntimeError
    with pytest.raises(expected, match=r"extreme value|another one failed"):
        sharded_masks(weight, 0, Rule(0.5, score=extreme_on_rank_1))


@on_ranks(2)
def test_what_does_not_fit_the_shards_raises_in_every_process_and_says_why():
    """Defends the borders of what is supported: decided from shape and mesh, by name."""
    mesh = init_device_mesh("cpu", (2,))
    weight = torch.randn(6, 8)
    cut = {"fc": distribute_tensor(weight, mesh, [Shard(0)])}
    grads = {"fc": distribute_tensor(weight, mesh, [Replicate()])}
    wide = {"fc": distribute_tensor(weight.double(), mesh, [Shard(0)])}
    partial = DTensor.from_local(weight, mesh, [Partial()], run_check=False)
    bias = distribute_tensor(torch.randn(5), mesh, [Shard(0)])
    cases: list[tuple[dict[str, Tensor], Rule, Any, str]] = [
        (cut, Rule(pattern=Channel(1)), None, r"units of 'fc'.*\(6, 1\).*borders.*dim 0"),
        (cut, Rule(pattern=Block((2, 1))), None, r"units of 'fc'.*\(2, 1\).*borders.*dim 0"),
        (cut, Rule(pattern=NM(2, 4, dim=0)), None, r"groups of 'fc'.*groups of 4 entries"),
        (cut, Rule(pattern=NM(1, 2, transposable=True)), None, r"groups of 2 .*at \(3,\) of dim 0"),
        (cut, Rule(pattern=Pattern(group=RowGroup(1))), None, r"groups of 'fc'.*rows"),
        (cut, Rule(score=lambda w, c: w), None, r"'fc'.*elementwise = True"),
        (cut, Rule(score="lamp"), None, r"'fc' that looks at one entry at a time; got LAMP"),
        (cut, Rule(score="wanda"), None, r"without statistics.*'fc'; got W.*needs input_norm"),
        (cut, Rule(score="taylor"), grads, r"gradient of 'fc' in the shards"),
        (wide, Rule(pattern=Channel(0)), None, r"'fc'.*norm='l2'"),
        (cut, Rule(0.5, pattern=Unstructured(scope=GlobalGroup(0.1))), None,
         r"scope='global' for 'fc'.*budget"),
        ({"fc": partial}, Rule(), None, r"'fc'; got P.*a sum over processes"),
        ({"fc.bias": bias}, PruneConfig().set_module_name("fc.bias", Rule(pattern=Kernel())), None,
         "'fc.bias': Expected at least 2 dims"),
    ]  # fmt: skip
    for params, rule, given, message in cases:
        with pytest.raises(ConfigError, match=message):
            sharded_masks(params, 0, rule, grads=given)
