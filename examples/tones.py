"""Sounds of which the pitch is known, made of partials: frames for the pitch tracker of CREPE.

This is no recording of anything. Voices glide, have vibrato and formants, bright tones have
partials that fall like a sawtooth's, reeds have the odd partials above all, plucked strings decay
and are slightly out of harmony; noise lies above them at several ratios. So each frame has a true
pitch, and a network's errors can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

RATE = 16_000  # samples per second
FRAME = 1024  # samples per frame
PER_CLIP = 8  # frames of one clip, which do not overlap
LOWEST, HIGHEST = 65.0, 1000.0  # Hz: C2 to about C6
PARTIALS = 40
FORMANTS = ((300, 850), (900, 2300), (2400, 3200))  # Hz: the ranges of their centres
KINDS = ("voice", "bright", "reed", "plucked")
NOISES = (40, 20, 10, 0)  # signal to noise, dB


class Tones(NamedTuple):
    """Frames, and what is known of them."""

    frames: Tensor  # (n, FRAME): each of mean 0 and standard deviation 1
    pitch: Tensor  # (n,): Hz, in the middle of the frame
    noise: Tensor  # (n,): signal to noise, dB
    kind: Tensor  # (n,): index in KINDS


def synthesise(kinds: Sequence[str], clips: int, seed: int) -> Tones:
    """Return frames of ``clips`` clips of each kind; the same seed gives the same frames."""
    parts = [_clips(kind, clips, seed) for kind in kinds]
    return Tones(*(torch.cat(some) for some in zip(*parts, strict=True)))


def _clips(kind: str, count: int, seed: int) -> Tones:
    generator = torch.Generator().manual_seed(len(KINDS) * seed + KINDS.index(kind))

    def draw(low: float, high: float) -> Tensor:
        uniform = torch.rand(count, 1, generator=generator, dtype=torch.float64)
        return low + (high - low) * uniform

    seconds = torch.arange(PER_CLIP * FRAME, dtype=torch.float64)[None] / RATE
    pitch = _melody(kind, seconds, draw)
    turns = (pitch / RATE).cumsum(1)
    sound = torch.zeros(pitch.shape)
    formants = [
        (draw(*band).float(), draw(60, 180).float())
        for band in ((300, 850), (900, 2300), (2400, 3200))
    ]
    inharmonic, slope, decay = draw(0, 1e-4), draw(0.8, 1.4), draw(1, 4)
    for h in range(1, PARTIALS + 1):
        multiple = h * (torch.sqrt(1 + inharmonic * h * h) if kind == "plucked" else 1)
        partial = (multiple * pitch).float()
        strength = (h**-slope).float() * (partial < 0.45 * RATE)
        if kind == "voice":
            strength = strength * _resonance(partial, formants)
        if kind == "reed" and h % 2 == 0:
            strength = strength * 0.05
        if kind == "plucked":
            strength = strength * torch.exp((-decay * h**0.7 * seconds).float())
        # Whole turns go in float64, since float32 has no digits left for a long phase.
        sound += strength * torch.sin(2 * math.pi * (multiple * turns + draw(0, 1)).frac().float())
    noise = torch.tensor(NOISES)[torch.arange(count) % len(NOISES)]
    level = sound.std(1, keepdim=True) * 10 ** (-noise[:, None] / 20)
    frames = (sound + level * torch.randn(sound.shape, generator=generator)).view(-1, FRAME)
    frames = frames - frames.mean(1, keepdim=True)
    return Tones(
        frames=frames / frames.std(1, keepdim=True),
        pitch=pitch.view(-1, FRAME)[:, FRAME // 2].float(),
        noise=noise.repeat_interleave(PER_CLIP),
        kind=torch.full((count * PER_CLIP,), KINDS.index(kind)),
    )


def _melody(kind: str, seconds: Tensor, draw: Callable[[float, float], Tensor]) -> Tensor:
    """Return the pitch of each sample, in Hz: a glide and vibrato, but strings hold theirs."""
    octaves = draw(math.log2(LOWEST), math.log2(HIGHEST)).expand(-1, seconds.shape[1])
    if kind == "plucked":
        return 2**octaves
    glide, depth, rate, start = draw(-1, 1), draw(0, 0.04), draw(4, 7), draw(0, 2 * math.pi)
    vibrato = depth * torch.sin(2 * math.pi * rate * seconds + start)
    return 2 ** (octaves + glide * (seconds - seconds.mean()) + vibrato)


def _resonance(partial: Tensor, formants: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the gain of a row of resonances, each with a centre and a width in Hz."""
    gain = torch.full_like(partial, 0.05)
    for centre, width in formants:
        gain += 1 / (1 + ((partial - centre) / width) ** 2)
    return gain
