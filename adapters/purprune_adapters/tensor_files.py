"""The safetensors format as places in a file: reading and writing a tensor without the others.

A file is 8 bytes with the length of a header (little endian), the header, which is JSON, and the
data, without holes. A file with other values of the same tensors has the same header.
"""

from __future__ import annotations

import json
import math
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from purprune_adapters.checkpoints import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHUNK = 1 << 20
"""Bytes at a time: what is read, summed and written is in the cache."""
_LIMIT = 1 << 30
"""What is read at a time in one piece; Linux does not do more than 2 GB."""


class Span(NamedTuple):
    """Where the data of a tensor is in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return self.stop - self.start


class FileLayout(NamedTuple):
    """The header of a file as its bytes, and what it says."""

    head: bytes
    spans: Mapping[str, Span]

    @property
    def size(self) -> int:
        """How many bytes the whole file has."""
        return max([len(self.head), *(span.stop for span in self.spans.values())])


def read_layout(file: Path) -> FileLayout:
    """Read the header of a file that safetensors has opened before, and so is sound."""
    with file.open("rb") as opened:
        length = opened.read(8)
        text = opened.read(int.from_bytes(length, "little"))
    begin = 8 + len(text)
    spans = {
        name: Span(
            DTYPES[entry["dtype"]],
            tuple(entry["shape"]),
            begin + entry["data_offsets"][0],
            begin + entry["data_offsets"][1],
        )
        for name, entry in json.loads(text).items()
        if name != "__metadata__"
    }
    return FileLayout(length + text, spans)


def new_layout(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
) -> FileLayout:
    """Lay out a new file: wide dtypes first, so that everything is aligned, else in order.

    >>> layout = new_layout({"a": (torch.uint8, (3,)), "b": (torch.int64, (2,))})
    >>> layout.spans["a"].start - layout.spans["b"].start, layout.size - len(layout.head)
    (16, 19)
    """
    order = sorted(tensors, key=lambda name: -tensors[name][0].itemsize)
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    places, at = {}, 0
    for name in order:
        dtype, shape = tensors[name]
        places[name] = (at, at + math.prod(shape) * dtype.itemsize)
        at = places[name][1]
        entries[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": list(places[name]),
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    spans = {
        name: Span(tensors[name][0], tuple(tensors[name][1]), begin + start, begin + stop)
        for name, (start, stop) in places.items()
    }
    return FileLayout(len(text).to_bytes(8, "little") + text, spans)


def create(file: Path, layout: FileLayout) -> int:
    """Make a file of its whole size, with its header; return its descriptor."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        if sys.platform == "linux":  # a full disk is found before the work is done
            os.posix_fallocate(descriptor, 0, layout.size)
        else:
            os.ftruncate(descriptor, layout.size)
        write_at(descriptor, layout.head, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class Opened:
    """A file that is open for reading."""

    def __init__(self, path: Path) -> None:
        """Open it."""
        self.path, self.descriptor = path, os.open(path, os.O_RDONLY)

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        os.close(self.descriptor)


def write_at(descriptor: int, data: bytes | memoryview, start: int, crc: int = 0) -> int:
    """Write all of the data at a place; return its CRC-32, or go on with that of what is before."""
    left = memoryview(data)
    while left:
        done = os.pwrite(descriptor, left[:_CHUNK], start)
        crc = zlib.crc32(left[:done], crc)
        left, start = left[done:], start + done
    return crc


def read_at(descriptor: int, into: memoryview, start: int) -> None:
    """Fill all of a memory from a place.

    Raises:
        OSError: the file ends before.
    """
    while into:
        done = os.preadv(descriptor, [into[:_LIMIT]], start)
        if not done:
            raise OSError(f"Expected {len(into):,} bytes more of a file; it was cut short.")
        into, start = into[done:], start + done


def map_tensor(file: Path, span: Span) -> Tensor:
    """Map a tensor of a file into memory. The file stays as it is, whatever is done to the tensor.

    Torch warns of memory that it may not write to, so pages are copied when they are written to.
    Words that lie across their boundaries are copied at once: torch says nothing of them to numpy.

    Raises:
        OSError: the file ends before.
    """
    if not span.size:
        return torch.empty(span.shape, dtype=span.dtype)
    try:
        raw: Any = np.memmap(file, np.uint8, "c", span.start, (span.size,))
    except ValueError:
        raise OSError(f"Expected {span.stop:,} bytes in '{file}'; it was cut short.") from None
    if span.start % span.dtype.itemsize:
        raw = np.array(raw)
    return torch.from_numpy(raw).view(span.dtype).reshape(span.shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def crc_of(descriptor: int, span: Span) -> int:
    """Return the CRC-32 of the bytes of a tensor."""
    crc = 0
    for _, part in parts_of(descriptor, span):
        crc = zlib.crc32(part, crc)
    return crc


def parts_of(descriptor: int, span: Span) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of a tensor part by part, each with its place."""
    buffer = memoryview(bytearray(min(_CHUNK, span.size)))
    for start in range(span.start, span.stop, _CHUNK):
        part = buffer[: span.stop - start]
        read_at(descriptor, part, start)
        yield start, part
