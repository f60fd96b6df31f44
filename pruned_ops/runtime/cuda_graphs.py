"""Record what a forward launches on a GPU, and launch it again at the cost of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn

from pruned_ops.runtime.packed_heads import PackedHead

T = TypeVar("T")


class Recorder(Protocol):
    """Records work on a device."""

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
        """What launches the same again, on the same memory, and returns the same output tensors."""

    def ordered(self) -> Any:
        """A context whose work comes after that of all earlier such contexts, on whatever streams."""

    def wait(self) -> None:
        """Until the work of all such contexts has ended."""


@dataclass
class Weights:
    """The weights that a graph reads, and where they were. slots: a module's parameters, and a name in them.
    held: keeps their memory until the graph is gone, also where they have moved and nobody has looked yet."""

    slots: list[tuple[dict[str, Any], str]]
    addresses: list[int]
    held: list[Any]
    packed: Any
    linears: tuple[nn.Module, ...]

    @classmethod
    def of(cls, encoder: Any, head: PackedHead | None) -> Weights:
        linears = () if head is None else head.linears
        modules = dict.fromkeys(module for part in (encoder, *linears) for module in part.modules())
        slots = [
            (module._parameters, name) for module in modules for name, one in module._parameters.items()
            if one is not None
        ]  # fmt: skip
        held = [parameters[name].detach() for parameters, name in slots]
        return cls(slots, [one.data_ptr() for one in held], held, encoder.encoder.packed, linears)

    def moved(self, encoder: Any, head: PackedHead | None) -> bool:
        """Whether one of them is elsewhere now, or another is in its place."""
        if encoder.encoder.packed is not self.packed or (head is not None and head.linears != self.linears):
            return True
        return [parameters[name].data_ptr() for parameters, name in self.slots] != self.addresses


class CudaGraphs:
    """Recorder of one GPU; its graphs share a pool of memory, so only one of them may run at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._finished = torch.cuda.Event()

    def record(self, work: Callable[[], T]) -> Callable[[], T]:
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
