"""Selecting without a sort: every way and every border between chunks, against a stable sort."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oracles import prune_oracle
from purprune import (
    NM,
    Block,
    Channel,
    Kernel,
    NaNError,
    Pattern,
    PruneConfig,
    Rule,
    bracketing,
    compute_masks,
    keys,
    selecting,
    threads,
    units,
)
from purprune.groups import Layout
from purprune.keys import KeyMaker
from purprune.ranking import WORDS, _by_bisecting, _by_selecting
from purprune.selecting import Span
from purprune.units import _reduced, unit_scores


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make chunks, samples and brackets so small that small tensors have many."""
    monkeypatch.setattr(selecting, "_CHUNK", 16)
    monkeypatch.setattr(bracketing, "_CHUNK", 16)
    monkeypatch.setattr(selecting, "_BRACKET_FROM", dict.fromkeys((2, 4, 8), 32))
    monkeypatch.setattr(bracketing, "_SAMPLE", 3)
    monkeypatch.setattr(bracketing, "_LINE", 2)
    monkeypatch.setattr(selecting, "_TIES_MATTER_FROM", 64)
    monkeypatch.setattr(units, "_CHUNK", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def _expected(keys: np.ndarray, k: int, gone: np.ndarray | None) -> np.ndarray:
    first = np.zeros(len(keys)) if gone is None else ~gone
    order = np.lexsort((np.arange(len(keys)), keys, first))
    keep = np.ones(len(keys), dtype=bool)
    keep[order[:k]] = False
    return keep


@given(
    st.lists(st.integers(-60, 60), min_size=1, max_size=12),
    st.integers(1, 300),
    st.integers(0, 300),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_one_large_group_is_selected_as_by_a_stable_sort(pool, n, k, rng, with_prev):
    """Defends the bracket, its ties, its misses and prev, over chunk borders and threads."""
    keys = np.array([rng.choice(pool) for _ in range(n)], dtype=np.int32)
    gone = np.array([rng.random() < 0.3 for _ in range(n)]) if with_prev else None
    k = min(k, n)
    layout, spans, make = Layout((0,), 0), [Span(0, n, n, k)], KeyMaker(False, None)
    prev = None if gone is None else torch.from_numpy(~gone)
    got = _by_selecting(torch.from_numpy(keys), layout, spans, prev, make)
    assert np.array_equal(got, _expected(keys, k, gone))
    assert torch.equal(got, _by_bisecting(torch.from_numpy(keys), layout, spans, prev, make))


@pytest.mark.parametrize("values", ["constant", "two values", "distinct", "sorted", "mostly zero"])
@pytest.mark.parametrize("s", [0.1, 0.5, 0.8, 0.99])
def test_large_groups_of_every_shape_of_data_are_exact(values: str, s: float):
    """Defends ties that fill the bracket, and data that follows any regular sample."""
    n = 1000
    generator = torch.Generator().manual_seed(1)
    w = {
        "constant": torch.ones(n),
        "two values": torch.tensor([1.0, 2.0]).repeat(n // 2),
        "distinct": torch.randperm(n, generator=generator) - 500.0,
        "sorted": torch.arange(float(n)),
        "mostly zero": torch.where(torch.rand(n, generator=generator) < 0.9, 0.0, 1.0),
    }[values].view(40, 25)
    expected = prune_oracle(w.abs(), Pattern(), Rule(s).target)
    assert torch.equal(compute_masks({"w": w}, 0, Rule(s))["w"], expected)


@pytest.mark.parametrize("n", [1 << 16, (1 << 16) + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pairs_of_key_and_index_fit_their_words(monkeypatch: pytest.MonkeyPatch, n: int, dtype):
    """Defends the last index that 16 bits hold, and the first that they do not."""
    monkeypatch.setattr(selecting, "_BRACKET_FROM", dict.fromkeys((2, 4, 8), 1 << 20))
    monkeypatch.setattr(selecting, "_CHUNK", 1 << 20)
    w = torch.ones(1, n, dtype=dtype)
    w[0, -2:] = 2.0
    for k in (1, n - 3, n - 2, n - 1):
        keep = compute_masks({"w": w}, 0, Rule(Fraction(k, n)))["w"]
        assert int(keep.sum()) == n - k
        assert keep[0, k:].all()  # all ties but the last two: by index


def test_data_at_which_a_partition_goes_astray_is_found():
    """Defends the speed: many zeros are told from distinct values, whatever their order."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randperm(4096, generator=generator).int().numpy().reshape(1, -1)
    zeros = np.where(np.arange(4096) % 5 < 4, 0, distinct)
    assert selecting._are_tied(zeros)
    assert not selecting._are_tied(distinct)


def test_the_bracket_really_is_used(monkeypatch: pytest.MonkeyPatch):
    """Defends the test above: with the partition switched off, brackets alone give the mask."""
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0)).view(80, 50)
    expected = compute_masks({"w": w}, 0, Rule(0.8))["w"]
    monkeypatch.setattr(bracketing, "_SAMPLE", 8)
    monkeypatch.setattr(selecting, "_select_rows", None)
    assert torch.equal(compute_masks({"w": w}, 0, Rule(0.8))["w"], expected)


@pytest.mark.parametrize("s", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("with_prev", [None, 0.2, 0.95])
def test_a_sample_that_misleads_costs_time_and_no_bit(monkeypatch, s, with_prev):
    """Defends the passes after a miss, also where fewer may go than went before."""
    monkeypatch.setattr(keys, "_GOLDEN", 0)  # the first unit, again and again
    w = torch.randn(999, generator=torch.Generator().manual_seed(0))
    gone = None if with_prev is None else np.random.default_rng(0).random(999) < with_prev
    prev = None if gone is None else torch.from_numpy(~gone)
    k = math.floor(999 * s)
    make, bits = KeyMaker(True, 0x7F800000), w.view(torch.int32)
    got = _by_selecting(bits, Layout((0,), 0), [Span(0, 999, 999, k)], prev, make)
    assert np.array_equal(got, _expected(w.abs().numpy(), k, gone))


@pytest.mark.parametrize("edge", [-3, -1, 0, 1, 3])
def test_few_units_are_collected_where_half_of_them_are_tied(monkeypatch, edge):
    """Defends the memory: ties at the edge of the bracket are counted and not collected."""
    n = 40_000
    monkeypatch.setattr(bracketing, "_CHUNK", 1 << 12)
    monkeypatch.setattr(bracketing, "_SAMPLE", 8)
    collected = []
    kth = bracketing._kth
    monkeypatch.setattr(
        bracketing, "_kth", lambda keys, *rest: (collected.append(keys.size), kth(keys, *rest))[1]
    )
    w = torch.randn(n, generator=torch.Generator().manual_seed(0))
    w[::2] = 0.0
    k = n // 2 + edge
    make, bits = KeyMaker(True, 0x7F800000), w.view(torch.int32)
    got = _by_selecting(bits, Layout((0,), 0), [Span(0, n, n, k)], None, make)
    assert np.array_equal(got, _expected(w.abs().numpy(), k, None))
    assert sum(collected) < n // 4


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record how many keys each pass over a large group collects; its sample is small."""
    collected: list[int] = []
    find = bracketing._Contest.find

    def watched(*args: Any) -> Any:
        chunks = find(*args)
        collected.append(sum(chunk.keys.size for chunk in chunks if chunk.keys is not None))
        return chunks

    monkeypatch.setattr(bracketing, "_CHUNK", 1 << 12)
    monkeypatch.setattr(bracketing, "_SAMPLE", 16)
    monkeypatch.setattr(bracketing._Contest, "find", watched)
    return collected


@pytest.mark.parametrize("edge", [-3, -1, 0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_heavy_tie_at_the_end_of_a_bracket_is_not_collected(monkeypatch, passes, dtype, edge):
    """Defends the memory: a third of all is tied below the k-th, and reaches into its bracket."""
    n, tied = 30_000, 10_000
    monkeypatch.setattr(bracketing, "_SAMPLE", 8)
    w = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 1
    w[torch.randperm(n, generator=torch.Generator().manual_seed(1))[:tied]] = 0.5
    w = w.to(dtype)
    k = tied + 900 + edge
    make = KeyMaker(True, int(torch.tensor(math.inf, dtype=dtype).view(WORDS[dtype.itemsize])))
    bits = w.view(WORDS[dtype.itemsize])
    got = _by_selecting(bits, Layout((0,), 0), [Span(0, n, n, k)], None, make)
    assert np.array_equal(got, _expected(w.double().numpy(), k, None))
    assert sum(passes) < tied


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_signed_scores_are_found_in_one_pass(passes, dtype, share):
    """Defends the speed: the sample has the signs of what it stands for."""
    n = 20_000
    w = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits, k = w.view(WORDS[dtype.itemsize]), int(n * share)
    infinity = int(torch.tensor(math.inf, dtype=dtype).view(bits.dtype))
    got = _by_selecting(bits, Layout((0,), 0), [Span(0, n, n, k)], None, KeyMaker(False, infinity))
    assert np.array_equal(got, _expected(w.double().numpy(), k, None))
    assert len(passes) <= (2 if dtype == torch.bfloat16 else 1)


def test_small_groups_that_shrink_are_partitioned(monkeypatch):
    """Defends the speed of many small tensors: what serves N:M has tables for few lengths."""
    monkeypatch.setattr(selecting, "_by_shifts", None)
    generator = torch.Generator().manual_seed(0)
    for n in range(18, 60):
        w, k = torch.randn(n, generator=generator), n - 5
        prev = torch.rand(n, generator=generator) < 12 / n
        make, bits = KeyMaker(True, 0x7F800000), w.view(torch.int32)
        got = _by_selecting(bits, Layout((0,), 0), [Span(0, n, n, k)], prev, make)
        assert np.array_equal(got, _expected(w.abs().numpy(), k, ~prev.numpy()))


def test_ties_of_16_bits_are_counted_in_about_one_pass(passes):
    """Defends the speed: few values hold the k-th, and a miss says where to look next."""
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    trials = 20
    for _ in range(trials):
        w = torch.randint(1, 40, (n,), generator=generator).bfloat16()
        bits, make = w.view(torch.int16), KeyMaker(True, 0x7F80)
        got = _by_selecting(bits, Layout((0,), 0), [Span(0, n, n, 16_000)], None, make)
        assert np.array_equal(got, _expected(w.float().numpy(), 16_000, None))
    assert trials <= len(passes) <= 2 * trials
    assert sum(passes) < trials * n // 100


@pytest.mark.parametrize("deviations", [4, 8])
@given(
    st.lists(st.integers(-50, 50), max_size=60),
    st.fractions(0, 1),
    st.integers(-60, 0),
    st.integers(0, 60),
)
def test_a_bracket_lies_between_what_is_known(deviations, values, share, least, most):
    """Defends the end of the search: a bracket has keys, and none that were ruled out."""
    sample = np.array([v for v in values if least <= v <= most], dtype=np.int16)
    low, high = bracketing._bracket(sample, float(share), deviations, least, most)
    assert least <= low <= high <= most


def test_chunks_really_are_shared_among_threads(monkeypatch: pytest.MonkeyPatch):
    """Defends all tests here: without a pool they would prove nothing about threads."""
    w = torch.randn(80, 50, generator=torch.Generator().manual_seed(0))
    rules = [Rule(0.8), Rule(pattern=NM(2, 4)), Rule(0.5, pattern=Channel())]
    for rule in rules:
        compute_masks({"w": w}, 0, rule)
        with monkeypatch.context() as patch:
            patch.setattr(threads, "_pool", None)
            with pytest.raises(TypeError):
                compute_masks({"w": w}, 0, rule)


@pytest.mark.parametrize("pattern", [NM(2, 4, dim=0), NM(1, 3, dim=-1), NM(7, 40, dim=0)])
def test_groups_of_a_long_vector_are_groups(pattern: Pattern):
    """Defends N:M on 1-D tensors, which are one row of many groups."""
    w = torch.randn(1001, generator=torch.Generator().manual_seed(0)).double()
    got = compute_masks({"w": w}, 0, PruneConfig().set_module_name("w", Rule(pattern=pattern)))
    assert torch.equal(got["w"], prune_oracle(w.abs(), pattern, pattern.target))


@pytest.mark.parametrize("position", [0, 17, 999])
def test_nan_is_found_in_every_chunk(position: int):
    """Defends the check that runs inside the pass; inf beside it is no NaN."""
    w = torch.ones(20, 50)
    w.view(-1)[position] = math.nan
    w.view(-1)[5] = math.inf
    for rule in (Rule(0.5), Rule(0.5, pattern=Channel()), Rule(0.5, pattern=Block((2, 3)))):
        with pytest.raises(NaNError, match="'w'; got 1 NaN of 1000"):
            compute_masks({"w": w}, 0, rule)


@pytest.mark.parametrize(
    "pattern", [Channel(), Channel(1), Kernel(size=3), Block((4, 1)), Block((3, -1, 2))]
)
@pytest.mark.parametrize("norm", ["l2", "l1", "sum"])
def test_units_reduced_in_chunks_have_the_bits_of_units_reduced_at_once(pattern: Pattern, norm):
    """Defends sums against chunk borders, ragged tails among them, and against another backend."""
    w = torch.randn(11, 7, 5, generator=torch.Generator().manual_seed(0))
    block = pattern.unit.block(w.shape)
    in_chunks = unit_scores(w, block, norm)
    at_once = _reduced(w.double(), block, norm, 0)  # torch ops, as on another device
    assert torch.equal(in_chunks, at_once)


def test_float64_norms_are_scaled_and_float32_ones_need_not_be():
    """Defends squares of 1e-200 and 1e200."""
    for factor in (2.0**-700, 2.0**700):
        w = torch.tensor([[3.0, 4.0], [1.0, 1.0], [5.0, 0.0]], dtype=torch.float64) * factor
        scores = unit_scores(w, (1, 2), "l2")
        assert scores[0] == scores[2] > scores[1] > 0
