"""Selecting with torch ops, as other devices do, on the CPU: every way against a stable sort."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purprune import NaNError, bisecting
from purprune.groups import Layout
from purprune.keys import KeyMaker
from purprune.ranking import WORDS, _by_bisecting, _by_selecting
from purprune.selecting import Span
from strategies import DTYPES, weights

WAYS = {
    "shifts": lambda keys, kept, k, among: bisecting._by_shifts(keys, kept, k),
    "sort": bisecting._by_sort,
    "halves": bisecting._by_halves,
}
LAYOUTS = {
    "whole": (Layout((0, 1, 2), 0), None),
    "rows": (Layout((0, 1, 2), 1), None),
    "rows of dim 1": (Layout((1, 0, 2), 1), None),
    "every 4 of dim 1": (Layout((0, 2, 1), 2), 4),
    "every 17 of dim 0": (Layout((1, 2, 0), 2), 17),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make chunks so small that small tensors have many, and what is sorted even smaller."""
    monkeypatch.setattr(bisecting, "DEVICE_CHUNK", 16)
    monkeypatch.setattr(bisecting, "_SORT_UP_TO", 8)


def _expected(keys: np.ndarray, kept: np.ndarray, k: int) -> np.ndarray:
    keep = np.ones(keys.shape, dtype=bool)
    for row in range(len(keys)):
        order = np.lexsort((np.arange(keys.shape[1]), keys[row], kept[row]))
        keep[row, order[:k]] = False
    return keep


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("word", [torch.int16, torch.int32, torch.int64], ids=str)
@given(data=st.data())
def test_every_way_keeps_all_but_the_first_k(way: str, word: torch.dtype, data: st.DataObject):
    """Defends ties, rows that kept too few and rows that kept too many, and the last key of all."""
    rows, size = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, size - 1))
    top = torch.iinfo(word).max - 1
    pool = data.draw(st.lists(st.integers(-top, top), min_size=1, max_size=9))
    drawn = data.draw(
        st.lists(st.sampled_from([*pool, top, -top]), min_size=rows * size, max_size=rows * size)
    )
    keys = torch.tensor(drawn, dtype=word).view(rows, size)
    share = data.draw(st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    kept = np.ones((rows, size), bool) if share is None else rng.random((rows, size)) < share
    got = WAYS[way](keys, None if share is None else torch.from_numpy(kept), k, (-top, top))
    assert np.array_equal(got, _expected(keys.numpy(), kept, k))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(data=st.data())
def test_other_devices_select_what_the_cpu_selects(layout: str, data: st.DataObject):
    """Defends chunks along any dim, ragged tails, empty tensors, signs and -0, for every dtype."""
    (order, lead, _), size = LAYOUTS[layout]
    longest = [40 if size == 17 and dim == order[-1] else 6 for dim in range(3)]
    shape = [data.draw(st.integers(0, n)) for n in longest]
    w = data.draw(weights(st.just(shape)))
    fitted = Layout(order, lead, size)
    columns = math.prod(shape[d] for d in order[lead:])
    spans = [Span(*span, data.draw(st.integers(0, span[2]))) for span in fitted.spans(columns)]
    infinity = int(torch.tensor(math.inf, dtype=w.dtype).view(WORDS[w.itemsize]))
    make = KeyMaker(data.draw(st.booleans()), infinity)
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    prev = torch.from_numpy(rng.random(shape) < data.draw(st.sampled_from([0.2, 0.7])))
    bits = w.view(WORDS[w.itemsize])
    for before in (None, prev):
        got = _by_bisecting(bits, fitted, spans, before, make)
        assert torch.equal(got, _by_selecting(bits, fitted, spans, before, make))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_found_by_other_devices(dtype: torch.dtype):
    """Defends the check in keys of either sign; infinities beside it are no NaN."""
    w = torch.tensor([1.0, -math.inf, math.inf, 2.0] * 8, dtype=dtype)
    bits, layout, spans = w.view(WORDS[w.itemsize]), Layout((0,), 0), [Span(0, 32, 32, 5)]
    infinity = int(bits[2])
    assert int(_by_bisecting(bits, layout, spans, None, KeyMaker(False, infinity)).sum()) == 27
    for value in (math.nan, -math.nan):
        w[-1] = value
        with pytest.raises(NaNError):
            _by_bisecting(bits, layout, spans, None, KeyMaker(False, infinity))


@pytest.mark.parametrize(
    ("units", "group", "sorted_up_to", "way"),
    [(60, 4, 8, "_by_shifts"), (60, 20, 60, "_by_sort"), (60, 20, 8, "_by_halves")],
)
def test_groups_and_tensors_of_every_size_have_their_way(
    monkeypatch: pytest.MonkeyPatch, units: int, group: int, sorted_up_to: int, way: str
):
    """Defends the tests above against sizes that never reach what they are for."""
    monkeypatch.setattr(bisecting, "DEVICE_CHUNK", 64)
    monkeypatch.setattr(bisecting, "_SORT_UP_TO", sorted_up_to)
    called = []
    for name in ("_by_shifts", "_by_sort", "_by_halves"):
        real = getattr(bisecting, name)
        monkeypatch.setattr(
            bisecting, name, lambda *a, name=name, real=real: called.append(name) or real(*a)
        )
    bits = torch.arange(units, dtype=torch.int32).view(3, -1)
    spans = [Span(0, units // 3, group, group // 2)]
    make = KeyMaker(False, None)
    keep = _by_bisecting(bits, Layout((0, 1), 1, group), spans, None, make)
    assert set(called) == {way}
    assert int(keep.sum()) == units // 2
