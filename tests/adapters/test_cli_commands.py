"""The commands: what they print, their JSON, their exit codes, and one line for bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
safetensors = pytest.importorskip("safetensors.torch")

from typer.testing import CliRunner  # noqa: E402

import purprune  # noqa: E402
from purprune import NM, Pattern, PruneConfig, Rule, apply_masks, compute_masks  # noqa: E402
from purprune.patterns import ChannelUnit, RowGroup  # noqa: E402
from purprune_adapters import Checkpoint  # noqa: E402
from purprune_adapters.cli import demo, main  # noqa: E402
from purprune_adapters.cli.app import app  # noqa: E402
from purprune_adapters.cli.pattern_names import pattern_name  # noqa: E402
from strategies import PATTERNS  # noqa: E402

COMMANDS = ("plan", "prune", "inspect", "schedule", "verify", "config", "demo")
YAML = """
global_config: {target_sparsity: 0.5, scheduler: {update_steps: "range(0, 50, 10)"}}
module_name_configs:
  head: null
  layers.1: {n_m_ratio: [2, 4]}
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    params = {
        "layers.0.weight": torch.randn(16, 32, generator=generator),
        "layers.1.weight": torch.randn(8, 16, generator=generator).bfloat16(),
        "layers.1.bias": torch.randn(8, generator=generator),
        "head.weight": torch.randn(10, 8, generator=generator),
    }
    safetensors.save_file(params, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def run(capsys: Any, *words: object) -> tuple[int, str, str]:
    """Run a command; return the exit code, stdout and stderr."""
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def found(capsys: Any, *words: object) -> Any:
    """Run a command that prints JSON, and nothing else."""
    code, out, err = run(capsys, *words, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def refused(capsys: Any, *words: object) -> str:
    """Run a command with bad input; return the one line of its error."""
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("purprune: ")
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command):
    """Defends --help, through typer's own runner."""
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert "Examples:" in result.output
    assert f"purprune {command}" in result.output
    assert "--json" in result.output
    assert "bool" not in result.output
    assert "{path}" not in result.output


def test_the_application_lists_its_commands_and_its_version(capsys):
    """Defends the first thing that anybody types."""
    code, out, _ = run(capsys)
    assert code == 0
    assert all(command in out for command in COMMANDS)
    code, out, _ = run(capsys, "--version")
    assert (code, out.split()[1]) == (0, purprune.__version__)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan"], "Missing argument 'CHECKPOINT'. See: purprune plan --help"),
        (["frob"], "No such command 'frob'. See: purprune --help"),
        (["plan", "{}", "--sparsit", "0.5"], "No such option: --sparsit"),
        (["plan", "{}"], "Expected what to prune; got nothing. Give --sparsity 0.5"),
        (["plan", "nowhere", "--nm", "2:4"], "Expected the file nowhere"),
        (["plan", "{}", "--nm", "4"], "Expected --nm ZEROS:M such as 2:4"),
        (["plan", "{}", "--nm", "5:4"], "--nm 5:4: expected ZEROS <= M, of M neighbours; write"),
        (["plan", "{}", "--nm", "5:4"], "; write --nm 4:5."),
        (["plan", "{}", "--nm", "0:0"], "--nm 0:0: M: expected greater than or equal to 1"),
        (["plan", "{}", "--sparsity", "80%"], "got '80%'. Write --sparsity 0.8."),
        (["plan", "{}", "--sparsity", "-1"], "a fraction of zeros in [0, 1]; got '-1'."),
        (["plan", "{}", "--sparsity", "1/0"], "a fraction of zeros such as 0.5 or 1/3; got '1/0'"),
        (["plan", "{}", "--sparsity", "1/2", "--block", "0x1"], "--block 0x1: expected block ext"),
        (["prune", "{}", "o.safetensors", "--nm", "2:4", "--leave", "haed"], "Expected --leave to"),
        (["plan", "{}", "--nm", "2:4", "--sparsity", "0.5"], "--nm without --sparsity"),
        (["plan", "{}", "--nm", "2:4", "--scope", "global"], "--nm without --sparsity"),
        (["plan", "{}", "--nm", "2:4", "--dim", "7"], "dim=7"),
        (["plan", "{}", "--sparsity", "0.5", "--dim", "0"], "--dim with --nm only"),
        (["plan", "{}", "--sparsity", "50"], "got '50'. Write --sparsity 0.5."),
        (["plan", "{}", "--sparsity", "half"], "got 'half'"),
        (["plan", "{}", "--sparsity", "0.5", "--scope", "all"], "'tensor', 'global'"),
        (["plan", "{}", "--block", "4x1"], "Expected --sparsity with this pattern"),
        (["plan", "{}", "--sparsity", "0.5", "--block", "4,1"], "--block extents such as 4x1"),
        (["plan", "{}", "--sparsity", "1/2", "--block", "4", "--channel", "0"], "one pattern"),
        (["plan", "{}", "--sparsity", "0.5", "--leave", "haed"], "Expected --leave to match some"),
        (["plan", "{}", "--config", "none.yaml"], "none.yaml"),
        (["plan", "{}", "--config", "x", "--sparsity", "0.5"], "--config alone"),
        (["prune", "{}", "{}", "--sparsity", "0.5"], "--overwrite"),
        (["prune", "{}", "no/out.safetensors", "--sparsity", "0.5"], "Expected a folder for"),
        (["inspect", "nowhere.pt"], "Expected the file nowhere.pt"),
        (["schedule"], "Expected --update-steps, or all of --begin, --end and --frequency; got"),
        (["schedule", "--begin", "3", "--end", "1", "--frequency", "1"], "Expected --begin <= --e"),
        (["schedule", "--update-steps", "1", "--target", "80"], "--target: expected a sparsity"),
        (["schedule", "--update-steps", "1", "--png", "no/x.png"], "no 'no'. Make it first."),
        (["schedule", "--config", "none.yaml"], "Expected the file none.yaml; it is not there."),
        (["schedule", "--update-steps", "a,b"], "Expected --update-steps like 0,100,200"),
        (["schedule", "--config", "x", "--target", "0.5"], "--config alone"),
        (["verify", "none.mlpackage", "{}"], "none.mlpackage"),
        (["config"], "Expected a config FILE, or --schema"),
    ],
)
def test_bad_input_is_answered_by_one_line(capsys, checkpoint, words, expected):
    """Defends the words for everything that can be typed wrong."""
    assert expected in refused(capsys, *(word.format(checkpoint) for word in words))


def test_a_traceback_is_there_for_those_who_ask(checkpoint):
    """Defends debugging."""
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "plan", "nowhere", "--nm", "2:4"])


def test_a_plan_says_integers_and_bytes_and_reads_no_values(capsys, checkpoint, monkeypatch):
    """Defends the prediction: counts, a bit mask, Core ML's float16."""
    monkeypatch.setattr(Checkpoint, "__getitem__", None)
    plan = found(capsys, "plan", checkpoint, "--nm", "2:4", "--leave", "head")
    rows = {row["name"]: row for row in plan["tensors"]}
    assert set(rows) == {"layers.0.weight", "layers.1.weight"}
    assert rows["layers.0.weight"]["zeros"] == 256
    assert rows["layers.0.weight"]["bitmask_bytes"] == 512 // 8 + 256 * 4
    assert rows["layers.1.weight"]["bitmask_bytes"] == 128 // 8 + 64 * 2
    assert rows["layers.0.weight"]["coreml_bytes"] == 512 // 8 + 256 * 2 + 225
    assert rows["layers.1.weight"]["coreml_bytes"] == 128 * 2  # sparse would be larger
    assert plan["total"]["dense_bytes"] == 512 * 4 + 128 * 2 + 8 * 4 + 80 * 4
    assert plan["total"]["coreml_bytes"] == 64 + 512 + 225 + 256 + 16 + 160
    assert plan["file_bytes"] == checkpoint.stat().st_size
    code, out, _ = run(capsys, "plan", checkpoint, "--nm", "2:4", "--leave", "head")
    assert code == 0
    assert "zeros: 320 of 640 entries in 2 tensors" in out
    assert "'head' is set to None: head.weight" in out


def test_a_plan_of_a_shared_count_is_exact_together_and_bounded_by_tensor(capsys, checkpoint):
    """Defends against numbers that values decide."""
    plan = found(capsys, "plan", checkpoint, "--sparsity", "0.9", "--scope", "global")
    assert plan["total"]["zeros"] == 720 * 9 // 10
    rows = {row["name"]: row["zeros"] for row in plan["tensors"]}
    assert rows["layers.0.weight"] == [648 - 208, 512]
    assert rows["head.weight"] == [8, 80]
    pruned = apply_masks(dict(Checkpoint(checkpoint)), {})
    masks = compute_masks(pruned, 0, Rule(0.9, pattern=purprune.Unstructured(scope="global")))
    for name, mask in masks.items():
        least, most = rows[name]
        assert least <= int((~mask).sum()) <= most


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("sparsity", ["0.3", "2/3", "0.9", "1.0"])
def test_a_plan_of_ragged_blocks_bounds_what_is_pruned(capsys, tmp_path, sparsity, dim):
    """Defends the bounds: a ragged unit has fewer entries than a whole one."""
    file = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(1)
    safetensors.save_file({"w": torch.randn(10, 7, generator=generator)}, file)
    block = "4x1" if dim == 0 else "3x2"
    plan = found(capsys, "plan", file, "--sparsity", sparsity, "--block", block)
    out = tmp_path / "y.safetensors"
    pruned = found(capsys, "prune", file, out, "--sparsity", sparsity, "--block", block)
    zeros = plan["tensors"][0]["zeros"]
    least, most = zeros if isinstance(zeros, list) else (zeros, zeros)
    assert least <= pruned["zeros"] <= most <= 70


def test_prune_writes_what_plan_said_and_inspect_finds_it(capsys, checkpoint, tmp_path):
    """Defends the way from one command to the next."""
    out = tmp_path / "pruned.safetensors"
    words = ["--nm", "2:4", "--leave", "head", "--leave", "*.0"]
    pruned = found(capsys, "prune", checkpoint, out, *words, "--masks", tmp_path / "m.safetensors")
    config = PruneConfig(global_config=Rule(pattern=NM(2, 4)))
    config = config.set_module_name("head", None).set_module_name("*.0", None)
    params = dict(Checkpoint(checkpoint))
    wanted = apply_masks(params, compute_masks(params, 0, config))
    assert all(torch.equal(Checkpoint(out)[name], wanted[name]) for name in wanted)
    assert (pruned["zeros"], pruned["entries"], pruned["resumed"]) == (64, 128, 0)
    rows = {row["name"]: row for row in found(capsys, "inspect", out)["tensors"]}
    assert rows["layers.1.weight"]["n_m"] == {"zeros": 2, "m": 4, "dim": 1}
    assert rows["layers.0.weight"]["zeros"] == 0
    code, text, err = run(capsys, "prune", checkpoint, out, *words, "--overwrite")
    assert (code, err) == (0, "")
    assert "64 of 128 (50.00 %) zero in 1 pruned tensors" in text


def test_a_config_file_says_rules_and_the_end_of_its_schedules(capsys, checkpoint, tmp_path):
    """Defends --config in plan, prune, schedule and config."""
    yaml, out = tmp_path / "rules.yaml", tmp_path / "out.safetensors"
    yaml.write_text(YAML)
    assert found(capsys, "prune", checkpoint, out, "--config", yaml)["zeros"] == 256 + 64
    at_0 = found(capsys, "prune", checkpoint, out, "--config", yaml, "--step", 0, "--overwrite")
    assert at_0["zeros"] == 64
    rules = found(capsys, "config", yaml, "--checkpoint", checkpoint)
    assert list(rules["rules"]) == ["layers.0.weight", "layers.1.weight"]
    assert PruneConfig.from_dict(rules["config"]) == PruneConfig.from_yaml(yaml)
    schedules = found(capsys, "schedule", "--config", yaml)["schedules"]
    assert [p["step"] for p in schedules["global_config"]] == [0, 10, 20, 30, 40]
    assert schedules["global_config"][-1]["sparsity"] == 0.5
    code, text, _ = run(capsys, "config", yaml)
    assert code == 0
    rows = {line.split()[0]: line for line in text.splitlines()}
    assert rows["layers.1"].endswith(" NM(2, 4)")
    assert rows["head"].split() == ["head", "|", "dense", *("|", "-") * 4]


def test_a_config_that_is_none_is_told_by_its_key(capsys, tmp_path):
    """Defends the check of YAML files."""
    yaml = tmp_path / "rules.yaml"
    yaml.write_text("global_config: {target_sparsty: 0.5}")
    assert "Did you mean 'target_sparsity'" in refused(capsys, "config", yaml)
    yaml.write_text("a: [")
    assert "Expected YAML" in refused(capsys, "config", yaml)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_the_name_of_a_pattern_makes_it_again(pattern):
    """Defends the short forms in tables: `NM(2, 4)` is what it says."""
    assert eval(pattern_name(pattern), vars(purprune) | vars(purprune.patterns)) == pattern


def test_patterns_that_have_names_are_written_by_them():
    """Defends short tables, and the repr of what no constructor makes."""
    names = (
        "Unstructured()", "Unstructured(scope='global')", "Channel(dim=1, size=2, norm='l1')",
        "Kernel()", "Block((4, 1), scope='row')", "NM(2, 4)", "NM(2, 4, dim=0)",
        "NM(2, 4, transposable=True)",
    )  # fmt: skip
    for name in names:
        assert pattern_name(eval(name, vars(purprune))) == name
    for odd in (Pattern(norm="l1"), Pattern(ChannelUnit(1), RowGroup(1))):
        assert pattern_name(odd) == repr(odd)


def test_rules_by_module_type_are_no_rules_for_a_checkpoint(capsys, checkpoint, tmp_path):
    """Defends the way out, which is another config and no Python call."""
    yaml = tmp_path / "rules.yaml"
    yaml.write_text("module_type_configs: {Linear: {target_sparsity: 0.5}}")
    for words in (
        ["config", yaml, "--checkpoint", checkpoint],
        ["plan", checkpoint, "--config", yaml],
    ):
        told = refused(capsys, *words)
        assert "a checkpoint has no modules; got module types Linear. Write module_" in told
        assert "resolve" not in told
    assert found(capsys, "config", yaml)["rules"]


def test_what_has_one_dim_may_be_left(capsys, checkpoint):
    """Defends `--leave '*bias'`: it was refused as matching nothing."""
    plan = found(capsys, "plan", checkpoint, "--nm", "2:4", "--leave", "*bias")
    assert plan["skipped"]["layers.1.bias"] == "'*bias' is set to None"


def test_the_schema_is_json(capsys):
    """Defends editors."""
    code, out, _ = run(capsys, "config", "--schema")
    assert code == 0
    assert "module_name_configs" in json.loads(out)["properties"]


def test_a_schedule_is_drawn_in_the_terminal_and_as_a_picture(capsys, tmp_path):
    """Defends the chart: its ends, and that it rises."""
    pytest.importorskip("matplotlib")
    words = ["schedule", "--begin", 0, "--end", 800, "--frequency", 100, "--target", 0.8]
    code, out, _ = run(capsys, *words, "--png", tmp_path / "ramp.png")
    assert code == 0
    bars = [line.partition("│")[2].rstrip() for line in out.splitlines() if "│" in line]
    filled = [len(bar.replace(" ", "")) for bar in bars]
    assert len(bars) == 12
    assert filled == sorted(filled)
    assert filled[0] > 0
    assert "0.00% at step 0, 80.00% from step 800 on, in 9 updates" in out
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")
    points = found(capsys, *words)["schedules"]["schedule"]
    assert [p["sparsity"] for p in points[:2]] == [0.0, 0.2640625]


def test_a_state_dict_of_torch_is_inspected(capsys, tmp_path):
    """Defends .pt files: nested dicts, and nothing that would have to be unpickled."""
    file = tmp_path / "model.pt"
    torch.save({"step": 3, "model": {"w": torch.eye(4)}}, file)
    (row,) = found(capsys, "inspect", file)["tensors"]
    assert (row["name"], row["zeros"], row["entries"]) == ("model.w", 12, 16)
    torch.save({"model": torch.nn.Linear(2, 2)}, file)
    told = refused(capsys, "inspect", file)
    assert "it holds an object, torch.nn.modules.linear.Linear, not a state dict alone" in told
    assert "Save model.state_dict() instead." in told
    assert "\x1b" not in told
    for damaged in (b"no archive", b"", b"PK\x03\x04 and no more"):
        file.write_bytes(damaged)
        told = refused(capsys, "inspect", file)
        assert "Expected tensors in dicts, saved by torch.save" in told
        assert "it is damaged, or was not saved by torch.save." in told
    torch.save([1], file)
    assert "got a list" in refused(capsys, "inspect", file)


def test_what_is_inspected_is_written_as_a_page_that_needs_nothing_else(
    capsys, checkpoint, tmp_path
):
    """Defends --html: the numbers of the table, names that are no markup, no address elsewhere."""
    page, weights = tmp_path / "page.html", dict(Checkpoint(checkpoint))
    rows = [[0.0, 0.0, 1.0, 2.0], [0.0, 3.0, 0.0, 4.0], [5.0, 0.0, 6.0, 0.0]]
    weights["<b>&.weight"] = torch.tensor(rows)
    checkpoint = tmp_path / "odd.safetensors"
    safetensors.save_file(weights, checkpoint)
    result = found(capsys, "inspect", checkpoint, "--html", page)
    text = page.read_text("utf-8")
    assert f"{result['zeros']:,} of {result['entries']:,}" in text
    assert "layers.<wbr>0.<wbr>weight" in text
    assert "&lt;b&gt;&amp;.<wbr>weight" in text
    assert "<b>&" not in text
    assert "2:4 along dim 1" in text
    assert text.count("<tr>") == 1 + len(weights)
    assert not re.search(r"https?:|@import|url\(|fetch\(|import\(", text)
    assert text == _again(capsys, checkpoint, page)


def _again(capsys: Any, checkpoint: Path, page: Path) -> str:
    page.write_text("old")
    told = refused(capsys, "inspect", checkpoint, "--html", page)
    assert "replace a page with overwrite=True (--overwrite)" in told
    assert page.read_text() == "old"
    found(capsys, "inspect", checkpoint, "--html", page, "--overwrite")
    return page.read_text("utf-8")


def test_a_page_is_refused_before_anything_is_read(capsys, checkpoint, tmp_path, monkeypatch):
    """Defends the checkpoint itself, folders, and the time that reading takes."""
    monkeypatch.setattr(Checkpoint, "__getitem__", None)
    before = checkpoint.read_bytes()
    told = refused(capsys, "inspect", checkpoint, "--html", checkpoint, "--overwrite")
    assert "Expected a page that ends in .html" in told
    assert f"Write '{tmp_path}/model.html'" in told
    assert checkpoint.read_bytes() == before
    (tmp_path / "folder.html").mkdir()
    for place, says in (("folder.html", "something is there"), ("no/page.html", "Make it first")):
        words = ["inspect", checkpoint, "--html", tmp_path / place, "--overwrite"]
        assert says in refused(capsys, *words)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_is_told_by_name_with_the_way_to_convert_it(
    capsys, checkpoint, tmp_path, monkeypatch, zipped
):
    """Defends those who have a .pt file: it is whole, but no safetensors file."""
    file, out, yaml = tmp_path / "net.pt", tmp_path / "out.safetensors", tmp_path / "rules.yaml"
    yaml.write_text("global_config: {target_sparsity: 0.5}")
    weights = dict(Checkpoint(checkpoint))
    torch.save(weights, file, _use_new_zipfile_serialization=zipped)
    recipe = "save_file(torch.load('net.pt', weights_only=True), 'net.safetensors')"
    for words in (
        ["plan", file, "--sparsity", 0.5],
        ["prune", file, out, "--sparsity", 0.5],
        ["config", yaml, "--checkpoint", file],
    ):
        told = refused(capsys, *words)
        assert f"Expected a safetensors file; got {file}, which torch.save wrote" in told
        assert recipe in told
    monkeypatch.chdir(tmp_path)
    exec(f"import safetensors.torch; safetensors.torch.{recipe}")
    assert found(capsys, "plan", "net.safetensors", "--sparsity", 0.5)["total"]["zeros"] == 360
    (tmp_path / "folder").mkdir()
    file.rename(tmp_path / "folder" / "pytorch_model.bin")
    told = refused(capsys, "plan", tmp_path / "folder", "--sparsity", 0.5)
    assert "pytorch_model.bin, which torch.save wrote" in told


def test_the_result_is_called_what_it_is(capsys, checkpoint, tmp_path):
    """Defends the next command, which reads files by their suffix, and --overwrite of the same."""
    for out, way_out in (
        ("out.pt", "Write '{}/out.safetensors'"),
        ("out", "Write '{}/out.safetensors'"),
        ("outdir/", "Write '{}/outdir.safetensors'"),
        ("model.v2", "Write '{}/model.v2.safetensors'"),
        ("", "Write '{}/out.safetensors'"),
    ):
        place = f"{tmp_path}/there/{out}" if out else f"{tmp_path}/there"
        (tmp_path / "there").mkdir(exist_ok=True)
        told = refused(capsys, "prune", checkpoint, place, "--sparsity", 0.5, "--overwrite")
        assert way_out.format(tmp_path / "there") in told
    words = ["--sparsity", 0.5, "--masks", tmp_path / "masks.pt"]
    told = refused(capsys, "prune", checkpoint, tmp_path / "out.safetensors", *words)
    assert f"Write '{tmp_path}/masks.safetensors'" in told
    folder = tmp_path / "source"
    folder.mkdir()
    checkpoint.rename(folder / "model.safetensors")
    told = refused(capsys, "prune", folder, tmp_path / "x.safetensors", "--sparsity", 0.5)
    assert "Expected a name for a folder" in told
    assert f"Write '{tmp_path}/x'" in told
    assert list((tmp_path / "there").iterdir()) == []
    assert found(capsys, "prune", folder, tmp_path / "x", "--sparsity", 0.5)["zeros"] == 360


def test_the_demo_prunes_exactly_and_keeps_its_accuracy(capsys):
    """Defends the first look: counts as the config says, and a network that still works."""
    pytest.importorskip("sklearn")
    result = found(capsys, "demo")
    rows = result["pruning"]["parameters"]
    zeros = {name: row["zeros"] for name, row in rows.items()}
    assert zeros == {"conv.weight": 75, "dense.weight": 1536}
    assert result["accuracy"]["pruned"] > 90
    assert result["problems"] == []


@pytest.mark.parametrize("there", ["a package", "a folder"])
def test_the_demo_replaces_no_package_unasked_and_says_so_before_it_trains(
    capsys, tmp_path, monkeypatch, there
):
    """Defends a package that took somebody days, and the time that the training takes."""
    pytest.importorskip("coremltools")
    package = tmp_path / "net.mlpackage"
    (package / "Data" / "com.apple.CoreML").mkdir(parents=True)
    if there == "a package":
        (package / "Manifest.json").write_text("mine")
    monkeypatch.setattr(demo, "_fit", None)
    assert "--overwrite" in refused(capsys, "demo", "--export", tmp_path / "net")
    if there == "a folder":
        words = refused(capsys, "demo", "--export", package, "--overwrite")
        assert "replaces Core ML packages only" in words
    assert "Make it first" in refused(capsys, "demo", "--export", tmp_path / "a" / "b")
    assert (package / "Data" / "com.apple.CoreML").is_dir()


def test_the_demo_replaces_a_package_when_it_is_told_to(capsys, tmp_path):
    """Defends --overwrite, and the export of what was trained."""
    pytest.importorskip("sklearn")
    pytest.importorskip("coremltools")
    package = tmp_path / "net.mlpackage"
    (package / "Data" / "com.apple.CoreML").mkdir(parents=True)
    (package / "Manifest.json").write_text("old")
    result = found(capsys, "demo", "--export", package, "--overwrite")
    assert result["export"]["verification"]["ok"]
    assert (package / "Manifest.json").read_text() != "old"


def test_the_demo_names_its_extra(capsys, monkeypatch):
    """Defends the message where scikit-learn is missing."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "purprune[examples]" in refused(capsys, "demo")


def test_the_command_line_names_its_extra_where_typer_is_missing(capsys, monkeypatch):
    """Defends an installation without the extra: one line, exit code 2."""
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("purprune_adapters.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "purprune[cli]" in refused(capsys, "plan")


def test_it_runs_as_a_process(checkpoint):
    """Defends the entry point: JSON on stdout alone, exit codes, and no traceback."""
    command = [sys.executable, "-m", "purprune_adapters.cli"]
    words = ["plan", str(checkpoint), "--sparsity", "0.5", "--json"]
    good = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["total"]["zeros"] == 360
