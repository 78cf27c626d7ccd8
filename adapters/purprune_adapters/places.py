"""Where something is written: looked at before any work, so that no work is lost."""

from __future__ import annotations

import os
from pathlib import Path


def check_folder(place: str | os.PathLike[str]) -> Path:
    """Return a place as a path, whose folder is there and can be written to.

    Raises:
        FileNotFoundError: there is no such folder.
        PermissionError: nothing can be made in it.
    """
    path = Path(place)
    folder = path.absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"Expected a folder for '{path}'; there is no '{path.parent}'. Make it first."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Expected a folder that can be written to for '{path}'; '{path.parent}' can't. Choose "
            f"another place, or change its permissions."
        )
    return path
