"""``verify`` and ``inspect`` on Core ML packages that were really exported."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

pytest.importorskip("coremltools")
pytest.importorskip("typer")
safetensors = pytest.importorskip("safetensors.torch")

from purprune import Rule, pack_masks, plan  # noqa: E402
from purprune_adapters import Pruner, export_coreml, verify_coreml  # noqa: E402
from purprune_adapters.cli import main  # noqa: E402
from purprune_adapters.predicted import predict  # noqa: E402


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A package with a folded batch norm, its checkpoint in two formats, and its masks."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 6 * 6, 32),
    )  # fmt: skip
    model(torch.randn(32, 1, 8, 8))  # running statistics that are not 0 and 1
    pruner = Pruner(model, Rule(0.75))
    pruner.prepare(inplace=True)
    pruner.finalize(inplace=True)
    export_coreml(model.eval(), torch.randn(1, 1, 8, 8), folder / "net.mlpackage")
    safetensors.save_file(model.state_dict(), folder / "net.safetensors")
    torch.save(model.state_dict(), folder / "net.pt")
    safetensors.save_file(pack_masks(pruner.masks), folder / "masks.safetensors")
    return folder


@pytest.mark.parametrize("checkpoint", ["net.safetensors", "net.pt"])
def test_a_package_holds_its_checkpoint(capsys, exported, checkpoint):
    """Defends verify: weights found by value, a folded batch norm explained by its statistics."""
    words = ["verify", str(exported / "net.mlpackage"), str(exported / checkpoint)]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"]
    conv, linear = result["parameters"]
    assert "batch norm '1' folded" in conv["matched"]
    assert (linear["zeros_stored"], linear["dropped"], linear["revived"]) == (13824, 0, 0)
    assert main([*words, "--masks", str(exported / "masks.safetensors")]) == 0
    assert "every surviving weight is there" in capsys.readouterr().out


def test_the_bytes_that_a_plan_predicts_are_those_of_the_package(capsys, exported):
    """Defends the prediction of plan: what is stored, and at most 225 bytes of records."""
    words = [str(exported / "net.mlpackage"), str(exported / "net.safetensors"), "--json"]
    assert main(["verify", *words]) == 0
    linear = json.loads(capsys.readouterr().out)["parameters"][1]
    shapes = {"w": torch.empty(linear["shape"], device="meta")}
    predicted = predict(shapes, plan(shapes, Rule(0.75))).total
    assert 0 <= predicted.coreml.least - linear["bytes_stored"] <= 225
    assert predicted.coreml.least == predicted.coreml.most
    assert predicted.coreml_dense == linear["bytes_dense"]


def test_another_checkpoint_does_not_hold(capsys, exported, tmp_path):
    """Defends exit code 1: an entry that the package does not have, and one that it has more."""
    state = dict(safetensors.load_file(exported / "net.safetensors"))
    weight = state["4.weight"].clone()
    zero, alive = (weight == 0).nonzero()[0], (weight != 0).nonzero()[0]
    weight[tuple(zero)], weight[tuple(alive)] = 0.5, 0.0
    safetensors.save_file({**state, "4.weight": weight}, tmp_path / "x.safetensors")
    words = ["verify", str(exported / "net.mlpackage"), str(tmp_path / "x.safetensors")]
    assert main([*words, "--json"]) == 1
    result = json.loads(capsys.readouterr().out)
    (row,) = [row for row in result["parameters"] if row["name"] == "4.weight"]
    assert (row["dropped"], row["revived"]) == (1, 1)
    assert main(words) == 1
    assert "1 of 18432 entries lost" in capsys.readouterr().out


def test_another_network_is_told_once(capsys, exported, tmp_path):
    """Defends against the same sentence for each of a thousand tensors."""
    state = dict(safetensors.load_file(exported / "net.safetensors"))
    other = {name: t.flip(0) * 1.5 if t.dim() > 1 else t for name, t in state.items()}
    safetensors.save_file(other, tmp_path / "x.safetensors")
    assert main(["verify", str(exported / "net.mlpackage"), str(tmp_path / "x.safetensors")]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "read back" in line]
    assert "none of the 2 pruned parameters is in the package, which was made of another" in line


def test_problems_are_told_one_by_a_line(capsys, exported, tmp_path):
    """Defends reading what is wrong with several tensors."""
    state = dict(safetensors.load_file(exported / "net.safetensors"))
    for name in ("0.weight", "4.weight"):
        state[name] = state[name].clone()
        state[name][tuple((state[name] == 0).nonzero()[0])] = 0.5
    safetensors.save_file(state, tmp_path / "x.safetensors")
    assert main(["verify", str(exported / "net.mlpackage"), str(tmp_path / "x.safetensors")]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("read back: '0.weight': 1 of 144 entries lost")
    assert second.startswith("  '4.weight': 1 of 18432 entries lost")


def test_swapped_arguments_are_shown_in_their_order(capsys, exported):
    """Defends the order that nobody remembers."""
    package, checkpoint = exported / "net.mlpackage", exported / "net.pt"
    assert main(["verify", str(checkpoint), str(package)]) == 2
    assert f"Write purprune verify {package} {checkpoint}." in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"verify_coreml\(path, model\); got Linear and str"):
        verify_coreml(nn.Linear(2, 2), str(package))


def test_a_dense_checkpoint_is_told_from_a_pruned_one(capsys, exported, tmp_path):
    """Defends the checkpoint of before the pruning, given by mistake."""
    state = dict(safetensors.load_file(exported / "net.safetensors"))
    dense = {name: torch.ones_like(t) for name, t in state.items()}
    safetensors.save_file(dense, tmp_path / "x.safetensors")
    words = ["verify", str(exported / "net.mlpackage"), str(tmp_path / "x.safetensors")]
    assert main(words) == 2
    assert "x.safetensors' holds no zeros in tensors of two" in capsys.readouterr().err


def test_a_package_is_inspected(capsys, exported):
    """Defends inspect: zeros counted in the package, and how it stores them."""
    assert main(["inspect", str(exported / "net.mlpackage"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tensors"]
    sparse = [row for row in rows if row["stored"] == "sparse"]
    assert [(row["zeros"], row["entries"]) for row in sparse] == [(13824, 18432)]
