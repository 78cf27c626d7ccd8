"""Writing one file of a pruned checkpoint, while the masks of the next tensors are made."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from purprune import Rule, pack_masks
from purprune.ranking import WORDS
from purprune_adapters.reading import Background, Reader
from purprune_adapters.tensor_files import (
    FileLayout,
    Opened,
    as_bytes,
    crc_of,
    create,
    new_layout,
    parts_of,
    read_at,
    write_at,
)

_PART = 1 << 18
"""Entries that are masked and written at a time."""
_SYNC_EVERY = 1 << 25
"""Bytes that the disk gets at a time, while the next are made: it is what is waited for longest."""


class Facts(NamedTuple):
    """What is known of a file that is whole."""

    crc: dict[str, int]
    """CRC-32 of each tensor's bytes."""
    zeros: dict[str, int]
    """How many entries the mask of each pruned tensor prunes."""
    masks: dict[str, int]
    """CRC-32 of each mask's bits in the file of masks."""


class MaskFile:
    """Packed masks of all tensors that a rule is for, in a file whose places are known before."""

    def __init__(self, path: Path, rules: Mapping[str, Rule], shapes: Mapping[str, Tensor]) -> None:
        """Open the file of an earlier run, or make one."""
        self._layout = new_layout(
            {f"{name}.bits": (torch.uint8, (-(-shapes[name].numel() // 8),)) for name in rules}
            | {f"{name}.shape": (torch.int64, (shapes[name].dim(),)) for name in rules}
        )
        there = path.exists() and path.stat().st_size == self._layout.size
        self._descriptor = os.open(path, os.O_RDWR) if there else create(path, self._layout)
        write_at(self._descriptor, self._layout.head, 0)

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def write(self, name: str, mask: Tensor) -> int:
        """Write a mask; return the CRC-32 of its bits."""
        packed, crc = pack_masks({name: mask}), {}
        for key, tensor in packed.items():
            crc[key] = write_at(self._descriptor, as_bytes(tensor), self._layout.spans[key].start)
        return crc[f"{name}.bits"]

    def sync(self) -> None:
        """Bring all to the disk."""
        os.fsync(self._descriptor)

    def crc(self, name: str) -> int:
        """Return the CRC-32 of the bits that are there."""
        return crc_of(self._descriptor, self._layout.spans[f"{name}.bits"])


class Shard:
    """One file that is being written."""

    def __init__(
        self, path: Path, source: Path, layout: FileLayout, progress: Callable[[str, int], None],
        syncing: Background,
    ) -> None:  # fmt: skip
        """Make the file with the header of the other."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._source, self._layout, self._progress = source, layout, progress
        self._descriptor, self._unsynced, self._syncing = create(path, layout), 0, syncing
        self.facts = Facts({}, {}, {})

    def __enter__(self) -> Self:
        """Return the file."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the file, if nothing has."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def copy(self, name: str) -> None:
        """Copy a tensor byte for byte."""
        crc = 0
        with Opened(self._source) as file:
            for start, part in parts_of(file.descriptor, self._layout.spans[name]):
                crc = self._put(part, start, crc)
        self._wrote(name, crc)

    def write(self, name: str, tensor: Tensor, mask: Tensor, masks: MaskFile | None) -> None:
        """Write a tensor with its mask applied, and the mask where there is a file for masks.

        The words are multiplied by 0 or 1 as :func:`zero_pruned_` does, part by part in the cache,
        and by numpy: the threads of torch would wait in a loop between the parts, and so take the
        cores from those that make masks.
        """
        words: Any = tensor.reshape(-1).view(WORDS[tensor.itemsize]).numpy()
        kept: Any = mask.reshape(-1).numpy()
        scratch: Any = np.empty(min(_PART, len(words)), words.dtype)
        start, crc, zeros = self._layout.spans[name].start, 0, len(kept)
        for at in range(0, len(words), _PART):
            keep = kept[at : at + _PART]
            part = scratch[: len(keep)]
            np.multiply(words[at : at + _PART], keep.view(np.int8), out=part)
            zeros -= int(np.count_nonzero(keep))
            crc = self._put(memoryview(part.view(np.uint8)), start + at * words.itemsize, crc)
        self.facts.zeros[name] = zeros
        if masks is not None:
            self.facts.masks[name] = masks.write(name, mask)
        self._wrote(name, crc)

    def finish(self, masks: MaskFile | None, done: Callable[[Facts], None]) -> None:
        """Bring all to the disk, and note that it is there."""
        self._syncing.wait()
        os.fsync(self._descriptor)
        self.__exit__()
        if masks is not None:
            masks.sync()
        done(self.facts)

    def _put(self, data: memoryview, start: int, crc: int) -> int:
        """Write; return the CRC-32 so far. The disk begins with what is there."""
        crc = write_at(self._descriptor, data, start, crc)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_EVERY:
            self._syncing.do(partial(os.fsync, self._descriptor))
            self._unsynced = 0
        return crc

    def _wrote(self, name: str, crc: int) -> None:
        self.facts.crc[name] = crc
        self._progress("written", self._layout.spans[name].size)


def write_shard(
    shard: Shard,
    names: Sequence[str],
    masks: Iterator[tuple[str, Tensor]],
    rules: Mapping[str, Rule],
    reader: Reader,
    packed: MaskFile | None,
    background: Background,
) -> None:
    """Write the tensors of a file, one while the mask of the next is made."""
    for name in names:
        if name not in rules:
            background.do(partial(shard.copy, name))
            continue
        found, mask = next(masks)
        if found != name:
            raise RuntimeError(f"Expected the mask of {name!r}; got that of {found!r}.")
        background.do(partial(shard.write, name, reader[name], mask, packed))
        del mask


def is_whole(path: Path, layout: FileLayout, facts: Facts, packed: MaskFile | None) -> bool:
    """Tell whether what an earlier run wrote is there as it was: header, tensors and masks."""
    if not path.is_file() or path.stat().st_size != layout.size:
        return False
    with Opened(path) as file:
        head = bytearray(len(layout.head))
        read_at(file.descriptor, memoryview(head), 0)
        return (
            bytes(head) == layout.head
            and all(crc_of(file.descriptor, s) == facts.crc[n] for n, s in layout.spans.items())
            and (packed is None or all(packed.crc(n) == c for n, c in facts.masks.items()))
        )
