"""Writes files in MNIST's format, independently of the reader under test."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx_bytes(array: Bytes) -> bytes:
    """Return an array in the IDX format."""
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return head + array.tobytes()


def write_folder(
    folder: Path,
    train: tuple[Bytes, Bytes],
    test: tuple[Bytes, Bytes],
    *,
    dotted: bool = False,
    compressed: bool = False,
) -> Path:
    """Write the four files in one of the spellings that are in use; return the folder."""
    for name, array in zip(NAMES, (*train, *test), strict=True):
        name = name.replace("-idx", ".idx") if dotted else name
        raw = idx_bytes(array)
        path = folder / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(raw) if compressed else raw)
    return folder


def random_images(count: int, side: int = 28, seed: int = 0) -> tuple[Bytes, Bytes]:
    """Return noise, and labels of all ten classes in turn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


def band_images(count: int) -> tuple[Bytes, Bytes]:
    """Return noise with one bright band per image, at the height that is its label."""
    images, labels = random_images(count)
    images //= 4
    for image, label in zip(images, labels, strict=True):
        image[4 + 2 * label : 6 + 2 * label] = 255
    return images, labels
