"""The examples' images of handwritten digits: MNIST-format files, or a small set that is built in.

A folder of four IDX files, the format that MNIST is published in, is read with
:func:`read_idx_folder`. Any other data set in that format will do (Fashion-MNIST, KMNIST, your
own), as long as its images are 28 x 28 and its labels are 0 to 9.

Without a folder :func:`digits` is used. It is *not* MNIST: it is the 1,797 scans of 8 x 8 pixels
that scikit-learn carries with it, enlarged to 28 x 28 so that the network of the tutorial fits. It
is there so that the examples run anywhere, without a download.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

SIDE = 28
CLASSES = 10
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Digits:
    """Images ``(N, 1, 28, 28)``, float32 and normalised, and labels ``(N,)``, int64."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(folder: Path | None = None) -> Digits:
    """Read the IDX files in ``folder``; None gives :func:`digits`."""
    return digits() if folder is None else read_idx_folder(folder)


def batches(
    images: Tensor, labels: Tensor, *, seed: int, size: int = 128
) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader that shuffles anew in every epoch, in an order that ``seed`` fixes.

    Whole batches are indexed at once: collating image by image would take longer than training.
    """
    dataset = TensorDataset(images, labels)
    generator = torch.Generator().manual_seed(seed)
    order = BatchSampler(RandomSampler(dataset, generator=generator), size, drop_last=False)
    return DataLoader(dataset, sampler=order, batch_size=None, generator=generator)


def digits(*, test_share: float = 0.25, seed: int = 0) -> Digits:
    """Return scikit-learn's digits, enlarged with bilinear interpolation and split by ``seed``.

    Both parts hold the ten classes in the same proportions. The split does not follow the seed of
    a training run, so that the accuracies of two runs are about the same test images.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "Expected scikit-learn, which carries the default images; install it with "
            '`pip install "purprune[examples]"`, or pass a folder of MNIST files.'
        ) from error
    small, labels = load_digits(return_X_y=True)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_share, random_state=seed, stratify=labels
    )
    pixels = torch.from_numpy(small).float().view(-1, 1, 8, 8) / 16  # 16 is full ink
    large = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    targets = torch.from_numpy(labels).long()
    return _normalised(
        "scikit-learn's digits, enlarged to 28 x 28",
        large[train],
        targets[train],
        large[test],
        targets[test],
    )


def read_idx_folder(folder: Path) -> Digits:
    """Read the four files of a data set in the format of MNIST.

    Each file may be compressed with gzip, and may have a dot for the hyphen before ``idx``. Where
    several spellings of a file are there, the first is taken: plain, then ``.gz``, then dotted.

    Raises:
        FileNotFoundError: a file is missing; says which names were looked for, and where.
        ValueError: a file is damaged, the images are not 28 x 28, or files don't belong together.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"Expected a folder of MNIST files; there is no folder '{folder}'.")
    # All four are found before one is read: a missing file should not cost a minute.
    paths = {part: tuple(_find(folder, name) for name in pair) for part, pair in _FILES.items()}
    (train, train_labels), (test, test_labels) = (_read_pair(*paths[p]) for p in ("train", "test"))
    return _normalised(folder.resolve().name, train, train_labels, test, test_labels)


def read_idx(path: Path, dims: int) -> Tensor:
    """Read one IDX file of unsigned bytes with ``dims`` dimensions; gzip is recognised.

    The format is a magic number (two zero bytes, 0x08 for unsigned bytes, the number of
    dimensions), each dimension as a big-endian 32-bit integer, and then the entries.

    Raises:
        ValueError: the magic number is another one, or the length does not fit the header.
    """
    raw = _unpacked(path)
    magic, header = bytes((0, 0, 0x08, dims)), 4 + 4 * dims
    if raw[:4] != magic:
        raise ValueError(
            f"Expected the magic number 0x{magic.hex()} (unsigned bytes, {dims} "
            f"dimension{'s' * (dims > 1)}) at the start of '{path}'; got "
            f"{'0x' + raw[:4].hex() if raw else 'an empty file'}."
        )
    if len(raw) < header:
        raise ValueError(
            f"Expected {header} bytes of header in '{path}'; it ends after {len(raw)}."
        )
    shape = tuple(int(n) for n in np.frombuffer(raw, dtype=">u4", count=dims, offset=4))
    expected, got = math.prod(shape), len(raw) - header
    if got != expected:
        raise ValueError(
            f"Expected {expected:,} bytes after the header of '{path}', which announces "
            f"{' x '.join(map(str, shape))}; got {got:,}. The file is "
            f"{'truncated: fetch it again' if got < expected else 'longer than it says'}."
        )
    entries = np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)
    return torch.from_numpy(entries.copy())  # frombuffer's memory is read-only


def _unpacked(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(_GZIP):  # by content: browsers unpack and keep the name
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"Expected whole gzip data in '{path}'; it is damaged or truncated ({error})."
        ) from error


def _find(folder: Path, name: str) -> Path:
    dotted = name.replace("-idx", ".idx")
    names = [name, f"{name}.gz", dotted, f"{dotted}.gz"]
    for candidate in names:
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(
        f"Expected one of {', '.join(names)} in '{folder}'; none is there. "
        "The four files of MNIST belong in one folder."
    )


def _read_pair(image_path: Path, label_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1).long()
    if len(images) != len(labels):
        raise ValueError(
            f"Expected as many labels as images; got {len(images):,} images in '{image_path}' "
            f"and {len(labels):,} labels in '{label_path}'."
        )
    if not len(images):
        raise ValueError(f"Expected at least one image; got none in '{image_path}'.")
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"Expected images of {SIDE} x {SIDE} pixels, for which the network is made; got "
            f"{images.shape[1]} x {images.shape[2]} in '{image_path}'."
        )
    if int(labels.max()) >= CLASSES:
        raise ValueError(
            f"Expected labels 0 to {CLASSES - 1}, one for each output of the network; got "
            f"{int(labels.max())} in '{label_path}'."
        )
    return images.unsqueeze(1).float() / 255, labels


def _normalised(
    name: str, train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor
) -> Digits:
    """Shift and scale both parts by the mean and deviation of the training pixels.

    For MNIST these are the 0.1307 and 0.3081 that its tutorials write as constants.
    """
    deviation, mean = torch.std_mean(train)
    if not deviation > 0:
        raise ValueError(f"Expected training images that differ; all pixels are {float(mean):g}.")
    return Digits(
        name, (train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels
    )
