"""The comparison of divisions runs, prunes the same total in all of them, and draws."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
import sensitivity as example
from purprune import Rule, Sensitivity, compute_masks, sparsity

CURVES = Sensitivity(
    0.0,
    [0.5, 0.99],
    {
        "conv1.weight": [1.0, 9.0],
        "conv2.weight": [0.5, 2.0],
        "dense1.weight": [0.0, 0.1],
        "dense2.weight": [0.2, 3.0],
    },
)


def test_the_example_runs_and_writes_its_table_and_picture(
    bands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Defends the command of the documentation, on 20 easy images."""
    arguments = ["--data", str(bands), "--out", str(tmp_path / "deep"), "--seeds", "1"]
    assert example.main([*arguments, "--dense-epochs", "2", "--tuning-epochs", "1"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "conv1.weight",
        "0.99",
        "sensitivity |",
        "erk |",
        "global |",
        "uniform |",
        "dense |",
    ):
        assert words in printed
    assert (tmp_path / "deep" / "sensitivity.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("total", example.TOTALS)
def test_every_division_prunes_the_same_number_of_weights(total: float) -> None:
    """Defends the comparison: one total for all."""
    model = example.network(0)
    params = dict(model.named_parameters())
    configs = example.configs(model, CURVES, total)
    pruned = {
        method: sparsity(compute_masks(params, 0, config)).zeros
        for method, config in configs.items()
    }
    weights = sum(p.numel() for name, p in params.items() if "weight" in name)
    assert pruned == dict.fromkeys(configs, int(weights * Rule(total).target))


def test_the_spread_shows_the_mean_and_every_seed() -> None:
    """Defends the table against a mean that hides its values."""
    assert example.spread([90.0, 95.0]) == "92.5 (90.0, 95.0)"
