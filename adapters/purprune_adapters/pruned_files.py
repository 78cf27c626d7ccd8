"""Pruning a checkpoint on the disk: one tensor at a time, in shards that outlive a kill."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from purprune import Count, NaNError, PruneConfig, Rule, iter_masks, plan
from purprune.selection import LazyParams
from purprune_adapters.prune_jobs import Job, copy_others, new_job, refuse_full, refuse_place
from purprune_adapters.reading import Background, Reader
from purprune_adapters.shard_files import Facts, MaskFile, Shard, is_whole, write_shard
from purprune_adapters.unfinished import Unfinished, put_in_place

Progress = Callable[[str, int], None]
"""Is told ``"read"`` or ``"written"`` or ``"found"`` (done by an earlier run), and of bytes."""


@dataclass(frozen=True)
class PrunedCheckpoint:
    """What :func:`prune_checkpoint` wrote."""

    path: Path
    tensors: Mapping[str, Count]
    """Zeros that the mask of each pruned tensor has."""
    bytes: int
    """Of all safetensors files."""
    resumed: int
    """How many of the files an earlier run had written."""
    left_out: tuple[str, ...]
    """Files of the folder that hold weights in other files, which would not be pruned."""

    @property
    def total(self) -> Count:
        """The zeros of all masks together."""
        counts = self.tensors.values()
        return Count(sum(c.zeros for c in counts), sum(c.entries for c in counts))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": str(self.path),
            "zeros": self.total.zeros,
            "entries": self.total.entries,
            "bytes": self.bytes,
            "resumed": self.resumed,
            "left_out": list(self.left_out),
            "tensors": {name: asdict(count) for name, count in self.tensors.items()},
        }


def prune_checkpoint(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    cfg: PruneConfig | Rule | Mapping[str, Any],
    *,
    step: int | None = None,
    masks: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> PrunedCheckpoint:
    """Write a checkpoint with the masks of :func:`purprune.compute_masks` applied.

    Tensors keep their names, dtypes, files and places, headers their metadata; tensors without a
    rule keep every bit. Other files of a folder (configs, tokenizers) are copied. In memory are
    three tensors, mapped, and two masks. The result is made in a hidden folder beside
    ``destination`` and renamed at the end. A call with the same arguments goes on where a killed
    one stopped: files that were whole are checked by the CRC-32 of each tensor and kept. A run
    that fails before a file is whole leaves nothing behind.

    Args:
        source: a ``.safetensors`` file, an index, or a folder, as :class:`Checkpoint` takes them.
        destination: a file where the source is one, else a folder.
        cfg: a config, a rule for everything, or a dict.
        step: the step whose sparsity holds; None means the end of the schedules.
        masks: where to write the masks, packed as :func:`purprune.pack_masks` does; None: nowhere.
        overwrite: replace a checkpoint at ``destination``.
        restart: forget what an interrupted run with other arguments left.
        progress: is called with ``"read"``, ``"written"`` or ``"found"``, and a number of bytes.

    Raises:
        FileExistsError: there is something at ``destination``, or a run of another job.
        ConfigError, SelectionError, NaNError: as :func:`purprune.compute_masks` does, and for a
            score that needs statistics.
        OSError: a file can't be read or written, or the disk has too little room.
    """
    job = new_job(
        Path(source), Path(destination), cfg, step, None if masks is None else Path(masks)
    )
    refuse_place(job, overwrite=overwrite)
    work = Unfinished(job.place.with_name(f".{job.place.name}.purprune"))
    with work.alone():
        done = work.begin(job.described(), restart=restart)
        with work.removed_if_nothing_is_done():
            refuse_full(job, work.folder)
            work.result.mkdir(exist_ok=True)
            try:
                facts, resumed = _shards(job, work, done, progress or (lambda what, size: None))
            except NaNError:
                work.remove()  # the checkpoint has to change first
                raise
        refuse_place(job, overwrite=overwrite)  # it took a while: what is there now?
        return _finished(job, work, facts, resumed)


def _shards(
    job: Job, work: Unfinished, done: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, Facts], int]:
    """Write all files that are not whole yet; return the facts of all, and how many were whole."""
    names: dict[str, list[str]] = {job.key(file): [] for file in job.layouts}
    for name, file in job.checkpoint.files().items():
        names[job.key(file)].append(name)
    reader = Reader(job.checkpoint, job.layouts, job.rules, progress)
    with ExitStack() as files, reader, Background() as syncing, Background() as background:
        packed = files.enter_context(_mask_file(job, work)) if job.masks else None
        found = _whole(job, work, done, packed)
        resumed = len(found)
        left = [name for key, some in names.items() if key not in found for name in some]
        masks = _masks(job, reader, left)
        for file, layout in job.layouts.items():
            key = job.key(file)
            if key in found:
                progress("found", layout.size)
                continue
            shard = files.enter_context(Shard(work.result / key, file, layout, progress, syncing))
            write_shard(shard, names[key], masks, job.rules, reader, packed, background)
            background.do(partial(shard.finish, packed, partial(work.done, key)))
            found[key] = shard.facts
        background.wait()
    return found, resumed


def _mask_file(job: Job, work: Unfinished) -> MaskFile:
    return MaskFile(work.folder / "masks.safetensors", job.rules, job.checkpoint.shapes())


def _whole(
    job: Job, work: Unfinished, done: Mapping[str, Any], packed: MaskFile | None
) -> dict[str, Facts]:
    """Return the facts of the files that an earlier run wrote and that are there as they were."""
    return {
        key: Facts(*facts)
        for file, layout in job.layouts.items()
        for key in [job.key(file)]
        for facts in [done.get(key)]
        if facts and is_whole(work.result / key, layout, Facts(*facts), packed)
    }


def _masks(job: Job, params: LazyParams, left: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the masks of the tensors that are left.

    Where they are planned alike without the other tensors they do not depend on these. Else all
    are made again, since tensors that share a count are one group.
    """
    rules = {name: job.rules[name] for name in left if name in job.rules}
    if not rules or len(rules) == len(job.rules):
        return iter_masks(params, job.step, job.config) if rules else iter(())
    alone = PruneConfig(module_name_configs=rules)
    shapes = {name: job.checkpoint.shapes()[name] for name in left}
    planned = {row.name: row for row in plan(job.checkpoint, job.config, job.step).tensors}
    again = plan(shapes, alone, job.step).tensors
    if any(row.shared or row != planned[row.name] for row in again):
        masks = iter_masks(params, job.step, job.config)
        return ((name, mask) for name, mask in masks if name in rules)
    return iter_masks(_Some(params, left), job.step, alone)


class _Some(LazyParams):
    """Some of the params."""

    def __init__(self, params: LazyParams, names: list[str]) -> None:
        self._params, self._names = params, names

    def shapes(self) -> Mapping[str, Tensor]:
        shapes = self._params.shapes()
        return {name: shapes[name] for name in self._names}

    def __getitem__(self, name: str) -> Tensor:
        return self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _finished(
    job: Job, work: Unfinished, facts: Mapping[str, Facts], resumed: int
) -> PrunedCheckpoint:
    """Copy what else the folder holds, and rename the result."""
    left_out = copy_others(job, work.result) if job.is_folder else ()
    if job.masks is not None:
        put_in_place(work.folder / "masks.safetensors", job.masks, work.folder / "masks.previous")
    fresh = work.result if job.is_folder else work.result / job.source.name
    put_in_place(fresh, job.place, work.folder / "previous")
    work.remove()
    shapes = job.checkpoint.shapes()
    counts = {
        name: Count(zeros, math.prod(shapes[name].shape))
        for one in facts.values()
        for name, zeros in one.zeros.items()
    }
    size = sum(layout.size for layout in job.layouts.values())
    return PrunedCheckpoint(job.place, counts, size, resumed, left_out)


__all__ = ["PrunedCheckpoint", "prune_checkpoint"]
