"""Blocks of an iterable's items: of one that is all there, or of one whose items arrive one by one.

A stream computes blocks of items. `Arrivals` reads a caller's generator in a thread, so that the items that
have come are computed while the next one is waited for, and none waits for a block to be full.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextvars import copy_context
from threading import Condition, Lock, Thread
from time import monotonic
from typing import Any, ClassVar, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")

# Seconds. A block is not waited for any longer when no item came for PAUSE, or when its first item has waited
# for LONGEST. A person does not notice either, and a program that has the items at hand pauses for less.
PAUSE, LONGEST = 0.02, 0.1


def blocks_of(
    items: Iterable[T], are_there: bool, enough: int, weigh: Callable[[T], int]
) -> Ready[T] | Arrivals[T]:
    """The items in blocks of a total weight of about `enough`. are_there: whether nobody has to wait for
    them (see `is_there`)."""
    return Ready(items, enough, weigh) if are_there else Arrivals(items, enough, weigh)


def is_there(items: Any) -> bool:
    """Whether all the items exist already, as a list's or a data set's do, and a generator's do not."""
    return hasattr(items, "__len__") and hasattr(items, "__getitem__")


class RefusedItem(ValueError):
    """An item that cannot be computed. index: its place among the items; reason: what is wrong with it."""

    noun: ClassVar[str] = "item"

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"{self.noun} {index} {reason}")
        self.index, self.reason = index, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes make it of both; of an exception's message alone it cannot be made."""
        return type(self), (self.index, self.reason)


class Ready(Generic[T]):
    """Blocks of items that are there, read by whoever takes a block. Which items share a block does not
    depend on time."""

    def __init__(self, items: Iterable[T], enough: int, weigh: Callable[[T], int]) -> None:
        self._items, self._enough, self._weigh = iter(items), enough, weigh
        self._failure: Exception | None = None

    def __iter__(self) -> Iterator[list[T]]:
        while (block := self.take()) is not None:
            yield block

    def take(self) -> list[T] | None:
        """The next block; None at the end. An error of the iterable is raised after the items before it."""
        block, weight = list[T](), 0
        while self._failure is None and weight < self._enough:
            try:
                block.append(next(self._items))
            except StopIteration:
                break
            except Exception as error:  # of any kind, as the iterable is the caller's
                self._failure = error
            else:
                weight += self._weigh(block[-1])
        if not block and self._failure is not None:
            raise self._failure
        return block or None

    def close(self) -> None:
        """Let go of the items. Nothing has to be ended."""
        self._items = iter(())


class Arrivals(Generic[T]):
    """Blocks of items that come whenever they come. A thread reads them from the first `take` on.

    At most one block is read ahead, and one item more. The thread cannot be stopped while it waits for an
    item; it does not keep a process from ending.
    """

    def __init__(self, items: Iterable[T], enough: int, weigh: Callable[[T], int] = lambda item: 1) -> None:
        self._items, self._enough, self._weigh = items, enough, weigh
        self._changed = Condition()
        self._block: list[T] = []
        self._weight = 0
        self._first = self._latest = 0.0  # when the first and the latest item of the block came
        self._is_over = False
        self._failure: BaseException | None = None
        self._thread: Thread | None = None
        self._process = os.getpid()

    def __iter__(self) -> Iterator[list[T]]:
        """The blocks. An empty one says that the next has to be waited for: whoever holds results of those
        before can give them away first."""
        self._start()
        while True:
            if not self._block and not self._is_over:
                yield []
            block = self.take()
            if block is None:
                return
            yield block

    def take(self) -> list[T] | None:
        """The next block, waiting for its first item for as long as it takes; None at the end. An error of
        the iterable is raised after the items before it."""
        self._start()
        with self._changed:
            self._changed.wait_for(lambda: self._block or self._is_over)
            while self._weight < self._enough and not self._is_over:
                seconds = min(self._latest + PAUSE, self._first + LONGEST) - monotonic()
                if seconds <= 0:
                    break
                self._changed.wait(seconds)
            block, self._block, self._weight = self._block, [], 0
            self._changed.notify_all()
            if not block and self._failure is not None:
                raise self._failure
            return block or None

    def close(self, wait: bool = False) -> None:
        """Read no more: `take` returns None from here on. wait: wait for the thread's end, which has to be
        near."""
        if self._process != os.getpid():
            return  # the thread is the parent's, and may hold the lock for good
        with self._changed:
            self._block, self._weight, self._is_over = [], 0, True
            self._changed.notify_all()
        if wait and self._thread is not None:
            self._thread.join()

    def _start(self) -> None:
        if self._thread is None:
            run = copy_context().run
            self._thread = Thread(target=run, args=(self._read,), name="pruned_ops-reader", daemon=True)
            self._thread.start()

    def _read(self) -> None:
        """Read to the end. This runs in the thread."""
        failure: BaseException | None = None
        try:
            for item in self._items:
                if not self._added(item, self._weigh(item)):
                    break
        except BaseException as error:  # the caller's iterable may raise any; `take` raises it again
            failure = error
        self._items = ()  # a generator that nobody else holds is closed here
        with self._changed:
            self._is_over, self._failure = True, failure
            self._changed.notify_all()

    def _added(self, item: T, weight: int) -> bool:
        """Add an item to the block, and wait until there is room for another. Returns False once the reader
        was closed."""
        with self._changed:
            if self._is_over:
                return False
            self._latest = monotonic()
            if not self._block:
                self._first = self._latest
                self._changed.notify_all()
            self._block.append(item)
            self._weight += weight
            if self._weight >= self._enough:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._weight < self._enough or self._is_over)
            return not self._is_over


def in_one_process(results: Iterator[T]) -> Iterator[T]:
    """The results, for the process that asks for the first. A child that was forked since then gets a
    RuntimeError: it has none of the threads that the rest would come from."""
    process = os.getpid()
    for result in results:
        yield result
        if os.getpid() != process:
            raise RuntimeError(
                f"this stream was begun in process {process}, and goes on there; a forked child has none of "
                "its threads: begin a stream of the child's own"
            )


class ForkLock:
    """A lock that is open in a forked child, whoever held it in the parent at that moment: the thread that
    would open it does not exist in the child."""

    _all: ClassVar[WeakSet[ForkLock]] = WeakSet()

    def __init__(self) -> None:
        self._lock = Lock()
        self._all.add(self)

    @property
    def is_held(self) -> bool:
        """Whether somebody holds it now."""
        return self._lock.locked()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        """Make copies and what is sent to another process open: nobody holds them."""
        return ForkLock, ()

    @classmethod
    def renew_all(cls) -> None:
        """Open every lock of this process. In a child this comes before any of its own code."""
        for lock in cls._all:
            lock._lock = Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=ForkLock.renew_all)
