"""Statistics that scores read: given by name, checked, named in errors; and the scores' names."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from purprune import (
    LAMP,
    RIA,
    ConfigError,
    Fisher,
    Given,
    NaNError,
    PruneConfig,
    Rule,
    ScoreContext,
    Taylor,
    Unstructured,
    Wanda,
    compute_masks,
)
from purprune.scores import needs_of
from strategies import SCORES


def context(name: str, **stats: Tensor) -> ScoreContext:
    return ScoreContext(name, 0, stats=stats)


def test_the_gradient_may_come_as_a_statistic_and_grads_come_first():
    """Defends one source for scores: means that were collected, or the gradients of now."""
    w, rule = {"w": torch.ones(1, 3)}, Rule(0.3334, score=Taylor())
    config = PruneConfig().set_module_name("w", rule)
    mean = {"w": {"gradient": torch.tensor([[3.0, 1.0, 2.0]])}}
    now = {"w": torch.tensor([[1.0, 3.0, 2.0]])}
    assert compute_masks(w, 0, config, stats=mean)["w"].tolist() == [[True, False, True]]
    assert compute_masks(w, 0, config, stats=mean, grads=now)["w"].tolist() == [[False, True, True]]


NEEDY = [Wanda(), RIA(), Fisher(), Given("movement")]


@pytest.mark.parametrize("score", NEEDY, ids=lambda s: s.kind)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_statistics_are_checked_and_named(score, scope):
    """Defends against a mask from a statistic that is missing, of another shape, or NaN."""
    (stat,) = score.needs
    w = torch.ones(3, 4)
    shape = (4,) if stat == "input_norm" else (3, 4)
    rule = Rule(0.5, score=score, pattern=Unstructured(scope=scope))

    def compute(stats):
        return compute_masks({"a": w}, 0, PruneConfig().set_module_name("a", rule), stats=stats)

    good = torch.ones(shape)
    assert compute({"a": {stat: good, "unused": torch.full((2,), math.nan)}})["a"].sum() == 6
    with pytest.raises(ValueError, match=f"'a' needs the statistic '{stat}'; got none"):
        compute({"a": {}})
    with pytest.raises(ValueError, match=f"'a' needs the statistic '{stat}'; got none"):
        compute(None)
    with pytest.raises(ConfigError, match=rf"'{stat}' of 'a' of shape \({shape[0]}.*got \(7,\)"):
        compute({"a": {stat: torch.ones(7)}})
    with pytest.raises(NaNError, match=f"statistic '{stat}' of 'a'; got {good.numel()} NaN"):
        compute({"a": {stat: good * math.nan}})
    with pytest.raises(ConfigError, match=f"a tensor as the statistic '{stat}' of 'a'; got list"):
        compute({"a": {stat: [1.0]}})


@pytest.mark.parametrize("bad", [-1.0, math.inf])
def test_norms_and_squares_are_finite_and_not_negative(bad):
    """Defends against roots of negative numbers, and 0 * inf."""
    for score in (Wanda(), RIA(), Fisher()):
        (stat,) = score.needs
        shape = (4,) if stat == "input_norm" else (3, 4)
        with pytest.raises(ConfigError, match=rf"'{stat}' of 'a' finite and >= 0; got {bad:g}"):
            score(torch.ones(3, 4), context("a", **{stat: torch.full(shape, bad)}))


@pytest.mark.parametrize(
    ("stats", "error", "says"),
    [
        ({"wieght": {}}, KeyError, "statistics of known parameters; got 'wieght'. Did you mean"),
        (
            {"weight": torch.ones(3)},
            TypeError,
            r"stats\['weight'\] as a dict by statistic, .*; got T",
        ),
        ([1], TypeError, "stats as a dict by name; got list"),
        ({"weight": {"input_nrom": torch.ones(4)}}, ValueError, "Did you mean 'input_nrom'"),
        ({"weight": {"gradient": torch.ones(4)}}, ValueError, "statistic 'input_norm'"),
    ],
)
def test_statistics_of_other_names_or_forms_are_refused(stats, error, says):
    """Defends against statistics that nobody reads."""
    config = PruneConfig().set_module_name("weight", Rule(0.5, score="wanda"))
    with pytest.raises(error, match=says):
        compute_masks({"weight": torch.ones(3, 4)}, 0, config, stats=stats)


def test_a_gradient_that_would_broadcast_is_refused():
    """Defends the shape of a gradient that comes as a statistic."""
    config = PruneConfig().set_module_name("w", Rule(0.5, score="gradient"))
    with pytest.raises(ConfigError, match=r"'gradient' of 'w' of shape \(3, 4\); got \(4,\)"):
        compute_masks({"w": torch.ones(3, 4)}, 0, config, stats={"w": {"gradient": torch.ones(4)}})


def test_a_score_of_the_user_reads_statistics_in_full_precision():
    """Defends the open end: any statistic, under any name."""
    seen = []

    def score(weight: Tensor, context: ScoreContext) -> Tensor:
        seen.append(context.stat("mine"))
        return weight.abs() * seen[-1]

    stats = {"w": {"mine": torch.tensor([2.0, 1.0], dtype=torch.bfloat16, requires_grad=True)}}
    config = PruneConfig().set_module_name("w", Rule(0.5, score=score))
    mask = compute_masks({"w": torch.ones(2, 2)}, 0, config, stats=stats)["w"]
    assert mask.tolist() == [[True, False], [True, False]]
    assert seen[0].dtype == torch.float32
    assert not seen[0].requires_grad


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("snip", Taylor()),
        ("movement", Given("movement")),
        ("synflow", Given("synflow")),
        ("grasp", Given("grasp")),
        *((s.kind, s) for n, s in SCORES.items() if n in ("gradient", "fisher", "wanda", "ria")),
        ("lamp", LAMP()),
        ({"kind": "ria", "power": 1}, RIA(1)),
        ({"kind": "given", "stat": "mine"}, Given("mine")),
        ({"kind": "movement"}, Given("movement")),
    ],
)
def test_scores_have_names_that_stand_in_files(name, score):
    """Defends the YAML form."""
    rule = PruneConfig.from_dict({"global_config": {"score": name}}).global_config
    assert rule.score == score == Rule(score=name).score
    assert PruneConfig.from_dict(PruneConfig(rule).as_dict()).global_config == rule


@pytest.mark.parametrize(
    ("score", "says"),
    [
        ("wandaa", "Did you mean 'wanda'"),
        ("given", "given.stat: expected a value; got none"),
        ({"kind": "given", "stat": ""}, "at least 1 character"),
        ({"kind": "ria", "power": -1}, "power >= 0; got -1"),
        ({"kind": "ria", "pwoer": 1}, "Did you mean 'power'"),
        (Wanda, "a score such as 'magnitude'"),
        ({"seed": 1}, "a score such as 'magnitude'"),
    ],
)
def test_unknown_scores_are_named_with_what_comes_near(score, says):
    """Defends against a score that is silently another one."""
    with pytest.raises(ConfigError, match=says):
        Rule(score=score)


def test_scores_say_what_they_need():
    """Defends adapters that collect just what is read."""
    assert {name: needs_of(score) for name, score in SCORES.items()} == {
        "magnitude": (),
        "taylor": ("gradient",),
        "random": (),
        "gradient": ("gradient",),
        "fisher": ("squared_gradient",),
        "wanda": ("input_norm",),
        "ria": ("input_norm",),
        "lamp": (),
        "given": ("movement",),
        "callable": (),
    }
