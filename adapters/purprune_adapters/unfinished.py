"""A result that is made aside and renamed when it is whole; what is done of it outlives a kill."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Unfinished:
    """The folder beside a result in which it is made.

    ``job.json`` says what is made, ``done.jsonl`` has a line for each part that is whole on the
    disk, and ``result`` is what will be renamed.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder."""
        self.folder = folder
        self.result = folder / "result"
        self._done = folder / "done.jsonl"

    def begin(self, job: Mapping[str, Any], *, restart: bool) -> dict[str, Any]:
        """Make the folder, or go on in the one that is there; return the parts that are done.

        Raises:
            FileExistsError: the folder is there, of another job, and ``restart`` is False.
        """
        if restart:
            self.remove()
        description = self.folder / "job.json"
        text = json.dumps(job, indent=1, sort_keys=True)
        if description.exists() and description.read_text(encoding="utf-8") != text:
            differing = _differing(description, job)
            raise FileExistsError(
                f"Expected the job that was interrupted before; it differs in {differing}. Give "
                f"what was given then, or start anew with restart=True (--restart), which "
                f"removes '{self.folder}'."
            )
        if not description.exists():
            self.folder.mkdir(exist_ok=True)
            (self.folder / "job.new").write_text(text, encoding="utf-8")
            (self.folder / "job.new").replace(description)
        return self._parts()

    def _parts(self) -> dict[str, Any]:
        """Return what is done; the last line may be half written."""
        parts = {}
        for line in self._done.read_text("utf-8").splitlines() if self._done.exists() else []:
            with contextlib.suppress(ValueError):
                parts.update(json.loads(line))
        return parts

    @contextlib.contextmanager
    def removed_if_nothing_is_done(self) -> Iterator[None]:
        """Remove the folder when what is within raises and no part is whole: nothing is lost."""
        try:
            yield
        except Exception:
            if not self._parts():
                self.remove()
            raise

    def done(self, part: str, facts: Mapping[str, Any]) -> None:
        """Note that a part is whole; it has been synced before."""
        with self._done.open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps({part: facts})}\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold a lock, so that no two runs make the same result.

        Raises:
            BlockingIOError: another run holds it.
        """
        import fcntl  # which not every system has; the package is imported on all

        lock = self.folder.with_name(f"{self.folder.name}.lock")
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BlockingIOError(
                    f"Expected one run at a time for '{self.folder}'; another one is at work."
                ) from None
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder and all in it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)


def put_in_place(fresh: Path, place: Path, aside: Path) -> None:
    """Rename a result to its place; what was there before is back if that fails, and else gone."""
    if not os.path.lexists(place):
        fresh.rename(place)
    elif fresh.is_file() and place.is_file():
        fresh.replace(place)
    else:
        place.rename(aside)
        try:
            fresh.rename(place)
        except BaseException:
            aside.rename(place)
            raise
        shutil.rmtree(aside) if aside.is_dir() and not aside.is_symlink() else aside.unlink()
    _sync_folder(place.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _differing(description: Path, job: Mapping[str, Any]) -> str:
    try:
        before = json.loads(description.read_text(encoding="utf-8"))
        keys = [key for key in job if before.get(key) != json.loads(json.dumps(job[key]))]
    except (ValueError, AttributeError):
        keys = []
    return ", ".join(keys) or "its description"
