"""A package that holds other weights, or whose check saw nothing, is never called good."""

import pytest
import torch
from coreml_models import prune
from torch import nn

from purprune_adapters.coreml import VerificationError, export_coreml, verify_coreml

UNEXPLAINED = "scaled by factors that nothing in the model explains"


def mlp(width=64):
    return nn.Sequential(nn.Linear(256, width), nn.ReLU(), nn.Linear(width, 1))


def scale_rows(model):
    model[0].weight *= torch.rand(64, 1) + 0.5


def replace_head(model):
    head = model[2].weight
    head.copy_(torch.where(head != 0, torch.randn_like(head), head))


def flip_signs(model):
    model[0].weight *= -1


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        (scale_rows, "0.weight", UNEXPLAINED),
        (replace_head, "2.weight", "not found"),
        (flip_signs, "0.weight", UNEXPLAINED),
    ],
)
def test_a_package_of_scaled_or_replaced_weights_is_a_problem(change, name, words, tmp_path):
    """Factors read off the weights explain nothing: only the model's batch norms do."""
    model = prune(mlp(), 0.5)
    path = export_coreml(model, torch.randn(1, 256), tmp_path / "m", check=False).path
    with torch.no_grad():
        change(model)
    for given in (model, dict(model.named_parameters())):
        result = verify_coreml(path, given, strict=False)
        assert [problem.split(": ")[0] for problem in result.problems] == [f"'{name}'"]
    assert words in verify_coreml(path, model, strict=False).problems[0]
    with pytest.raises(VerificationError, match=name):
        verify_coreml(path, model)


def test_a_column_of_weights_is_not_explained_entry_by_entry(tmp_path):
    """One factor for one survivor fits whatever is there."""
    model = prune(nn.Sequential(nn.Linear(1, 64), nn.Linear(64, 1)), 0.5)
    path = export_coreml(model, torch.randn(3, 1), tmp_path / "m", check=False).path
    with torch.no_grad():
        for layer in (model[0], model[1]):
            layer.weight[layer.weight != 0] = torch.randn(32)
    rows = verify_coreml(path, model, strict=False).rows
    assert [row.found for row in rows] == [False, False]


class Scaled(nn.Module):
    """Multiplies its weight by a constant, which the converter folds."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 64))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 0.37)


def test_a_factor_that_the_numerical_check_confirms_is_accepted_and_told(tmp_path):
    """Nothing names the factor, but the saved program computes what the model computes."""
    model, x = prune(Scaled(), 0.5), torch.randn(4, 64)
    report = export_coreml(model, x, tmp_path / "a")
    assert report.verification.ok
    assert "confirmed by the numerical check" in report.rows[0].matched
    for options in ({"check": False}, {"inputs": torch.zeros(4, 64)}):
        inputs = options.pop("inputs", x)
        with pytest.raises(VerificationError, match="factors that nothing in the model explains"):
            export_coreml(model, inputs, tmp_path / "b", **options)


def test_parameters_alone_do_not_explain_a_folded_batch_norm(tmp_path):
    """Only the model names its batch norms; the problem says to pass it."""
    model = prune(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)), 0.5)
    path = export_coreml(model, torch.randn(1, 8, 6, 6), tmp_path / "m").path
    assert verify_coreml(path, model).ok
    result = verify_coreml(path, dict(model.named_parameters()), strict=False)
    assert "pass the model" in result.problems[0]
    assert result.rows[0].zeros_stored == result.rows[0].zeros_torch


def test_a_pruned_norm_weight_that_was_folded_is_a_problem_that_names_the_layer(tmp_path):
    """It can't be read back, so nothing may be claimed of it."""
    model = prune(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)), 0.5)
    with torch.no_grad():
        model[1].weight[:4] = 0
        model[0].bias[:4] = 0
    masks = {"1.weight": model[1].weight != 0, "0.bias": model[0].bias != 0}
    inputs = torch.randn(1, 8, 6, 6)
    report = export_coreml(model, inputs, tmp_path / "a", masks=masks, strict=False)
    again = verify_coreml(report.path, model, masks, strict=False)
    for result in (report.verification, again):
        norm, bias = result.rows
        assert not norm.found
        assert "folded into layer '0'" in norm.problem
        assert "leave it out of masks" in norm.problem
        assert "batch norm '1'" in bias.problem
        assert not result.ok
    assert "every surviving weight is there" not in str(report)
    with pytest.raises(VerificationError, match=r"'1\.weight'"):
        export_coreml(model, inputs, tmp_path / "b", masks=masks)


class Unused(nn.Module):
    """Holds a parameter that its forward pass leaves alone."""

    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        return self.used(x)


def test_a_parameter_that_forward_does_not_use_raises_with_the_way_out(tmp_path):
    """The converter leaves it out, so it isn't found."""
    model = prune(Unused(), 0.5)
    with pytest.raises(
        VerificationError, match=r"'spare\.weight': not found.*leave it out of mask"
    ):
        export_coreml(model, torch.randn(1, 32), tmp_path / "m")


def test_outputs_that_are_all_zero_are_not_a_passed_check(tmp_path):
    """Zeros agree with zeros whatever the weights are."""
    model = prune(nn.Linear(32, 32, bias=False), 0.5)
    report = export_coreml(model, torch.zeros(2, 32), tmp_path / "m")
    assert report.check.status == (
        "not checked: the model's outputs are all zero on example_inputs"
    )
    assert report.check.status in str(report)


class NotANumber(nn.Module):
    """Takes the root of a negative number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x):
        return torch.sqrt(-1 - self.linear(x).square())


def test_outputs_that_are_nan_in_torch_are_not_a_passed_check(tmp_path):
    """NaN agrees with NaN."""
    report = export_coreml(prune(NotANumber(), 0.5), torch.randn(2, 32), tmp_path / "m")
    assert report.check.status == "not checked: torch's own outputs are NaN"
