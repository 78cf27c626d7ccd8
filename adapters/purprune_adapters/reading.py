"""Reading the tensors of a checkpoint in turn, each while the one before is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from purprune import Rule
from purprune.selection import LazyParams
from purprune_adapters.checkpoints import Checkpoint
from purprune_adapters.tensor_files import FileLayout, as_bytes, map_tensor

_AROUND = 1 << 16
"""Bytes that Linux maps with the one that is read."""


class Background:
    """A thread that does one piece of work at a time."""

    def __init__(self) -> None:
        """Start no thread yet."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="purprune-files")
        self._pending: Future[Any] | None = None

    def do(self, work: Callable[[], object]) -> None:
        """Begin a piece of work, when the one before is done; an error of that is raised here."""
        self.wait()
        self._pending = self._thread.submit(work)

    def wait(self) -> None:
        """Wait for what is being done, and raise its error if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        """Return the thread."""
        return self

    def __exit__(self, *error: object) -> None:
        """Wait for what is being done: it may write to files that are closed next."""
        self._thread.shutdown()


class Reader(LazyParams):
    """A checkpoint whose tensors are mapped into memory, the next one ahead.

    To map the pages of a file takes a tenth of the time of copying them. They are only read: a
    page that is written to is copied first. A second thread touches the pages of the next tensor,
    so that nobody waits for the disk. A tensor is unmapped when nobody holds it any more.
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
        self._last: tuple[str, Tensor] | None = None
        self._ahead: tuple[str, Tensor] | None = None
        self._thread = Background()

    def shapes(self) -> Mapping[str, Tensor]:
        """Return meta tensors by name."""
        return self._checkpoint.shapes()

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor, which is not to be written to, and begin to read the one behind it."""
        if self._last is None or self._last[0] != name:
            ahead, self._ahead = self._ahead, None
            self._last = ahead if ahead and ahead[0] == name else (name, self._map(name))
            self._progress("read", self._spans[name].size)
            if (following := self._next.get(name)) is not None:
                self._ahead = following, self._map(following)
                self._thread.do(partial(_touch, self._ahead[1]))
        return self._last[1]

    def _map(self, name: str) -> Tensor:
        return map_tensor(self._files[name], self._spans[name])

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


def _touch(tensor: Tensor) -> None:
    """Read a byte here and there, without the interpreter lock: the kernel maps what is around."""
    np.asarray(as_bytes(tensor))[::_AROUND].max(initial=0)
