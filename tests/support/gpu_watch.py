"""A process of tests that hangs, or whose GPU is lost, ends: pytest-xdist reports the test that it was at,
and starts another process for the rest. In the same process every later test would fail, too."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable, Iterator

import pytest


class GpuWatch:
    """A plugin of pytest's. seconds: the most that a test may take. is_lost: whether an error has left the
    GPU of no use to this process."""

    def __init__(self, seconds: float, is_lost: Callable[[], bool]) -> None:
        self._seconds, self._is_lost = seconds, is_lost
        self._replaceable = False
        self._stderr = 2

    def pytest_configure(self, config: pytest.Config) -> None:
        self._replaceable = hasattr(config, "workerinput")
        self._stderr = os.dup(2)  # which the tests' output will be captured from

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        faulthandler.dump_traceback_later(self._seconds, exit=self._replaceable, file=self._stderr)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
        if self._is_lost():
            message = f"the GPU is lost after {item.nodeid}\n"
            os.write(self._stderr, message.encode())
            if self._replaceable:
                os._exit(1)  # while pytest-xdist still knows this test as the one that runs
            item.session.shouldstop = message.strip()
        return result
