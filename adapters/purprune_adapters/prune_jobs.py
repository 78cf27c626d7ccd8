"""What is pruned, where it goes, and what refuses it, before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from purprune import PruneConfig, Rule, plan
from purprune.config import as_config
from purprune.selection import select
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.tensor_files import FileLayout, read_layout

_WEIGHTS = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz",
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A checkpoint, the rules for its tensors, and where the result goes."""

    source: Path
    place: Path
    masks: Path | None
    step: int
    config: PruneConfig
    rules: Mapping[str, Rule]
    checkpoint: Checkpoint
    layouts: Mapping[Path, FileLayout]

    @property
    def is_folder(self) -> bool:
        """Whether the checkpoint is a folder, so that the result is one."""
        return self.source.is_dir() or self.source.suffix == ".json"

    @property
    def folder(self) -> Path:
        """The folder that the checkpoint's files are in."""
        return self.source if self.source.is_dir() else self.source.parent

    def key(self, file: Path) -> str:
        """Name a file of the checkpoint below its folder."""
        return str(file.relative_to(self.folder))

    def described(self) -> dict[str, Any]:
        """Say what is made, so that only the same job goes on with it."""
        stats = {file: file.stat() for file in self.layouts}
        return {
            "checkpoint": {str(f.resolve()): [s.st_size, s.st_mtime_ns] for f, s in stats.items()},
            "rules": PruneConfig(module_name_configs=self.rules).as_dict(),
            "step": self.step,
            "masks": None if self.masks is None else str(self.masks.absolute()),
        }


def last_step(config: PruneConfig) -> int:
    """Return the step from which on all rules of a config are at their targets.

    Raises:
        ValueError: a schedule is a callable, of which the end is not known.
    """
    steps = [rule.last_step for rule in config.rules.values()]
    if None in steps:
        raise ValueError("Expected a step, since a schedule is a callable; got none.")
    return max((step for step in steps if step is not None), default=0)


def new_job(
    source: Path, place: Path, cfg: PruneConfig | Rule | Mapping[str, Any], step: int | None,
    masks: Path | None,
) -> Job:  # fmt: skip
    """Read headers and resolve rules; raise for what does not fit."""
    checkpoint, config = Checkpoint(source), as_config(cfg)
    step = last_step(config) if step is None else step
    plan(checkpoint, config, step)  # so that what does not fit is refused before anything is made
    layouts = {file: read_layout(file) for file in dict.fromkeys(checkpoint.files().values())}
    rules = select(config, checkpoint.shapes()).rules
    return Job(source, place, masks, step, config, rules, checkpoint, layouts)


def refuse_place(job: Job, *, overwrite: bool) -> None:
    """Raise when the result has no folder, would replace something, or is the checkpoint."""
    for place in filter(None, (job.place, job.masks)):
        if not place.absolute().parent.is_dir():
            raise FileNotFoundError(f"Expected a folder for '{place}'; there is none. Make it.")
        if os.path.lexists(place) and not overwrite:
            raise FileExistsError(
                f"Expected nothing at '{place}'; something is there. Choose another place, or "
                f"replace it with overwrite=True (--overwrite)."
            )
    own, other = job.place.resolve(), job.folder.resolve()
    if own in (other, job.source.resolve()) or (job.is_folder and other in own.parents):
        raise FileExistsError(
            f"Expected another place than the checkpoint's own; got '{job.place}'."
        )
    if os.path.lexists(job.place):
        _refuse_other_kind(job)
    if job.masks is not None and job.masks.is_dir():
        raise IsADirectoryError(f"Expected a file for masks; '{job.masks}' is a folder.")


def _refuse_other_kind(job: Job) -> None:
    """Raise unless what is replaced is a checkpoint like the one that is made."""
    if job.is_folder:
        known = job.place.is_dir() and any(job.place.glob("*.safetensors"))
    else:
        known = job.place.is_file() and job.place.suffix == ".safetensors"
    if not known:
        kind = "folder of safetensors files" if job.is_folder else "safetensors file"
        raise FileExistsError(
            f"Expected a {kind} to replace at '{job.place}'; got something else. Choose another "
            f"place, or remove it yourself."
        )


def refuse_full(job: Job, folder: Path) -> None:
    """Raise when the disk has less room than what is still to be written."""
    there = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())
    needed = sum(layout.size for layout in job.layouts.values()) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"Expected {needed:,} free bytes for '{job.place}'; there are {free:,}. Make room, or "
            f"choose another disk."
        )


def copy_others(job: Job, into: Path) -> tuple[str, ...]:
    """Copy the other files of a folder; return those that hold weights too, and are left out."""
    written, left_out = {job.key(file) for file in job.layouts}, []
    for path in sorted(job.folder.rglob("*")):
        relative = path.relative_to(job.folder)
        if not path.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if str(relative) in written:
            continue
        if path.suffix in _WEIGHTS:
            left_out.append(str(relative))
            continue
        (into / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, into / relative)
    return tuple(left_out)
