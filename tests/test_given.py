"""Masks from elsewhere: inferred from zeros, held as a floor, and checked against a config."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import prune_oracle
from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    Pattern,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    SelectionError,
    apply_masks,
    compute_masks,
    infer_masks,
    sparsity,
)
from purprune.given import refuse_unfit_masks
from strategies import (
    any_values,
    exact_sparsity,
    matrix_shapes,
    patterns_for,
    shapes,
    sparsities,
    target_of,
    weights,
)

finite = st.integers(-16, 16).map(lambda n: n / 8)


def only(rule: Rule) -> PruneConfig:
    return PruneConfig().set_module_name("w", rule)


@given(weights(shapes, any_values))
def test_inferred_masks_are_true_where_a_weight_is_not_zero(w: Tensor):
    """Defends -0.0, infinities and every shape and dtype; masks applied again change no value."""
    mask = infer_masks({"w": w}, names=["w"])["w"]
    expected = [value != 0 for value in w.double().reshape(-1).tolist()]
    assert mask.dtype == torch.bool
    assert mask.shape == w.shape
    assert mask.reshape(-1).tolist() == expected
    assert torch.equal(apply_masks({"w": w}, {"w": mask})["w"], w)


def test_without_names_only_tensors_of_two_dims_with_a_zero_are_looked_at():
    """Defends biases and norms, which start as zeros, and dense layers."""
    params = {
        "sparse": torch.eye(3),
        "dense": torch.ones(2, 2),
        "bias": torch.zeros(3),
        "steps": torch.zeros(2, 2, dtype=torch.int64),
        "nan": torch.tensor([[math.nan, math.inf]]),
        "float8": torch.eye(2).to(torch.float8_e4m3fn),
    }
    masks = infer_masks(params)
    assert list(masks) == ["sparse", "float8"]
    assert masks["sparse"].tolist() == torch.eye(3).bool().tolist()
    named = infer_masks(params, names=("dense", "bias", "steps"))
    assert [int(mask.sum()) for mask in named.values()] == [4, 0, 0]


def test_what_cannot_be_looked_at_is_refused_by_name():
    """Defends mis-spelt names, meta tensors and modules passed for their parameters."""
    with pytest.raises(SelectionError, match=r"got 'fc\.wieght'\. Did you mean 'fc\.weight'"):
        infer_masks({"fc.weight": torch.ones(2, 2)}, names=["fc.wieght"])
    with pytest.raises(ConfigError, match="data for 'w'; got a meta tensor"):
        infer_masks({"w": torch.ones(2, 2, device="meta")})
    with pytest.raises(TypeError, match=r"Pass dict\(model\.named_parameters\(\)\)"):
        infer_masks(torch.nn.Linear(2, 2))


def test_a_sparse_model_is_pruned_further_from_its_zeros():
    """Defends prev=infer_masks: zeros stay, of whatever score, and the count is exact."""
    w = torch.tensor([[0.0, 5.0, -0.0, 1.0, 2.0, 3.0, 4.0, 6.0]])
    scores = Rule(0.5, score=lambda weight, context: -weight.abs())
    masks = compute_masks({"w": w}, 0, scores, prev=infer_masks({"w": w}))
    assert masks["w"].tolist() == [[False, False, False, True, True, True, True, False]]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Pattern, Tensor, Tensor, float]:
    """Draw weights, a pattern, a floor and a prev that prunes it too, and a sparsity."""
    w = draw(weights(matrix_shapes, finite, (torch.float32,)))
    pattern = draw(patterns_for(w.dim()))
    some = torch.ones(w.shape, dtype=torch.bool)
    found = []
    for _ in range(2):  # whole units of any count: what other scores prune at other sparsities
        score = Random(draw(st.integers(0, 9)))
        rule = Rule(draw(sparsities), pattern=Pattern(unit=pattern.unit), score=score)
        some = some & compute_masks({"w": w}, 0, only(rule))["w"]
        found.append(some)
    return w, pattern, found[0], found[1], draw(sparsities)


@given(cases(), st.booleans())
def test_a_floor_goes_first_then_prev_and_the_count_is_the_larger_one(case, with_prev: bool):
    """Defends masks that are given: never undone, in every group exactly max(k, the floor's)."""
    w, pattern, floor, prev, s = case
    rule = Rule(target_of(pattern, s), pattern=pattern)
    before = {"w": prev} if with_prev else None
    got = compute_masks({"w": w}, 0, only(rule), prev=before, floor={"w": floor})["w"]
    expected = prune_oracle(
        w.abs(), pattern, exact_sparsity(pattern, s), prev if with_prev else None, floor
    )
    assert torch.equal(got, expected)
    assert not bool((got & ~floor).any())
    assert got.data_ptr() != floor.data_ptr()
    refuse_unfit_masks({"w": got}, 0, {"w": rule}, {"w": floor})


def test_a_floor_that_prunes_nothing_changes_no_mask_and_one_of_integers_works():
    """Defends integer scores, whose highest value is no infinity, on a schedule that falls."""
    w = torch.arange(1.0, 21.0).view(4, 5)
    falling = Rule(0.2, PolynomialDecay([0, 1]), 0.8, score=Random(3))
    full = torch.ones(4, 5, dtype=torch.bool)
    first = compute_masks({"w": w}, 0, falling)
    held = first["w"] | (torch.arange(20).view(4, 5) % 4 > 0)  # every fourth, if it was pruned
    for floor in (full, held):
        masks = compute_masks({"w": w}, 1, falling, prev=first, floor={"w": floor})
        assert sparsity(masks).zeros == max(4, int((~floor).sum()))
        assert not bool((masks["w"] & ~floor).any())
        assert not bool((~masks["w"] & first["w"]).any()), "nothing new goes while it falls"
    plain = compute_masks({"w": w}, 1, falling, prev=first)
    assert torch.equal(
        compute_masks({"w": w}, 1, falling, prev=first, floor={"w": full})["w"], plain["w"]
    )


def test_a_floor_that_does_not_fit_is_refused_as_prev_is():
    """Defends the error: it says floor, not prev."""
    w, cut = torch.ones(2, 4), torch.tensor([[True, False, True, True]] * 2)
    with pytest.raises(ConfigError, match=r"floor\['w'\] to prune whole units"):
        compute_masks({"w": w}, 0, Rule(0.5, pattern=Channel()), floor={"w": cut})
    with pytest.raises(KeyError, match="known parameters; got 'v'"):
        compute_masks({"w": w}, 0, Rule(0.5), floor={"v": cut})
    with pytest.raises(TypeError, match="floor as a dict by name; got Tensor"):
        compute_masks({"w": w}, 0, Rule(0.5), floor=cut)


@given(cases(), st.data())
def test_every_flip_that_changes_a_count_is_found(case, data: st.DataObject):
    """Defends the check of loaded masks: of any pattern, in any group, floors too."""
    w, pattern, floor, prev, s = case
    rule = Rule(target_of(pattern, s), pattern=pattern)
    masks = compute_masks({"w": w}, 0, only(rule), prev={"w": prev}, floor={"w": floor})
    flipped = masks["w"].clone()
    at = data.draw(st.integers(0, w.numel() - 1))
    flipped.view(-1)[at] ^= True
    with pytest.raises(ValueError, match="'w'") as caught:
        refuse_unfit_masks({"w": flipped}, 0, {"w": rule}, {"w": floor})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "mask", "says"),
    [
        (Pattern(), [[0, 1, 1], [1, 0, 1]], r"3 of 6 units pruned in 'w' at step 0.*prune 2"),
        (NM(1, 3), [[0, 0, 1], [1, 1, 1]], r"1 of 3 units pruned in 'w'.*prune 2"),
        (Block((2, 1)), [[0, 1, 1], [1, 1, 1]], r"masks\['w'\] to prune whole units"),
    ],
)
def test_the_counts_are_those_of_each_group_and_units_are_whole(pattern, mask, says):
    """Defends against damage that leaves the tensor's total, or the first entry of each unit."""
    rule = Rule(None if pattern.target else 0.5, pattern=pattern)
    with pytest.raises(ValueError, match=says):
        refuse_unfit_masks({"w": torch.tensor(mask).bool()}, 0, {"w": rule}, {})
