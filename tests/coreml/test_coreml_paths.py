"""Placing a package: nothing that exists is lost, nothing is left over."""

import pathlib

import pytest
import torch
from coreml_models import digits_net

from purprune_adapters.coreml import VerificationError, export_coreml
from purprune_adapters.coreml import export as export_module
from purprune_adapters.coreml.paths import destination, is_package, package_path, staged


def make_package(path, text="old"):
    (path / "Data" / "com.apple.CoreML").mkdir(parents=True)
    (path / "Manifest.json").write_text(text)
    return path


def test_home_expands_and_the_suffix_is_added(monkeypatch, tmp_path):
    """coremltools does neither openly."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert package_path("~/net") == tmp_path / "net.mlpackage"
    assert package_path("~/net.mlpackage") == tmp_path / "net.mlpackage"
    for bad in ("net.mlmodel", "net.v2", ""):
        with pytest.raises(ValueError, match="path"):
            package_path(bad)


def test_only_packages_are_overwritten_and_only_on_request(tmp_path):
    """MLModel.save() replaces whatever stands at the path, a folder of user files too."""
    place = tmp_path / "net.mlpackage"
    assert destination(place, overwrite=False) == place
    place.mkdir()
    (place / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError):
            destination(place, overwrite=overwrite)
    other = make_package(tmp_path / "other.mlpackage")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        destination(other, overwrite=False)
    assert destination(other, overwrite=True) == other


def test_a_staged_package_replaces_the_old_one_whole(tmp_path):
    """After the block the new one is there, and nothing else."""
    place = make_package(tmp_path / "net.mlpackage")
    with staged(place, overwrite=True) as fresh:
        assert fresh.parent.parent == tmp_path
        make_package(fresh, "new")
        assert (place / "Manifest.json").read_text() == "old"
    assert (place / "Manifest.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [place]


def test_a_failure_inside_leaves_the_old_package_and_no_litter(tmp_path):
    """Verification fails inside the block."""
    place = make_package(tmp_path / "net.mlpackage")

    def fail():
        with staged(place, overwrite=True) as fresh:
            make_package(fresh, "new")
            raise VerificationError("bad")

    with pytest.raises(VerificationError):
        fail()
    assert (place / "Manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_a_rename_that_fails_puts_the_old_package_back(tmp_path, monkeypatch):
    """Between moving the old one aside and the new one in."""
    place = make_package(tmp_path / "net.mlpackage")
    rename = pathlib.Path.rename

    def broken(self, target):
        if pathlib.Path(target) == place and self.name == place.name:
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", broken)

    def run():
        with staged(place, overwrite=True) as fresh:
            make_package(fresh, "new")

    with pytest.raises(OSError, match="disk full"):
        run()
    assert (place / "Manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_something_that_appeared_meanwhile_is_not_replaced(tmp_path):
    """Another process may have written there during a long conversion."""
    place = tmp_path / "net.mlpackage"

    def run():
        with staged(place, overwrite=False) as fresh:
            make_package(fresh, "new")
            make_package(place, "other process")

    with pytest.raises(FileExistsError):
        run()
    assert (place / "Manifest.json").read_text() == "other process"


@pytest.mark.parametrize("stage", ["save", "read_back", "check_numbers", "versions"])
def test_a_failure_at_any_stage_leaves_what_was_there(stage, tmp_path, monkeypatch):
    """Saved beside, verified, then renamed: the old package survives each way to fail."""
    place = make_package(tmp_path / "net.mlpackage")

    def broken(*args, **options):
        raise RuntimeError(f"{stage} broke")

    monkeypatch.setattr(export_module, stage, broken)
    with pytest.raises(RuntimeError, match=f"{stage} broke"):
        export_coreml(digits_net(), torch.randn(1, 1, 28, 28), place, overwrite=True)
    assert (place / "Manifest.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [place]


def test_overwriting_twice_works(tmp_path):
    """The usual loop of an experiment."""
    for _ in range(2):
        report = export_coreml(
            digits_net(), torch.randn(1, 1, 28, 28), tmp_path / "m", overwrite=True, check=False
        )
    assert is_package(report.path)
    assert len(list(tmp_path.iterdir())) == 1
