"""Configs: validated when built, one dict form with coremltools, every bad key named."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from purprune import (
    NM,
    Block,
    Channel,
    ConfigError,
    ConstantSparsity,
    Kernel,
    PolynomialDecay,
    PruneConfig,
    Random,
    Rule,
    Unstructured,
    compute_masks,
)
from strategies import PATTERNS, SCORES


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("score", [s for n, s in SCORES.items() if n != "callable"])
def test_configs_survive_dict_json_and_pickle(pattern, score):
    """Defends round trips of every pattern and score."""
    rule = Rule(None, PolynomialDecay([0, 5, 7], 2.5), 0.1, pattern, score, "weight")
    config = PruneConfig(rule, {"Conv2d": Rule(0.3)}, {"head": None, "a.*": rule})
    assert PruneConfig.from_dict(config.as_dict()) == config
    assert PruneConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(
    ("keys", "pattern"),
    [
        ({}, Unstructured()),
        ({"granularity": "per_scalar"}, Unstructured()),
        ({"granularity": "per_channel"}, Channel(0)),
        ({"granularity": "per_channel", "block_size": 2}, Channel(0, size=2)),
        ({"granularity": "per_kernel"}, Kernel()),
        ({"granularity": "per_kernel", "block_size": 3}, Kernel(size=3)),
        ({"block_size": 4}, Block(4)),
        ({"block_size": [4, 1]}, Block((4, 1))),
        ({"n_m_ratio": [2, 4]}, NM(zeros=2, m=4)),
        ({"n_m_ratio": (3, 4), "dim": 0}, NM(zeros=3, m=4, dim=0)),
    ],
)
def test_the_keys_of_coremltools_mean_what_it_documents(keys, pattern):
    """Defends the shared dict form."""
    config = PruneConfig.from_dict({"global_config": keys})
    assert config.rules["global_config"].pattern == pattern
    assert Rule(**keys).pattern == pattern


def test_a_full_dump_of_a_coremltools_config_is_taken_as_it_stands():
    """Defends dicts that spell out every default, the ignored ones too."""
    dumped = {
        "scheduler": {"begin_step": 0},
        "initial_sparsity": 0.0,
        "target_sparsity": 0.5,
        "granularity": "per_scalar",
        "block_size": 1,
        "n_m_ratio": None,
        "dim": 1,
        "param_name": "weight",
    }
    whole = {"global_config": dumped, "module_type_configs": {}, "module_name_configs": {}}
    assert PruneConfig.from_dict(whole).global_config == Rule(0.5, param_name="weight")
    nm = {**dumped, "n_m_ratio": [1, 4], "scheduler": {"update_steps": "range(0, 9, 3)"}}
    rule = PruneConfig.from_dict({"global_config": nm}).global_config
    assert rule == Rule(schedule=PolynomialDecay([0, 3, 6]), pattern=NM(1, 4), param_name="weight")
    assert Rule(**{**dumped, "dim": None}) == Rule(0.5, param_name="weight")
    channel = {**dumped, "granularity": "per_channel"}
    assert PruneConfig.from_dict({"global_config": channel}).global_config.pattern == Channel(0)


def test_yaml_is_read_from_a_path_and_from_a_stream(tmp_path):
    """Defends the file form."""
    text = (
        "global_config: {target_sparsity: 5e-1}\n"
        "module_type_configs:\n  Conv2d: {target_sparsity: 0.7, granularity: per_kernel}\n"
        "module_name_configs:\n  head: null\n"
    )
    (tmp_path / "config.yaml").write_text(text)
    expected = PruneConfig(Rule(0.5), {"Conv2d": Rule(0.7, pattern=Kernel())}, {"head": None})
    assert PruneConfig.from_yaml(tmp_path / "config.yaml") == expected
    assert PruneConfig.from_yaml(str(tmp_path / "config.yaml")) == expected
    assert PruneConfig.from_yaml(io.StringIO(text)) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2\n", "duplicate key"),
        ("global_config: [", "Expected YAML"),
        ("- 1\n", "dict of config keys; got list"),
        ("", r"keys in the stream; it is empty\. Write for instance global_config: {target_spars"),
        ("# later\n", "it is empty"),
        ("global_config: {target: 0.5}\n", "unknown key 'target'"),
    ],
)
def test_bad_yaml_raises(text, says):
    """Defends against a key that is given twice and counts once."""
    with pytest.raises(ConfigError, match=says):
        PruneConfig.from_yaml(io.StringIO(text))


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"granularty": "per_channel"}, "unknown key 'granularty'. Did you mean 'granularity'?"),
        ({"target_sparsity": 1.5}, r"target_sparsity: expected a sparsity .* got 1.5"),
        ({"target_sparsity": float("nan")}, "got nan"),
        (
            {"target_sparsity": "0.5"},
            "target_sparsity: Expected a sparsity as a float or a Fraction; got '0.5'",
        ),
        ({"target_sparsity": True}, "got True"),
        ({"initial_sparsity": -0.1}, "initial_sparsity"),
        ({"n_m_ratio": [5, 4]}, "zeros <= m; got zeros=5, m=4"),
        ({"n_m_ratio": "2:4"}, r"conv1\.n_m_ratio: expected a list such as \[2, 4\]; got '2:4'"),
        ({"n_m_ratio": [1, 2, 3]}, r"conv1\.n_m_ratio: expected at most 2 values such as \[2, 4\]"),
        ({"pattern": {"unit": "channel"}}, "unit: .* got 'channel'. Write {'kind': 'channel'}"),
        ({"pattern": {"unit": {"kind": "chanel"}}}, "Did you mean 'channel'?"),
        (
            {"pattern": {"unit": {"dim": 1}}},
            "a dict whose kind is one of entry, channel, kernel, block; got {'dim': 1}",
        ),
        (
            {"pattern": {"group": {"kind": "n_m"}}},
            r"N:M is a rule's n_m_ratio: \[2, 4\], or the gr",
        ),
        ({"pattern": {"kind": "nm"}}, "unknown key 'kind'. N:M is a rule's n_m_ratio"),
        ({"pattern": {"kind": "row"}}, "unknown key 'kind'. Write {'group': {'kind': 'row'}}"),
        ({"n_m_ratio": [2, 0]}, "m: expected greater than or equal to 1; got 0"),
        ({"n_m_ratio": [2, 4], "block_size": 2}, "n_m_ratio alone"),
        ({"n_m_ratio": [2, 4], "granularity": "per_channel"}, "n_m_ratio alone"),
        ({"n_m_ratio": [2, 4], "target_sparsity": 0.75}, "beside the pattern's own 1/2"),
        ({"n_m_ratio": [2.0, 4.0]}, "valid integer"),
        ({"granularity": "per_layer"}, "per_scalar"),
        ({"granularity": "per_channel", "dim": 1}, r"pattern=Channel\(dim=...\)"),
        ({"granularity": "per_channel", "dim": 0}, r"got dim=0 without.*Channel\(dim=...\)"),
        ({"dim": 0}, "expected dim with n_m_ratio only"),
        ({"dim": 0, "n_m_ratio": None}, "expected dim with n_m_ratio only"),
        ({"dim": 2, "n_m_ratio": None}, "expected dim with n_m_ratio only"),
        ({"block_size": 0}, "block extents >= 1"),
        ({"block_size": 1.5}, "valid integer"),
        ({"scheduler": {"update_steps": [0.5]}}, "whole update steps"),
        ({"scheduler": {"begin_step": -1}}, "begin_step"),
        ({"scheduler": {}, "schedule": {}}, "schedule or scheduler; got both"),
        ({"scheduler": 3}, "a schedule"),
        ({"schedule": {"callable": "os:system"}}, "unknown key 'callable'"),
        ({"score": "magnitud"}, "'magnitude', 'taylor', 'random'"),
        ({"score": {"kind": "random", "seed": -1}}, "seed"),
        ({"pattern": {"unit": {"kind": "row"}}}, "unit"),
        ({"pattern": {}, "block_size": 2}, "pattern or block_size; got both"),
    ],
)
def test_bad_rules_raise_and_say_what_was_expected(rule, says):
    """Defends against configs that silently do something else."""
    with pytest.raises(ConfigError, match=says) as caught:
        PruneConfig.from_dict({"module_name_configs": {"conv1": rule}})
    assert "module_name_configs.conv1" in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"granularty": 1}, "Did you mean 'granularity'?"),
        ({"pattern": {"unit": {"kind": "channel", "dims": 1}}}, "Did you mean 'dim'?"),
        ({"pattern": {"groop": {}}}, "Did you mean 'group'?"),
        ({"schedule": {"kind": "cosine", "power": 2}}, "It is a key of RIA and PolynomialDecay."),
        ({"score": {"kind": "random", "sed": 1}}, "Did you mean 'seed'?"),
    ],
)
def test_near_misses_in_dicts_are_keys_of_that_place(rule, says):
    """Defends the suggestions of files, for modules too whose names are keys elsewhere."""
    for name in ("conv1", "score"):
        with pytest.raises(ConfigError, match=re.escape(says)):
            PruneConfig.from_dict({"module_name_configs": {name: rule}})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"a.weight": Rule(0.5)}, "PruneConfig().set_module_name('a.weight', Rule(0.5)), or"),
        ({"a.weight": {}}, "{'module_name_configs': {'a.weight': ...}}"),
        ({"global_config": {}, "head": None}, "PruneConfig().set_module_name('head', None)"),
    ],
)
def test_rules_that_stand_under_names_at_once_are_told_where_they_belong(config, says):
    """Defends a natural first try: rules by the name of a parameter, in a dict of these alone."""
    with pytest.raises(ConfigError, match=re.escape(says)):
        compute_masks({"a.weight": torch.ones(2, 2)}, 0, config)


def test_unknown_top_level_keys_raise():
    """Defends against a mis-spelt section."""
    with pytest.raises(ConfigError, match="Did you mean 'global_config'"):
        PruneConfig.from_dict({"globl_config": {}})


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Rule(target=0.8), "'target'. Did you mean 'target_sparsity'?"),
        (lambda: Rule(amount=0.8), "'amount'. Did you mean 'target_sparsity'?"),
        (lambda: Rule(sparsity=0.8), "'sparsity'. Did you mean 'target_sparsity'?"),
        (lambda: Rule(scor="wanda"), "Did you mean 'score'?"),
        (lambda: Rule(granularty="per_channel"), "Did you mean 'granularity'?"),
        (lambda: Rule(kinds=1), "Known here: target_sparsity, schedule, initial_sparsity, pattern"),
        (lambda: Random(sed=1), "Did you mean 'seed'?"),
        (lambda: Random(foo=1), "Known here: seed."),
        (
            lambda: PolynomialDecay(0, 800, 100),
            "PolynomialDecay: expected at most update_steps, power without a name; got more. Write "
            "the others so: PolynomialDecay(begin_step=..., end_step=..., frequency=...).",
        ),
        (lambda: Random(1, 2), "Random: expected at most seed without a name; got more."),
        (lambda: Rule(final_sparsity=0.8), "Did you mean 'target_sparsity'?"),
        (lambda: Rule(density=0.2), "'density'. In a Rule it is 1 - target_sparsity."),
        (lambda: Rule(keep=0.2), "'keep'. In a Rule it is 1 - target_sparsity."),
        (
            lambda: PolynomialDecay(range(9), final_sparsity=0.5),
            "'final_sparsity'. In a Rule it is target_sparsity.",
        ),
        (lambda: PolynomialDecay(range(9), initial_sparsity=0), "It is a key of Rule."),
        (lambda: Channel(n_m_ratio=(2, 4)), "It is a key of Rule."),
        (
            lambda: Rule(scope="global"),
            "It is a key of Unstructured, Channel, Kernel and Block. Write "
            "pattern=Unstructured(scope=...).",
        ),
        (lambda: Rule(norm="l1"), "Write pattern=Pattern(norm=...)."),
        (lambda: Rule(begin_step=3), "Write schedule=ConstantSparsity(begin_step=...)."),
        (lambda: Rule(m=4), "It is a key of NM. Write pattern=NM(m=...)."),
        (lambda: Rule(max_sparsity=0.9), "It is a key of GlobalGroup."),
    ],
)
def test_a_key_that_is_not_there_leads_to_one_of_the_same_value(build, says):
    """Defends near misses against keys that only other values have, and says whose these are."""
    with pytest.raises(ConfigError) as caught:
        build()
    assert says in str(caught.value)
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: NM(2, 4, scope="global"), "NM: unknown key 'scope'. Every group of m has its own"),
        (lambda: NM(n=2, m=4), "unknown key 'n'. The first number counts zeros: 2:4 is NM(zeros=2"),
        (lambda: NM(2), "NM.m: expected a value; got none. 2:4 sparsity is NM(2, 4)"),
        (lambda: NM("2:4"), "NM.m: expected a value; got none. 2:4 sparsity is NM(2, 4)"),
        (lambda: NM(2, 4, 1), "NM: expected at most zeros, m without a name; got more. Write the"),
        (lambda: NM(4, 2), "NM: expected zeros <= m; got zeros=4, m=2."),
        (lambda: Block((0, 1)), "Block: expected block extents >= 1"),
        (
            lambda: Block(4, dim=1),
            "It is a key of Channel, NM and Rule. Known here: shape, norm, scope.",
        ),
        (lambda: Channel(axis=1), "Channel: unknown key 'axis'. Along a dim it is Channel(dim="),
        (lambda: Channel(1.5), "Channel.dim: expected a valid integer; got 1.5."),
        (lambda: Unstructured("global"), "Write the others so: Unstructured(scope=...)."),
    ],
)
def test_a_named_pattern_is_refused_under_its_own_name(build, says):
    """Defends against bare TypeErrors, and names that nobody typed."""
    with pytest.raises(ConfigError) as caught:
        build()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: PruneConfig().set_module_name("4", 0.5), "a Rule such as Rule(0.5), or a dict"),
        (lambda: PruneConfig().set_global(0.5), "a Rule such as Rule(0.5), or a dict"),
        (
            lambda: PruneConfig().set_module_type([torch.nn.Linear], Rule(0.5)),
            "Expected one name or one class to select by; got [<class",
        ),
        (
            lambda: PruneConfig().set_module_name(["0"], Rule(0.5)),
            "got ['0']. Call set_module_name or set_module_type once for each.",
        ),
        (lambda: PruneConfig(0.5), "a Rule such as Rule(0.5), or a dict"),
        (lambda: Rule(pattern=Channel), "got Channel itself. Write Channel(...)."),
        (lambda: Rule(score=Random), "got Random itself. Write Random(...)."),
        (lambda: Rule(pattern="channel"), "a Pattern such as Channel() or NM(2, 4)"),
        (lambda: Rule(0.5, range(10)), "such as PolynomialDecay(range(0, 100, 10)), a dict"),
        (lambda: PolynomialDecay(100), "got 100. Write range(0, 100, 10)."),
        (lambda: PolynomialDecay(0, 100), "got 0. Write range(0, 100, 10)."),
        (lambda: Rule(0.5, Channel()), "a pattern by its name; got it without. Write Rule(0.5, "),
    ],
)
def test_what_was_forgotten_around_a_value_is_named(build, says):
    """Defends first tries: a number for a rule, a function for a pattern, a value misplaced."""
    with pytest.raises(ConfigError) as caught:
        build()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Rule(score=lambda w: w.abs()), r"a score(weight, context); got .*<lambda>(w), "),
        (lambda: Rule(score=lambda w: w.abs()), "which takes 1 argument."),
        (lambda: Rule(score=lambda w, c, *, k: w), "missing a required argument: 'k'"),
        (lambda: Rule(schedule=lambda: 0.5), "a schedule(step); got .*(), which takes 0 arguments"),
        (lambda: Rule(schedule=lambda a, b: 0.5), "which takes 2 arguments."),
    ],
)
def test_a_callable_with_other_arguments_is_refused_when_the_rule_is_built(build, says):
    """Defends against an error in the middle of a training, far from the rule."""
    with pytest.raises(ConfigError, match=says.replace("(", r"\(").replace(")", r"\)")):
        build()


def test_a_callable_that_does_not_say_what_it_takes_is_taken():
    """Defends what is built in, partial functions, methods and variable arguments."""
    partial = functools.partial(lambda power, weight, context: weight**power, 2)
    for score in (max, partial, lambda *given: given[0]):
        assert Rule(score=score).score is score
    assert Rule(schedule=[0.5].__getitem__).sparsity_at(0) == Fraction(1, 2)


@pytest.mark.parametrize("key", ["target_sparsity", "scheduler", "granularity", "schedule"])
def test_a_rule_without_its_place_is_told_where_it_belongs(key):
    """Defends flat configs: `{target_sparsity: 0.8}` alone."""
    for build in (PruneConfig.from_dict, lambda keys: PruneConfig(**keys)):
        with pytest.raises(
            ConfigError, match=rf"in a rule; .* Write global_config: {{{key}: 0\.8}}"
        ):
            build({key: 0.8})
    with pytest.raises(ConfigError, match=r"\{target_sparsity: 0.8, scheduler: \.\.\.\}\."):
        PruneConfig.from_dict({"target_sparsity": 0.8, "scheduler": {"begin_step": 1}})


def test_a_config_that_is_not_there_is_told_by_its_path(tmp_path):
    """Defends against `[Errno 2]`."""
    with pytest.raises(FileNotFoundError, match=r"Expected the file .*no\.yaml; it is not there\."):
        PruneConfig.from_yaml(tmp_path / "no.yaml")
    with pytest.raises(IsADirectoryError, match=f"Expected a YAML file; got the folder {tmp_path}"):
        PruneConfig.from_yaml(str(tmp_path))


def test_an_empty_config_is_told_by_its_path_or_the_name_of_its_stream(tmp_path):
    """Defends a file that was never written, and the one that says what to write."""
    path = tmp_path / "c.yaml"
    path.write_text("")
    with pytest.raises(ConfigError, match=r"in .*c\.yaml; it is empty\. Write .*global_config"):
        PruneConfig.from_yaml(path)
    with path.open() as file, pytest.raises(ConfigError, match=r"in .*c\.yaml; it is empty"):
        PruneConfig.from_yaml(file)
    path.write_text("a: [")
    with path.open() as file, pytest.raises(ConfigError, match=r"YAML in .*c\.yaml; got an error"):
        PruneConfig.from_yaml(file)


def test_a_config_is_read_from_a_pipe():
    """Defends `--config <(...)` and /dev/stdin: a pipe is there, but is no regular file."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as _:
        with os.fdopen(writing, "w") as pipe:
            pipe.write("global_config: {target_sparsity: 0.8}")
        assert PruneConfig.from_yaml(f"/dev/fd/{reading}") == PruneConfig(Rule(0.8))


def test_setting_a_rule_returns_a_new_config_and_leaves_the_old_one():
    """Defends configs as values."""
    empty = PruneConfig()
    config = empty.set_global(Rule(0.5)).set_module_type(torch.nn.Conv2d, Rule(0.7))
    config = config.set_module_name("head", None)
    assert empty == PruneConfig()
    assert config.rules == {"global_config": Rule(0.5), "torch.nn.Conv2d": Rule(0.7)}
    assert config == PruneConfig(Rule(0.5), {torch.nn.Conv2d: Rule(0.7)}, {"head": None})
    with pytest.raises(AttributeError):
        config.global_config = None


def test_callables_are_told_apart_in_dicts_but_not_loaded_from_them():
    """Defends resume with a user's score, and files against naming code to run."""
    config = PruneConfig().set_global(Rule(0.5, score=_my_score))
    plain = config.as_dict()
    assert plain["global_config"]["score"] == {"callable": f"{__name__}:_my_score"}
    with pytest.raises(ConfigError, match="score"):
        PruneConfig.from_dict(plain)


def _my_score(weight, context):
    return weight.abs()


def test_written_sparsities_are_kept_exactly():
    """Defends thirds, and numbers of other libraries, which show shorter decimals than they are."""
    assert Rule(Fraction(1, 3)).target == Fraction(1, 3)
    assert Rule(np.float32(0.7)).target == Fraction(7, 10)
    assert Rule(np.float64(0.7)) == Rule(0.7)
    assert Rule(schedule=lambda t: np.float32(0.7)).sparsity_at(0) == Fraction(7, 10)
    config = PruneConfig(Rule(Fraction(1, 3)))
    assert config.as_dict()["global_config"]["target_sparsity"] == "1/3"
    assert PruneConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ConfigError, match=r"got 80. 80 % is 0.8"):
        Rule(80)
    with pytest.raises(ConfigError, match="float or a Fraction; got tensor"):
        Rule(torch.tensor(0.7))


def test_configs_cannot_be_changed_behind_their_back():
    """Defends configs as values that can be compared, hashed and shared."""
    config = PruneConfig().set_module_name("a", Rule(0.5))
    with pytest.raises(TypeError, match="return a new one"):
        config.module_name_configs["b"] = 5
    assert hash(config) == hash(PruneConfig().set_module_name("a", Rule(0.5)))


def test_callables_have_the_same_name_in_every_process():
    """Defends resume with a partial: no address of memory is in its name."""
    schedule = functools.partial(min, 0.5, key=_my_score)
    plain = Rule(schedule=schedule)
    name = PruneConfig(plain).as_dict()["global_config"]["schedule"]["callable"]
    assert name.startswith("builtins:min(0.5")
    assert "0x" not in name


def test_the_json_schema_knows_every_key():
    """Defends editors' completion of YAML files: our keys and coremltools'."""
    schema = PruneConfig.json_schema()
    assert set(schema["properties"]) == {
        "global_config", "module_type_configs", "module_name_configs",
    }  # fmt: skip
    rule = schema["$defs"]["Rule"]
    for key in ("scheduler", "target_sparsity", "granularity", "block_size", "n_m_ratio", "dim"):
        assert key in rule["properties"]
    assert rule["additionalProperties"] is False
    json.dumps(schema)


def test_random_seeds_and_defaults():
    """Defends the documented defaults."""
    assert Rule() == Rule(None, ConstantSparsity(0), 0.0, Unstructured(), "magnitude")
    assert Rule().target == 0.5
    assert Rule(score="random").score == Random(0)


@pytest.mark.parametrize("whole", [0, 1])
def test_a_fraction_that_is_whole_goes_through_a_dict(whole):
    """Defends computed targets: Fraction(1) was written as a text that nothing read."""
    config = PruneConfig(Rule(Fraction(whole)))
    assert PruneConfig.from_dict(config.as_dict()) == config
