"""Sharing chunks of an array among threads: numpy lets go of the interpreter lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(work: Callable[[Sequence[int]], T], starts: range, least: int = 1) -> list[T]:
    """Call ``work`` with one run of chunks per thread, in order; torch says how many threads.

    Chunks share no result, so the number of threads changes no bit. With fewer than ``least``
    chunks each a thread takes longer to wake than it saves.
    """
    workers = min(torch.get_num_threads(), len(starts) // least)
    if workers <= 1:
        return [work(starts)]
    share = -(-len(starts) // workers)
    first, *others = (starts[i : i + share] for i in range(0, len(starts), share))
    pending = [_pool(os.getpid()).submit(work, run) for run in others]
    try:
        return [work(first), *(future.result() for future in pending)]
    finally:
        for future in pending:  # they write to what the caller owns
            future.exception()


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the helpers of this process: a fork has none of its parent's threads."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="purprune")
