"""Counting in many parts, on one process and on several, against one stable sort of all units."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from purprune import NaNError, counting, parts
from purprune.counting import Group, Outcome, Part, count_down, keep
from purprune.ranking import widest
from purprune.ties import share_ties
from strategies import DTYPES, any_values, exact_values, members, shapes


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make chunks so small that small tensors have many, in several threads."""
    monkeypatch.setattr(parts, "_CHUNK", 16)
    monkeypatch.setattr(parts, "DEVICE_CHUNK", 16)
    monkeypatch.setattr(parts, "_FEW", 4)  # up to 4 ties are remembered, of more it is asked again
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


class Case:
    """Some tensors, some with a previous mask or a floor, whose first k units are to go."""

    def __init__(self, data: st.DataObject, values: st.SearchStrategy[float]) -> None:
        self.tensors = list(data.draw(members(shapes, values)).values())
        self.prev = [data.draw(_flags(w)) for w in self.tensors]
        self.floor = [data.draw(_flags(w)) for w in self.tensors]
        self.absolute = data.draw(st.booleans())
        self.units = sum(w.numel() for w in self.tensors)
        self.k = data.draw(st.integers(0, self.units))
        self.bits = data.draw(st.sampled_from([1, 2, 5, 8, 16, 20]))

    def group(self, own: list[Part]) -> Group:
        sizes = tuple(w.numel() for w in self.tensors)
        return Group(own, self.k, sizes, widest(w.dtype for w in self.tensors), self.absolute)

    @property
    def whole(self) -> list[Part]:
        triples = zip(self.tensors, self.prev, self.floor, strict=True)
        return [
            Part(lambda w=w: w, i, prev, floor=floor) for i, (w, prev, floor) in enumerate(triples)
        ]

    @property
    def expected(self) -> np.ndarray:
        flat = np.concatenate([w.double().numpy().ravel() for w in self.tensors])
        keys = np.abs(flat) if self.absolute else flat + 0.0
        kept, below = (
            np.concatenate(
                [
                    np.ones(w.numel(), bool) if mask is None else mask.numpy().ravel()
                    for w, mask in zip(self.tensors, masks, strict=True)
                ]
            )
            for masks in (self.prev, self.floor)
        )
        order = np.lexsort((np.arange(self.units), keys, kept, below))
        stays = np.ones(self.units, bool)
        stays[order[: max(self.k, int((~below).sum()))]] = False
        return stays


@st.composite
def _flags(draw: st.DrawFn, of: Tensor) -> Tensor | None:
    if draw(st.booleans()):
        return None
    flags = draw(st.lists(st.booleans(), min_size=of.numel(), max_size=of.numel()))
    return torch.tensor(flags, dtype=torch.bool).reshape(of.shape)


def in_order(group: Group, outcome: Outcome) -> np.ndarray:
    """Carry along how many ties are left."""
    left, masks = outcome.ties, [np.ones(0, bool)]
    for part in group.parts:
        mask, gone = keep(group, part, outcome, left)
        left -= gone
        masks.append(mask.numpy().ravel())
    assert left == 0
    return np.concatenate(masks)


@given(st.data(), st.sampled_from([exact_values, any_values]), st.sampled_from([0, 5, 60]))
def test_the_first_k_of_many_parts_are_those_of_one_stable_sort(data, values, sample):
    """Defends ties across parts, mixed dtypes, signs, prev, floors, samples that miss."""
    case = Case(data, values)
    group = case.group(case.whole)
    (outcome,) = count_down([group], bits=case.bits, sample=sample)
    assert np.array_equal(in_order(group, outcome), case.expected)


@given(st.data())
def test_torch_on_other_devices_counts_as_numpy_does(data):
    """Defends the path of devices, run here on the CPU."""
    case = Case(data, exact_values)
    group = case.group(case.whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "_on_cpu", lambda tensor: False)
        patch.setattr(parts, "in_threads", None)
        (outcome,) = count_down([group], bits=case.bits, sample=5)
        assert np.array_equal(in_order(group, outcome), case.expected)


class Processes:
    """Threads that stand for processes: each has its own parts, all sum their counts."""

    def __init__(self, number: int) -> None:
        self.barrier = threading.Barrier(number, timeout=60)
        self.counts: list[Any] = [None] * number
        self.results: list[Any] = [None] * number

    def reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        def sum_all(counts: Tensor) -> Tensor:
            assert counts.dtype == torch.int64
            assert counts.dim() == 1
            self.counts[rank] = counts.clone()
            self.barrier.wait()
            total = sum(self.counts)
            self.barrier.wait()
            return total

        return sum_all

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        def one(rank: int) -> None:
            try:
                self.results[rank] = work(rank)
            except Exception as error:
                self.results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(self.counts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.results


@st.composite
def pieces(draw: st.DrawFn, case: Case) -> list[tuple[int, tuple[slice, ...], Part]]:
    """Cut each tensor in up to four pieces along two dims; each has an owner."""
    found = []
    for i, (w, *masks) in enumerate(zip(case.tensors, case.prev, case.floor, strict=True)):
        cuts = [draw(st.integers(0, n)) if d < 2 else n for d, n in enumerate(w.shape)]
        corners: list[tuple[slice, ...]] = [()]
        for n, cut in zip(w.shape, cuts, strict=True):
            ends = [(0, cut), (cut, n)] if cut < n else [(0, n)]
            corners = [(*corner, slice(*end)) for corner in corners for end in ends]
        for at in corners:
            offset = tuple(s.start for s in at)
            prev, floor = (None if mask is None else mask[at] for mask in masks)
            part = Part(lambda w=w, at=at: w[at], i, prev, tuple(w.shape), offset, floor)
            found.append((draw(st.integers(0, 1)), at, part))
    return found


@given(st.data())
def test_pieces_in_several_processes_have_the_masks_of_the_whole(data):
    """Defends shards of any dims, owners without a part, and ties by their global position."""
    case = Case(data, exact_values)
    cut = data.draw(pieces(case))
    processes, sample = Processes(2), data.draw(st.sampled_from([0, 20]))

    def work(rank: int) -> list[Tensor]:
        group = case.group([part for owner, _, part in cut if owner == rank])
        reduce = processes.reduce(rank)
        outcomes = count_down([group], reduce=reduce, bits=case.bits, sample=sample)
        (ties,) = share_ties([group], outcomes, reduce=reduce, bits=case.bits)
        return [keep(group, p, outcomes[0], n)[0] for p, n in zip(group.parts, ties, strict=True)]

    results = processes.run(work)
    masks = [torch.ones(w.shape, dtype=torch.bool) for w in case.tensors]
    own = [iter(result) for result in results]
    for owner, at, part in cut:
        masks[part.member][at] = next(own[owner])
    got = np.concatenate([mask.numpy().ravel() for mask in masks])
    assert np.array_equal(got, case.expected)


def test_nan_in_one_process_raises_in_all():
    """Defends against processes that wait for one that gave up."""
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor([float("nan"), 3.0])]
    processes = Processes(2)

    def work(rank: int) -> None:
        group = Group([Part(lambda: tensors[rank], rank)], 2, (2, 2), torch.float32, True)
        count_down([group], reduce=processes.reduce(rank), bits=8)

    assert [type(result) for result in processes.run(work)] == [NaNError, NaNError]


@given(st.sets(st.sampled_from(DTYPES), min_size=1))
@example({torch.bfloat16, torch.float16})
def test_the_widest_float_holds_all(dtypes):
    """Defends bfloat16 beside float16, of which neither holds the other."""
    for dtype in dtypes:
        largest = torch.tensor(torch.finfo(dtype).max, dtype=dtype)
        least = torch.tensor(1 + torch.finfo(dtype).eps, dtype=dtype)
        for value in (largest, least):
            assert value.to(widest(dtypes)).double() == value.double()


def test_rounds_are_as_few_as_the_buckets_allow():
    """Defends the number of passes over data: the sample leaves one, and none is wasted."""
    w = torch.randn(40_000, generator=torch.Generator().manual_seed(0))
    for dtype, bits, sample, most in (
        (torch.float32, 8, 0, 4),
        (torch.float32, 16, 0, 2),
        (torch.bfloat16, 15, 0, 1),
        (torch.float32, 18, 4096, 1),
    ):
        reads: list[Tensor] = []
        scores = w.to(dtype)
        part = Part(lambda reads=reads, scores=scores: reads.append(scores) or scores, 0)
        group = Group([part], 30_000, (len(w),), dtype, True)
        count_down([group], bits=bits, sample=sample)
        assert len(reads) - bool(sample) <= most


@pytest.mark.parametrize(("tied", "again"), [(4, False), (5, True), (16, True)])
def test_only_few_ties_of_a_chunk_are_remembered(monkeypatch, tied, again):
    """Defends memory where all are tied, and one pass where they are not; the first ties go."""
    w = torch.arange(10.0, 42).bfloat16()
    w[16 : 16 + tied] = 9
    group = Group([Part(lambda: w, 0)], 3, (32,), torch.bfloat16, True)
    (outcome,) = count_down([group])
    calls = []
    chunks = parts._chunks
    monkeypatch.setattr(parts, "_chunks", lambda *a: calls.append(a) or chunks(*a))
    mask, gone = keep(group, group.parts[0], outcome, outcome.ties)
    assert (gone, (~mask).nonzero().flatten().tolist()) == (3, [16, 17, 18])
    assert len(calls) - 2 == again  # besides the two threads'


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_counted_in_one_pass_without_a_sample(dtype, absolute):
    """Defends checkpoints that are not in the page cache: a sample would read all of them."""
    w = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    w[0], w[1] = float("inf"), float("-inf")  # the ends of what there is
    reads: list[Tensor] = []
    part = Part(lambda: reads.append(w) or w, 0)
    for k in (1, 25_000, 49_999):
        reads.clear()
        group = Group([part], k, (len(w),), dtype, absolute)
        (outcome,) = count_down([group], sample=1000)
        assert len(reads) == 1
        mask, _ = keep(group, part, outcome, outcome.ties)
        scores = w.float().abs() if absolute else w.float()
        first = np.argsort(scores.numpy(), kind="stable")[:k]
        assert np.array_equal(np.flatnonzero(~mask.numpy()), np.sort(first))


@pytest.mark.parametrize(
    ("dtype", "sample", "looked"),
    [
        (torch.float32, 10_000, False),  # two rounds of 16 bits
        (torch.float32, 9_999, True),
        (torch.float64, 39_999, True),  # four rounds
        (torch.float64, 40_000, False),
        (torch.bfloat16, 1, False),  # one round
    ],
    ids=str,
)
def test_a_sample_is_taken_where_it_saves_time(monkeypatch, dtype, sample, looked):
    """Defends small groups, whose sample would take longer than their count."""
    monkeypatch.setattr(parts, "_CHUNK", 1 << 14)
    taken, sampled = [], counting.sampled

    def watched(*args: Any) -> Tensor:
        taken.append(args)
        return sampled(*args)

    monkeypatch.setattr(counting, "sampled", watched)
    w = torch.rand(40_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    group = Group([Part(lambda: w, 0)], 30_000, (len(w),), dtype, True)
    (outcome,) = count_down([group], bits=16, sample=sample)
    mask, _ = keep(group, group.parts[0], outcome, outcome.ties)
    assert int((~mask).sum()) == 30_000
    assert bool(taken) == looked


def test_a_sample_that_misleads_costs_a_round_and_no_bit(monkeypatch: pytest.MonkeyPatch):
    """Defends the way back from a window on either side of the rank."""
    w = torch.arange(1.0, 1001)
    group = Group([Part(lambda: w, 0)], 500, (1000,), torch.float32, True)
    for wrong in (w[:100], w[900:]):
        monkeypatch.setattr(counting, "sampled", lambda *_, wrong=wrong: wrong)
        (outcome,) = count_down([group], sample=100)
        mask, _ = keep(group, group.parts[0], outcome, outcome.ties)
        assert mask.tolist() == [False] * 500 + [True] * 500
