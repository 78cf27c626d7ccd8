"""The language model example in a tiny form: it runs, and its table has what it says."""

from __future__ import annotations

import math

import pytest
import torch

import language_model as example


def test_the_table_compares_the_methods_at_each_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    """Defends the example that the documentation's figures come from."""
    tiny = ["--steps", "3", "--batch", "2", "--width", "16", "--depth", "2"]
    patterns = ["70 %", "2:4"]
    found = example.main([*tiny, "--calibrate", "8", "--evaluate", "700", "--patterns", *patterns])
    printed = capsys.readouterr().out
    assert list(found) == [(m, p) for p in patterns for m in example.METHODS]
    for (_, pattern), (error, bits) in found.items():
        assert 0 < error < 1
        assert 4 < bits < 10
        assert error >= found["sparsegpt", pattern][0]
    assert f"{found['wanda', '2:4'][0]:.3f}" in printed
    assert "3 steps" in printed


def test_bits_per_byte_of_a_model_that_knows_nothing_are_eight() -> None:
    """Defends the unit: nats over all positions, turned into bits."""
    model = example.GPT(16, 1)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    text = torch.arange(1000) % 256
    assert example.bits_per_byte(model, text) == pytest.approx(math.log2(256))


def test_no_position_sees_a_later_byte() -> None:
    """Defends the figures against a model that reads what it predicts."""
    torch.manual_seed(0)
    model = example.GPT(16, 2).eval()
    text = torch.arange(20).view(1, 20)
    other = text.clone()
    other[0, 12:] += 1
    first, second = model(text)[0], model(other)[0]
    assert torch.equal(first[:12], second[:12])
    assert not torch.equal(first[12], second[12])


def test_what_is_held_out_is_not_trained_on() -> None:
    """Defends the split: no topic is in both parts."""
    training, held_out = (bytes(part.tolist()) for part in example.corpus())
    assert len(held_out) > 10_000
    assert held_out[:400] not in training
    assert held_out[-400:] not in training
