"""`BatchRunner` runs batches of sequences through a model, and keeps it busy.

Sequences are sorted by length within a block of a few batches' tokens, so that batches of a bounded number of
tokens hold little padding. While a GPU computes a batch, the inputs of the next one are copied to it, and the
results of the one before are copied back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pruned_ops.layers.packing import PackedBatch
from pruned_ops.runtime.packed_encoder import OptimisedEncoder

# The number of batches whose sequences are sorted together. With so many, padding is a few percent of them.
LOOK_AHEAD = 8
# Tokens of a batch by default, padding included. A CPU's caches like small batches. On a GPU so many rows
# make 128 tiles of 128 rows, about one for each multiprocessor of an H200; not measured.
TOKENS_ON_A_CPU, TOKENS_ON_A_GPU = 4096, 16384

T = TypeVar("T", bound=Any)
Tensors = dict[str, Tensor]


def token_batches(sequences: Sequence[Any], tokens: int) -> Iterator[list[int]]:
    """The places in `sequences` that make up each batch: like lengths together, the longest first.

    A batch takes at most `tokens` with its padding, or holds one sequence. With the longest first, a batch
    that is too large fails at once."""
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    first = 0
    while first < len(order):
        rows = max(1, tokens // len(sequences[order[first]]))
        yield order[first : first + rows]
        first += rows


def padded(batch: Sequence[Any], pad_token_id: int) -> Tensors:
    """A model's inputs on the host, padded on the right, int64 (batch, seqlen).

    batch: objects with a length, input_ids and token_type_ids (None: all 0). The types are left out where no
    sequence has any."""
    shape = (len(batch), max(map(len, batch)))
    ids, types, mask = np.full(shape, pad_token_id), np.zeros(shape, int), np.zeros(shape, int)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence)] = sequence.input_ids
        mask[row, : len(sequence)] = 1
        if sequence.token_type_ids is not None:
            types[row, : len(sequence)] = sequence.token_type_ids
    inputs = {"input_ids": ids, "attention_mask": mask}
    if any(sequence.token_type_ids is not None for sequence in batch):
        inputs["token_type_ids"] = types
    return {name: torch.from_numpy(values) for name, values in inputs.items()}


class Lanes(Protocol):
    """Copies tensors to a model's device and back. A copy begins at once; the function that is returned waits
    for its end."""

    ahead: int  # the number of batches that are copied each way while one is computed

    def to_device(self, host: Tensors) -> Callable[[], Tensors]: ...

    def to_host(self, device: Tensors) -> Callable[[], Tensors]: ...

    def wait(self) -> None:
        """Wait until no copy is under way."""


class HostLanes:
    """The lanes of a model on the CPU: nothing is copied, and a batch ends before the next one is read."""

    ahead = 0

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        return lambda: host

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        return lambda: device

    def wait(self) -> None:
        pass


class CudaLanes:
    """The lanes of a model on a GPU: copies run on a stream of their own, with pinned memory."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)

    def to_device(self, host: Tensors) -> Callable[[], Tensors]:
        pinned = {name: tensor.pin_memory() for name, tensor in host.items()}
        with torch.cuda.stream(self._copies):
            copies = {name: tensor.to(self._device, non_blocking=True) for name, tensor in pinned.items()}
            arrived = self._copies.record_event()

        def wait() -> Tensors:
            torch.cuda.current_stream(self._device).wait_event(arrived)
            return copies

        return wait

    def to_host(self, device: Tensors) -> Callable[[], Tensors]:
        self._copies.wait_event(torch.cuda.current_stream(self._device).record_event())
        with torch.cuda.stream(self._copies):
            copies = {}
            for name, tensor in device.items():
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
                copies[name].copy_(tensor, non_blocking=True)
            arrived = self._copies.record_event()

        def wait() -> Tensors:
            arrived.synchronize()
            return copies

        return wait

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()
        self._copies.synchronize()


@dataclass(frozen=True)
class Batch(Generic[T]):
    """Sequences that run together, with the tensors that are being copied for them.

    arrive: waits for the end of the copy, and returns its tensors. held: tensors that the copy reads, which
    have to live until its end."""

    sequences: list[T]
    arrive: Callable[[], Tensors]
    held: Tensors | None = None

    def results(self) -> tuple[list[T], Tensors]:
        """The sequences with their tensors, which have arrived."""
        return self.sequences, self.arrive()


class BatchRunner:
    """Runs batches through a model, one after another.

    select: takes a model's output, and returns the tensors of it that are wanted on the host. lanes: how
    tensors are copied, for tests; by default as the device needs it.
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
        """Run every block's sequences in batches of at most `tokens` (see `token_batches`).

        Yields each batch with its results on the host. A block is read when all batches before it are
        computed, except for `lanes.ahead` of them. An empty block says that the next one is not there yet:
        the batches before it are finished first, and then ([], {}) is yielded. A generator of blocks is
        closed at the end, and where the model raises an error, too."""

        def batches() -> Iterator[list[T]]:
            for block in blocks:
                if not block:
                    yield []
                for places in token_batches(block, tokens):
                    yield [block[place] for place in places]

        try:
            yield from self.run(batches())
        finally:
            if isinstance(blocks, Generator):
                blocks.close()  # the traceback of an error would keep it open, and its threads waiting

    def run(self, batches: Iterable[list[T]]) -> Iterator[tuple[list[T], Tensors]]:
        """Run these batches. Yields each with its results on the host, in the order given; ([], {}) for an
        empty one, once all before it are finished."""
        ahead = self._lanes.ahead
        to_device, to_host = deque[Batch[T]](), deque[Batch[T]]()
        try:
            for sequences in batches:
                if not sequences:
                    yield from self._finished(to_device, to_host)
                    yield [], {}
                    continue
                to_device.append(Batch(sequences, self._lanes.to_device(padded(sequences, self._pad))))
                if len(to_device) > ahead:
                    to_host.append(self._computed(to_device.popleft()))
                if len(to_host) > ahead:
                    yield to_host.popleft().results()
            yield from self._finished(to_device, to_host)
        finally:
            self._lanes.wait()  # a copy may still use memory that is given back after this

    def _finished(
        self, to_device: deque[Batch[T]], to_host: deque[Batch[T]]
    ) -> Iterator[tuple[list[T], Tensors]]:
        """The results of the batches that are under way."""
        while to_device:
            to_host.append(self._computed(to_device.popleft()))
            if len(to_host) > self._lanes.ahead:
                yield to_host.popleft().results()
        while to_host:
            yield to_host.popleft().results()

    def _computed(self, batch: Batch[T]) -> Batch[T]:
        """Run the model on a batch of inputs. The result is the same batch, with its outputs on their way."""
        inputs = batch.arrive()
        with torch.inference_mode():
            outputs = self._select(self._model(**inputs, **self._packed_batch(inputs, batch.sequences)))
        return Batch(batch.sequences, self._lanes.to_host(outputs), held=inputs | outputs)

    def _packed_batch(self, inputs: Tensors, sequences: list[T]) -> dict[str, PackedBatch]:
        """The argument that tells an optimised model the lengths, which the host knows: to read them from the
        mask, a GPU would be waited for. A model that would not hand it to its encoder gets no argument."""
        if not _takes_packed_batch(self._model):
            return {}
        mask, lengths = inputs["attention_mask"], tuple(map(len, sequences))
        batch_size, seqlen = mask.shape
        return {"packed_batch": PackedBatch.from_mask(mask, batch_size, seqlen, mask.device, lengths)}


def _takes_packed_batch(model: Any) -> bool:
    """Whether this is an optimised encoder, or a model of a known class that hands arguments on to it."""
    if isinstance(model, OptimisedEncoder):
        return True
    if not isinstance(model, nn.Module) or "forward" in vars(model):
        return False
    packed = [child.packed for child in model.children() if isinstance(child, OptimisedEncoder)]
    return any(head.module is model for encoder in packed for head in encoder.heads)
