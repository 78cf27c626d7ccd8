"""Sensitivity of a module over batches: the pure function, resolved and averaged."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F  # noqa: N812 (its usual name)

from purprune import (
    PruneConfig,
    Rule,
    SelectionError,
    Sensitivity,
    allocate_by_sensitivity,
    sensitivity,
)
from purprune_adapters import Pruner, measure_sensitivity, plot_sensitivity, resolve

LEVELS = [0.5, 0.9]


def _network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(), nn.Linear(48, 4)]
    return nn.Sequential(*layers).eval()


def _batches():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(11, 1, 6, 6, generator=generator)
    return [(images[:8], torch.arange(8) % 4), (images[8:], torch.arange(3))]


def test_the_mean_over_batches_is_the_pure_measurement_of_all_images():
    """Defends the weights: batches count by their size."""
    model, batches = _network(), _batches()
    found = measure_sensitivity(model, F.cross_entropy, iter(batches), LEVELS, Rule())
    whole = [torch.cat(parts) for parts in zip(*batches, strict=True)]

    def loss_fn(params, batch):
        return F.cross_entropy(functional_call(model, params, batch[0]), batch[1])

    expected = sensitivity(
        loss_fn, dict(model.named_parameters()), whole, LEVELS, resolve(model, Rule())
    )
    assert found.dense == pytest.approx(expected.dense, rel=1e-5)
    assert found.weight == 11
    assert list(found.losses) == ["0.weight", "4.weight"]
    for name, curve in found.losses.items():
        torch.testing.assert_close(curve, expected.losses[name], rtol=1e-5, atol=0)


def test_the_module_stays_as_it_is_and_the_pruner_takes_the_targets():
    """Defends purity, and the way from curves to a training run."""
    model = _network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = PruneConfig().set_module_type("Conv2d", Rule(0.5)).set_module_type("Linear", Rule(0.5))
    curves = measure_sensitivity(model, F.cross_entropy, _batches(), LEVELS, config)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    targets = allocate_by_sensitivity(
        curves, dict(model.named_parameters()), resolve(model, config)
    )
    pruner = Pruner(model, targets)
    pruner.prepare()
    assert sum(int((~mask).sum()) for mask in pruner.masks.values()) == (27 + 192) // 2


def test_a_model_in_training_mode_and_a_rule_for_nothing_are_refused():
    """Defends the losses: dropout and running statistics would change them."""
    with pytest.raises(ValueError, match=r"Call \.eval\(\)"):
        measure_sensitivity(_network().train(), F.cross_entropy, _batches(), LEVELS, Rule())
    with pytest.raises(ValueError, match=r"levels as a list of sparsities; got 0\.5"):
        measure_sensitivity(_network(), F.cross_entropy, _batches(), 0.5, Rule())
    config = PruneConfig().set_module_type("Conv3d", Rule())
    with pytest.raises(SelectionError, match="Conv3d"):
        measure_sensitivity(_network(), F.cross_entropy, _batches(), LEVELS, config)


def test_the_plot_has_a_line_of_growths_for_every_tensor():
    """Defends what is drawn: from 0 at sparsity 0, whether that was measured or not."""
    figure = pytest.importorskip("matplotlib.figure")
    for levels, losses in (([0.5, 0.9], [0.6, 1.5]), ([0, 0.5, 0.9], [0.5, 0.6, 1.5])):
        axes = figure.Figure().add_subplot()
        plot_sensitivity(Sensitivity(0.5, levels, {"a": losses, "b": losses}), axes)
        assert [line.get_label() for line in axes.lines] == ["a", "b"]
        assert axes.lines[0].get_xdata().tolist() == [0, 50, 90]
        assert axes.lines[0].get_ydata().round(9).tolist() == [0, 0.1, 1.0]
