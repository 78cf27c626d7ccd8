"""Where the package goes: checked before any work, and put in place in one rename."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from purprune_adapters.places import check_folder

__all__ = ["destination", "is_package", "package_path", "staged"]

SUFFIX = ".mlpackage"


def is_package(path: Path) -> bool:
    """Whether ``path`` looks like a Core ML package: a manifest and a Core ML data folder."""
    return (path / "Manifest.json").is_file() and (path / "Data" / "com.apple.CoreML").is_dir()


def package_path(path: str | os.PathLike[str]) -> Path:
    """Expand ``~`` and append ``.mlpackage`` where there is no suffix.

    Raises:
        TypeError: ``path`` is not a path.
        ValueError: ``path`` has another suffix, no name, or an unknown home folder.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"Expected path as str or os.PathLike; got {type(path).__name__}.")
    try:
        full = Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"Expected path below a home folder that exists; got {os.fspath(path)!r}: {error}"
        ) from error
    if full.name in ("", "..", SUFFIX):
        raise ValueError(
            f"Expected path to name a package, like 'net{SUFFIX}'; got {os.fspath(path)!r}."
        )
    if full.suffix == "":
        full = full.with_name(full.name + SUFFIX)
    if full.suffix != SUFFIX:
        raise ValueError(
            f"Expected path to end in '{SUFFIX}' (or in no suffix); got {os.fspath(path)!r}. "
            f"Write {str(full.with_suffix(SUFFIX))!r}."
        )
    return full


def destination(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The checked place of a new package.

    Raises:
        TypeError, ValueError: as ``package_path``.
        FileNotFoundError, PermissionError: the parent folder doesn't exist, or is read-only.
        FileExistsError: something is there, and ``overwrite`` is False or it is no Core ML package.
    """
    full = check_folder(package_path(path))
    _check_free(full, overwrite=overwrite)
    return full


def _check_free(full: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(full):
        return
    if not overwrite:
        raise FileExistsError(
            f"Expected nothing at path; '{full}' exists. Pass overwrite=True (--overwrite) to "
            f"replace a package."
        )
    if not is_package(full):
        raise FileExistsError(
            f"overwrite=True replaces Core ML packages only; '{full}' is none (no Manifest.json "
            "and Data/com.apple.CoreML). Choose another path or remove it yourself."
        )


@contextlib.contextmanager
def staged(full: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``full`` when the block succeeds.

    When the block raises, or the rename fails, what stood at ``full`` is there as before, and
    nothing is left beside it.

    Yields:
        Path: where to save.
    """
    room = Path(tempfile.mkdtemp(prefix=f".{full.stem}-", dir=full.parent))
    try:
        fresh = room / full.name
        yield fresh
        _put_in_place(fresh, full, room / "previous", overwrite=overwrite)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _put_in_place(fresh: Path, full: Path, aside: Path, *, overwrite: bool) -> None:
    _check_free(full, overwrite=overwrite)
    if not os.path.lexists(full):
        fresh.rename(full)
        return
    full.rename(aside)
    try:
        fresh.rename(full)
    except BaseException:
        aside.rename(full)
        raise
