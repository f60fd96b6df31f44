"""Many sequences through a model at full rate: like lengths together, and copies beside the computing.

Sequences come in blocks of a few batches' tokens and are sorted by length within a block, so that batches of
a bounded number of tokens hold little padding. On a GPU a batch is computed while the next one's inputs are
on their way there, and the results of the one before on theirs back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pruned_ops.layers.packing import with_lengths

# Batches that a block is sorted over: with so many, padding is a few percent of the tokens.
LOOK_AHEAD = 8

T = TypeVar("T", bound=Any)
Tensors = dict[str, Tensor]


def token_batches(sequences: Sequence[Any], tokens: int) -> Iterator[list[int]]:
    """Places in `sequences`, as batches of like length, longest first: little padding, and too large a batch
    fails at once. A batch takes at most `tokens` with its padding, or holds one sequence."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    first = 0
    while first < len(order):
        rows = max(1, tokens // len(sequences[order[first]]))
        yield order[first : first + rows]
        first += rows


def padded(batch: Sequence[Any], pad_token_id: int) -> Tensors:
    """A model's inputs on the host, right-padded, int64 (batch, seqlen).

    batch: whatever has a length, input_ids and token_type_ids (None: all 0). Types are left out where nobody
    has any."""
    shape = (len(batch), max(map(len, batch)))
    ids, types, mask = np.full(shape, pad_token_id), np.zeros(shape, int), np.zeros(shape, int)
    for row, one in enumerate(batch):
        ids[row, : len(one)] = one.input_ids
        mask[row, : len(one)] = 1
        if one.token_type_ids is not None:
            types[row, : len(one)] = one.token_type_ids
    made = {"input_ids": ids, "attention_mask": mask}
    if any(one.token_type_ids is not None for one in batch):
        made["token_type_ids"] = types
    return {name: torch.from_numpy(values) for name, values in made.items()}


class Lanes(Protocol):
    """Copies to where a model is and back. Both begin at once, and return what waits for their end."""

    ahead: int  # batches that are on their way there, and as many on theirs back, while one is computed

    def to_device(self, host: Tensors) -> Callable[[], Tensors]: ...

    def to_host(self, device: Tensors) -> Callable[[], Tensors]: ...

    def wait(self) -> None:
        """Until nothing is on its way."""


class HostLanes:
    """The model is on the CPU: nothing is copied, and every batch's results come before the next is read."""

    ahead = 0

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        return lambda: host

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        return lambda: device

    def wait(self) -> None:
        pass


class CudaLanes:
    """Copies on a stream of their own, from and to pinned memory, beside the caller's current stream."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        pinned = {name: tensor.pin_memory() for name, tensor in host.items()}
        with torch.cuda.stream(self._copies):
            there = {name: one.to(self._device, non_blocking=True) for name, one in pinned.items()}
            arrived = self._copies.record_event()

        def wait() -> Tensors:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return there

        return wait

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        self._copies.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._copies):
            found = {}
            for name, one in device.items():
                found[name] = torch.empty(one.shape, dtype=one.dtype, pin_memory=True)
                found[name].copy_(one, non_blocking=True)
            copied = self._copies.record_event()

        def wait() -> Tensors:
            copied.synchronize()
            return found

        return wait

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._copies.synchronize()


class BatchRunner:
    """Batches through a model, one after another.

    select: the model's output -> its tensors that are wanted on the host. lanes: for tests; by default those
    of the device.
    """

    def __init__(
        self,
        model: Any,
        pad_token_id: int,
        device: torch.device,
        select: Callable[[Any], Tensors],
        lanes: Lanes | None = None,
    ) -> None:
        self._model, self._pad, self._select = model, pad_token_id, select
        if lanes is None:
            lanes = CudaLanes(device) if device.type == "cuda" else HostLanes()
        self._lanes = lanes

    def scheduled(self, blocks: Iterable[Sequence[T]], tokens: int) -> Iterator[tuple[list[T], Tensors]]:
        """Every block's sequences in batches of at most `tokens` (see `token_batches`), with their results on
        the host. A block is read when the batches before it are computed, but for `lanes.ahead` of them."""
        return self.run(
            [block[place] for place in places] for block in blocks for places in token_batches(block, tokens)
        )

    def run(self, batches: Iterable[list[T]]) -> Iterator[tuple[list[T], Tensors]]:
        """Each batch with its results, in the order given."""
        ahead = self._lanes.ahead
        # What a copy reads is kept with it until its end is waited for.
        coming: deque[tuple[list[T], Callable[[], Tensors]]] = deque()
        going: deque[tuple[list[T], Tensors, Callable[[], Tensors]]] = deque()
        try:
            for batch in batches:
                coming.append((batch, self._lanes.to_device(padded(batch, self._pad))))
                if len(coming) > ahead:
                    going.append(self._computed(*coming.popleft()))
                if len(going) > ahead:
                    yield _arrived(going.popleft())
            while coming:
                going.append(self._computed(*coming.popleft()))
                if len(going) > ahead:
                    yield _arrived(going.popleft())
            while going:
                yield _arrived(going.popleft())
        finally:
            self._lanes.wait()  # before memory is given back that a copy may still use

    def _computed(
        self, batch: list[T], arrive: Callable[[], Tensors]
    ) -> tuple[list[T], Tensors, Callable[[], Tensors]]:
        inputs = arrive()
        # The host knows the lengths: without them a GPU would be waited for.
        inputs["attention_mask"] = with_lengths(inputs["attention_mask"], tuple(map(len, batch)))
        with torch.inference_mode():
            outputs = self._select(self._model(**inputs))
        return batch, inputs | outputs, self._lanes.to_host(outputs)


def _arrived(
    going: tuple[list[T], Tensors, Callable[[], Tensors]],
) -> tuple[list[T], Tensors]:
    batch, _, arrive = going
    return batch, arrive()
