"""Selection by name: most specific wins, nothing is passed over in silence."""

from __future__ import annotations

import pytest
import torch

from purprune import PruneConfig, Rule, SelectionError, compute_masks
from purprune.selection import select
from purprune_adapters import resolve

PARAMS = {
    "embed.weight": torch.ones(4, 2),
    "encoder.0.attn.in_proj_weight": torch.ones(6, 2),
    "encoder.0.attn.in_proj_bias": torch.ones(6),
    "encoder.0.norm.weight": torch.ones(2),
    "encoder.0.mlp.weight": torch.ones(2, 2),
    "encoder.1.mlp.weight": torch.ones(2, 2),
    "head.weight": torch.ones(2, 2),
    "head.bias": torch.ones(2),
    "steps": torch.ones(2, 2, dtype=torch.int64),
}
A, B, C = Rule(0.1), Rule(0.2), Rule(0.3)


def _selected(config):
    return select(config, PARAMS).rules


def test_the_global_rule_is_for_floats_of_two_or_more_dims():
    """Defends the meaning of global where there are no modules, and the reasons for the rest."""
    found = select(PruneConfig(A), PARAMS)
    assert list(found.rules) == [
        "embed.weight", "encoder.0.attn.in_proj_weight", "encoder.0.mlp.weight",
        "encoder.1.mlp.weight", "head.weight",
    ]  # fmt: skip
    assert found.skipped["head.bias"] == "1-D: the global rule is for 2 or more dims"
    assert found.skipped["steps"] == "int64: the global rule is for floats"


def test_a_module_name_stands_for_the_weights_at_and_below_it():
    """Defends conv1 -> conv1.weight, in_proj_weight among the weights, and norms below left out."""
    assert list(_selected(PruneConfig().set_module_name("head", A))) == ["head.weight"]
    assert list(_selected(PruneConfig().set_module_name("encoder.0", A))) == [
        "encoder.0.attn.in_proj_weight", "encoder.0.mlp.weight",
    ]  # fmt: skip
    assert list(_selected(PruneConfig().set_module_name("encoder.0.norm", A))) == [
        "encoder.0.norm.weight"
    ]
    bias = Rule(0.5, param_name="bias")
    assert list(_selected(PruneConfig().set_module_name("head", bias))) == ["head.bias"]


def test_exact_beats_glob_near_beats_far_and_late_beats_early():
    """Defends the order of precedence among names."""
    config = PruneConfig(
        A, {}, {"*.mlp": A, "encoder": B, "encoder.1.*": C, "encoder.0.mlp.weight": C}
    )
    rules = _selected(config)
    assert rules["encoder.0.mlp.weight"] == C
    assert rules["encoder.1.mlp.weight"] == B, "an exact name, even a far one, beats a glob"
    globs = PruneConfig(None, {}, {"encoder.*.mlp": A, "*.mlp": B})
    assert _selected(globs)["encoder.0.mlp.weight"] == B
    assert _selected(globs.set_module_name("encoder.*.mlp", C))["encoder.0.mlp.weight"] == C


def test_none_leaves_dense():
    """Defends exceptions from a global rule."""
    found = select(PruneConfig(A).set_module_name("encoder", None), PARAMS)
    assert list(found.rules) == ["embed.weight", "head.weight"]
    assert found.skipped["encoder.0.mlp.weight"] == "'encoder' is set to None"


@pytest.mark.parametrize(
    ("selector", "dense"),
    [
        ("*norm*", {"encoder.0.norm.weight"}),
        ("*bias", {"encoder.0.attn.in_proj_bias", "head.bias"}),
        ("encoder.0.norm", {"encoder.0.norm.weight"}),
        ("steps", {"steps"}),
        ("head", {"head.weight", "head.bias"}),
    ],
)
def test_none_takes_everything_there(selector, dense):
    """Defends `--leave '*norm*'`: what has one dim is left anyway; that is no mistake."""
    found = select(PruneConfig(A).set_module_name(selector, None), PARAMS)
    reason = f"{selector!r} is set to None"
    assert {name for name, why in found.skipped.items() if why == reason} == dense


@pytest.mark.parametrize(
    ("selector", "says"),
    [
        ("hed", "'hed' matches nothing. Did you mean 'head'"),
        ("head.wieght", "Did you mean 'head.weight'"),
        ("zzz.*", "There are 'embed', 'embed.weight', 'encoder'"),
        ("encoder.0.attn.in_proj", "in_proj_weight"),
    ],
)
def test_a_selector_that_matches_nothing_raises_with_near_misses(selector, says):
    """Defends against a mis-spelt name that prunes nothing; None rules count too."""
    for rule in (A, None):
        with pytest.raises(SelectionError, match=says.replace(".", r"\.").replace("*", r"\*")):
            select(PruneConfig(B).set_module_name(selector, rule), PARAMS)


@pytest.mark.parametrize("selector", [r"encoder\.\d+", "encodr.*", "head|embed", "(head)", "h.+"])
def test_a_regular_expression_is_told_how_globs_are_written(selector):
    """Defends names as coremltools takes them: globs have other signs and no alternatives."""
    config = PruneConfig(B).set_module_name(selector, A)
    model = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
    for raising in (lambda: select(config, PARAMS), lambda: resolve(model, config)):
        words = r"matches nothing\. Names are globs, not regular expressions: '\*' stands for any"
        with pytest.raises(SelectionError, match=words):
            raising()
    for plain in ("hed", "zzz*", "layer[0-9]"):
        with pytest.raises(SelectionError, match="matches nothing") as caught:
            select(PruneConfig(B).set_module_name(plain, A), PARAMS)
        assert "globs" not in str(caught.value)


def test_integer_parameters_raise_when_they_are_named():
    """Defends against masks for things that are no weights."""
    with pytest.raises(SelectionError, match=r"'steps' of torch.int64.*to None"):
        select(PruneConfig().set_module_name("steps", A), PARAMS)


def test_configs_that_need_modules_or_do_nothing_raise():
    """Defends the pure core's border, and against a config that prunes nothing."""
    with pytest.raises(SelectionError, match=r"purprune_adapters.resolve"):
        select(PruneConfig().set_module_type("Linear", A), PARAMS)
    for config in (PruneConfig(), PruneConfig().set_module_name("head", None)):
        with pytest.raises(SelectionError, match="at least one rule"):
            select(config, PARAMS)


def test_a_thousand_names_are_selected_in_linear_time():
    """Defends resolved configs, which name every parameter: 1,000 names must not be 10**6 tests."""
    params = {f"layers.{i}.fc.weight": torch.ones(1, 1) for i in range(1000)}
    config = PruneConfig(module_name_configs=dict.fromkeys(params, A))
    assert len(compute_masks(params, 0, config)) == 1000
