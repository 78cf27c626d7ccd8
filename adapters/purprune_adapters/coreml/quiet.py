"""Importing and running coremltools without its log lines, progress bars and warnings."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Captured", "load_coremltools", "quiet"]

# stdout, stderr, warning filters and logger levels belong to the process, not to a thread.
_LOCK = threading.RLock()


@dataclass
class Captured:
    """What was printed, logged or warned inside a ``quiet()`` block."""

    stream: io.StringIO = field(default_factory=io.StringIO)
    warnings: list[warnings.WarningMessage] = field(default_factory=list)

    def tail(self, lines: int = 30) -> str:
        """The last lines that were captured, warnings first; empty when nothing was."""
        said = [f"{w.category.__name__}: {w.message}" for w in self.warnings]
        said += [part for line in self.stream.getvalue().splitlines() for part in line.split("\r")]
        unique = dict.fromkeys(line.rstrip() for line in said if line.strip())
        return "\n".join(list(unique)[-lines:])


class _Into(logging.Handler):
    """A log handler that writes to the captured text."""

    def __init__(self, stream: io.StringIO) -> None:
        super().__init__(logging.WARNING)
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        self._stream.write(f"{record.levelname}: {record.getMessage()}\n")


@contextlib.contextmanager
def _logs_into(stream: io.StringIO) -> Iterator[None]:
    """Send the log of coremltools to ``stream``, what it logs to the root logger too."""
    logger, root, handler = logging.getLogger("coremltools"), logging.getLogger(), _Into(stream)
    before = (logger.propagate, logger.handlers[:])

    def keep_out(record: logging.LogRecord) -> bool:
        if "coremltools" not in record.pathname:
            return True
        handler.emit(record)
        return False

    logger.propagate, logger.handlers = False, [handler]
    root.addFilter(keep_out)
    try:
        yield
    finally:
        root.removeFilter(keep_out)
        logger.propagate, logger.handlers = before


@contextlib.contextmanager
def quiet() -> Iterator[Captured]:
    """Capture what coremltools and torch print, log and warn; everything is restored at the end.

    The block holds a process-wide lock, because the streams are process-wide.

    Yields:
        Captured: filled while the block runs.
    """
    captured = Captured()
    with (
        _LOCK,
        warnings.catch_warnings(record=True) as seen,
        contextlib.redirect_stdout(captured.stream),
        contextlib.redirect_stderr(captured.stream),
        _logs_into(captured.stream),
    ):
        warnings.simplefilter("always")
        captured.warnings = seen
        yield captured


def load_coremltools() -> Any:
    """Import coremltools quietly.

    Raises:
        ImportError: coremltools isn't installed, or its import fails; says what to install.
    """
    way_out = 'install it with `pip install "purprune[coreml]"`'
    if importlib.util.find_spec("coremltools") is None:
        raise ImportError(f"Expected coremltools, which the Core ML export needs; {way_out}.")
    with quiet() as captured:
        try:
            return importlib.import_module("coremltools")
        except Exception as error:
            raise ImportError(
                f"coremltools is installed but its import fails ({error}); {way_out} in a fresh "
                f"environment.\n{captured.tail()}"
            ) from error
