"""Times on a GPU without the host's share: calls are recorded as a CUDA graph, and its launches are timed.

A kernel of a pruned layer takes less time than the host needs to launch it. A clock around the call would
measure the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pruned_ops.measure.timing import Runner, event_seconds, host_seconds
from pruned_ops.runtime.cuda_graphs import CudaGraphs, Recorder

Clock = Callable[[Callable[[], Any]], float]
# A graph holds at least so many calls, so that the pause between two graphs is a small share of its time.
CALLS = 24
# Seconds in which a GPU is busy before it is timed, longer than its clock should take to rise. While a kernel
# is compiled and a graph is made, the GPU idles: an H200 does so at 345 MHz, and multiplies at up to 1,980.
WARM_UP = 0.05


def queued_seconds(call: Callable[[], Any]) -> float:
    """How long the work that a call launches takes by the GPU's clock. The GPU is busy with the same work
    while the host launches, so that the host's time does not count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def replay_seconds(
    calls: Sequence[Callable[[], Any]],
    rounds: int,
    recorder: Recorder | None = None,
    clock: Clock | None = None,
) -> tuple[float, ...]:
    """The seconds of one call in each round, as a part of a graph that holds all the calls in turn, repeated
    until there are CALLS of them.

    Give the calls different inputs, which together with the outputs are larger than the L2 cache: each then
    reads its own from memory, as in a model, and writes its own to memory, because the outputs of all calls
    are kept until the next ones are there. recorder, clock: by default those of the current GPU; tests give
    others.
    """
    recorder = CudaGraphs(torch.device("cuda", torch.cuda.current_device())) if recorder is None else recorder
    clock = queued_seconds if clock is None else clock
    repeats = -(-CALLS // len(calls))

    def all_calls() -> None:
        for _ in range(repeats):
            # An output that is freed lends its memory to the next: all would be written into L2.
            outputs = [call() for call in calls]
        del outputs

    with torch.inference_mode():
        replay = recorder.record(all_calls)
        busy = 0.0
        while busy < WARM_UP:  # the first launch of a graph also uploads it
            busy += clock(replay)
        return tuple(clock(replay) / repeats / len(calls) for _ in range(rounds))


class HostClock:
    """Times a runner on a batch by the host's clock: on a CPU."""

    def seconds(self, name: str, runner: Runner, batch: dict[str, Tensor]) -> float:
        return host_seconds(lambda: runner(batch))


class GraphClock:
    """Times a runner on a batch as a CUDA graph, which is captured when they first come together.

    alone: names of runners that make graphs by themselves. They are timed as calls, the host's part before
    the first launch included. recorder, clocks: stand-ins for tests.
    """

    def __init__(
        self,
        alone: Sequence[str],
        recorder: Recorder,
        clock: Clock = queued_seconds,
        clock_alone: Clock = event_seconds,
    ) -> None:
        self._alone, self._recorder = frozenset(alone), recorder
        self._clock, self._clock_alone = clock, clock_alone
        # A batch is kept beside its graphs: its address is a key, and the graphs read its tensors.
        self._replays: dict[tuple[str, int], tuple[dict[str, Tensor], Callable[[], Any]]] = {}

    def seconds(self, name: str, runner: Runner, batch: dict[str, Tensor]) -> float:
        if name in self._alone:
            return self._clock_alone(lambda: runner(batch))
        key = name, id(batch)
        if key not in self._replays:
            self._replays[key] = batch, self._recorder.record(lambda: runner(batch))
        return self._clock(self._replays[key][1])
