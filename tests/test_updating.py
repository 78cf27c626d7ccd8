"""update_masks: the fold of a training, with and without entries that come back."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oracles import prune_oracle
from purprune import (
    NM,
    SET,
    Block,
    Channel,
    ConfigError,
    GlobalGroup,
    Kernel,
    PolynomialDecay,
    PruneConfig,
    Random,
    Regrow,
    RigL,
    Rule,
    ScoreContext,
    StraightThrough,
    Unstructured,
    apply_masks,
    compute_masks,
    straight_through,
    update_masks,
)
from purprune.patterns import TransposableGroup
from strategies import DTYPES, PATTERNS, exact_sparsity, exact_values, target_of, weights

FRACTIONS = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0])


def values(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return small whole numbers, so that many are tied."""
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)) / 4


def zeros(masks: dict[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_an_exchange_is_two_stable_sorts(pattern, grow):
    """Defends the definition: prune to s + f (1 - s) within what is kept, then let k stay gone."""
    shape = (8, 8, 3) if isinstance(pattern.group, TransposableGroup) else (10, 7, 3)
    w, g = values(shape, 0), values(shape, 1)
    exchange = Regrow(every=3, end_step=10, fraction=0.7, score=grow)
    rule = Rule(target_of(pattern, 0.6), pattern=pattern, regrow=exchange)
    config = PruneConfig().set_module_name("w", rule)
    s = exact_sparsity(pattern, 0.6)
    first = update_masks({"w": w}, {}, 0, config)
    start = Random()(w, ScoreContext("w", 0))
    assert torch.equal(first["w"], prune_oracle(start, pattern, s))
    f = Fraction("0.7") * Fraction(f"{(1 + math.cos(math.pi * 3 / 10)) / 2:.15f}")
    more = prune_oracle(w.abs(), pattern, s + f * (1 - s), first["w"])
    growth = g.abs() if grow == "gradient" else Random(3)(w, ScoreContext("w", 3))
    expected = prune_oracle(growth, pattern, s, more)
    found = update_masks({"w": w}, first, 3, config, grads={"w": g})
    assert torch.equal(found["w"], expected)


def rigl_by_the_paper(w: Tensor, g: Tensor, mask: Tensor, count: int) -> Tensor:
    """Algorithm 1 of Evci et al., entry by entry: drop ``count`` active ones, grow as many."""
    active = [i for i in range(w.numel()) if mask.view(-1)[i]]
    dropped = sorted(active, key=lambda i: abs(float(w.view(-1)[i])))[:count]
    kept = set(active) - set(dropped)
    others = [i for i in range(w.numel()) if i not in kept]
    grown = sorted(others, key=lambda i: -abs(float(g.view(-1)[i])))[:count]
    new = torch.zeros(w.numel(), dtype=torch.bool)
    new[sorted(kept | set(grown))] = True
    return new.view(w.shape)


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 0.8, 0.9]), st.integers(1, 9))
def test_rigl_is_the_papers_algorithm(seed: int, sparsity: float, step: int):
    """Defends RigL against its published form, on weights and gradients without ties."""
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(6, 9, generator=generator) for _ in range(2))
    rule = Rule(sparsity, regrow=RigL(every=1, end_step=10, fraction=0.3))
    masks = update_masks({"w": w}, {}, 0, rule)
    kept = 54 - math.floor(54 * Fraction(str(sparsity)))
    f = 0.3 / 2 * (1 + math.cos(step * math.pi / 10))
    found = update_masks({"w": w}, masks, step, rule, grads={"w": g})["w"]
    # k + d = floor(n s + f (n - n s)): between the floor and the ceiling of f times the kept ones.
    choices = [rigl_by_the_paper(w, g, masks["w"], d) for d in {int(f * kept), int(f * kept) + 1}]
    assert any(torch.equal(found, choice) for choice in choices)


@given(
    weights(values=exact_values, dtypes=DTYPES),
    st.floats(0, 1),
    FRACTIONS,
    st.sampled_from(["gradient", "random", "magnitude"]),
    st.integers(1, 12),
)
def test_every_exchange_keeps_the_exact_count(w, sparsity, fraction, grow, step):
    """Defends law 1 while units come and go, and that other steps change nothing."""
    rule = Rule(sparsity, regrow=Regrow(every=3, fraction=fraction, score=grow, decay="constant"))
    config = PruneConfig().set_module_name("w", rule)
    masks = update_masks({"w": w}, {}, 0, config)
    found = update_masks({"w": w}, masks, step, config, grads={"w": w.flip(0) if w.dim() else w})
    due = math.floor(w.numel() * Fraction(str(sparsity)))
    assert zeros(masks) == zeros(found) == due
    if step % 3:
        assert found["w"] is masks["w"]
    exchanged = int((found["w"] & ~masks["w"]).sum())
    assert exchanged <= math.ceil(Fraction(str(fraction)) * (w.numel() - due))


def test_what_went_and_came_back_competes_with_the_others():
    """Defends RigL's rule that entries just dropped may be grown again."""
    w, g = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.0, 5.0, 9.0]])
    rule = Rule(0.5, regrow=Regrow(every=1, fraction=1.0, decay="constant"))
    masks = {"w": torch.tensor([[True, True, False, False]])}
    assert update_masks({"w": w}, masks, 1, rule, grads={"w": g})["w"].tolist() == [
        [False, False, True, True]
    ]
    assert update_masks({"w": w}, masks, 1, rule, grads={"w": g.flip(1)})["w"].tolist() == [
        [True, True, False, False]
    ]


def test_set_draws_anew_at_each_update_and_the_same_again_in_another_run():
    """Defends the random growth: fresh, and without any state of a generator."""
    params = {"w": torch.ones(40, 25)}
    rule = Rule(0.9, regrow=SET(every=10, fraction=0.5, seed=3))

    def run() -> list[Tensor]:
        masks, seen = {}, []
        for step in range(0, 50, 10):
            masks = update_masks(params, masks, step, rule)
            seen.append(masks["w"])
        return seen

    state = torch.random.get_rng_state()
    one, other = run(), run()
    assert all(map(torch.equal, one, other))
    assert len({tuple(mask.view(-1).tolist()) for mask in one}) == 5
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_rising_schedule_prunes_and_regrows_at_once():
    """Defends GraNet: gradual sparsity with growth by the gradient, exact at every step."""
    schedule = PolynomialDecay(range(0, 50, 10))
    rule = Rule(0.9, schedule, 0.5, regrow=RigL(every=10, end_step=45, fraction=0.5))
    params, masks, back = {"w": values((20, 30), 0)}, {}, 0
    for step in range(60):
        new = update_masks(params, masks, step, rule, grads={"w": values((20, 30), step)})
        assert zeros(new) == math.floor(600 * rule.sparsity_at(step))
        if masks:
            back += int((new["w"] & ~masks["w"]).sum())
        masks, params = new, {"w": params["w"].roll(1, 0)}
    assert back > 0
    assert zeros(masks) == 540


@pytest.mark.parametrize(
    "pattern",
    [Unstructured(), Unstructured(scope="global"), Channel(), Kernel(), Block(2), NM(2, 4)],
    ids=str,
)
def test_without_regrow_the_fold_is_compute_masks_with_prev(pattern):
    """Defends the one meaning of a fold for rules whose entries never come back."""
    rule = Rule(target_of(pattern, 0.7), PolynomialDecay([0, 2, 5]), pattern=pattern)
    masks, before = {}, None
    for step in range(7):
        params = {"a": values((8, 6), step), "b": values((4, 4), step + 9)}
        masks = update_masks(params, masks, step, rule)
        before = compute_masks(params, step, rule, prev=before)
        if rule.changes_at(step):
            assert all(torch.equal(masks[name], before[name]) for name in params)
        before = masks


def test_a_straight_through_rule_chooses_anew_from_the_dense_weights():
    """Defends STE: what was pruned competes with its dense weight."""
    rule = Rule(0.5, regrow=StraightThrough(every=2))
    masks = update_masks({"w": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}, {}, 0, rule)
    later = {"w": torch.tensor([[1.0, 3.0, 2.0, 4.0]])}
    assert update_masks(later, masks, 1, rule)["w"] is masks["w"]
    assert update_masks(later, masks, 2, rule)["w"].tolist() == [[False, True, False, True]]


def test_a_floor_never_comes_back():
    """Defends masks that hold at every step against growth."""
    w = values((8, 8), 0)
    floor = {"w": torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) > 0.3}
    rule = Rule(0.5, regrow=RigL(every=1, end_step=20, fraction=1.0))
    masks: dict[str, Tensor] = {}
    for step in range(10):
        masks = update_masks(
            {"w": w}, masks, step, rule, floor=floor, grads={"w": values((8, 8), step)}
        )
        assert not bool((masks["w"] & ~floor["w"]).any())
        assert zeros(masks) == max(32, zeros(floor))


def test_a_new_tensor_brings_its_group_along():
    """Defends a global group of which one tensor has no mask yet."""
    rule = Rule(0.5, PolynomialDecay([0, 9]), 0.5, pattern=Unstructured(scope="global"))
    params = {"a": values((4, 4), 0), "b": values((4, 4), 1)}
    masks = update_masks(params, {}, 3, rule)
    found = update_masks(params, {"a": masks["a"]}, 4, rule)
    assert zeros(found) == 16


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Regrow(), "expected end_step with decay='cosine'"),
        (lambda: RigL(every=100, end_step=50), "expected every < end_step"),
        (
            lambda: Rule(
                0.9,
                pattern=Unstructured(scope=GlobalGroup(max_sparsity=0.92)),
                regrow=RigL(end_step=900),
            ),
            "expected max_sparsity of at least 0.92",
        ),
        (lambda: Regrow(every=0, end_step=5), "every"),
        (lambda: Regrow(fraction=30, end_step=5), "30"),
        (lambda: StraightThrough(decay=-1.0), "decay"),
        (
            lambda: Rule(pattern=NM(2, 4), regrow=RigL(end_step=900)),
            "fraction of at least 1/2 at the first exchange, which moves one of the 2",
        ),
        (lambda: Rule(0.5, regrow="rigl"), "got 'rigl'. RigL and SET are exchanges."),
        (lambda: Rule(0.5, regrow={"kind": "exchang"}), "Did you mean 'exchange'?"),
        (lambda: Rule(0.5, regrow=StraightThrough), "got the class StraightThrough. Call it."),
        (lambda: straight_through({}, {}, decay=-1.0), "Expected a decay >= 0; got -1.0"),
        (lambda: Rule(0.5, regrow=RigL), "Regrow(...), StraightThrough(...)"),
    ],
)
def test_impossible_values_of_regrow_are_refused_in_one_line(make, says):
    """Defends the errors of a configuration."""
    with pytest.raises((ConfigError, ValueError)) as caught:
        make()
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_growth_by_the_gradient_without_a_gradient_says_the_way_out():
    """Defends the error of a loop that zeroes gradients too early."""
    rule = Rule(0.5, regrow=RigL(every=1, end_step=9))
    masks = update_masks({"w": torch.ones(4, 4)}, {}, 0, rule)
    with pytest.raises(ValueError, match="needs a gradient; got none"):
        update_masks({"w": torch.ones(4, 4)}, masks, 1, rule)


def test_regrow_goes_through_dicts_and_back():
    """Defends YAML: every value of regrow has a plain form."""
    plain = {
        "global_config": {
            "target_sparsity": 0.9,
            "regrow": {"every": 50, "end_step": 750, "score": {"kind": "random", "seed": 2}},
        },
        "module_name_configs": {"head": {"regrow": {"kind": "straight_through", "decay": 2e-4}}},
    }
    config = PruneConfig.from_dict(plain)
    assert config.rules["global_config"].regrow == Regrow(50, 750, score=Random(2))
    assert config.rules["head"].regrow == StraightThrough(decay=2e-4)
    assert PruneConfig.from_dict(config.as_dict()) == config


def test_straight_through_is_apply_masks_forwards_and_dense_backwards():
    """Defends the estimator under torch.func, vmap over masks among it, and its decay."""
    w, x = values((3, 4), 0), values((4,), 1)
    masks = torch.stack([values((3, 4), seed) > 0 for seed in range(5)])

    def loss(weight: Tensor, mask: Tensor) -> Tensor:
        masked = straight_through({"w": weight}, {"w": mask}, decay=0.25)["w"]
        return (masked @ x).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, masks)
    for mask, grad in zip(masks, grads, strict=True):
        masked = apply_masks({"w": w}, {"w": mask})["w"].requires_grad_()
        (dense,) = torch.autograd.grad((masked @ x).square().sum(), masked)
        assert torch.equal(grad, dense + 0.25 * w * ~mask)
    infinite = {"w": torch.tensor([torch.inf, 1.0], requires_grad=True)}
    masked = straight_through(infinite, {"w": torch.tensor([False, True])})["w"]
    assert masked.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("shared", [{"budget": "erk"}, {"pattern": Unstructured(scope="global")}])
def test_only_equal_rules_share_in_an_exchange_too(shared):
    """Defends totals of rules that differ in nothing but their seeds, at every step."""
    params = {"a": values((8, 8), 0), "b": values((24, 24), 1)}
    rules = {
        name: Rule(0.5, regrow=RigL(every=2, end_step=9, seed=seed), **shared)
        for seed, name in enumerate(params)
    }
    config, masks = PruneConfig(module_name_configs=rules), {}
    for step in range(6):
        grads = {name: values(p.shape, step) for name, p in params.items()}
        masks = update_masks(params, masks, step, config, grads=grads)
        assert [zeros({name: masks[name]}) for name in params] == [32, 288]


def test_every_tensor_of_a_budget_exchanges_its_own_share():
    """Defends RigL's drop: f of what is kept in each layer, those that ERK leaves dense too."""
    generator = torch.Generator().manual_seed(0)
    params = {f"w{i}": torch.randn(16, 16, generator=generator) for i in range(4)}
    params["large"] = torch.randn(64, 64, generator=generator)
    rule = Rule(0.4, budget="erk", regrow=SET(every=1, fraction=0.5))
    masks = update_masks(params, {}, 0, rule)
    later = update_masks(params, masks, 1, rule)
    kept = int(masks["large"].sum())
    assert all(bool(masks[f"w{i}"].all()) for i in range(4))
    assert kept < 4096
    for name, mask in masks.items():  # a few of those that went come back by chance
        went = int((mask & ~later[name]).sum())
        assert went <= int(mask.sum()) - math.floor(Fraction(int(mask.sum()), 2))
    assert all(bool((masks[name] & ~later[name]).any()) for name in ("large",))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_are_not_finite_exchange_nothing_and_the_schedule_goes_on(bad):
    """Defends a training in mixed precision whose scaler skips the step of an exchange."""
    rule = Rule(0.9, PolynomialDecay([0, 5, 10]), 0.5, regrow=RigL(every=5, end_step=20))
    params = {"w": values((10, 10), 0)}
    masks = update_masks(params, {}, 0, rule)
    grads = {"w": torch.full((10, 10), bad)}
    later = update_masks(params, masks, 5, rule, grads=grads)
    assert not bool((later["w"] & ~masks["w"]).any())
    assert zeros(later) == math.floor(100 * rule.sparsity_at(5)) > zeros(masks)


def test_none_means_no_masks_yet_and_the_order_is_told():
    """Defends a natural first call: None, as prev=None of compute_masks means none."""
    params, rule = {"w": values((4, 4), 0)}, Rule(0.5)
    masks = update_masks(params, {}, 0, rule)
    assert torch.equal(update_masks(params, None, 0, rule)["w"], masks["w"])
    with pytest.raises(TypeError, match=r"The order is update_masks\(params, masks, step, cfg\)"):
        update_masks(params, 0, masks, rule)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"floor": {"wieght": torch.ones(4, 4, dtype=torch.bool)}}, KeyError, "Did you mean"),
        ({"stats": {"wieght": {}}}, KeyError, "Did you mean"),
        ({"floor": [1]}, TypeError, "Expected floor as a dict by name; got list"),
        ({"masks": {"wieght": torch.ones(4, 4, dtype=torch.bool)}}, KeyError, "Did you mean"),
        ({"masks": {"weight": torch.ones(3)}}, TypeError, "Expected a bool mask for 'weight'"),
        ({"masks": {"weight": torch.ones(3, dtype=torch.bool)}}, ValueError, "shape (4, 4)"),
        ({"masks": [1]}, TypeError, "Expected masks as a dict by name; got list"),
    ],
)  # fmt: skip
def test_names_and_shapes_are_refused_as_compute_masks_refuses_them(given, error, says):
    """Defends against masks, floors and statistics that nobody reads."""
    masks = given.pop("masks", {})
    with pytest.raises(error) as caught:
        update_masks({"weight": torch.ones(4, 4)}, masks, 5, Rule(0.5, regrow=SET()), **given)
    assert says in str(caught.value)
