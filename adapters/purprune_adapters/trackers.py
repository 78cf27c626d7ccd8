"""Logging while training: what each update of the masks did, in integers, for any tracker.

A log is told by one plain dict, a :data:`Record`, and tells any callable that takes it: a line of
a file, ``wandb.log``, ``mlflow.log_metrics``, :class:`TensorBoard`. The callbacks for trainers use
the same words.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from purprune_adapters.distributed import brought, local, summed
from purprune_adapters.extras import install_hint
from purprune_adapters.pruner import Pruner
from purprune_adapters.report import Report, ReportRow

Record = dict[str, Any]
"""What :class:`SparsityLog` tells: numbers by name, and ``layers``, records by parameter."""


class Change(NamedTuple):
    """How many entries of a mask are other than before."""

    newly_pruned: int
    regrown: int


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Change]:
    """Count the entries that are pruned now and were not, and those that came back.

    A parameter without a mask before was dense. Masks in shards are counted over all processes:
    it is a collective call then.

    Raises:
        ValueError: a mask is missing now, or has another shape than before.

    >>> before = {"w": torch.tensor([True, True, False, False])}
    >>> changes(before, {"w": torch.tensor([True, False, False, True])})
    {'w': Change(newly_pruned=1, regrown=1)}
    """
    for name, mask in before.items():
        if name not in after or after[name].shape != mask.shape:
            now = f"shape {tuple(after[name].shape)}" if name in after else "none"
            raise ValueError(
                f"Expected masks of the same parameters; of {name!r} there was one of shape "
                f"{tuple(mask.shape)}, and now {now}. Start a new log for another model."
            )
    own = {name: _flips(before.get(name), name, mask) for name, mask in after.items()}
    return {name: Change(*found) for name, found in summed(own, after).items()}


def _flips(before: Tensor | None, name: str, after: Tensor) -> list[int]:
    now = local(after)
    kept = int(torch.count_nonzero(now))
    if before is None:
        return [now.numel() - kept, 0]
    old = local(brought(name, before, after))
    both = int(torch.count_nonzero(now & old))
    return [int(torch.count_nonzero(old)) - both, kept - both]


def totals(report: Report) -> dict[str, float]:
    """Return the numbers of a report that trackers get under the same names everywhere.

    ``sparsity`` is the share of zeros among the pruned parameters now, ``scheduled_sparsity`` the
    mean of the sparsities in force, each tensor by its entries.
    """
    entries = report.total.entries
    scheduled = sum(row.sparsity * row.weight.entries for row in report.rows)
    return {
        "sparsity": float(report.total),
        "scheduled_sparsity": scheduled / entries if entries else 0.0,
    }


class SparsityLog:
    """Tells what changed whenever a pruner has new masks; between updates it costs a look.

    Call :meth:`step` after ``pruner.step()``, and once after ``prepare()`` where the masks of
    step 0 are to be told. A record has ``step``, ``zeros`` (now, in the weights), ``entries``,
    ``pruned_by_mask``, ``newly_pruned`` and ``regrown`` (since the record before; dense at first)
    as ints, ``sparsity`` and ``scheduled_sparsity`` as floats; of each parameter too on demand.

    Args:
        pruner: the pruner. Of sharded weights every process needs a log and steps it.
        tell: called with each record; None only keeps them in :attr:`history`.
        every: tell every n-th update, and the schedule's last one. Counts of the updates between
            are added up: an entry that left and came back is in both.
        layers: True adds ``layers``, a record of the same words for each parameter.

    >>> from torch import nn
    >>> from purprune import PolynomialDecay, Rule
    >>> model = nn.Linear(8, 4)
    >>> pruner = Pruner(model, Rule(0.75, PolynomialDecay([1, 2])))
    >>> log = SparsityLog(pruner, lambda record: print(record["step"], record["newly_pruned"]))
    >>> _ = pruner.prepare(inplace=True)
    >>> for _ in range(3):
    ...     pruner.step()
    ...     _ = log.step()
    1 0
    2 24
    """

    def __init__(
        self,
        pruner: Pruner,
        tell: Callable[[Record], object] | None = None,
        *,
        every: int = 1,
        layers: bool = False,
    ) -> None:
        """Start with nothing told, as if all were dense."""
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"Expected every as a whole number of updates >= 1; got {every!r}.")
        self.pruner = pruner
        self.history: list[Record] = []
        self._tell = tell
        self._every, self._layers = every, layers
        self._updates = 0
        self._masks: dict[str, Tensor] = {}  # those in force, not copies: they cost no memory
        self._changed: dict[str, Change] = {}

    def step(self) -> Record | None:
        """Return a record, and tell it, where masks are new since the last call; else None."""
        masks = dict(self.pruner.masks)
        if not any(mask is not self._masks.get(name) for name, mask in masks.items()):
            return None
        found = changes(self._masks, masks)
        self._changed = {name: _added(self._changed.get(name), now) for name, now in found.items()}
        self._masks = masks
        self._updates += 1
        over = self.pruner.step_count == self.pruner.last_step
        if self._updates % self._every and not over:
            return None
        record = self._record(self.pruner.report())
        self._changed = {}
        self.history.append(record)
        if self._tell is not None:
            self._tell(record)
        return record

    def _record(self, report: Report) -> Record:
        record: Record = {
            "step": report.step,
            "zeros": report.total.zeros,
            "entries": report.total.entries,
            "pruned_by_mask": sum(row.mask.zeros for row in report.rows),
            **totals(report),
            "newly_pruned": sum(change.newly_pruned for change in self._changed.values()),
            "regrown": sum(change.regrown for change in self._changed.values()),
        }
        if self._layers:
            changed = self._changed
            record["layers"] = {row.name: _layer(row, changed[row.name]) for row in report.rows}
        return record


def _added(before: Change | None, now: Change) -> Change:
    return now if before is None else Change(*map(sum, zip(before, now, strict=True)))


def _layer(row: ReportRow, change: Change) -> dict[str, float]:
    return {
        "zeros": row.weight.zeros,
        "entries": row.weight.entries,
        "pruned_by_mask": row.mask.zeros,
        "sparsity": float(row.weight),
        "scheduled_sparsity": row.sparsity,
        **change._asdict(),
    }


def flat(record: Record, prefix: str = "pruning/") -> dict[str, float]:
    """Return a record as one flat dict of numbers without ``step``, as trackers take metrics.

    >>> flat({"step": 3, "zeros": 1, "layers": {"fc.weight": {"zeros": 1}}})
    {'pruning/zeros': 1, 'pruning/layers/fc.weight/zeros': 1}
    """
    numbers = {
        prefix + key: value for key, value in record.items() if key not in ("step", "layers")
    }
    for name, layer in record.get("layers", {}).items():
        numbers |= {f"{prefix}layers/{name}/{key}": value for key, value in layer.items()}
    return numbers


class TensorBoard:
    """Tells records to TensorBoard, as ``tell`` of a :class:`SparsityLog`.

    Args:
        writer: a folder, for which a ``torch.utils.tensorboard.SummaryWriter`` is made, or such a
            writer.
        prefix: what the tags begin with.

    Raises:
        ImportError: tensorboard is not installed; names the extra.
    """

    def __init__(self, writer: str | os.PathLike[str] | Any, *, prefix: str = "pruning/") -> None:
        """Open the writer of a folder."""
        if isinstance(writer, str | os.PathLike):
            writer = _summary_writer(os.fspath(writer))
        self.writer: Any = writer
        self._prefix = prefix

    def __call__(self, record: Record) -> None:
        """Write every number of a record at its step."""
        for tag, number in flat(record, self._prefix).items():
            self.writer.add_scalar(tag, number, record["step"])

    def close(self) -> None:
        """Close the writer, so that all is on the disk."""
        self.writer.close()


def _summary_writer(folder: str) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(install_hint("tensorboard", "tensorboard")) from error
    return SummaryWriter(folder)
