"""Record what a forward launches on a GPU, and launch it again at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What launches the same again, on the same memory, and returns the same output tensor."""

    def ordered(self) -> Any:
        """A context whose work comes after that of all earlier such contexts, on whatever streams."""


class CudaGraphs:
    """Recorder of one GPU; its graphs share a pool of memory, so only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._finished = torch.cuda.Event()

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs it once first, beside the current stream: kernels are compiled and libraries set up then."""
        with torch.cuda.device(self._device):
            aside, current = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                work()
            current.wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = work()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    @contextmanager
    def ordered(self) -> Iterator[None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            current.wait_event(self._finished)
            try:
                yield
            finally:
                self._finished.record(current)
