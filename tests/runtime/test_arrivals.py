"""Blocks of what has come: nobody waits for items that do not come, and fast ones fill their blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from queue import Queue
from threading import Event, Thread
from typing import Any

import pytest

from pruned_ops.runtime import arrivals
from pruned_ops.runtime.arrivals import Arrivals, ForkLock, Ready, blocks_of, is_there

HUNG = 300  # seconds after which a thread is taken to hang


def weight(item: int) -> int:
    return item


def test_what_is_there_is_read_by_who_asks() -> None:
    blocks = blocks_of([3, 3, 3, 9, 1], is_there([3]), 5, weight)
    assert isinstance(blocks, Ready) and list(blocks) == [[3, 3], [3, 9], [1]]
    assert not is_there(iter([3])) and not is_there(5) and is_there(range(3))


@pytest.mark.parametrize("kind", [Ready, Arrivals])
def test_an_error_comes_after_the_items_before_it(kind: Any) -> None:
    def broken() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    blocks = kind(broken(), 10, weight)
    assert blocks.take() == [1, 2]
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            blocks.take()
    assert list(kind(iter([]), 10, weight)) in ([], [[]])


def test_fast_items_fill_their_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "PAUSE", HUNG)
    monkeypatch.setattr(arrivals, "LONGEST", HUNG)
    blocks = [block for block in Arrivals(iter(range(1, 8)), 6, weight) if block]
    assert blocks == [[1, 2, 3], [4, 5], [6], [7]]


def test_an_item_does_not_wait_for_the_next() -> None:
    """Before each wait an empty block says so."""
    more: Queue[int] = Queue()
    blocks = iter(Arrivals(iter(more.get, 0), 100, weight))
    assert next(blocks) == []
    for item in (5, 6):
        more.put(item)
        assert next(blocks) == [item]
        assert next(blocks) == []
    more.put(0)
    assert list(blocks) == []


def test_at_most_a_block_is_read_ahead() -> None:
    read: list[int] = []
    full = Event()

    def items() -> Iterator[int]:
        for item in range(1000):
            read.append(item)
            if item == 7:
                full.set()
            yield item

    blocks = Arrivals(items(), 4)
    assert blocks.take() == [0, 1, 2, 3]
    assert blocks.take() == [4, 5, 6, 7] and full.is_set()
    blocks.close(wait=True)
    assert len(read) <= 13 and blocks.take() is None


def test_a_reader_sees_the_callers_context() -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")
    name.set("caller")
    assert Arrivals((name.get() for _ in range(2)), 2).take() == ["caller"] * 2


def test_who_waits_is_told_of_the_end() -> None:
    never = Event()

    def silent() -> Iterator[int]:
        never.wait(HUNG)
        yield from ()

    blocks, taken = Arrivals(silent(), 2), []
    thread = Thread(target=lambda: taken.append(blocks.take()))
    thread.start()
    blocks.close()
    thread.join(HUNG)
    assert taken == [None]
    never.set()


def test_a_fork_opens_every_lock() -> None:
    lock = ForkLock()
    with lock:
        ForkLock.renew_all()  # as the child does
        with lock:
            pass
        lock._lock.acquire()  # the end of the outer block opens it
