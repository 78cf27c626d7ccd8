"""Scratch: memory that a thread uses again, and that no two uses share."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from purprune import scratch as scratch_module
from purprune.scratch import scratch


def test_a_use_gets_its_memory_again_and_another_use_does_not():
    """Defends both: that pages are fresh once, and that nothing is overwritten."""
    first = scratch("a test", 100, np.int32)
    again = scratch("a test", 50, np.float64)  # no more bytes
    other = scratch("another test", 100, np.int32)
    assert first.dtype == np.int32
    assert again.dtype == np.float64
    assert len(again) == 50
    assert np.shares_memory(first, again)
    assert not np.shares_memory(first, other)


def test_memory_grows_with_what_is_asked_for():
    """Defends the size: the second call has more items than the first."""
    assert len(scratch("grows", 10, np.int16)) == 10
    large = scratch("grows", 1000, np.int64)
    assert len(large) == 1000
    assert np.shares_memory(large, scratch("grows", 10, np.int8))


def test_every_thread_has_its_own():
    """Defends masks that are computed by two threads at once."""
    own, others = scratch("threads", 100, np.int8), []
    thread = threading.Thread(target=lambda: others.append(scratch("threads", 100, np.int8)))
    thread.start()
    thread.join()
    assert not np.shares_memory(own, others[0])


def test_large_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """Defends the user's memory: between calls a thread holds a few MB."""
    monkeypatch.setattr(scratch_module, "_KEPT", 64)
    kept, large = scratch("limit", 64, np.int8), scratch("limit", 65, np.int8)
    assert not np.shares_memory(kept, large)
    assert not np.shares_memory(large, scratch("limit", 65, np.int8))
    assert np.shares_memory(kept, scratch("limit", 1, np.int8))
