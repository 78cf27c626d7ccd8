"""Sharing chunks of an array among threads: numpy lets go of the interpreter lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def in_threads(work: Callable[[Sequence[int]], T], starts: range) -> list[T]:
    """Call ``work`` with one run of chunks per thread, in order; torch says how many threads.

    Chunks share no result, so the number of threads changes no bit. Each call may keep scratch
    over its run.
    """
    workers = min(torch.get_num_threads(), len(starts))
    if workers <= 1:
        return [work(starts)]
    share = -(-len(starts) // workers)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, [starts[i : i + share] for i in range(0, len(starts), share)]))
