"""How a total is divided: the closed form against giving one seat after the other."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from oracles import apportion_oracle
from purprune import ConfigError
from purprune.allocations import apportion

weights = st.one_of(
    st.integers(0, 40),
    st.fractions(0, 50, max_denominator=30),
    st.sampled_from([1, 2, 1000, Fraction(1, 997), Fraction(10**30 + 1, 10**28)]),
)
ones, quanta = st.just(1), st.sampled_from([1, 1, 2, 3, 7])


@st.composite
def tensors(draw, sizes=ones):
    """Draw weights, caps and quanta; equal ones make ties, small caps and zeros make full ones."""
    n = draw(st.integers(1, 8))
    pool = st.sampled_from(draw(st.lists(weights, min_size=1, max_size=n)))
    caps = st.integers(0, 40)
    return [[draw(of) for _ in range(n)] for of in (pool, caps, sizes)]


def most(given_, caps, sizes):
    return sum(cap // size * size for w, cap, size in zip(given_, caps, sizes, strict=True) if w)


def real_shares(total, given_, caps):
    """Return the water-filled solution, one full tensor after the other."""
    full: set[int] = set()
    while True:
        rest = [i for i in range(len(caps)) if i not in full and given_[i]]
        left = total - sum(caps[i] for i in full)
        level = Fraction(left) / sum(map(Fraction, (given_[i] for i in rest))) if rest else 0
        over = [i for i in rest if level * given_[i] > caps[i]]
        if not over:
            return [caps[i] if i in full else level * given_[i] for i in range(len(caps))]
        full.update(over)


@given(tensors(), st.data())
@example(([1, 1, 1], [9, 9, 9], [1, 1, 1]), None)
def test_the_closed_form_is_one_seat_after_the_other(drawn, data):
    """Defends order and ties: the first tensor first, and caps and weights of 0."""
    given_, caps, sizes = drawn
    top = most(given_, caps, sizes)
    total = top // 2 if data is None else data.draw(st.integers(0, top))
    assert apportion(total, given_, caps) == apportion_oracle(given_, caps, sizes)[total]


@given(tensors())
def test_totals_are_exact_within_caps_and_nobody_loses_a_seat_as_they_grow(drawn):
    """Defends the laws: exact, capped, house-monotone, and both ends."""
    given_, caps, sizes = drawn
    before = [0] * len(caps)
    for total in range(most(given_, caps, sizes) + 1):
        seats = apportion(total, given_, caps)
        assert sum(seats) == total
        assert all(a <= b <= cap for a, b, cap in zip(before, seats, caps, strict=True))
        before = seats
    assert before == [cap if w else 0 for w, cap in zip(given_, caps, strict=True)]


@given(tensors(), st.data())
def test_seats_are_near_the_real_shares(drawn, data):
    """Defends proportion: at most max(1, n - 1) / 2 seats away from the water-filled solution."""
    given_, caps, sizes = drawn
    total = data.draw(st.integers(0, most(given_, caps, sizes)))
    bound = Fraction(max(1, len(caps) - 1), 2)
    shares = real_shares(total, given_, caps)
    for seats, share in zip(apportion(total, given_, caps), shares, strict=True):
        assert abs(seats - share) <= bound


@given(tensors(quanta), st.data())
def test_quanta_reach_what_one_after_the_other_passes_by_and_no_more(drawn, data):
    """Defends rows with equal counts, and the error that says the nearest totals."""
    given_, caps, sizes = drawn
    reached = apportion_oracle(given_, caps, sizes)
    total = data.draw(st.integers(0, most(given_, caps, sizes)))
    if total in reached:
        assert apportion(total, given_, caps, quanta=sizes) == reached[total]
        return
    below, above = max(t for t in reached if t < total), min(t for t in reached if t > total)
    with pytest.raises(ConfigError, match=f"got {total}.*{below} and {above}"):
        apportion(total, given_, caps, quanta=sizes)


def test_a_billion_seats_are_not_given_one_by_one():
    """Defends the closed form: no seat that was given was due later than one that was not."""
    caps = [10**7 + i for i in range(500)]
    given_ = [Fraction(i % 37 + 1, i % 11 + 1) for i in range(500)]
    seats = apportion(10**9, given_, caps)
    assert sum(seats) == 10**9
    rows = [*zip(seats, given_, caps, strict=True)]
    last = max(Fraction(2 * n - 1) / w for n, w, _ in rows if n)
    assert last <= min(Fraction(2 * n + 1) / w for n, w, cap in rows if n < cap)


@pytest.mark.parametrize("total", [-1, 31])
def test_what_the_caps_do_not_allow_is_refused(total):
    """Defends against a total that silently becomes another one; weight 0 takes nothing."""
    with pytest.raises(ConfigError, match=rf"in \[0, 30\].*got {total}"):
        apportion(total, [1, 2, 0], [10, 20, 5])
    with pytest.raises(ConfigError, match="weights >= 0; got -1"):
        apportion(3, [1, -1], [4, 4])


def test_nothing_is_divided_among_nobody():
    """Defends the empty case."""
    assert apportion(0, [], []) == []
