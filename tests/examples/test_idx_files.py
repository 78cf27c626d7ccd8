"""The reader of MNIST's files: what it reads, and what it says about files that it can't read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import NAMES, idx_bytes, random_images, write_folder

import data

TRAIN, TEST = random_images(30), random_images(20, seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path, TRAIN, TEST)


def replace(folder: Path, name: str, raw: bytes) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_bytes(raw)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dotted", [False, True])
def test_every_spelling_of_the_files_gives_back_what_was_written(
    tmp_path: Path, dotted: bool, compressed: bool
) -> None:
    """Mirrors of MNIST differ in the dot before ``idx`` and in gzip; none may need a rename."""
    read = data.load(write_folder(tmp_path, TRAIN, TEST, dotted=dotted, compressed=compressed))
    pixels = torch.from_numpy(TRAIN[0]).float() / 255
    mean, deviation = pixels.mean(), pixels.std()
    for images, labels, wanted in (
        (read.train_images, read.train_labels, TRAIN),
        (read.test_images, read.test_labels, TEST),
    ):
        restored = ((images[:, 0] * deviation + mean) * 255).round().to(torch.uint8)
        assert np.array_equal(restored.numpy(), wanted[0])
        assert np.array_equal(labels.numpy(), wanted[1])
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


def test_images_are_shifted_and_scaled_by_the_training_images_alone(folder: Path) -> None:
    """Statistics of the test images would leak into training."""
    read = data.load(folder)
    assert read.train_images.mean().abs() < 1e-6
    assert (read.train_images.std() - 1).abs() < 1e-6
    replace(folder, NAMES[2], idx_bytes(TEST[0] // 2))
    assert torch.equal(data.load(folder).train_images, read.train_images)


def test_gzip_is_recognised_by_content_and_not_by_name(folder: Path) -> None:
    """Browsers unpack downloads and keep the ``.gz``, or the other way round."""
    wanted = data.load(folder)
    packed = gzip.compress((folder / NAMES[0]).read_bytes())
    replace(folder, NAMES[0], packed)
    (folder / NAMES[1]).rename(folder / f"{NAMES[1]}.gz")
    read = data.load(folder)
    assert torch.equal(read.train_images, wanted.train_images)
    assert torch.equal(read.train_labels, wanted.train_labels)


def test_the_first_spelling_wins_where_several_are_there(folder: Path) -> None:
    """Which file is read must not depend on the order of a directory listing."""
    replace(folder, f"{NAMES[1]}.gz", b"not read")
    replace(folder, NAMES[1].replace("-idx", ".idx"), b"not read")
    assert np.array_equal(data.load(folder).train_labels.numpy(), TRAIN[1])


def test_a_missing_file_is_named_in_every_spelling_with_its_folder(folder: Path) -> None:
    """Whoever has the file under another name must see which names would do."""
    (folder / NAMES[3]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load(folder)
    dotted = NAMES[3].replace("-idx", ".idx")
    for part in (NAMES[3], f"{NAMES[3]}.gz", dotted, f"{dotted}.gz", str(folder)):
        assert part in str(caught.value)


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    """A mistyped folder is another mistake than an empty one."""
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        data.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        (NAMES[0], b"PK\x03\x04" + bytes(40), r"0x00000803 .*3 dimensions.*got 0x504b0304"),
        (NAMES[1], idx_bytes(TRAIN[0]), r"0x00000801 .*1 dimension\).*got 0x00000803"),
        (NAMES[0], b"", "got an empty file"),
        (NAMES[0], idx_bytes(TRAIN[0])[:9], "16 bytes of header .* ends after 9"),
        (NAMES[0], idx_bytes(TRAIN[0])[:-1], "23,520 bytes .*30 x 28 x 28; got 23,519.*truncated"),
        (NAMES[1], idx_bytes(TRAIN[1]) + b"\0", "30 bytes .*; got 31.*longer than it says"),
        (NAMES[0], gzip.compress(idx_bytes(TRAIN[0]))[:-20], "whole gzip data .*truncated"),
        (NAMES[0], b"\x1f\x8bnonsense", "whole gzip data"),
        (NAMES[1], idx_bytes(TRAIN[1][:29]), "30 images .* and 29 labels"),
        (NAMES[1], idx_bytes(TRAIN[1] + 1), "labels 0 to 9, .*; got 10"),
        (NAMES[0], idx_bytes(random_images(30, side=32)[0]), "28 x 28 pixels.*got 32 x 32"),
        (NAMES[0], idx_bytes(np.zeros_like(TRAIN[0])), "images that differ; all pixels are 0"),
    ],
    ids=[
        "zip archive",
        "images for labels",
        "empty",
        "cut in the header",
        "cut in the pixels",
        "too long",
        "cut gzip",
        "no gzip",
        "counts differ",
        "label 10",
        "32 x 32",
        "all black",
    ],
)
def test_a_damaged_file_raises_and_says_what_was_found_where(
    folder: Path, name: str, raw: bytes, message: str
) -> None:
    """A file that is read wrongly trains a network on noise, and nobody notices for an hour."""
    replace(folder, name, raw)
    with pytest.raises(ValueError, match=message) as caught:
        data.load(folder)
    assert name in str(caught.value) or "all pixels" in str(caught.value)


def test_a_data_set_without_images_raises(tmp_path: Path) -> None:
    """The mean of no pixels is NaN, which would surface much later."""
    empty = (TRAIN[0][:0], TRAIN[1][:0])
    with pytest.raises(ValueError, match="at least one image"):
        data.load(write_folder(tmp_path, empty, TEST))


def test_the_default_digits_are_split_the_same_way_every_time_with_all_classes_alike() -> None:
    """Accuracies of two runs compare only when they are about the same test images."""
    pytest.importorskip("sklearn")
    first, second = data.load(), data.load()
    assert torch.equal(first.test_images, second.test_images)
    assert first.train_images.shape == (1347, 1, 28, 28)
    assert first.test_images.shape == (450, 1, 28, 28)
    shares = [labels.bincount() / len(labels) for labels in (first.train_labels, first.test_labels)]
    assert torch.allclose(*shares, atol=0.005)


def test_batches_hold_every_image_once_in_an_order_that_only_the_seed_fixes() -> None:
    """The two examples see the same batches, whatever else draws random numbers meanwhile."""
    images, labels = torch.arange(300.0), torch.arange(300)

    def epochs(seed: int) -> list[list[int]]:
        loader = data.batches(images, labels, seed=seed)
        assert len(loader) == 3
        torch.rand(7)  # must not matter
        return [torch.cat([some for _, some in loader]).tolist() for _ in range(2)]

    first, second = epochs(seed=3)
    assert sorted(first) == sorted(second) == list(range(300))
    assert first != second
    assert epochs(seed=3) == [first, second]
    assert epochs(seed=4)[0] != first
