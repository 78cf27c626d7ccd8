"""Parts: what is asked of one part of a group, chunk by chunk, so that scratch stays small.

How many keys are in each bucket (:mod:`purprune.tallies`), a sample, which units stay, and where
the ties are. The groups and how their k-th is found are :mod:`purprune.counting`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from purprune.keys import spread_evenly
from purprune.ranking import WORDS, key_range, keys_of
from purprune.scratch import DEVICE_CHUNK, scratch
from purprune.tallies import Array, Buckets, Tally
from purprune.threads import in_threads

T = TypeVar("T")

_CHUNK = 1 << 18
"""Keys that are made at a time on the CPU, so that scratch stays in the cache."""
_FEW = 64
"""Of so many keys one may be tied for their places to be remembered: an eighth of the mask."""


class Part(NamedTuple):
    """A member of a group, or a rectangular piece of one."""

    scores: Callable[[], Tensor]
    """Returns the unit scores of the piece; called once in every pass, and not kept."""
    member: int
    """Which member of the group this is, from 0; members are ordered by it."""
    prev: Tensor | None = None
    """Which units are kept so far, in the shape of the piece; None: all."""
    shape: tuple[int, ...] | None = None
    """The member's whole unit grid; None: the piece is the whole."""
    offset: tuple[int, ...] = ()
    """Where in the grid the piece begins, per dim."""
    floor: Tensor | None = None
    """Which units may stay; the others go first of all, and are not ranked; None: all may."""


class Group(NamedTuple):
    """Units that share one count; the same in every process but for its parts."""

    parts: Sequence[Part]
    """The parts that this process holds, in the order of their members."""
    k: int
    """How many units go, if a floor does not prune more."""
    sizes: tuple[int, ...]
    """How many units each member has, wherever they are."""
    dtype: torch.dtype
    """What scores are ranked in: a float that holds every member's, or int64."""
    absolute: bool
    """Rank ``|scores|``, without making them."""
    among: tuple[int, int] | None = None
    """The lowest and the highest key that there may be; None: what the dtype allows."""


class Outcome(NamedTuple):
    """Which units of a group go."""

    kept: bool
    """True: all that were pruned go, and of those kept so far the ones below ``bound``.

    False: of those pruned so far the ones below ``bound`` stay pruned, and nothing else goes.
    Either way all that a floor prunes goes.
    """
    bound: int
    """A key."""
    ties: int = 0
    """Of the units whose key is ``bound`` so many go too: the first by (member, flat index)."""


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _size(scores: Tensor) -> int:
    return _CHUNK if _on_cpu(scores) else DEVICE_CHUNK


def _over_chunks(work: Callable[[Sequence[int]], T], scores: Tensor) -> list[T]:
    """Call ``work`` with the starts of chunks: on the CPU with a run of them in each thread."""
    starts = range(0, scores.numel(), _size(scores))
    return in_threads(work, starts) if _on_cpu(scores) else [work(starts)]


class _Chunk(NamedTuple):
    start: int
    keys: Array
    active: Array | None
    """Which of them are ranked; None: all."""
    nan: int
    flags: Array | None
    """Scratch on the CPU: two rows of bools."""

    def below(self, bound: int) -> Array:
        """Mark the keys below a bound."""
        if self.flags is None:
            return self.keys < bound
        return np.less(self.keys, bound, out=self.flags[0, : len(self.keys)])

    def up_to(self, bound: int) -> Array:
        """Mark the keys up to a bound."""
        if self.flags is None:
            return self.keys <= bound
        return np.less_equal(self.keys, bound, out=self.flags[1, : len(self.keys)])

    def ties(self, bound: int) -> Array:
        """Mark the ranked keys that are equal to a bound."""
        if self.flags is None:
            found = self.keys == bound
        else:
            found = np.equal(self.keys, bound, out=self.flags[0, : len(self.keys)])
        if self.active is not None:
            found &= self.active
        return found


def _chunks(
    scores: Tensor, starts: Sequence[int], part: Part, group: Group, kept: bool
) -> Iterator[_Chunk]:
    """Yield keys in chunks, and which of them are ranked: those kept so far, or the others.

    On the CPU a chunk is valid until the next one is asked for.
    """
    if not _on_cpu(scores):
        yield from _keyed(scores, starts, part, group, kept, None, None)
        return
    room, word = min(_CHUNK, scores.numel()), f"i{group.dtype.itemsize}"
    with scratch(room, word) as memory, scratch(2 * room, np.bool_) as flags:
        yield from _keyed(scores, starts, part, group, kept, memory, flags.reshape(2, room))


def _keyed(
    scores: Tensor, starts: Sequence[int], part: Part, group: Group, kept: bool,
    memory: Array | None, flags: Array | None,
) -> Iterator[_Chunk]:  # fmt: skip
    size, flat = _size(scores), scores.detach().reshape(-1)
    prev, floor = _flat(part.prev), _flat(part.floor)
    for start in starts:
        keys, nan = keys_of(flat[start : start + size], group.dtype, group.absolute, memory)
        at = slice(start, start + size)
        if nan:
            yield _Chunk(start, keys[:0], None, nan, flags)
            continue
        active: Array | None = None
        if prev is not None:
            active = prev[at] if kept else ~prev[at]
        elif not kept:
            active = keys != keys
        if floor is not None:
            active = floor[at] if active is None else active & floor[at]
        yield _Chunk(start, keys, active, nan, flags)


def _flat(mask: Tensor | None) -> Array | None:
    flat: Array | None = None if mask is None else mask.reshape(-1)
    return flat.numpy() if flat is not None and _on_cpu(flat) else flat


def count_part(group: Group, part: Part, kept: bool, buckets: Buckets, tally: Tally) -> None:
    """Count the keys of a part."""
    scores = part.scores()
    low, high = group.among or key_range(group.dtype, group.absolute)
    everything = buckets.start <= low and high < buckets.stop

    def count(starts: Sequence[int]) -> None:
        for chunk in _chunks(scores, starts, part, group, kept):
            if everything:
                tally.add(chunk.nan, 0, _taken(chunk.keys, chunk.active, buckets))
                continue
            below, inside = chunk.below(buckets.start), chunk.up_to(buckets.stop - 1)
            if chunk.active is not None:
                below &= chunk.active
                inside &= chunk.active
            inside ^= below
            tally.add(chunk.nan, _count(below), _taken(chunk.keys, inside, buckets))

    _over_chunks(count, scores)


def _count(flags: Array) -> int:
    if isinstance(flags, Tensor):
        return int(torch.count_nonzero(flags))
    return int(np.count_nonzero(flags))


def _taken(keys: Array, inside: Array | None, buckets: Buckets) -> Array:
    """Return in which bucket, from 0, the keys are that are inside; None: all are."""
    if isinstance(keys, Tensor):
        keys = keys if inside is None else keys[inside]
        return (keys >> buckets.shift).to(torch.int64) - buckets.first
    if inside is not None and not inside.all():
        keys = np.compress(inside, keys)
    if not buckets.shift and not buckets.first:
        return keys.astype(np.int64)  # which bincount would do, and the keys are scratch
    keys = keys >> buckets.shift
    wide = np.int64 if keys.itemsize == 8 else np.int32
    return np.subtract(keys, buckets.first, dtype=wide)


def sampled(group: Group, part: Part, kept: bool, sample: int) -> Tensor:
    """Return some of the part's scores on the CPU: about ``sample`` when all parts do."""
    scores = part.scores().detach().reshape(-1)
    size = math.ceil(scores.numel() * sample / sum(group.sizes))
    at = spread_evenly(size, scores.numel())
    if part.prev is not None:
        at = at[_picked(part.prev.reshape(-1), at).numpy() == kept]
    elif not kept:
        at = at[:0]
    if part.floor is not None:
        at = at[_picked(part.floor.reshape(-1), at).numpy()]
    return _picked(scores, at).to(group.dtype)


def _picked(flat: Tensor, at: Array) -> Tensor:
    """Return some elements on the CPU, as words: threads of torch cost more than they save."""
    if not _on_cpu(flat):
        return flat[torch.from_numpy(at).to(flat.device)].cpu()
    words = flat.view(WORDS[flat.itemsize]).numpy()[at]
    return torch.from_numpy(words).view(flat.dtype)


def keep(group: Group, part: Part, outcome: Outcome, ties: int) -> tuple[Tensor, int]:
    """Return which units of a part stay, and how many of its ties went: at most ``ties``."""
    scores = part.scores()
    if _on_cpu(scores):  # numpy asks for huge pages
        stay = torch.from_numpy(np.empty(scores.shape, dtype=np.bool_))
    else:
        stay = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    flat: Array = stay.view(-1).numpy() if _on_cpu(scores) else stay.view(-1)
    floor = _flat(part.floor)

    def mark(starts: Sequence[int]) -> list[tuple[int, int, Array | None]]:
        tied: list[tuple[int, int, Array | None]] = []
        for chunk in _chunks(scores, starts, part, group, outcome.kept):
            into = flat[chunk.start : chunk.start + len(chunk.keys)]
            at_least = np.greater_equal if _on_cpu(scores) else torch.ge
            at_least(chunk.keys, outcome.bound, out=into)
            if chunk.active is not None and outcome.kept:
                into &= chunk.active
            elif chunk.active is not None:
                into |= ~chunk.active
                if floor is not None:
                    into &= floor[chunk.start : chunk.start + len(chunk.keys)]
            if ties:
                equal = chunk.ties(outcome.bound)
                number = _count(equal)
                few = number <= len(chunk.keys) // _FEW
                tied.append((chunk.start, number, _where(equal) if few else None))
        return tied

    left = ties
    for start, tied, at in [found for run in _over_chunks(mark, scores) for found in run]:
        if left and tied:
            if at is None:  # to hold so many would take more memory than the mask
                again = _chunks(scores, [start], part, group, outcome.kept)
                (at,) = [_where(chunk.ties(outcome.bound)) for chunk in again]
            flat[start + at[:left]] = False
            left -= min(left, tied)
    return stay, ties - left


def _where(flags: Array) -> Array:
    return flags.nonzero()[:, 0] if isinstance(flags, Tensor) else np.flatnonzero(flags)


def tied_positions(group: Group, part: Part, outcome: Outcome) -> Iterator[Tensor]:
    """Yield in chunks the flat index in the whole member of each unit whose key is the bound."""
    scores = part.scores()
    for chunk in _chunks(
        scores, range(0, scores.numel(), _size(scores)), part, group, outcome.kept
    ):
        at = torch.as_tensor(_where(chunk.ties(outcome.bound))).cpu() + chunk.start
        yield _in_whole(at, part, scores.shape)


def _in_whole(at: Tensor, part: Part, piece: Sequence[int]) -> Tensor:
    """Return indices in a piece as indices in its whole member; they order alike."""
    if part.shape is None:
        return at
    index, stride = torch.zeros_like(at), 1
    for n, whole, offset in reversed([*zip(piece, part.shape, part.offset, strict=True)]):
        index += (at % n + offset) * stride
        at, stride = at // n, stride * whole
    return index
