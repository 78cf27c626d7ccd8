"""Shards: which rectangle of a distributed tensor this process holds, and sums over processes.

Nothing here moves a weight. What is decided about a tensor (whether its pattern fits its shards) is
decided from its whole shape, its mesh and its placements, which all processes know alike, so that
all of them raise or none does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from purprune import ConfigError


class Axis(NamedTuple):
    """How one dim of a tensor is cut: the borders between shards, and this process's part."""

    cuts: tuple[int, ...]
    """Where a shard ends and another begins; empty when one process has the whole dim."""
    start: int
    stop: int


class Processes(NamedTuple):
    """The processes among which a tensor is divided: those along some dims of a mesh."""

    mesh: DeviceMesh
    over: tuple[int, ...]

    def summed(self, counts: Tensor) -> Tensor:
        """Sum counts over the processes. A collective call."""
        total = counts.to(self.mesh.device_type, copy=True)
        for dim in self.over:
            dist.all_reduce(total, group=self.mesh.get_group(dim))
        return total


class Shards(NamedTuple):
    """How a tensor is divided among processes."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    axes: tuple[Axis, ...]
    """One for each dim of the tensor."""

    @property
    def processes(self) -> Processes:
        """The processes that hold different entries; replicas are not among them."""
        over = (d for d, p in enumerate(self.placements) if not isinstance(p, Replicate))
        return Processes(self.mesh, tuple(over))

    @property
    def offset(self) -> tuple[int, ...]:
        """The index of this process's first entry."""
        return tuple(axis.start for axis in self.axes)

    @property
    def here(self) -> tuple[slice, ...]:
        """The entries that this process holds, of a tensor that is there as a whole."""
        return tuple(slice(axis.start, axis.stop) for axis in self.axes)

    def share(self, held: Tensor, like: Tensor) -> DTensor:
        """Return this process's part as a distributed tensor of the shape of ``like``."""
        return DTensor.from_local(
            held.contiguous(),
            self.mesh,
            self.placements,
            run_check=False,
            shape=like.shape,
            stride=_contiguous(like.shape),
        )


def shards_of(name: str, tensor: DTensor) -> Shards:
    """Return how a distributed tensor is divided.

    Raises:
        ConfigError: it is a sum of what processes hold, or cut in a way that is not supported.
    """
    mesh, placements = tensor.device_mesh, tuple(tensor.placements)
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConfigError(f"Expected {name!r} on a mesh with this process; got {mesh}.")
    for placement in placements:
        if not isinstance(placement, Shard | _StridedShard | Replicate):
            kind = "a sum over processes" if isinstance(placement, Partial) else "of a kind unknown"
            raise ConfigError(
                f"Expected shards or replicas of {name!r}; got {placement}, {kind}. Redistribute "
                f"it to Shard or Replicate first."
            )
    axes = tuple(
        _axis(n, _chain(name, dim, n, mesh, placements), coordinate)
        for dim, n in enumerate(tensor.shape)
    )
    return Shards(mesh, placements, axes)


def _chain(
    name: str, dim: int, n: int, mesh: DeviceMesh, placements: Sequence[Placement]
) -> list[tuple[int, int]]:
    """Return by which mesh dims, of which sizes, a dim is cut, in the order of cutting.

    FSDP cuts what tensor parallelism has cut before, though its mesh dim comes first: torch calls
    that a strided shard.
    """
    at = [(d, p) for d, p in enumerate(placements) if getattr(p, "dim", None) == dim]
    strided = [(d, p) for d, p in at if isinstance(p, _StridedShard)]
    if not strided:
        return [(d, mesh.size(d)) for d, _ in at]
    (first, shard), *others = strided
    after = [(d, mesh.size(d)) for d, p in at if d > first]
    pieces = math.prod(size for _, size in after)
    if (
        others
        or first != at[0][0]
        or shard.split_factor != pieces
        or n % (pieces * mesh.size(first))
    ):
        raise ConfigError(
            f"Expected shards of {name!r} that divide its dim {dim} of {n} evenly where FSDP and "
            f"tensor parallelism cut the same dim; got {tuple(placements)} on a mesh of "
            f"{tuple(mesh.shape)}. Cut another dim, or leave it dense."
        )
    return [*after, (first, mesh.size(first))]


def _axis(n: int, chain: Sequence[tuple[int, int]], coordinate: Sequence[int]) -> Axis:
    spans, start, stop = [(0, n)], 0, n
    for mesh_dim, size in chain:
        spans = [chunk for span in spans for chunk in _chunks(*span, size)]
        start, stop = [*_chunks(start, stop, size)][coordinate[mesh_dim]]
    return Axis(tuple(sorted({a for a, b in spans if a < b} - {0})), start, stop)


def _chunks(start: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cut as torch.chunk does, with empty chunks at the end."""
    size = -(-(stop - start) // parts)
    for i in range(parts):
        yield min(start + i * size, stop), min(start + (i + 1) * size, stop)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(math.prod(max(n, 1) for n in shape[d + 1 :]) for d in range(len(shape)))


def totals(
    counts: Mapping[str, Sequence[int]], tensors: Mapping[str, Tensor]
) -> dict[str, list[int]]:
    """Sum counts for each tensor over the processes that hold different parts of it.

    A collective call: all processes make it with the same names.
    """
    found = {name: list(row) for name, row in counts.items()}
    together: dict[Processes, list[str]] = {}
    for name in counts:
        tensor = tensors[name]
        if isinstance(tensor, DTensor):
            together.setdefault(shards_of(name, tensor).processes, []).append(name)
    for processes, names in together.items():
        own = torch.tensor([found[name] for name in names], dtype=torch.int64)
        found |= zip(names, processes.summed(own).tolist(), strict=True)
    return found
