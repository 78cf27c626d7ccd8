"""Scratch: memory that a thread uses again, and that has one user at a time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from purprune import scratch as scratch_module
from purprune.scratch import scratch


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch_module._free, "blocks", [])


def test_memory_is_used_again_and_by_one_at_a_time():
    """Defends both: that pages are fresh once, and that nothing is overwritten."""
    with scratch(100, np.int32) as first, scratch(100, np.int32) as other:
        assert first.dtype == np.int32
        assert len(first) == 100
        assert not np.shares_memory(first, other)
    with scratch(50, np.float64) as again:  # no more bytes
        assert again.dtype == np.float64
        assert len(again) == 50
        assert np.shares_memory(first, again)


def test_code_that_runs_in_between_takes_other_memory():
    """Defends masks while a signal's handler computes masks too."""
    with scratch(100, np.int8) as outer:
        outer[:] = 1
        with scratch(100, np.int8) as inner:
            inner[:] = 2
        assert (outer == 1).all()


def test_blocks_are_no_more_than_were_lent_at_once():
    """Defends the user's memory where sizes grow from call to call."""
    for size in range(1, 50):
        with scratch(size, np.int16) as one, scratch(2 * size, np.int64) as two:
            assert (len(one), len(two)) == (size, 2 * size)
    assert len(scratch_module._free.blocks) == 2


def test_memory_comes_back_after_an_error():
    """Defends the next call after NaN was found."""
    with pytest.raises(ZeroDivisionError), scratch(10, np.int8) as lent:
        raise ZeroDivisionError
    with scratch(10, np.int8) as again:
        assert np.shares_memory(lent, again)


def test_every_thread_has_its_own():
    """Defends masks that are computed by two threads at once."""
    others = []

    def other() -> None:
        with scratch(100, np.int8) as lent:
            others.append(lent)

    with scratch(100, np.int8) as own:
        pass
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert not np.shares_memory(own, others[0])


def test_large_memory_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """Defends the user's memory: between calls a thread holds a few MB."""
    monkeypatch.setattr(scratch_module, "_KEPT", 64)
    with scratch(64, np.int8), scratch(65, np.int8) as large:
        assert len(large) == 65
    assert [len(block) for block in scratch_module._free.blocks] == [64]
