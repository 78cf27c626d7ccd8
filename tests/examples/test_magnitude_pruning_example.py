"""The tutorial runs from end to end, and its own checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
import magnitude_pruning as tutorial
from purprune_adapters.coreml import ExportError, VerificationError

EXAMPLES = Path(tutorial.__file__).parent
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def result(bands: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Run the tutorial on 20 easy images with a coremltools that is not installed."""
    out = tmp_path_factory.mktemp("run") / "deep" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "coremltools", None)
        return tutorial.main(["--data", str(bands), "--out", str(out)]), out


@pytest.fixture(scope="module")
def summary(result: tuple[int, Path]) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((result[1] / "summary.json").read_text("utf-8"))
    return read


def test_the_tutorial_prunes_exactly_and_keeps_the_accuracy(
    result: tuple[int, Path], summary: dict[str, Any]
) -> None:
    """The promise of the README, from files to numbers, in one run."""
    assert result[0] == 0
    parameters = summary["pruning"]["parameters"]
    assert {name: p["zeros"] for name, p in parameters.items()} == {
        "conv.weight": 75,
        "dense.weight": 18_816,
    }
    assert summary["accuracy"]["pruned"] >= summary["accuracy"]["dense"] - 2
    assert summary["accuracy"]["dense"] > 90
    assert summary["images"] == {"train": 20, "test": 50}


def test_fine_tuning_reaches_the_end_of_the_schedule_when_an_epoch_is_one_step(
    summary: dict[str, Any],
) -> None:
    """The number of epochs follows from the number of batches, and not from MNIST's."""
    assert summary["epochs"] == {"dense": 900, "fine_tune": 900}
    assert summary["steps"] == {"dense": 900, "fine_tune": 900}


def test_without_coremltools_everything_else_is_written(
    result: tuple[int, Path], summary: dict[str, Any]
) -> None:
    """The export is the last step: its absence must not cost the training before it."""
    assert summary["export"] is None
    assert sorted(path.name for path in result[1].iterdir()) == ["pruning.png", "summary.json"]
    assert (result[1] / "pruning.png").read_bytes().startswith(PNG)


def test_without_coremltools_the_way_to_install_it_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whoever wants the package must learn what is missing."""
    monkeypatch.setitem(sys.modules, "coremltools", None)
    model = tutorial.network(0).eval()
    assert tutorial.export(model, {}, torch.zeros(1, 1, 28, 28), tmp_path) == (None, [])
    assert 'pip install "purprune[coreml]"' in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ExportError, VerificationError])
def test_an_export_that_fails_is_a_problem_and_no_traceback(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The training before it took minutes; its summary and picture are written all the same."""

    def fail(*args: Any, **options: Any) -> None:
        raise kind("3 of 9 entries lost")

    monkeypatch.setattr(tutorial, "export_coreml", fail)
    report, [line] = tutorial.export(tutorial.network(0), {}, torch.zeros(1), tmp_path)
    assert report is None
    assert "3 of 9 entries lost" in line


@pytest.mark.parametrize(
    ("batches", "epochs"), [(469, (4, 2)), (11, (82, 82)), (1, (900, 900)), (2000, (4, 1))]
)
def test_epochs_follow_from_the_number_of_batches(batches: int, epochs: tuple[int, int]) -> None:
    """469 is MNIST: four epochs and two, as the tutorial that people know."""
    loader = range(batches)
    assert (tutorial.dense_epochs(loader), tutorial.fine_tune_epochs(loader)) == epochs


@pytest.mark.filterwarnings("ignore:step.. was called")  # nothing is trained here
def test_a_result_out_of_bounds_is_reported_with_both_numbers() -> None:
    """The checks at the end of the tutorial are checks only if they can fail."""
    pruner = tutorial.Pruner(tutorial.network(0), tutorial.CONFIG)
    pruner.prepare(inplace=True)
    dense = pruner.report()
    for _ in range(900):
        pruner.step()
    pruned = pruner.report()
    assert tutorial.problems(98.0, 96.0, pruned) == []
    assert tutorial.problems(90.0, 97.0, pruned) == []
    [line] = tutorial.problems(98.0, 95.9, pruned)
    assert "98.00 %" in line
    assert "95.90 %" in line
    lines = tutorial.problems(98.0, 98.0, dense)
    assert ["75 zeros in 'conv.weight'; got 0 of 108" in lines[0], "18,816" in lines[1]] == [
        True
    ] * 2


def test_a_result_out_of_bounds_ends_with_exit_code_1(
    bands: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script that runs the tutorial sees the failure without reading the text."""
    monkeypatch.setattr(tutorial, "run", lambda *a, **k: ({"seconds": 0}, ["too bad"]))
    assert tutorial.main(["--data", str(bands), "--out", str(tmp_path)]) == 1
    assert "too bad" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/nowhere"], "there is no folder '/nowhere'"),
        (["--dense-epochs", "0"], "expected at least 1; got 0"),
        (["--dense-epochs", "two"], "invalid"),
    ],
)
def test_bad_arguments_end_with_exit_code_2_and_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped folder gets one line and no traceback."""
    with pytest.raises(SystemExit) as caught:
        tutorial.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_network_does_not_touch_the_global_random_state() -> None:
    """Both examples draw the same weights, wherever in a program they are called."""
    before = torch.random.get_rng_state()
    first, second = tutorial.network(5), tutorial.network(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.dense.weight, second.dense.weight)
    assert not torch.equal(first.dense.weight, tutorial.network(6).dense.weight)


@pytest.mark.parametrize("script", ["magnitude_pruning.py", "functional_training.py"])
def test_the_examples_start_as_scripts_from_any_folder(script: str, tmp_path: Path) -> None:
    """They import each other as files that lie side by side."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--data DIR" in done.stdout


@pytest.mark.slow
def test_the_whole_tutorial_exports_a_package_below_45_percent_with_no_weight_lost(
    tmp_path: Path,
) -> None:
    """The default run as `make demo` starts it, on scikit-learn's digits, export included."""
    pytest.importorskip("coremltools")
    pytest.importorskip("sklearn")
    assert tutorial.main(["--out", str(tmp_path)]) == 0
    exported = json.loads((tmp_path / "summary.json").read_text("utf-8"))["export"]
    assert exported["verification"]["ok"]
    assert exported["check"]["status"] == "passed"
    assert exported["check"]["declared_nonfinite"] == 0
    assert exported["weight_bytes"] < 0.45 * exported["dense_weight_bytes"]
    rows = {row["name"]: row for row in exported["verification"]["parameters"]}
    assert [rows[name]["dropped"] for name in ("conv.weight", "dense.weight")] == [0, 0]
    assert rows["dense.weight"]["storage"] == "sparse"
    assert (tmp_path / "digits.mlpackage" / "Manifest.json").is_file()
    inspected = subprocess.run(
        [
            sys.executable,
            "-m",
            "purprune_adapters.cli",
            "inspect",
            str(tmp_path / "digits.mlpackage"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    readme = (EXAMPLES.parent / "README.md").read_text("utf-8")
    for line in inspected.stdout.splitlines()[2:]:
        assert line.rpartition(" | ")[0] in readme
    # A second run replaces the package of the first.
    assert tutorial.main(["--out", str(tmp_path), "--dense-epochs", "10"]) == 0
