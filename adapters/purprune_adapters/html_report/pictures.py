"""Pictures of masks: small PNG files, exact where that is small, else the share that is kept."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLUE = (47, 118, 214)  # on white and on near-black
_LEVELS = 15
_TINY = 1e-9
"""What a quotient may be off: the highest level is not to become one more."""
_CHUNK = 1 << 22


class Picture(NamedTuple):
    """A mask as a matrix: dim 0 downwards, all other dims to the right."""

    uri: str
    rows: int
    columns: int
    exact: bool
    """Whether a cell is one entry."""
    cell: tuple[float, float]
    """How many rows and columns of entries a cell stands for."""
    fullest: float
    """The share of kept entries in the cell with the most; it has the full colour."""

    @property
    def ratio(self) -> float:
        """The width over the height to show it at: not too far from a square."""
        return min(max(self.columns / max(self.rows, 1), 0.9), 3.0)


def picture(mask: Tensor, budget: int) -> Picture | None:
    """Return a picture of about so many bytes; None of a mask without entries."""
    if mask.numel() == 0:
        return None
    matrix = mask.reshape(1, -1) if mask.dim() < 2 else mask.reshape(len(mask), -1)
    rows, columns = matrix.shape
    if rows * -(-columns // 8) <= budget:
        kept = matrix.cpu().numpy()
        return Picture(_png(kept.astype(np.uint8), 1), rows, columns, True, (1, 1), 1.0)
    grid = _grid(rows, columns, 2 * budget)
    shares = _shares(matrix, *grid)
    fullest = float(shares.max())
    levels = np.ceil(shares / (fullest or 1.0) * _LEVELS - _TINY).astype(np.uint8)
    cell = rows / grid[0], columns / grid[1]
    return Picture(_png(levels, 4), rows, columns, False, cell, fullest)


def _grid(rows: int, columns: int, cells: int) -> tuple[int, int]:
    """Return a grid of at most so many cells, about in proportion, but no side below 16."""
    scale = (cells / (rows * columns)) ** 0.5
    down = min(rows, max(round(rows * scale), 16))
    across = max(1, min(columns, cells // down))
    return max(1, min(rows, cells // across)), across


def _shares(matrix: Tensor, down: int, across: int) -> NDArray[np.float64]:
    """Return the share of kept entries per cell; counts are exact, one pass in chunks of rows."""
    rows, columns = matrix.shape
    top, left = np.arange(down) * rows // down, np.arange(across) * columns // across
    counts = np.zeros((down, across), np.int64)
    height = max(1, _CHUNK // columns)
    for start in range(0, rows, height):
        part = matrix[start : start + height].to(torch.uint8).cpu().numpy()
        sums = np.add.reduceat(part, left, axis=1, dtype=np.int64)
        cells = np.searchsorted(top, np.arange(start, start + len(part)), side="right") - 1
        np.add.at(counts, cells, sums)
    heights, widths = np.diff(top, append=rows), np.diff(left, append=columns)
    shares: NDArray[np.float64] = counts / np.outer(heights, widths)
    return shares


def _png(levels: NDArray[np.uint8], bits: int) -> str:
    """Return a PNG of one colour, from transparent at level 0 to opaque at the highest."""
    rows, columns = levels.shape
    packed = _packed(levels, bits)
    lines = np.concatenate([np.zeros((rows, 1), np.uint8), packed], axis=1).tobytes()
    highest = (1 << bits) - 1
    alphas = bytes(255 * level // highest for level in range(highest + 1))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(name, body)
        for name, body in (
            (b"IHDR", struct.pack(">IIBBBBB", columns, rows, bits, 3, 0, 0, 0)),
            (b"PLTE", bytes(_BLUE) * (highest + 1)),
            (b"tRNS", alphas),
            (b"IDAT", zlib.compress(lines, 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def _packed(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits == 1:
        return np.packbits(levels, axis=1)
    wide = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    packed: NDArray[np.uint8] = np.bitwise_or(wide[:, ::2] << 4, wide[:, 1::2], dtype=np.uint8)
    return packed


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
