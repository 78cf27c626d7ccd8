"""The read-back can fail: every kind of damage on disk is found and named."""

import numpy as np
import pytest
import torch
from coreml_models import build, digits_net, prune
from torch import nn

from purprune_adapters.coreml import VerificationError, export_coreml, verify_coreml
from purprune_adapters.coreml import export as export_module
from purprune_adapters.coreml.package import Package


def exported(model, inputs, path, **options):
    return export_coreml(model, inputs, path, check=False, **options).path


def damage(path, mil_part, change):
    """Edit the values of a stored tensor on disk."""
    stored = next(s for s in Package(path).stored() if mil_part in s.name)
    place = min(key[1] for key in stored.blobs)  # the values stand before the mask
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    raw = np.fromfile(file, dtype=np.uint8)
    size, start = raw[place + 8 : place + 24].view(np.uint64)
    values = raw[int(start) : int(start + size)].view(stored.dtype)
    change(values)
    raw.tofile(file)


def zero_one(values):
    values[len(values) // 2] = 0


@pytest.mark.parametrize("target", ["iOS16", "iOS18"])
def test_one_survivor_zeroed_on_disk_is_found(target, tmp_path):
    """One of 4704 values: the count is 1, and the parameter is named."""
    model = digits_net()
    path = exported(model, torch.randn(1, 1, 28, 28), tmp_path / "m", target=target)
    assert verify_coreml(path, model).ok
    damage(path, "p_4_weight", zero_one)
    with pytest.raises(VerificationError, match=r"'4\.weight': 1 of 23520 entries lost") as caught:
        verify_coreml(path, model)
    assert caught.value.report.rows[1].dropped == 1
    result = verify_coreml(path, model, strict=False)
    assert not result.ok
    assert result.rows[0].problem == ""


def test_one_survivor_changed_on_disk_is_found(tmp_path):
    """A value that is off by more than its rounding."""
    model = digits_net()
    path = exported(model, torch.randn(1, 1, 28, 28), tmp_path / "m")
    damage(path, "p_4_weight", lambda v: v.__setitem__(7, v[7] * 1.01))
    row = verify_coreml(path, model, strict=False).rows[1]
    assert (row.wrong, row.dropped) == (1, 0)
    assert "1 of 23520 entries changed" in row.problem


def test_a_pruned_entry_that_came_alive_is_found(tmp_path):
    """In a tensor stored dense, where a zero can become something."""
    model = digits_net()
    path = exported(model, torch.randn(1, 1, 28, 28), tmp_path / "m", min_sparsity=0.9)
    place = int((model[4].weight.flatten() == 0).nonzero()[5])
    damage(path, "p_4_weight", lambda v: v.__setitem__(place, 0.5))
    row = verify_coreml(path, model, strict=False).rows[1]
    assert (row.revived, row.dropped) == (1, 0)


@pytest.mark.parametrize("name", ["residual", "lstm"])
def test_damage_is_found_behind_a_folded_batch_norm_and_behind_a_gate_order(name, tmp_path):
    """The stored values aren't the torch values there; the check is by ratio and by layout."""
    model, inputs = build(name)
    report = export_coreml(model, inputs, tmp_path / "m", check=False)
    row = next(r for r in report.rows if "folded" in r.matched or "gate" in r.matched)
    damage(report.path, row.mil_names[0], zero_one)
    again = verify_coreml(report.path, model, strict=False)
    found = next(r for r in again.rows if r.name == row.name)
    assert found.dropped + found.wrong >= 1
    assert [r.problem for r in again.rows if r.name != row.name] == [""] * (len(again.rows) - 1)


def test_a_whole_channel_zeroed_behind_a_batch_norm_is_lost_not_silenced(tmp_path):
    """Only a factor of zero in the model's own batch norm explains zeros."""
    model = prune(nn.Sequential(nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16)), 0.5)
    report = export_coreml(model, torch.randn(1, 8, 6, 6), tmp_path / "m", check=False)
    count = int(model[0].weight[0].count_nonzero())

    def silence(values):
        values[:count] = 0

    damage(report.path, report.rows[0].mil_names[0], silence)
    row = verify_coreml(report.path, model, strict=False).rows[0]
    assert (row.dropped, row.scaled_to_zero) == (count, 0)


def test_a_package_of_another_model_holds_none_of_the_weights(tmp_path):
    """Same shapes, other values."""
    path = exported(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m")
    torch.manual_seed(5)
    with pytest.raises(VerificationError, match="none of the 2 pruned parameters is in"):
        verify_coreml(path, digits_net())


def test_export_raises_with_its_report_when_a_weight_is_lost(tmp_path, monkeypatch):
    """Strict by default; the old state of the path stays. strict=False places and reports."""
    save = export_module.save

    def save_damaged(coremltools, model, path, names):
        save(coremltools, model, path, names)
        damage(path, "p_4_weight", zero_one)

    monkeypatch.setattr(export_module, "save", save_damaged)
    model, inputs = digits_net(), torch.randn(4, 1, 28, 28)
    with pytest.raises(VerificationError, match="1 of 23520 entries lost") as caught:
        export_coreml(model, inputs, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    assert caught.value.report.verification.rows[1].dropped == 1
    report = export_coreml(model, inputs, tmp_path / "m", strict=False)
    assert not report.verification.ok
    assert "entries lost" in str(report)
    assert report.path.is_dir()


def test_tied_weights_are_reported_under_both_names_and_counted_once(tmp_path):
    """One blob, two names."""
    model, inputs = build("tied")
    report = export_coreml(model, inputs, tmp_path / "m", check=False)
    first, second = report.rows
    assert first.shared_with == ("out.weight",)
    assert second.shared_with == ("embed.weight",)
    assert first.mil_names == second.mil_names
    assert report.weight_bytes < first.bytes_stored + second.bytes_stored


def test_a_package_made_by_plain_coremltools_is_described_as_it_is(tmp_path):
    """Dense where sparse would pay: verification says so."""
    from purprune_adapters.coreml.quiet import load_coremltools, quiet

    model, x = digits_net(), torch.randn(1, 1, 28, 28)
    ct = load_coremltools()
    with quiet():
        program = torch.export.export(model, (x,)).run_decompositions({})
        options = {"minimum_deployment_target": ct.target.iOS16, "skip_model_load": True}
        ct.convert(program, **options).save(str(tmp_path / "m.mlpackage"))
    result = verify_coreml(tmp_path / "m.mlpackage", model)
    assert result.ok
    assert [row.storage for row in result.rows] == ["dense", "dense"]
    assert "sparse would be smaller" in result.rows[1].reason


def test_a_damaged_record_is_an_error_and_not_a_guess(tmp_path):
    """A weight file cut short or overwritten."""
    path = exported(digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m")
    file = path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(ValueError, match="damaged"):
        verify_coreml(path, digits_net())


def test_thresholds_of_other_routes_would_be_caught(tmp_path):
    """A pruner with coremltools' own fp16 epsilon drops weights; verification counts them."""
    from purprune_adapters.coreml.quiet import load_coremltools, quiet

    model, x = prune(nn.Sequential(nn.Linear(256, 256)), 0.5), torch.randn(1, 256)
    with torch.no_grad():
        model[0].weight[model[0].weight != 0] *= 0.02
    expected = int(((model[0].weight != 0) & (model[0].weight.abs() < 9.77e-4)).sum())
    assert expected > 0
    ct = load_coremltools()
    with quiet():
        program = torch.export.export(model, (x,)).run_decompositions({})
        options = {"minimum_deployment_target": ct.target.iOS16, "skip_model_load": True}
        optimize = ct.optimize.coreml
        lossy = optimize.OpThresholdPrunerConfig(
            threshold=9.77e-4, minimum_sparsity_percentile=0.0, weight_threshold=0
        )
        config = optimize.OptimizationConfig(global_config=lossy)
        dense = ct.convert(program, **options)
        optimize.prune_weights(dense, config).save(str(tmp_path / "m.mlpackage"))
    row = verify_coreml(tmp_path / "m.mlpackage", model, strict=False).rows[0]
    assert row.problem
    assert row.dropped == pytest.approx(expected, abs=3) or not row.found
