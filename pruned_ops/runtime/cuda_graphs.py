"""Records work on a GPU as a CUDA graph, one at a time in a process, and launches it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol, TypeVar

import torch

from pruned_ops.runtime.arrivals import ForkLock

T = TypeVar("T")


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Record `work`. The result launches it again, on the same memory, and returns the same tensors."""

    def ordered(self) -> AbstractContextManager[None]:
        """A context whose work runs after that of all earlier such contexts, on whatever streams."""

    def wait(self) -> None:
        """Wait until the work of all such contexts has ended."""


# torch captures one graph at a time in a process, whatever the threads, devices and models.
CAPTURE = ForkLock()


def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream to capture on, which no other thread works on meanwhile.

    torch gives the same 32 streams out again and again, of each priority its own 32. What another thread does
    on a stream that captures becomes a part of the graph, and is not done. So it has another priority than a
    caller's streams."""
    return torch.cuda.Stream(device, priority=-1)


class CudaGraphs:
    """The Recorder of one GPU. Its graphs share a pool of memory, so only one of them may run at a time.

    stream: what all are captured on, by default one of the recorder's own. cuBLAS keeps a workspace (32 MiB
    on an H200) for each stream that it has seen, for good, and graphs that may run at once must not share
    one.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = capture_stream(device) if stream is None else stream
        self._finished = torch.cuda.Event()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """Record `work` after one run beside the current stream, which compiles kernels and sets up
        libraries. The thread is on the stream that it was on before, whether or not this succeeds."""
        with CAPTURE, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            try:
                self._stream.wait_stream(current)
                # A graph that still runs, on any stream, uses the workspace that cuBLAS has for this one.
                self._stream.wait_event(self._finished)
                with torch.cuda.stream(self._stream):
                    work()
                current.wait_stream(self._stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
                ):
                    output = work()
            finally:
                torch.cuda.set_stream(current)  # where the end of a capture raises, torch does not go back

        def replay() -> T:
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

    def wait(self) -> None:
        self._finished.synchronize()
