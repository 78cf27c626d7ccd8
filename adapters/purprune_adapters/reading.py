"""Reading the tensors of a checkpoint in turn, each while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from purprune import Rule
from purprune.selection import LazyParams
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.tensor_files import FileLayout, Opened, read_tensor

T = TypeVar("T")


class Background(Generic[T]):
    """A thread that does one piece of work at a time."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="purprune-files")
        self._pending: Future[T] | None = None

    def do(self, work: Callable[[], T]) -> None:
        """Begin a piece of work, when the one before is done; an error of that is raised here."""
        if self._pending is not None:
            self.result()
        self._pending = self._thread.submit(work)

    def result(self) -> T:
        """Wait for what is being done, and return what came of it."""
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending.result()

    def __enter__(self) -> Self:
        """Return the thread."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being done: it may write to files that are closed next."""
        self._thread.shutdown()


class Reader(LazyParams):
    """A checkpoint whose tensors are read into memory of its own, the next one ahead.

    There are three memories, each of the size of the largest tensor, used in turn: one is being
    read into, one is worked on, one is being written out. To map new memory takes longer than to
    read into it, and a mapped file is copied page by page when zeros are written into it. A tensor
    is good until another one is asked for, or once taken until it is given back.
    """

    def __init__(
        self, checkpoint: Checkpoint, layouts: Mapping[Path, FileLayout],
        rules: Mapping[str, Rule], progress: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        """Read nothing yet."""
        self._checkpoint, self._progress = checkpoint, progress
        self._files, names = checkpoint.files(), list(rules)
        self._spans = {name: layouts[self._files[name]].spans[name] for name in names}
        self._next = dict(pairwise(names))
        most = max((span.size for span in self._spans.values()), default=0)
        # numpy asks for huge pages
        memories = [torch.from_numpy(np.empty(most + 1, dtype=np.uint8)) for _ in range(3)]
        self._memories = {memory.untyped_storage().data_ptr(): memory for memory in memories}
        self._free = memories
        self._last: tuple[str, Tensor] | None = None
        self._ahead: str | None = None
        self._thread = Background[Tensor]()

    def shapes(self) -> Mapping[str, Tensor]:
        """Return meta tensors by name."""
        return self._checkpoint.shapes()

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, and begin to read the one behind it."""
        if self._last is None or self._last[0] != name:
            if self._last is not None:
                self.give_back(self._last[1])
            self._last = name, self._found(name)
            self._progress("read", self._spans[name].size)
            self._ahead = self._next.get(name)
            if self._ahead is not None:
                self._thread.do(partial(self._read, self._ahead))
        return self._last[1]

    def take(self, name: str) -> Tensor:
        """Return a tensor that is the caller's until it is given back."""
        tensor, self._last = self[name], None
        return tensor

    def give_back(self, tensor: Tensor) -> None:
        """Let the memory of a tensor be used again."""
        self._free.append(self._memories[tensor.untyped_storage().data_ptr()])

    def _found(self, name: str) -> Tensor:
        ahead = None if self._ahead is None else self._thread.result()
        if ahead is not None and self._ahead != name:
            self.give_back(ahead)
        return ahead if ahead is not None and self._ahead == name else self._read(name)

    def _read(self, name: str) -> Tensor:
        memory = self._free.pop()
        with Opened(self._files[name]) as file:
            return read_tensor(file.descriptor, self._spans[name], memory)

    def __iter__(self) -> Iterator[str]:
        """Iterate over names."""
        return iter(self._checkpoint)

    def __len__(self) -> int:
        """Return how many tensors there are."""
        return len(self._checkpoint)

    def __enter__(self) -> Self:
        """Return the reader."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being read."""
        self._thread.__exit__()
