"""Transposable N:M: exact in rows and columns, of the largest kept sum, the first of equals."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from oracles import even_masks, transposable_oracle
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
    apply_masks,
    compute_masks,
    plan,
    sparsity,
)
from purprune.augmenting import cheapest
from purprune.given import refuse_unfit_floor, refuse_unfit_masks
from purprune.patterns import ChannelUnit, TransposableGroup
from purprune.transposable import _of_all, lines_kept
from strategies import DTYPES, any_values, exact_values, views, weights

GOLDEN = torch.arange(1.0, 65537.0).mul(0.6180339887498949).frac()


def only(rule: Rule) -> PruneConfig:
    return PruneConfig().set_module_name("w", rule)


def mask_of(weight: Tensor, rule: Rule, step: int = 0, **more: object) -> Tensor:
    return compute_masks({"w": weight}, step, only(rule), **more)["w"]


@st.composite
def shapes_for(draw: st.DrawFn, group: TransposableGroup, dims: int) -> list[int]:
    """Draw a shape of which the group's dims are whole blocks, or none."""
    shape = draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))
    for dim in group.dims:
        shape[dim] = group.m * draw(st.integers(0, 2))
    return shape


@st.composite
def cases(
    draw: st.DrawFn, values: st.SearchStrategy[float] = exact_values, least: int = 1
) -> tuple[Tensor, TransposableGroup]:
    """Draw a group of small blocks and a weight that they divide."""
    m = draw(st.integers(least, 4))
    dims = draw(st.integers(2, 4))
    pair = draw(st.permutations(range(dims)))[:2]
    group = TransposableGroup(draw(st.integers(0, m)), m, (pair[0], pair[1] - dims))
    return draw(weights(shapes_for(group, dims), values)), group


@given(cases())
def test_the_mask_is_the_first_of_the_largest_sum_among_all(case: tuple[Tensor, TransposableGroup]):
    """Defends optimum, counts and the order of ties, with infinities, in every dtype and layout."""
    w, group = case
    expected = transposable_oracle(w.double().abs(), group, Fraction(group.zeros, group.m))
    got = mask_of(w, Rule(pattern=Pattern(group=group)))
    assert torch.equal(got, expected)
    assert (got.shape, got.dtype, got.device) == (w.shape, torch.bool, w.device)


@given(cases(), st.integers(0, 8))
def test_signed_scores_count_with_their_signs(case: tuple[Tensor, TransposableGroup], seed: int):
    """Defends that only magnitudes are taken without their signs, and integers are scores too."""
    w, group = case
    assert torch.equal(
        mask_of(w, Rule(pattern=Pattern(group=group), score=lambda weight, context: weight)),
        transposable_oracle(w.double(), group, Fraction(group.zeros, group.m)),
    )
    small = lambda weight, context: (weight.nan_to_num(1, 1, 1) * 8).long() % 5  # noqa: E731
    assert torch.equal(
        mask_of(w, Rule(pattern=Pattern(group=group), score=small)),
        transposable_oracle(small(w.float(), None), group, Fraction(group.zeros, group.m)),
    )


@given(cases(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_any_values_are_within_a_step_of_the_best(case: tuple[Tensor, TransposableGroup]):
    """Defends the integers that scores are read as: 2**-42 of the block's largest, per entry."""
    w, group = case
    w = w.nan_to_num(0, 1, 1)
    got = mask_of(w, Rule(pattern=Pattern(group=group)))
    best = transposable_oracle(w.double().abs(), group, Fraction(group.zeros, group.m))

    def kept(mask: Tensor) -> list[Fraction]:
        return [Fraction(x) for x in w.double().abs()[mask].tolist()]

    blocks = w.numel()
    slack = Fraction(float(w.double().abs().max()) if w.numel() else 0) * blocks / 2**41
    assert sum(kept(best)) - sum(kept(got)) <= slack


@given(cases(least=2), st.data())
def test_prev_and_floor_stay_and_counts_are_exact_while_the_sparsity_moves(
    case: tuple[Tensor, TransposableGroup], data: st.DataObject
):
    """Defends nesting both ways: more goes while it grows, some comes back while it falls."""
    w, group = case
    pattern = Pattern(group=TransposableGroup(group.m, group.m, group.dims))

    def drawn(k: int, **more: object) -> Tensor:
        seed = data.draw(st.integers(0, 99))
        step = Fraction(k, group.m)
        return mask_of(
            w, Rule(pattern=pattern, score=Random(seed), schedule=lambda t: step), **more
        )

    counts = st.integers(0, group.m)
    floor = drawn(data.draw(counts))
    prev = drawn(data.draw(counts), floor={"w": floor})
    k = data.draw(counts)
    rule = Rule(pattern=pattern, schedule=lambda t: Fraction(k, group.m))
    for more in ({"prev": prev}, {"floor": floor}, {"prev": prev, "floor": floor}):
        got = mask_of(w, rule, **{what: {"w": mask} for what, mask in more.items()})
        at = Fraction(k, group.m)
        assert torch.equal(got, transposable_oracle(w.double().abs(), group, at, **more))
        refuse_unfit_masks({"w": got}, 0, {"w": rule}, {"w": floor} if "floor" in more else {})


@given(st.integers(2, 4), st.data())
def test_paths_find_the_mask_that_comparing_all_finds(m: int, data: st.DataObject):
    """Defends the flow of larger blocks: ties, what has to go and what may not, many at once."""
    k = data.draw(st.integers(1, m - 1))
    blocks = data.draw(st.integers(1, 5))
    values = st.lists(st.integers(-3, 3), min_size=m * m * blocks, max_size=m * m * blocks)
    worth = np.array(data.draw(values), np.int64).reshape(m, m, blocks)
    masks = np.array(even_masks(m, k))
    inside = masks[data.draw(st.integers(0, len(masks) - 1))]
    some = np.array(data.draw(st.lists(st.booleans(), min_size=m * m, max_size=m * m)))
    gone = np.repeat((~inside & some.reshape(m, m))[..., None], blocks, axis=2)
    kept = np.repeat((inside & some.reshape(m, m))[..., None], blocks, axis=2)
    expected = _of_all(k, worth, gone, kept)
    assert np.array_equal(~cheapest(worth, k, gone, kept), expected)


@given(st.integers(1, 4), st.lists(st.integers(0, 4), min_size=25, max_size=25))
@example(2, [0] * 25)
@example(3, [1, 0, 0, 0, 0] * 5)
def test_blocks_of_five_are_the_first_best_of_all(k: int, values: list[int]):
    """Defends blocks that are not compared mask by mask, ties among them."""
    w = torch.tensor(values, dtype=torch.float32).view(5, 5)
    masks = _MASKS_OF_FIVE[k]
    sums = (masks * np.array(values).reshape(5, 5)).sum(axis=(1, 2))
    got = mask_of(w, Rule(pattern=NM(k, 5, transposable=True)))
    assert np.array_equal(got.numpy(), masks[sums.argmax()])


_MASKS_OF_FIVE = {k: np.array(even_masks(5, k)) for k in range(1, 5)}


@pytest.mark.slow
def test_blocks_of_six_are_the_first_best_of_all():
    """Defends the flow against all 67,950 masks of a block."""
    masks = np.array(even_masks(6, 2)).reshape(-1, 36)
    for seed in range(60):
        w = torch.randint(0, 3 + seed, (6, 6), generator=torch.Generator().manual_seed(seed))
        best = masks[(masks @ w.numpy().reshape(36)).argmax()].reshape(6, 6)
        got = mask_of(w.float(), Rule(pattern=NM(2, 6, transposable=True)))
        assert np.array_equal(got.numpy(), best)


def gains_on_cycles(block: np.ndarray, keep: np.ndarray) -> bool:
    """Tell whether exchanges around some cycle would keep more: the only way to be no optimum."""
    m = len(block)
    away = [[math.inf] * m for _ in range(m)]
    for i in range(m):
        for a in range(m):
            for b in range(m):
                if not keep[i, a] and keep[i, b]:  # row i keeps a instead of b
                    away[a][b] = min(away[a][b], int(block[i, b]) - int(block[i, a]))
    for via in range(m):
        for a in range(m):
            for b in range(m):
                away[a][b] = min(away[a][b], away[a][via] + away[via][b])
    return any(away[a][a] < 0 for a in range(m))


@pytest.mark.parametrize(("m", "zeros"), [(8, 4), (8, 2), (8, 7), (16, 8), (7, 3), (12, 1)])
@pytest.mark.parametrize("most", [3, 50, 10**6])
def test_no_cycle_of_exchanges_improves_a_large_block(m: int, zeros: int, most: int):
    """Defends the optimum where masks are too many to compare; a worse mask has such a cycle."""
    w = (GOLDEN[: 4 * m * m].view(2 * m, 2 * m) * most).floor()
    mask = mask_of(w, Rule(pattern=NM(zeros, m, transposable=True)))
    rows, columns = lines_kept(mask, TransposableGroup(zeros, m))
    assert (rows == m - zeros).all()
    assert (columns == m - zeros).all()
    for i, j in np.ndindex(2, 2):
        at = slice(i * m, (i + 1) * m), slice(j * m, (j + 1) * m)
        assert not gains_on_cycles(w[at].numpy(), mask[at].numpy())
    worse = mask_of(-w, Rule(pattern=NM(zeros, m, transposable=True), score=lambda x, c: x))
    assert gains_on_cycles(w[:m, :m].numpy(), worse[:m, :m].numpy())


@pytest.mark.parametrize("m", [4, 8])
def test_chunks_threads_and_layouts_change_no_bit(m: int):
    """Defends law 4 where a tensor is cut in many parts, along any dim."""
    w = GOLDEN.sub(0.5).repeat(3)[: 64 * 64 * 40].view(64, 64, 40)
    rule = Rule(pattern=NM(m // 2, m, transposable=True))
    expected = mask_of(w, rule)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(mask_of(w, rule), expected)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(mask_of(w[..., 3:5].clone(), rule), expected[..., 3:5])
    assert torch.equal(mask_of(w[:m], rule), expected[:m])
    assert torch.equal(mask_of(w.permute(2, 1, 0).contiguous().permute(2, 1, 0), rule), expected)


@given(cases(any_values), st.data())
def test_views_upcasts_and_powers_of_two_change_no_mask(
    case: tuple[Tensor, TransposableGroup], data: st.DataObject
):
    """Defends laws 4 and 7: every block has a scale of its own, and float64 does not overflow."""
    w, group = case
    rule = Rule(pattern=Pattern(group=group))
    expected = mask_of(w, rule)
    assert torch.equal(mask_of(data.draw(views(w)), rule), expected)
    wide = w.double()
    assert torch.equal(mask_of(wide, rule), expected)
    for by in (2.0**600, 2.0**-600):
        assert torch.equal(mask_of(wide * by, rule), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
def test_nan_raises_with_the_name_and_the_count(dtype: torch.dtype):
    """Defends law 8 at every sparsity."""
    w = torch.ones(4, 4).to(dtype)
    assert int(mask_of(w, Rule(pattern=NM(2, 4, transposable=True))).sum()) == 8
    w = torch.tensor([[math.nan, math.inf, 1.0, 1.0]] * 4).to(dtype)
    bad = int(w.float().isnan().sum())
    for zeros in (0, 1, 4):
        with pytest.raises(NaNError, match=rf"'w'; got {bad} NaN of 16"):
            mask_of(w, Rule(pattern=NM(zeros, 4, transposable=True)))


def test_a_huge_infinity_in_one_block_leaves_the_others_as_they_are():
    """Defends finite scores beside an infinity: it stays, and the rest is still the best."""
    w = torch.tensor([[math.inf, 1.0, 2.0], [1.0, 3.0, 1.0], [5.0, 1.0, 1.0]])
    mask = mask_of(w, Rule(pattern=NM(2, 3, transposable=True)))
    assert mask.tolist() == [[True, False, False], [False, True, False], [False, False, True]]


def test_the_number_of_zeros_ramps_and_nothing_comes_back():
    """Defends schedules: floor(m * s) in every line at every step, nested, on moving weights."""
    rule = Rule(pattern=NM(6, 8, transposable=True), schedule=PolynomialDecay(range(7)))
    params, masks, seen = {"w": GOLDEN[:1024].view(32, 32) - 0.5}, None, []
    for step in range(7):
        new = compute_masks(params, step, rule, prev=masks)
        assert masks is None or not bool((new["w"] & ~masks["w"]).any())
        zeros = math.floor(8 * rule.sparsity_at(step))
        assert all((lines == 8 - zeros).all() for lines in lines_kept(new["w"], rule.pattern.group))
        seen.append(zeros)
        masks, params = new, apply_masks({"w": params["w"].flip(0) + 0.01}, new)
    assert seen[0] == 0
    assert seen[-1] == 6
    assert len(set(seen)) > 3


def test_what_does_not_fit_is_refused_in_one_line():
    """Defends the way out: ragged dims, equal dims, units, large blocks, other budgets."""
    rule = Rule(pattern=NM(2, 4, transposable=True))
    for shape in ((6, 8), (8, 6)):
        with pytest.raises(ConfigError, match=r"'w': Expected m=4 to divide dims 0 and 1 .*NM\("):
            mask_of(torch.ones(shape), rule)
    with pytest.raises(ConfigError, match="dims that differ"):
        mask_of(torch.ones(4, 4), Rule(pattern=NM(2, 4, dim=0, transposable=True)))
    with pytest.raises(ConfigError, match=r"dim=1 for a tensor of shape \(4,\)"):
        mask_of(torch.ones(4), rule)
    with pytest.raises(ConfigError, match="single entries as the units of a transposable group"):
        Pattern(unit=ChannelUnit(), group=TransposableGroup(1, 2))
    with pytest.raises(ConfigError, match="zeros <= m; got zeros=5, m=4"):
        NM(5, 4, transposable=True)
    with pytest.raises(ConfigError, match=r"m: .*less than or equal to 16; got 32"):
        NM(2, 32, transposable=True)


def test_masks_of_uneven_lines_are_refused_whatever_the_sparsity():
    """Defends against a block without a solution in the middle of a run."""
    w, uneven = torch.ones(4, 8), torch.ones(4, 8, dtype=torch.bool)
    uneven[0, 5] = False
    rule = Rule(pattern=NM(2, 4, transposable=True), schedule=PolynomialDecay([5, 6]))
    for what in ("prev", "floor"):
        with pytest.raises(ConfigError, match=rf"{what}\['w'\] to prune as many .*; in 1 of 2 it"):
            mask_of(w, rule, **{what: {"w": uneven}})
    with pytest.raises(ConfigError, match=r"masks\['w'\] to prune as many"):
        refuse_unfit_floor({"w": uneven}, {"w": w}, {"w": rule})


def test_a_damaged_mask_with_the_right_rows_is_found():
    """Defends the check of saved states: rows alone say nothing of columns."""
    rule = Rule(pattern=NM(1, 2, transposable=True))
    for rows in ([[0, 1], [0, 1]], [[0, 1], [1, 1]], [[0, 0], [0, 0]]):
        with pytest.raises(ValueError, match="'w'") as caught:
            refuse_unfit_masks({"w": torch.tensor(rows).bool()}, 0, {"w": rule}, {})
        assert "\n" not in str(caught.value)
    refuse_unfit_masks({"w": torch.eye(2).bool()}, 0, {"w": rule}, {})


def test_plans_and_configs_know_it():
    """Defends YAML and the dry run."""
    config = PruneConfig.from_dict(
        {"global_config": {"pattern": {"group": {"kind": "transposable", "zeros": 2, "m": 4}}}}
    )
    assert config.global_config == Rule(pattern=NM(2, 4, transposable=True))
    (row,) = plan({"w": torch.empty(8, 12, 3, device="meta")}, config).tensors
    assert [(g.groups, g.units, g.pruned) for g in row.groups] == [(72, 4, 2)]
    assert row.pruned_units == sparsity(compute_masks({"w": torch.ones(8, 12, 3)}, 0, config)).zeros


def _trained(pruner_of, steps: range, model: nn.Module):
    pruner = pruner_of(model)
    model = pruner.prepare(inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in steps:
        optimizer.zero_grad()
        x = GOLDEN[step * 32 : step * 32 + 64].view(4, 16)
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        pruner.step()
    return model, pruner


def test_a_pruner_trains_with_it_and_resumes():
    """Defends laws 9 and 10: the pure fold, and a run that was stopped ends with the same bits."""
    from purprune_adapters import Pruner

    rule = Rule(pattern=NM(2, 4, transposable=True), schedule=PolynomialDecay(range(0, 9, 2)))
    start = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))
    whole, pruner = _trained(lambda net: Pruner(net, rule), range(10), copy.deepcopy(start))
    half, stopped = _trained(lambda net: Pruner(net, rule), range(5), copy.deepcopy(start))

    def resumed(net: nn.Module):
        again = Pruner(net, rule)
        again.load_state_dict(stopped.state_dict())
        return again

    loaded = copy.deepcopy(start)
    loaded.load_state_dict(half.state_dict())
    again, _ = _trained(resumed, range(5, 10), loaded)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )
    for name, mask in pruner.masks.items():
        assert all((lines == 2).all() for lines in lines_kept(mask, rule.pattern.group)), name
        assert torch.equal(whole.get_parameter(name) == 0, ~mask)


@pytest.mark.parametrize("dim", [0, 1])
def test_blocks_that_cross_the_borders_of_shards_are_refused(dim: int):
    """Defends shards: a cut between blocks is fine along both dims, one through them is not."""
    from purprune_adapters.shard_tasks import _crosses, _turned
    from purprune_adapters.shards import Axis

    rule, w = Rule(pattern=NM(2, 4, transposable=True)), torch.empty(16, 16, device="meta")
    layouts = [rule.pattern.group.layout(w.shape), *_turned(rule, w)]

    def crosses(cut: int) -> bool:
        axes = [Axis((), 0, 16)] * 2
        axes[dim] = Axis((cut,), 0, cut)
        return any(_crosses("w", (1, 1), layout, axes) for layout in layouts)

    assert not crosses(8)
    with pytest.raises(ConfigError, match=f"groups of 4 entries cross .* of dim {dim}"):
        crosses(6)
    assert _turned(Rule(pattern=Block(4)), w) == _turned(Rule(pattern=Channel()), w) == []
