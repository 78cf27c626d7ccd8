"""What is pruned, where it goes, and what refuses it, before anything is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from purprune import ConfigError, PruneConfig, Rule, plan
from purprune.config import as_config
from purprune.scores import needs_of
from purprune.selection import select
from purprune_adapters.checkpoints import Checkpoint, is_safetensors
from purprune_adapters.places import check_folder
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
    _refuse_statistics(rules)
    return Job(source, place, masks, step, config, rules, checkpoint, layouts)


def _refuse_statistics(rules: Mapping[str, Rule]) -> None:
    """Raise for a score that reads more than the weights, which is all that a checkpoint has."""
    for name, rule in rules.items():
        if needs := needs_of(rule.score):
            raise ConfigError(
                f"Expected a score that needs weights alone, since a checkpoint has no statistics; "
                f"that of {name!r} needs {' and '.join(map(repr, needs))}. In Python, with the "
                f"model: compute_masks(..., stats=collect_stats(...)), or prune_layerwise for "
                f"scores of inputs."
            )


def refuse_place(job: Job, *, overwrite: bool) -> None:
    """Raise when the result has no folder, would replace something else, or is the checkpoint."""
    for place in filter(None, (job.place, job.masks)):
        check_folder(place)
        if os.path.lexists(place) and not overwrite:
            raise FileExistsError(
                f"Expected nothing at '{place}'; something is there. Choose another place, or "
                f"replace it with overwrite=True (--overwrite)."
            )
        _refuse_own(job, place)
    if job.is_folder:
        _refuse_suffix(job.place)
        _refuse_other_folder(job)
    else:
        _refuse_other_file(job.place)
    if job.masks is not None:
        _refuse_other_file(job.masks)
        _refuse_lost_masks(job.masks, job.place)


def _refuse_own(job: Job, place: Path) -> None:
    """Raise when a place is the checkpoint, or in its folder."""
    own, other = place.resolve(), job.folder.resolve()
    if own in (other, job.source.resolve()) or (job.is_folder and other in own.parents):
        raise FileExistsError(f"Expected another place than the checkpoint's own; got '{place}'.")


def _refuse_suffix(place: Path) -> None:
    """Raise when a folder would be called as a file is, which readers take it for."""
    if place.suffix in _WEIGHTS:
        raise ValueError(
            f"Expected a name for a folder, since the checkpoint is one; got '{place}'. Write "
            f"'{place.with_suffix('')}'."
        )


def _refuse_other_file(place: Path) -> None:
    """Raise unless it is called a safetensors file, and what is there is one by its header."""
    if place.is_dir():
        raise IsADirectoryError(
            f"Expected a file at '{place}'; it is a folder. Write '{place / 'out.safetensors'}'."
        )
    if place.suffix != ".safetensors":
        stem = place.with_suffix("") if place.suffix in _WEIGHTS else place
        raise ValueError(
            f"Expected a file that ends in .safetensors; got '{place}'. Write '{stem}.safetensors'."
        )
    if os.path.lexists(place) and not is_safetensors(place):
        raise FileExistsError(
            f"Expected a safetensors file to replace at '{place}'; got something else. Choose "
            f"another place, or remove it yourself."
        )


def _refuse_other_folder(job: Job) -> None:
    """Raise unless what is replaced is a checkpoint all of whose files are made anew."""
    if not os.path.lexists(job.place):
        return
    if not (job.place.is_dir() and any(job.place.glob("*.safetensors"))):
        raise FileExistsError(
            f"Expected a folder of safetensors files to replace at '{job.place}'; got something "
            f"else. Choose another place, or remove it yourself."
        )
    if lost := _lost(job):
        names = ", ".join(map(repr, lost[:3])) + (f" and {len(lost) - 3} more" if lost[3:] else "")
        raise FileExistsError(
            f"Expected a folder to replace at '{job.place}' that holds what the new checkpoint "
            f"will hold; {names} would be gone. Choose another place, or move them away first."
        )


def _lost(job: Job) -> list[str]:
    """Name what is at the place and would be gone; a folder without what is in it."""
    made = {Path(job.key(file)) for file in job.layouts}
    made.update(path.relative_to(job.folder) for path in _others(job).copied)
    kept = made.union(*(path.parents for path in made))
    found = sorted(path.relative_to(job.place) for path in job.place.rglob("*"))
    return [str(path) for path in found if path not in kept and path.parent in kept]


def _refuse_lost_masks(masks: Path, result: Path) -> None:
    """Raise when the masks are where the result goes, which replaces what is there."""
    own = masks.resolve()
    if result.resolve() in (own, *own.parents):
        raise FileExistsError(
            f"Expected a place for masks beside the result '{result}'; got '{masks}', which the "
            f"result would replace."
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


class _Others(NamedTuple):
    """The files of a folder that are copied, and those that hold weights too, and are not."""

    copied: list[Path]
    left_out: list[Path]


def _others(job: Job) -> _Others:
    """Sort the files of the checkpoint's folder that are not pruned; hidden ones are left."""
    found = _Others([], [])
    for path in sorted(job.folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(job.folder).parts)
        if path.is_file() and not hidden and path not in job.layouts:
            (found.left_out if path.suffix in _WEIGHTS else found.copied).append(path)
    return found


def copy_others(job: Job, into: Path) -> tuple[str, ...]:
    """Copy the other files of a folder; return those that hold weights too, and are left out."""
    others = _others(job)
    for path in others.copied:
        target = into / path.relative_to(job.folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return tuple(map(job.key, others.left_out))
