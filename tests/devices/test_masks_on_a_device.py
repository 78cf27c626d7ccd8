"""The pure core on another device: the CPU's bits, in little memory, and nothing left behind."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from purprune import (
    NM,
    Block,
    Channel,
    GlobalGroup,
    NaNError,
    Pattern,
    PruneConfig,
    Rule,
    Unstructured,
    apply_masks,
    bisecting,
    compute_masks,
    infer_masks,
    pack_masks,
    search_permutation,
    sparsegpt,
    sparsity,
    unpack_masks,
)
from purprune.patterns import RowGroup
from strategies import (
    PATTERNS,
    SCORES,
    exact_values,
    global_patterns_for,
    matrix_shapes,
    members,
    patterns_for,
    sparsities,
    stats_for,
    target_of,
    weights,
)


def to(device: str, values: Any) -> Any:
    """Bring all tensors of a nested value to a device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), values)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], device: str) -> bool:
    """Tell whether all is on the device, and as expected."""
    assert {tensor.device.type for tensor in found.values()} == {device}
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].cpu(), expected[name]) for name in expected
    )


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("score", SCORES)
def test_every_pattern_and_score_gives_the_masks_of_the_cpu(
    device: str, pattern: str, score: str
) -> None:
    """Defends scores, statistics and groups against tensors of two devices in one operation."""
    shape = (8, 20) if "transposable" in pattern else (8, 20, 3, 3)
    rule = Rule(target_of(PATTERNS[pattern], 0.6), pattern=PATTERNS[pattern], score=SCORES[score])
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.randint(-8, 9, shape, generator=generator) / 4 for name in ("a", "b")}
    grads = {name: torch.randint(-4, 5, shape, generator=generator) / 4 for name in params}
    stats = {name: stats_for(weight) for name, weight in params.items()}
    try:
        expected = compute_masks(params, 0, rule, grads=grads, stats=stats)
    except ValueError:
        pytest.skip("the score is not for this pattern")
    there = to(device, {"grads": grads, "stats": stats})
    assert same(compute_masks(to(device, params), 0, rule, **there), expected, device)


@given(st.data())
def test_masks_nest_and_keep_to_a_floor_as_on_the_cpu(device: str, data: st.DataObject) -> None:
    """Defends prev, floor and purity on every unit and group, for every dtype, tie and infinity."""
    w = {"w": data.draw(weights(matrix_shapes, exact_values))}
    pattern = data.draw(patterns_for(w["w"].dim()))
    floor, prev, last = (
        Rule(target_of(pattern, s), pattern=pattern)
        for s in sorted(data.draw(st.lists(sparsities, min_size=3, max_size=3)))
    )
    given = {"floor": compute_masks(w, 0, floor)}
    given["prev"] = compute_masks(w, 0, prev)
    there, given_there = to(device, w), to(device, given)
    for rule in (floor, last):
        expected = compute_masks(w, 0, rule, **given)
        assert same(compute_masks(there, 0, rule, **given_there), expected, device)
    assert same(there, w, device)
    assert same(given_there["prev"], given["prev"], device)


@given(members(matrix_shapes), sparsities, st.data())
def test_tensors_that_share_a_count_give_the_masks_of_the_cpu(
    device: str, params: dict[str, Tensor], s: float, data: st.DataObject
) -> None:
    """Defends counting in buckets, and ties over tensors and dtypes."""
    dims = min(weight.dim() for weight in params.values())
    rule = Rule(s, pattern=data.draw(global_patterns_for(dims)))
    expected = compute_masks(params, 0, rule)
    assert same(compute_masks(to(device, params), 0, rule), expected, device)
    prev = to(device, compute_masks(params, 0, Rule(s / 2, pattern=rule.pattern)))
    assert same(compute_masks(to(device, params), 0, rule, prev=prev), expected, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_a_large_tensor_is_halved_to_the_masks_of_the_cpu(device: str, dtype, tied: bool) -> None:
    """Defends the sizes from which on nothing is sorted, with ties in more than one chunk."""
    n = bisecting.DEVICE_CHUNK + 77
    w = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    params = {"w": w.abs().ceil() if tied else w}
    expected = compute_masks(params, 0, Rule(0.6))
    assert same(compute_masks(to(device, params), 0, Rule(0.6)), expected, device)
    assert sparsity(expected).zeros == n * 6 // 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured(),
        Pattern(group=RowGroup(0)),
        NM(2, 4),
        NM(2, 4, dim=0),
        Channel(),
        Unstructured(scope="global"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_prev", [False, True])
def test_memory_beside_the_mask_is_little(
    device: str,
    memory: Any,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    pattern: Pattern,
    with_prev: bool,
) -> None:
    """Defends 1.25 bytes for each byte of the weight, where a stable sort takes four or more."""
    for module in ("bisecting", "units", "parts"):
        monkeypatch.setattr(f"purprune.{module}.DEVICE_CHUNK", 1 << 13)
    monkeypatch.setattr(bisecting, "_SORT_UP_TO", 1 << 12)
    params = {"w": torch.randn(1024, 1024).to(dtype).to(device)}
    rule = Rule(target_of(pattern, 0.8), pattern=pattern)
    first = compute_masks(params, 0, Rule(target_of(pattern, 0.4), pattern=pattern))
    prev = first if with_prev else None
    memory.reset_peak_memory_stats()
    before = memory.memory_allocated()
    mask = compute_masks(params, 0, rule, prev=prev)["w"]
    extra = memory.max_memory_allocated() - before - mask.untyped_storage().nbytes()
    assert extra <= 1.25 * params["w"].nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_nan_is_found_and_named(device: str, dtype: torch.dtype) -> None:
    """Defends the one number that every mask fetches from the device."""
    w = torch.ones(4, 8, dtype=dtype)
    w[2, 3], w[0, 0] = math.nan, math.inf
    for pattern in (Unstructured(), NM(1, 2), Channel(), Unstructured(scope="global")):
        rule = Rule(target_of(pattern, 0.5), pattern=pattern)
        with pytest.raises(NaNError, match="'w'; got 1 NaN of 32"):
            compute_masks({"w": w.to(device)}, 0, rule)


def test_what_takes_masks_takes_them_from_the_device(device: str) -> None:
    """Defends applying, counting, finding and packing."""
    params = {"w": torch.randn(6, 10, generator=torch.Generator().manual_seed(0))}
    masks = compute_masks(params, 0, Rule(0.7))
    there, masks_there = to(device, params), to(device, masks)
    pruned = apply_masks(there, masks_there)
    assert torch.equal(pruned["w"].cpu(), apply_masks(params, masks)["w"])
    assert sparsity(masks_there).zeros == 42
    assert same(infer_masks(pruned), masks, device)
    packed = pack_masks(masks_there)
    assert same(unpack_masks(packed), masks, "cpu")


def test_searches_and_reconstruction_give_what_they_give_on_the_cpu(device: str) -> None:
    """Defends the permutation search and SparseGPT against constants of another device."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 32, generator=generator)
    inputs = torch.randn(64, 32, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs
    order = search_permutation(weight.to(device), 2, 4)
    assert torch.equal(order.cpu(), search_permutation(weight, 2, 4))
    there = sparsegpt(weight.to(device), hessian.to(device), NM(2, 4))
    for found, expected in zip(there, sparsegpt(weight, hessian, NM(2, 4)), strict=True):
        torch.testing.assert_close(found.cpu(), expected)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: torch.where(there > 0, there, here),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there @ here.T,
        lambda there, here: there.masked_fill(here > 0, 0),
        lambda there, here: here.copy_(there).numpy() @ there.numpy(),
    ],
)
def test_tensors_of_two_devices_do_not_mix(device: str, mixed: Any) -> None:
    """Defends all other tests here: what mixes devices raises, as on a GPU."""
    here = torch.randn(3, 3)
    with pytest.raises((RuntimeError, TypeError), match=r"device|numpy"):
        mixed(here.to(device), here)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), (2, 0, 3)])
@pytest.mark.parametrize("pattern", [Unstructured(), Channel(), NM(2, 4, dim=0), Block(2)], ids=str)
def test_empty_tensors_have_empty_masks(device: str, shape: tuple[int, ...], pattern) -> None:
    """Defends groups without units."""
    params = {"w": torch.zeros(shape)}
    config = PruneConfig().set_module_name("w", Rule(target_of(pattern, 0.5), pattern=pattern))
    expected = compute_masks(params, 0, config)
    assert same(compute_masks(to(device, params), 0, config), expected, device)


def test_scales_of_tensors_are_divided_by_as_on_the_cpu(device: str) -> None:
    """Defends ties of normalized scores: 49 * (1 / 49) is less than 1."""
    params = {"a": torch.ones(1, 2), "b": torch.full((1, 2), 49.0)}
    rule = Rule(0.5, pattern=Unstructured(scope=GlobalGroup(normalize="max")))
    expected = compute_masks(params, 0, rule)
    assert expected["b"].all()
    assert same(compute_masks(to(device, params), 0, rule), expected, device)
