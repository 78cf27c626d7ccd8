"""The report as text, rich table, dict and data frame."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from purprune import PruneConfig, Rule, Unstructured
from purprune_adapters import ExportReport, Pruner, Report
from purprune_adapters.coreml.numeric import NumericalCheck
from purprune_adapters.coreml.records import ParameterRecord, Verification


def report(config: PruneConfig | Rule) -> Report:
    torch.manual_seed(0)
    pruner = Pruner(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), config)
    pruner.prepare(inplace=True)
    return pruner.report()


GLOBAL = Rule(0.7, pattern=Unstructured(scope="global"))


def rendered(shown: object) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_the_rich_table_says_what_the_text_says():
    """Defends one truth in two forms: every word of the text is in the table."""
    found = report(PruneConfig().set_global(GLOBAL).set_module_name("1", None))
    table = rendered(found)
    words = [word for word in str(found).split() if set(word) - set("|+-")]
    assert not [word for word in words if word not in table]
    assert "68.75%" in table


def test_names_are_no_markup():
    """Defends names with brackets, which rich would swallow."""
    model = nn.ModuleDict({"[red]": nn.Linear(4, 4)})
    assert "[red].weight" in rendered(Pruner(model, Rule(0.5)).report())


def test_a_tensor_of_a_global_group_has_no_target_of_its_own():
    """Defends against reading the target of all as that of one, which it may miss."""
    shared = report(GLOBAL).as_dict()["parameters"]["0.weight"]
    assert shared["sparsity"] is shared["target_sparsity"] is None
    assert shared["shared"] == {"sparsity": 0.7, "target_sparsity": 0.7}
    own = report(Rule(0.7)).as_dict()["parameters"]["0.weight"]
    assert (own["sparsity"], own["target_sparsity"], own["shared"]) == (0.7, 0.7, None)


def test_the_dict_is_plain():
    """Defends json.dumps."""
    found = report(Rule(0.5)).as_dict()
    assert json.loads(json.dumps(found)) == found


def test_the_data_frame_has_a_row_for_each_parameter():
    """Defends columns and their sums."""
    pytest.importorskip("pandas", reason="the extra `pandas` is not installed")
    found = report(Rule(0.5))
    frame = found.to_pandas()
    assert list(frame.index) == ["0.weight", "1.weight"]
    assert int(frame.zeros.sum()) == found.total.zeros == 48
    assert frame.loc["1.weight", "shape"] == (4, 8)
    assert frame.zero.tolist() == [0.5, 0.5]
    empty = Report("new", 0, 0, (), {})
    assert len(empty.to_pandas()) == 0


def test_a_report_is_a_mapping_of_names_to_rows():
    """Defends `name in report` and dict(report), and a name that is nearly right."""
    found = report(PruneConfig().set_global(Rule(0.5)))
    assert list(found) == list(found.keys()) == ["0.weight", "1.weight"]
    assert len(found) == 2
    assert "0.weight" in found
    assert "0.bias" not in found
    assert 0 not in found
    assert dict(found) == {row.name: row for row in found.rows}
    assert found.get("0.bias") is None
    with pytest.raises(KeyError, match=r"got '0\.wieght'\. Did you mean '0\.weight'"):
        found["0.wieght"]


def saved_and_loaded(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [lambda one: pickle.loads(pickle.dumps(one)), copy.deepcopy, saved_and_loaded]
)
def test_a_report_is_a_value_that_is_copied_and_saved(copied):
    """Defends reports in checkpoints and from other processes, and what is skipped in them."""
    config = PruneConfig().set_global(Rule(0.5)).set_module_name("1", None)
    found = report(config)
    assert len(found.skipped) == 3
    again = copied(found)
    assert again == found == report(config)
    assert hash(again) == hash(found)
    assert again != report(Rule(0.5))
    assert dataclasses.asdict(found)["skipped"] == found.skipped
    with pytest.raises(TypeError, match=r"stays as it is; got a change\. Change dict\(\.\.\.\)"):
        again.skipped["1.weight"] = ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.step = 1


def exported() -> ExportReport:
    row = ParameterRecord(
        "0.weight", (8, 8), ("w",), "as is", "sparse", "float16", 64, 48, 48,
        0, 0, 0, 0, 0, 0, 40, 128, 0.0,
    )  # fmt: skip
    verification = Verification((row,), 60, 148)
    check = NumericalCheck("passed", 0.0, 1.0)
    sizes = (900, 1000, 148)
    return ExportReport(
        Path("net.mlpackage"), "iOS16", "float16", "export", "first", verification, check, *sizes,
        compress=None, warnings=(), versions={},
    )  # fmt: skip


def test_an_export_is_a_data_frame_too():
    """Defends the records of the read-back by name."""
    pytest.importorskip("pandas", reason="the extra `pandas` is not installed")
    frame = exported().to_pandas()
    assert frame.loc["0.weight", "bytes_stored"] == 40
    assert frame.loc["0.weight", "mil_names"] == ["w"]


@pytest.mark.parametrize("made", [lambda: report(Rule(0.5)), exported])
def test_the_extra_is_named_where_pandas_is_missing(made, monkeypatch):
    """Defends the optional dependency."""
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"purprune\[pandas\]"):
        made().to_pandas()
