"""The laws of the design as properties, against slow oracles; laws 9 and 10 are the adapter's."""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from oracles import prune_oracle
from purprune import NaNError, Pattern, Rule, Taylor, compute_masks
from purprune.config import PruneConfig
from purprune.ranking import count
from strategies import (
    DTYPES,
    any_values,
    exact_sparsity,
    exact_values,
    matrix_shapes,
    patterns_for,
    shapes,
    sparsities,
    target_of,
    views,
    weights,
)


def only(rule: Rule) -> PruneConfig:
    return PruneConfig().set_module_name("w", rule)


def mask_of(weight: Tensor, rule: Rule, step: int = 0, **more: object) -> Tensor:
    return compute_masks({"w": weight}, step, only(rule), **more)["w"]


def same_bits(a: Tensor, b: Tensor) -> bool:
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    return torch.equal(a.contiguous().view(words), b.contiguous().view(words))


@given(st.integers(0, 2**60), st.integers(0, 10**9))
@example(100, 290_000_000)
@example(95, 400_000_000)
@example(2**24 + 1, 1_000_000_000)
@example(10, 800_000_000)
def test_law_1_counts_are_the_floor_of_the_decimal_that_was_written(n: int, billionths: int):
    """Defends exactness against float32 sizes and against float products below a whole number."""
    written = billionths / 10**9
    assert count(n, written) == n * billionths // 10**9


@given(weights(), sparsities)
def test_laws_1_and_2_unstructured_masks_are_the_first_k_of_a_stable_sort(w: Tensor, s: float):
    """Defends count and order for every dtype, tie, inf and shape, 0-d and empty ones too."""
    expected = prune_oracle(w.double().abs(), Pattern(), Fraction(str(s)))
    assert torch.equal(mask_of(w, Rule(s)), expected)


@given(st.data())
def test_laws_1_2_and_3_hold_for_every_unit_and_group(data: st.DataObject):
    """Defends ragged tails, unit sums, group borders and the order among tied units."""
    w = data.draw(weights(shapes.filter(len), exact_values))
    pattern = data.draw(patterns_for(w.dim()))
    s = data.draw(sparsities)
    expected = prune_oracle(w.abs(), pattern, exact_sparsity(pattern, s))
    got = mask_of(w, Rule(target_of(pattern, s), pattern=pattern))
    assert got.dtype == torch.bool
    assert got.shape == w.shape
    assert got.device == w.device
    assert torch.equal(got, expected)


@given(st.data())
def test_law_2_every_backend_gives_the_same_masks(data: st.DataObject):
    """Defends the one order: pairs, partition and the sort of other devices agree with argsort."""
    from purprune import selecting
    from purprune.groups import Layout
    from purprune.keys import KeyMaker
    from purprune.ranking import _by_bisecting, _by_selecting
    from purprune.selecting import Span

    rows = data.draw(st.integers(1, 4))
    n = data.draw(st.integers(1, 20))
    k = data.draw(st.integers(0, n))
    drawn = data.draw(st.lists(st.integers(-3, 3), min_size=rows * n, max_size=rows * n))
    keys = torch.tensor(drawn, dtype=torch.int32).view(rows, n)
    order = np.argsort(keys.numpy(), axis=1, kind="stable")[:, :k]
    expected = np.ones((rows, n), dtype=bool)
    np.put_along_axis(expected, order, False, axis=1)
    layout, spans, make = Layout((0, 1), 1), [Span(0, n, n, k)], KeyMaker(False, None)
    assert np.array_equal(_by_selecting(keys, layout, spans, None, make), expected)
    assert np.array_equal(_by_bisecting(keys, layout, spans, None, make), expected)
    if 0 < k < n:
        ways = [selecting._by_shifts, selecting._by_partition, selecting._by_threshold]
        ways += [selecting._by_words] if n in selecting._WORDS else []
        for way, dtype in itertools.product(ways, (np.int16, np.int32, np.int64)):
            assert np.array_equal(way(keys.numpy().astype(dtype), k), expected), (way, dtype)
        for dtype, wide in ((np.int16, np.int32), (np.int16, np.int64), (np.int32, np.int64)):
            got = selecting._by_pairs(keys.numpy().astype(dtype), k, np.dtype(wide))
            assert np.array_equal(got, expected), (dtype, wide)


@given(st.data())
def test_law_4_arguments_and_global_states_stay_as_they_were(data: st.DataObject):
    """Defends purity: no argument changes a bit, no random generator its state."""
    w = data.draw(weights(matrix_shapes, exact_values))
    pattern = data.draw(patterns_for(w.dim()))
    rule = Rule(target_of(pattern, 0.5), pattern=pattern, score=data.draw(_scores))
    grads, finite = {"w": torch.ones_like(w)}, torch.where(w.isinf(), 0.5, w)
    prev = {"w": mask_of(finite, rule, grads=grads)}
    kept = finite.clone(), grads["w"].clone(), prev["w"].clone()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    mask_of(finite, rule, 3, prev=prev, grads=grads)
    assert same_bits(finite, kept[0])
    assert same_bits(grads["w"], kept[1])
    assert torch.equal(prev["w"], kept[2])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


_scores = st.sampled_from(["magnitude", Taylor(), {"kind": "random", "seed": 1}])


@given(st.data())
def test_law_4_views_and_thread_counts_change_no_bit(data: st.DataObject):
    """Defends one result for a contiguous tensor, a view of it, and another thread count."""
    w = data.draw(weights(matrix_shapes, st.floats(-100, 100, width=32)))
    pattern = data.draw(patterns_for(w.dim()))
    rule = Rule(target_of(pattern, 0.5), pattern=pattern)
    expected = mask_of(w, rule)
    assert torch.equal(mask_of(data.draw(views(w)), rule), expected)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(mask_of(w, rule), expected)
    finally:
        torch.set_num_threads(threads)


_DIGEST = """
import hashlib, torch
from purprune import *
w = torch.linspace(-3, 5, 1_200_000).sin().view(1500, 40, 20).to(torch.{dtype})
rules = [Rule(0.7), Rule(0.3, pattern=Channel()), Rule(0.6, pattern=Block((4, 3))),
         Rule(pattern=NM(2, 4)), Rule(0.9, score=Random(5)),
         Rule(0.5, pattern=Channel(1, norm="l1"))]
digest = hashlib.sha256()
for rule in rules:
    digest.update(compute_masks({{"w": w}}, 0, rule)["w"].contiguous().numpy().tobytes())
print(digest.hexdigest())
"""


def test_law_4_another_process_with_other_threads_and_hash_seed_gives_the_same_bits():
    """Defends masks against PYTHONHASHSEED, thread counts and the state of this process."""
    code = _DIGEST.format(dtype="float32")
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    scope: dict[str, object] = {}
    exec(code.replace("print(digest.hexdigest())", "result = digest.hexdigest()"), scope)
    assert found == {scope["result"]}


@given(st.data())
def test_law_5_with_prev_what_was_pruned_stays_pruned_and_the_count_is_exact(data: st.DataObject):
    """Defends nesting on weights that changed in between, for every pattern and score."""
    before = data.draw(weights(matrix_shapes, exact_values, (torch.float32,)))
    n = before.numel()
    drawn = data.draw(st.lists(exact_values, min_size=n, max_size=n))
    after = torch.tensor(drawn, dtype=torch.float32).view(before.shape)
    pattern = data.draw(patterns_for(before.dim()))
    low, high = sorted([data.draw(sparsities), data.draw(sparsities)])
    if pattern.target is None:
        first, second = Rule(low, pattern=pattern), Rule(high, pattern=pattern)
    else:  # the schedule of N:M grows: floor(m * s)
        goal = float(pattern.target)
        first = second = Rule(
            pattern=pattern, schedule=lambda t: [min(low, goal), min(high, goal)][t]
        )
    prev = mask_of(before, first, 0)
    got = mask_of(after, second, 1 if pattern.target is not None else 0, prev={"w": prev})
    assert not bool((got & ~prev).any()), "a pruned entry came back"
    step = 1 if pattern.target is not None else 0
    expected = prune_oracle(after.abs(), pattern, second.sparsity_at(step), prev)
    assert torch.equal(got, expected)


@given(st.data())
def test_law_5_without_prev_masks_of_the_same_weights_nest(data: st.DataObject):
    """Defends that a higher sparsity prunes a superset when nothing else changes."""
    w = data.draw(weights(matrix_shapes, exact_values))
    pattern = data.draw(patterns_for(w.dim()).filter(lambda p: p.target is None))
    low, high = sorted([data.draw(sparsities), data.draw(sparsities)])
    less = mask_of(w, Rule(low, pattern=pattern))
    more = mask_of(w, Rule(high, pattern=pattern))
    assert not bool((more & ~less).any())


@given(st.data())
def test_law_6_zero_prunes_nothing_and_one_prunes_everything(data: st.DataObject):
    """Defends both ends for every pattern without a target of its own."""
    w = data.draw(weights(matrix_shapes))
    pattern = data.draw(patterns_for(w.dim()).filter(lambda p: p.target is None))
    assert bool(mask_of(w, Rule(0.0, pattern=pattern)).all())
    assert not bool(mask_of(w, Rule(1.0, pattern=pattern)).any())


@given(st.data())
def test_law_7_half_weights_give_the_mask_of_their_float32_upcast(data: st.DataObject):
    """Defends full precision: no square underflows or overflows in half precision."""
    w = data.draw(weights(matrix_shapes, any_values, (torch.bfloat16, torch.float16)))
    pattern = data.draw(patterns_for(w.dim()))
    rule = Rule(target_of(pattern, 0.5), pattern=pattern)
    assert torch.equal(mask_of(w, rule), mask_of(w.float(), rule))


@given(st.data(), st.integers(-60, 60))
def test_law_7_scaling_by_a_power_of_two_changes_no_magnitude_mask(
    data: st.DataObject, exponent: int
):
    """Defends norms against underflow and overflow of the accumulator, float64 weights too."""
    w = data.draw(weights(matrix_shapes, exact_values, (torch.float32, torch.float64)))
    exponent = exponent if w.dtype == torch.float32 else exponent * 12
    scaled = w * 2.0**exponent
    assume(torch.equal(scaled / 2.0**exponent, w))
    pattern = data.draw(patterns_for(w.dim()))
    rule = Rule(target_of(pattern, 0.5), pattern=pattern)
    assert torch.equal(mask_of(w, rule), mask_of(scaled, rule))


@given(weights(matrix_shapes), st.data(), sparsities)
def test_law_8_nan_raises_and_names_the_parameter_and_the_count(
    w: Tensor, data: st.DataObject, s: float
):
    """Defends against NaN that is ranked somewhere, at every sparsity and for every pattern."""
    at = data.draw(st.sets(st.integers(0, w.numel() - 1), min_size=1))
    w.view(-1)[list(at)] = math.nan
    pattern = data.draw(patterns_for(w.dim()))
    with pytest.raises(NaNError, match=rf"'w'; got {len(at)} NaN of {w.numel()}"):
        mask_of(w, Rule(target_of(pattern, s), pattern=pattern))


@pytest.mark.parametrize("dtype", DTYPES)
def test_law_8_infinities_rank_highest_and_a_pruned_one_becomes_zero(dtype: torch.dtype):
    """Defends against inf * 0 = NaN, and against inf mistaken for NaN."""
    from purprune import apply_masks

    w = torch.tensor([[math.inf, -math.inf, 1.0, 3.0]], dtype=dtype)
    assert mask_of(w, Rule(0.5)).tolist() == [[True, True, False, False]]
    assert apply_masks({"w": w}, {"w": mask_of(w, Rule(1.0))})["w"].tolist() == [[0.0] * 4]


def test_the_largest_tensor_here_is_past_float32_counting():
    """Defends counts above 2**24, where float32 formulas miss: every bit of the mask counts."""
    w = torch.zeros(2**24 + 3)
    mask = mask_of(w, Rule(0.3))
    k = (2**24 + 3) * 3 // 10
    assert int((~mask).sum()) == k
    assert not bool(mask[:k].any()), "ties go by index"
