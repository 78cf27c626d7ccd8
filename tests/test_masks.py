"""compute_masks, apply_masks, sparsity and plan: the public pure functions."""

from __future__ import annotations

import copy
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    Kernel,
    NaNError,
    PruneConfig,
    Ramp,
    Rule,
    SelectionError,
    Taylor,
    apply_masks,
    compute_masks,
    pack_masks,
    plan,
    sparsity,
)


class Wild(Ramp):
    """A ramp of a user that leaves the unit interval."""

    def remaining(self, step: int) -> Fraction:
        return Fraction(2)


W = {"w": torch.arange(1.0, 13.0).view(3, 4)}


def test_masks_of_a_model_leave_its_parameters_alone():
    """Defends the pure path: parameters that require grad go in, plain bool masks come out."""
    model = nn.Linear(4, 3)
    before = model.weight.detach().clone()
    masks = compute_masks(dict(model.named_parameters()), 0, Rule(0.5))
    assert not masks["weight"].requires_grad
    assert torch.equal(model.weight, before)
    assert sparsity(masks).zeros == 6


def test_apply_masks_is_differentiable_and_passes_other_tensors_through():
    """Defends functional training: pruned entries get no gradient, absent names are the same."""
    model = nn.Linear(4, 3)
    params = dict(model.named_parameters())
    masks = {"weight": torch.tensor([[True, False, True, False]] * 3)}
    assert apply_masks(params, masks)["bias"] is params["bias"]

    def loss(p):
        return functional_call(model, apply_masks(p, masks), torch.ones(2, 4)).square().sum()

    assert not bool(
        grad(loss)({k: v.detach() for k, v in params.items()})["weight"][~masks["weight"]].any()
    )


def test_apply_masks_works_under_vmap_over_masks():
    """Defends ensembles of masks."""
    masks = torch.stack([torch.ones(3, 4), torch.zeros(3, 4)]).bool()
    out = vmap(lambda m: apply_masks(W, {"w": m})["w"].sum())(masks)
    assert out.tolist() == [78.0, 0.0]


def test_apply_masks_clears_inf_nan_and_the_sign_of_zero():
    """Defends law 8: where, not a product."""
    w = {"w": torch.tensor([math.inf, math.nan, -1.0, 2.0])}
    out = apply_masks(w, {"w": torch.tensor([False, False, False, True])})["w"]
    assert out.tolist() == [0.0, 0.0, 0.0, 2.0]
    assert not bool(out.signbit().any())


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: compute_masks(nn.Linear(2, 2), 0, Rule(0.5)), TypeError, "named_parameters"),
        (lambda: compute_masks({"w": [1.0]}, 0, Rule(0.5)), TypeError, "'w': list"),
        (lambda: compute_masks(W, -1, Rule(0.5)), ValueError, "step >= 0; got -1"),
        (lambda: compute_masks(W, 0.5, Rule(0.5)), TypeError, "step as an int; got float"),
        (lambda: compute_masks(W, True, Rule(0.5)), ValueError, "got True"),
        (
            lambda: compute_masks(W, Rule(0.5), 0),
            TypeError,
            r"got Rule. The order is compute_masks\(params, step, cfg\)",
        ),
        (
            lambda: plan(W, 0, Rule(0.5)),
            TypeError,
            r"got Rule. The order is plan\(params, cfg, step\)",
        ),
        (
            lambda: apply_masks({"w": W["w"] > 3}, W),
            TypeError,
            r"seem swapped. The order is apply_masks\(params, masks\)",
        ),
        (lambda: apply_masks(W, 0.5), TypeError, "bool tensors; got float. Pass what compute_mas"),
        (
            lambda: compute_masks(W, 0, Rule(0.5, score="wanda")),
            ValueError,
            r"Pruner\(..., stats=...\). .*purprune_adapters.collect_stats\(model, loader, config\)",
        ),
        (lambda: compute_masks(W, 0, Rule(0.5, score=Taylor())), ValueError, "'w' needs a grad"),
        (
            lambda: compute_masks(W, 0, Rule(pattern=NM(2, 4, dim=2))),
            ConfigError,
            "'w': Expected a dim",
        ),
        (lambda: compute_masks(W, 0, Rule(pattern=Channel(5))), ConfigError, "'w': Expected a dim"),
        (
            lambda: compute_masks(W, 0, Rule(pattern=Block((1, 1, 1)))),
            ConfigError,
            "'w': Expected at least 3 dims",
        ),
        (
            lambda: compute_masks(
                {"w": torch.ones(3)}, 0, PruneConfig().set_module_name("w", Rule(pattern=Kernel()))
            ),
            ConfigError,
            "2 dims for a kernel",
        ),
        (lambda: compute_masks(W, 0, Rule(0.5), prev={"v": W["w"] > 3}), KeyError, "'v'"),
        (
            lambda: compute_masks(W, 0, Rule(0.5), prev={"w": W["w"]}),
            TypeError,
            "bool mask for 'w'",
        ),
        (
            lambda: compute_masks(W, 0, Rule(0.5), prev={"w": W["w"][:2] > 3}),
            ValueError,
            r"shape \(3, 4\) for 'w'",
        ),
        (
            lambda: compute_masks(W, 0, Rule(0.5, pattern=Channel()), prev={"w": W["w"] > 3}),
            ConfigError,
            "whole units",
        ),
        (
            lambda: compute_masks(W, 0, Rule(0.5, score=lambda w, c: w[0])),
            ConfigError,
            "scores of shape",
        ),
        (
            lambda: compute_masks(W, 0, Rule(0.5, score=lambda w, c: w / 0 - w / 0)),
            NaNError,
            "score of 'w'; got 12 NaN",
        ),
        (
            lambda: compute_masks({"w": torch.ones(2, 2, device="meta")}, 0, Rule(0.5)),
            ConfigError,
            "meta tensor",
        ),
        (
            lambda: compute_masks(W, 0, Rule(0.5), grads={"w": torch.full((3, 4), math.nan)}),
            None,
            "",
        ),
        (
            lambda: compute_masks(
                W, 0, Rule(0.5, score="taylor"), grads={"w": torch.full((3, 4), math.nan)}
            ),
            NaNError,
            "'w'",
        ),
        (lambda: apply_masks(W, {"v": W["w"] > 3}), KeyError, "'v'"),
        (lambda: apply_masks(W, {"w": W["w"][0] > 3}), ValueError, "shape"),
        (lambda: apply_masks(W, {"w": W["w"]}), TypeError, "True = keep"),
        (lambda: compute_masks({}, 0, Rule(0.5)), SelectionError, "no parameters at all"),
        (lambda: compute_masks(W, 0, Rule(0.5, param_name="v")), SelectionError, "is 'v'"),
        (lambda: compute_masks(W, 0, 0.5), TypeError, r"got float. Write Rule\(0.5\)"),
        (lambda: compute_masks(W, 0, "c.yaml"), TypeError, r"PruneConfig.from_yaml\('c.yaml'\)"),
        (lambda: compute_masks(W, 0, Rule(schedule=lambda t: None)), ConfigError, "'w': .*None"),
        (lambda: compute_masks(W, 0, Rule(schedule=lambda t: 1.5)), ConfigError, "'w': .*1.5"),
        (lambda: compute_masks(W, 0, Rule(0.5, schedule=Wild())), ConfigError, "'w': .*got -0.5"),
        (lambda: compute_masks({"w": W["w"].to_sparse()}, 0, Rule(0.5)), ConfigError, "to_dense"),
        (
            lambda: compute_masks(W, 0, Rule(0.5, score="taylor"), grads={"w": torch.ones(4)}),
            ConfigError,
            "gradient of shape",
        ),
        (lambda: compute_masks(W, 0, Rule(0.5), grads=[1]), TypeError, "grads as a dict"),
        (
            lambda: compute_masks(W, 0, Rule(0.5, score=lambda w, c: w + 1j)),
            ConfigError,
            "complex64",
        ),
        (
            lambda: grad(lambda w: compute_masks({"w": w}, 0, Rule(0.5))["w"].sum())(W["w"]),
            ConfigError,
            "apply_masks inside",
        ),
        (lambda: plan(W, Rule(schedule=lambda step: 0.5)), ConfigError, "Expected a step for 'w'"),
        (lambda: plan(W, Rule(schedule=lambda step: 1.5), 0), ConfigError, "'w': .*got 1.5"),
    ],
)
def test_bad_input_raises_and_names_the_parameter(call, error, says):
    """Defends every way in: what was expected, what came, of which parameter."""
    if error is None:
        call()  # a gradient that no score reads is not looked at
        return
    with pytest.raises(error, match=says):
        call()


def test_signed_scores_rank_with_their_sign_and_units_sum_them():
    """Defends scores such as movement, of which low and negative means prune."""
    w = {"w": torch.tensor([[5.0, -5.0], [1.0, 1.0], [-9.0, 1.0]])}
    entries = Rule(0.5, score=lambda w, c: w)
    assert compute_masks(w, 0, entries)["w"].tolist() == [
        [True, False],
        [False, True],
        [False, True],
    ]
    channels = Rule(0.34, score=entries.score, pattern=Channel(norm="sum"))
    assert compute_masks(w, 0, channels)["w"].all(dim=1).tolist() == [True, True, False]


def test_a_score_of_the_user_cannot_change_the_weight():
    """Defends purity against callables that work in place."""
    w = {"w": torch.tensor([[-3.0, 1.0]])}
    compute_masks(w, 0, Rule(0.5, score=lambda w, c: w.abs_()))
    assert w["w"].tolist() == [[-3.0, 1.0]]


def test_plan_answers_for_a_billion_entries_without_data():
    """Defends the dry run on meta tensors: integers, ragged tails and reasons, no values."""
    params = {"big.weight": torch.empty(2**15, 2**15 + 3, device="meta"), "b": torch.empty(3)}
    planned = plan(params, Rule(pattern=NM(zeros=2, m=4)))
    (row,) = planned.tensors
    assert [(g.groups, g.units, g.pruned) for g in row.groups] == [
        (2**15 * 2**13, 4, 2), (2**15, 3, 1),
    ]  # fmt: skip
    assert row.pruned_units == 2**15 * (2**14 + 1)
    assert "big.weight" in str(planned)
    assert "1-D" in str(planned)
    assert planned.as_dict()["tensors"][0]["entries"] == 2**15 * (2**15 + 3)


def test_plan_counts_ragged_units():
    """Defends the words "ragged" and "units"."""
    (row,) = plan({"w": torch.empty(10, 7)}, Rule(0.5, pattern=Block((4, 3)))).tensors
    assert (row.units, row.ragged_units, row.pruned_units) == (9, 5, 4)


BORDER = """
import sys, purprune
for banned in ("coremltools", "matplotlib", "transformers", "lightning", "torch.distributed.tensor",
               "rich", "ruamel.yaml", "purprune_adapters"):
    assert banned not in sys.modules, banned
import purprune_adapters
for banned in ("coremltools", "matplotlib", "transformers", "accelerate", "lightning",
               "pandas", "tensorboard", "purprune_adapters.html_report", "typer",
               "purprune_adapters.cli", "purprune_adapters.transformers",
               "purprune_adapters.lightning"):
    assert banned not in sys.modules, banned
import pathlib
for path in pathlib.Path(purprune.__file__).parent.glob("*.py"):
    text = path.read_text()
    for banned in ("torch.nn import", "import torch.nn\\n", "purprune_adapters import",
                   "import coremltools", "torch.distributed"):
        assert banned not in text, (path.name, banned)
"""


def test_importing_stays_within_the_borders_of_the_house():
    """Defends a light import: extras and adapters come when they are used."""
    subprocess.run([sys.executable, "-c", BORDER], check=True, env=os.environ.copy())


def test_a_tensor_of_which_a_part_is_here_is_refused():
    """Defends counts and masks against shards, whose local entries would be taken for all."""
    from torch.testing._internal.two_tensor import TwoTensor

    mask = torch.ones(2, 2, dtype=torch.bool)
    weight = torch.ones(2, 2)
    with pytest.raises(TypeError, match="plain tensor for 'w'; got a TwoTensor"):
        sparsity({"w": TwoTensor(mask, mask)})
    with pytest.raises(TypeError, match="plain tensor for 'w'"):
        pack_masks({"w": TwoTensor(mask, mask)})
    with pytest.raises(TypeError, match="plain tensor for 'w'"):
        compute_masks({"w": TwoTensor(weight, weight)}, 0, Rule(0.5))
    with pytest.raises(TypeError, match="Expected a bool mask"):
        sparsity({"w": weight})


def test_sparsity_counts_masks_and_says_what_else_counts():
    """Defends the call that comes first to mind: a model, or its parameters."""
    model = nn.Linear(2, 2)
    for given in (model, model.parameters()):
        with pytest.raises(TypeError, match=r"bool tensors; got \w+\. Pass what compute_masks"):
            sparsity(given)


def test_of_infinite_weights_that_went_before_only_some_come_back():
    """Defends the order where fewer go than went, a floor is given, and all scores are infinite."""
    params = {"w": torch.full((1, 4), math.inf)}
    prev = {"w": torch.tensor([[True, True, False, False]])}
    floor = {"w": torch.ones(1, 4, dtype=torch.bool)}
    got = compute_masks(params, 0, Rule(0.25), prev=prev, floor=floor)
    assert got["w"].tolist() == [[True, True, False, True]]


def test_a_plan_is_a_mapping_of_its_rows():
    """Defends what one tries first: names, a row by its name, a copy and a typing error."""
    planned = plan({"fc.weight": torch.empty(4, 8), "out.weight": torch.empty(2, 4)}, Rule(0.5))
    assert list(planned) == ["fc.weight", "out.weight"]
    assert dict(planned)["out.weight"] is planned["out.weight"] is planned.tensors[1]
    assert len(planned) == 2
    assert pickle.loads(pickle.dumps(planned)) == planned == copy.deepcopy(planned)
    with pytest.raises(KeyError, match=r"got 'fc.wieght'. Did you mean 'fc.weight'"):
        planned["fc.wieght"]
