"""Engine: an encoder's forward recorded as a CUDA graph per bucket of sizes, and launched again as one.

A pruned layer's kernels are shorter than their launches; a graph costs one launch for all of them. Sizes are
rounded up to a bucket (tokens by at most `waste`), inputs are copied into its buffers, results out of them.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pruned_ops.cuda_graphs import CudaGraphs, Recorder
from pruned_ops.packing import PackedBatch
from pruned_ops.registry import is_watched, record, replayed

# A program of the attention has so many query rows at least; those beyond a sequence's end stop at once.
LENGTH_STEP = 64


@dataclass(frozen=True)
class Bucket:
    """Sizes that share a graph: batches of at most these are run as one of exactly these."""

    tokens: int
    batch: int
    max_seqlen: int

    @classmethod
    def of(cls, tokens: int, batch: int, max_seqlen: int, waste: float) -> Bucket:
        """The smallest bucket for a batch: tokens in steps of a power of 2 that is at most `waste` of them,
        the number of sequences as a power of 2, lengths in steps of LENGTH_STEP. Rows that are too many make
        sequences of their own, for which there is room; sequences that are too many are empty."""
        step = 1 << max(int(waste * tokens), 1).bit_length() - 1
        longest = -(-max_seqlen // LENGTH_STEP) * LENGTH_STEP
        fillers = -(-(step - 1) // longest)
        return cls(-(-tokens // step) * step, 1 << (batch + fillers - 1).bit_length(), longest)


@dataclass
class EngineStats:
    """What an engine did. tokens: real ones in replays; wasted: rows beside them. eager: batches that no
    graph ran. invalidated: how often all graphs were dropped because weights had moved."""

    replays: int = 0
    captures: int = 0
    evicted: int = 0
    eager: int = 0
    invalidated: int = 0
    tokens: int = 0
    wasted: int = 0


@dataclass
class _Graph:
    """inputs int64 (3, tokens): ids, positions, types. cu_seqlens int32 (batch + 1,). fillers int32 (batch,):
    where sequences of filling rows end, counted from the first. ran: ops in it."""

    inputs: Tensor
    cu_seqlens: Tensor
    fillers: Tensor
    replay: Callable[[], Tensor]
    ran: dict[str, Counter[str]]


class Engine:
    """Runs a PackedEncoder's batches by graphs on a GPU; elsewhere, and where it cannot, batches run eagerly.

    waste: the share of rows that a bucket may add. max_tokens: a larger batch is split between sequences.
    max_graphs: as many are kept, those used last. recorder: for tests; by default CUDA's on a GPU.
    Safe from several threads and streams: one graph runs at a time. Nothing here waits for the GPU.
    """

    def __init__(
        self,
        encoder: Any,
        waste: float = 0.05,
        max_tokens: int = 1 << 16,
        max_graphs: int = 64,
        recorder: Recorder | None = None,
    ) -> None:
        if not 0 <= waste < 1:
            raise ValueError(f"waste is {waste!r}; a share from 0 to below 1 is needed")
        if max_tokens < 1 or max_graphs < 1:
            raise ValueError(f"max_tokens ({max_tokens}) and max_graphs ({max_graphs}) must be at least 1")
        self.waste, self.max_tokens, self.max_graphs = waste, max_tokens, max_graphs
        self.stats = EngineStats()
        self._encoder = encoder
        self._given = recorder
        self._reset()

    def _reset(self) -> None:
        self._lock = Lock()
        self._recorder = self._given
        self._graphs: OrderedDict[Bucket, _Graph] = OrderedDict()
        self._pointers: list[Callable[[], int]] = []
        self._addresses: list[int] = []
        self._out_of_memory = False

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without graphs, which belong to one process and its memory."""
        kept = ("waste", "max_tokens", "max_graphs", "stats", "_encoder", "_given")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    @property
    def serves(self) -> bool:
        """Whether batches come here: on a GPU, and where nothing watches or chooses single ops."""
        if self._recorder is None and self._encoder.device.type != "cuda":
            return False
        return not (torch.compiler.is_compiling() or self._out_of_memory or _capturing() or is_watched())

    def run(self, inputs: Sequence[Tensor], batch: PackedBatch) -> Tensor:
        """The last hidden states (tokens, hidden_size) of packed ids, positions and types, int64 (tokens,)
        each: the caller's own, whatever runs later."""
        if batch.tokens == 0:
            return self._eagerly(inputs, batch.cu_seqlens, batch.max_seqlen)
        if batch.tokens <= self.max_tokens:
            return self._run(inputs, batch.cu_seqlens, batch.batch_size, batch.max_seqlen)
        parts = []
        for first, lengths in self._pieces(batch.lengths):
            bounds = [0, *accumulate(lengths)]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(inputs[0].device, non_blocking=True)
            rows = [one[first : first + bounds[-1]] for one in inputs]
            parts.append(self._run(rows, cu_seqlens, len(lengths), max(lengths)))
        return torch.cat(parts)

    def warm_up(self, batches: Iterable[Sequence[int]]) -> int:
        """Capture the graphs of batches of these lengths (tokens of each sequence) now; how many were new.

        Errors: RuntimeError where batches do not run by graphs.
        """
        if not self.serves:
            raise RuntimeError(
                "batches of this model do not run by CUDA graphs here: it is not on a GPU, the GPU had no "
                "memory for them, or a backend is asked for"
            )
        before = self.stats.captures
        for lengths in batches:
            for _, piece in self._pieces(lengths):
                bucket = Bucket.of(sum(piece), len(piece), max(piece), self.waste)
                with self._lock:
                    self._check_weights()
                    self._graph(bucket)
        return self.stats.captures - before

    def invalidate(self) -> None:
        """Drop all graphs."""
        with self._lock:
            self._drop()

    def _pieces(self, lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """A batch in parts of at most max_tokens: each part's first row and its sequences' lengths."""
        first, piece = 0, list[int]()
        for length in lengths:
            if piece and sum(piece) + length > self.max_tokens:
                yield first, piece
                first, piece = first + sum(piece), []
            piece.append(length)
        if sum(piece):
            yield first, piece

    def _run(self, inputs: Sequence[Tensor], cu_seqlens: Tensor, batch: int, max_seqlen: int) -> Tensor:
        tokens = inputs[0].size(0)
        bucket = Bucket.of(tokens, batch, max_seqlen, self.waste)
        with self._lock:
            self._check_weights()
            graph = self._graph(bucket)
            if graph is not None:
                self.stats.replays += 1
                self.stats.tokens += tokens
                self.stats.wasted += bucket.tokens - tokens
                replayed(graph.ran)
                assert self._recorder is not None
                with self._recorder.ordered():
                    torch.stack(list(inputs), out=graph.inputs[:, :tokens])
                    graph.cu_seqlens[: batch + 1].copy_(cu_seqlens)
                    ends = graph.fillers[: bucket.batch - batch] + cu_seqlens[-1:]
                    torch.clamp(ends, max=bucket.tokens, out=graph.cu_seqlens[batch + 1 :])
                    return graph.replay()[:tokens].clone()
        return self._eagerly(inputs, cu_seqlens, max_seqlen)

    def _eagerly(self, inputs: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        self.stats.eager += 1
        found: Tensor = self._encoder.compute(*inputs, cu_seqlens, max_seqlen)
        return found

    def _graph(self, bucket: Bucket) -> _Graph | None:
        """The bucket's graph, captured now if it is new; None where there is no memory for it."""
        graph = self._graphs.get(bucket)
        if graph is None:
            try:
                graph = self._captured(bucket)
            except torch.OutOfMemoryError:
                self._drop()
                self._out_of_memory = True
                warnings.warn(
                    f"no GPU memory for a graph of {bucket}: this model runs without graphs from now on",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            self.stats.captures += 1
            self._graphs[bucket] = graph
        self._graphs.move_to_end(bucket)
        while len(self._graphs) > self.max_graphs:
            self._graphs.popitem(last=False)
            self.stats.evicted += 1
        return graph

    # Outside the caller's inference mode: its tensors could not be written to by a caller without.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, bucket: Bucket) -> _Graph:
        device = self._encoder.device
        if self._recorder is None:
            self._recorder = CudaGraphs(device)
        inputs = torch.zeros(3, bucket.tokens, dtype=torch.int64, device=device)
        cu_seqlens = torch.zeros(bucket.batch + 1, dtype=torch.int32, device=device)
        # What is recorded is the same whatever these hold: filling rows alone at first.
        fillers = torch.arange(1, bucket.batch + 1, dtype=torch.int32, device=device) * bucket.max_seqlen
        torch.clamp(fillers, max=bucket.tokens, out=cu_seqlens[1:])
        ran: dict[str, Counter[str]] = {}

        def work() -> Tensor:
            ran.clear()  # it may run more than once before it is recorded
            with record() as counted:
                found: Tensor = self._encoder.compute(*inputs.unbind(), cu_seqlens, bucket.max_seqlen)
            ran.update(counted)
            return found

        return _Graph(inputs, cu_seqlens, fillers, self._recorder.record(work), ran)

    def _check_weights(self) -> None:
        """Graphs read the addresses that they were captured with."""
        addresses = [pointer() for pointer in self._pointers]
        if addresses != self._addresses or not addresses:
            if self._graphs:
                self._drop()
                self.stats.invalidated += 1
            self._pointers = [parameter.data_ptr for parameter in self._encoder.parameters()]
            self._addresses = [pointer() for pointer in self._pointers]

    def _drop(self) -> None:
        self._graphs.clear()
        self._addresses = []
        self._recorder = self._given


def _capturing() -> bool:
    """Whether somebody records a graph of their own around us."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
