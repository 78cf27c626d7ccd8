"""Checkpoints larger than memory: a mapping of names to tensors that are mapped when asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purprune import LazyParams
from purprune.errors import near_misses

_INDEX = "model.safetensors.index.json"


class Checkpoint(LazyParams):
    """The tensors of a safetensors file, or of a folder of them, read-only and by name.

    A tensor is mapped into memory when it is asked for, and unmapped when nobody holds it any more,
    so that :func:`purprune.iter_masks` needs the memory of one tensor and its mask. Names, shapes
    and dtypes come from the files' headers.

    Args:
        path: a ``.safetensors`` file, an index ``*.safetensors.index.json``, or a folder with
            ``model.safetensors.index.json`` or ``.safetensors`` files, as Hugging Face lays it out.

    Raises:
        ImportError: safetensors is not installed; it comes with ``purprune[safetensors]``.
        FileNotFoundError: there is no such file, or one that the index names is missing.
        ValueError: a file is cut short or no safetensors file, a name is in two files, or the index
            and the files name different tensors.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read the headers; no data is read."""
        self._path = Path(path)
        self._shapes: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        files, index = _files(self._path)
        for file in files:
            for name, shape in _header(file).items():
                if name in self._files:
                    raise ValueError(
                        f"Expected every tensor in one file; {name!r} is in {self._files[name]} "
                        f"and in {file}."
                    )
                self._files[name], self._shapes[name] = file, shape
        _refuse_other_index(index, self._files)

    def shapes(self) -> Mapping[str, Tensor]:
        """Return meta tensors by name."""
        return dict(self._shapes)

    def files(self) -> Mapping[str, Path]:
        """Return the file that each tensor is in, by name."""
        return dict(self._files)

    def __getitem__(self, name: str) -> Tensor:
        """Map a tensor."""
        if name not in self._files:
            near = near_misses(str(name), self._files)
            raise KeyError(f"Expected a tensor of {self._path}; got {name!r}.{near}")
        with _open(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over names, file by file, in their order in the header."""
        return iter(self._files)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._files)

    def __repr__(self) -> str:
        """Return a short description."""
        return f"Checkpoint({str(self._path)!r}): {len(self)} tensors"


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What safetensors calls the dtypes of torch."""


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            "Expected safetensors to read checkpoints; install it with "
            "pip install 'purprune[safetensors]'."
        ) from None
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected the file {file}; it is not there.") from None
    except SafetensorError as error:
        if is_of_torch(file):
            raise ValueError(f"Expected a safetensors file; got {_to_convert(file)}") from None
        raise ValueError(f"Expected a whole safetensors file; got {file}: {error}.") from None


def is_of_torch(file: Path) -> bool:
    """Tell whether a file is what ``torch.save`` writes: an archive, or a pickle in old ones."""
    with file.open("rb") as opened:
        return opened.read(4).startswith((b"PK\x03\x04", b"\x80\x02"))


def _to_convert(file: Path) -> str:
    """Name a file of ``torch.save``, and how it becomes one of safetensors."""
    return (
        f"{file}, which torch.save wrote. Convert it with safetensors.torch.save_file(torch.load("
        f"'{file.name}', weights_only=True), '{file.with_suffix('.safetensors').name}')."
    )


def is_safetensors(file: Path) -> bool:
    """Tell whether there is a whole safetensors file, by its header and size."""
    try:
        _open(file)
    except (OSError, ValueError):
        return False
    return True


def _header(file: Path) -> dict[str, Tensor]:
    """Return meta tensors of what is in a file."""
    shapes: dict[str, Tensor] = {}
    with _open(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            piece = opened.get_slice(name)
            dtype = DTYPES.get(piece.get_dtype())
            if dtype is None:
                raise ValueError(
                    f"Expected a dtype that torch has for {name!r}; got {piece.get_dtype()}."
                )
            shapes[name] = torch.empty(piece.get_shape(), dtype=dtype, device="meta")
    return shapes


def _files(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files of a checkpoint in order, and what its index says of them."""
    if path.is_dir():
        if (path / _INDEX).exists():
            return _files(path / _INDEX)
        files = sorted(path.glob("*.safetensors"))
        if not files:
            others = [f for f in sorted(path.glob("*")) if f.is_file() and is_of_torch(f)]
            found = f"got {_to_convert(others[0])}" if others else "there are none."
            raise FileNotFoundError(f"Expected {_INDEX} or .safetensors files in {path}; {found}")
        return files, None
    if path.suffix != ".json":
        return [path], None
    index = _weight_map(path)
    return [path.parent / name for name in dict.fromkeys(index.values())], index


def _weight_map(path: Path) -> dict[str, str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in found.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"Expected the index {path}; it is not there.") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"Expected an index with a weight_map in {path}; got none.") from None


def _refuse_other_index(index: dict[str, str] | None, files: Mapping[str, Path]) -> None:
    """Raise when the index names other tensors than the files hold, or other files."""
    if index is None:
        return
    differing = sorted(
        name
        for name in {*index, *files}
        if name not in index or name not in files or files[name].name != Path(index[name]).name
    )
    if differing:
        raise ValueError(
            f"Expected an index that agrees with its files; they differ in "
            f"{', '.join(map(repr, differing[:4]))}"
            + (f" and {len(differing) - 4} more." if differing[4:] else ".")
        )
