"""Engine: a model's forward, from token ids to logits, recorded as a CUDA graph per bucket of sizes, and
launched again as one.

A pruned layer's kernels are shorter than their launches; a graph costs one launch for all of them. Sizes are
rounded up to a bucket (tokens by at most `waste`), inputs are copied into its buffers, results out of them.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from threading import Lock
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from pruned_ops.layers.packing import PackedBatch
from pruned_ops.ops.registry import is_watched, record, replayed
from pruned_ops.runtime.packed_heads import Outputs, PackedHead

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


def pieces(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """A batch cut between sequences into parts of at most max_tokens, or of one sequence with tokens: each
    part's first row and its sequences' lengths. Every sequence is in one of them, also one of no tokens."""
    first, piece, tokens = 0, list[int](), 0
    for length in lengths:
        if tokens and tokens + length > max_tokens:
            yield first, piece
            first, piece, tokens = first + tokens, [], 0
        piece.append(length)
        tokens += length
    if piece:
        yield first, piece


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
        return cls(slots, [one.data_ptr() for one in held], held, encoder.encoder.laid_out, linears)

    def moved(self, encoder: Any, head: PackedHead | None) -> bool:
        """Whether one of them is elsewhere now, or another is in its place."""
        if encoder.encoder.laid_out is not self.packed or (head is not None and head.linears != self.linears):
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


@dataclass
class EngineStats:
    """What an engine did. replays: graphs launched; tokens: real ones in them; wasted: rows beside them.
    outside: replays whose head ran after the graph, which ended with the hidden states, by the name of the
    class around the encoder. eager: batches that no graph ran: hidden states of every layer were asked for, a
    backend was, there was no token, or nothing could be captured. captures: graphs made; evicted: those that
    went for others; invalidated: how often all were dropped because weights had moved."""

    replays: int = 0
    captures: int = 0
    evicted: int = 0
    eager: int = 0
    invalidated: int = 0
    tokens: int = 0
    wasted: int = 0
    outside: Counter[str] = field(default_factory=Counter)


@dataclass
class _Graph:
    """inputs int64 (3, tokens): ids, positions, types. cu_seqlens int32 (batch + 1,). fillers int32 (batch,):
    where sequences of filling rows end, counted from the first. ran: ops in it."""

    inputs: Tensor
    cu_seqlens: Tensor
    fillers: Tensor
    replay: Callable[[], Outputs]
    ran: dict[str, Counter[str]]
    weights: Weights


class Engine:
    """Runs a PackedEncoder's batches by graphs on a GPU; elsewhere, and where it cannot, batches run eagerly.

    waste: the share of rows that a bucket may add. max_tokens: a larger batch is split between sequences.
    max_graphs: as many are kept, those used last. recorder: for tests; by default CUDA's on a GPU.
    A head that we know is in the graph; `stats.outside` counts those that are not. Results are the caller's
    own. Safe from several threads and streams: one graph runs at a time. Nothing waits for the GPU but
    captures, and what drops graphs.
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
        self._encoder = encoder
        self._given = recorder
        self._reset()

    def _reset(self) -> None:
        self.stats = EngineStats()
        self._lock = Lock()
        self._recorder = self._given
        self._graphs: OrderedDict[tuple[Bucket, int], _Graph] = OrderedDict()
        self._unable: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without graphs, which belong to one process and its memory."""
        kept = ("waste", "max_tokens", "max_graphs", "_encoder", "_given")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        """Graphs that are kept."""
        return len(self._graphs)

    @property
    def serves(self) -> bool:
        """Whether batches run by graphs: on a GPU, where they could be captured so far, and where nothing
        watches or chooses single ops, or records what we launch."""
        if torch.compiler.is_compiling() or not self._has_recorder:
            return False
        return not (self._unable or is_watched() or self._is_recorded_around())

    def _is_recorded_around(self) -> bool:
        """Whether somebody records a graph of their own around us."""
        return self._encoder.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    @property
    def _has_recorder(self) -> bool:
        return self._recorder is not None or self._encoder.device.type == "cuda"

    def run(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs:
        """The head's outputs, or the last hidden states, of packed ids, positions and types, int64 (tokens,)
        each: the caller's own, whatever runs later. collect: as PackedEncoder.compute's; then eagerly."""
        if not self.serves or collect is not None or batch.tokens == 0:
            if not torch.compiler.is_compiling() and self._has_recorder:
                with self._lock:
                    self.stats.eager += 1
            found: Outputs = self._encoder.computed(inputs, batch, head, collect)
            return found
        if batch.tokens <= self.max_tokens:
            return self._run(inputs, batch.cu_seqlens, batch.batch_size, batch.max_seqlen, head)
        parts = []
        for first, lengths in pieces(batch.lengths, self.max_tokens):
            bounds = [0, *accumulate(lengths)]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(inputs[0].device, non_blocking=True)
            rows = [one[first : first + bounds[-1]] for one in inputs]
            parts.append(self._run(rows, cu_seqlens, len(lengths), max(lengths), head))
        return Outputs(*(None if of[0] is None else torch.cat(of) for of in zip(*parts, strict=True)))

    def warm_up(self, batches: Iterable[Sequence[int]]) -> int:
        """Capture the graphs of batches of these lengths (tokens of each sequence) now, with the heads that
        we know; how many were new.

        Errors: RuntimeError where batches do not run by graphs.
        """
        if not self.serves:
            reason = self._unable or "it is not on a GPU, or a backend is asked for"
            raise RuntimeError(f"batches of this model do not run by CUDA graphs here: {reason}")
        before = self.stats.captures
        heads = [head if head.computes() else None for head in self._encoder.heads] or [None]
        for lengths in batches:
            for _, piece in pieces(lengths, self.max_tokens):
                if sum(piece):
                    bucket = Bucket.of(sum(piece), len(piece), max(piece), self.waste)
                    with self._lock:
                        for head in heads:
                            self._graph(bucket, head)
        return self.stats.captures - before

    def invalidate(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        with self._lock:
            self._drop()

    def _run(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        batch: int,
        max_seqlen: int,
        head: PackedHead | None,
    ) -> Outputs:
        tokens = inputs[0].size(0)
        bucket = Bucket.of(tokens, batch, max_seqlen, self.waste)
        while True:
            with self._lock:
                graph = self._graph(bucket, head)
                if graph is None:
                    self.stats.eager += 1
                    break
                outputs = self._replayed(graph, inputs, cu_seqlens, batch)
                # Looked at while the GPU works: it takes as long as the launch. What it read is still there.
                if graph.weights.moved(self._encoder, head):
                    self._drop()
                    continue
                self.stats.replays += 1
                self.stats.tokens += tokens
                self.stats.wasted += bucket.tokens - tokens
                if head is None and self._encoder.around:
                    self.stats.outside[" or ".join(self._encoder.around)] += 1
            replayed(graph.ran)
            return outputs
        found: Outputs = self._encoder.compute(inputs, cu_seqlens, max_seqlen, head)
        return found

    def _replayed(self, graph: _Graph, inputs: Sequence[Tensor], cu_seqlens: Tensor, batch: int) -> Outputs:
        assert self._recorder is not None
        tokens = inputs[0].size(0)
        with self._recorder.ordered():
            torch.stack(list(inputs), out=graph.inputs[:, :tokens])
            graph.cu_seqlens[: batch + 1].copy_(cu_seqlens)
            ends = graph.fillers[: graph.fillers.size(0) - batch] + cu_seqlens[-1:]
            torch.clamp(ends, max=graph.inputs.size(1), out=graph.cu_seqlens[batch + 1 :])
            rows, firsts = graph.replay()
            return Outputs(
                None if rows is None else rows[:tokens].clone(),
                None if firsts is None else firsts[:batch].clone(),
            )

    def _graph(self, bucket: Bucket, head: PackedHead | None) -> _Graph | None:
        """The bucket's graph, captured now if it is new; None where it cannot be."""
        graph = self._graphs.get((bucket, id(head)))
        if graph is None:
            if self._unable:  # since it was asked last, by another thread or a piece before
                return None
            try:
                graph = self._captured(bucket, head)
            except RuntimeError as error:  # no memory, or a kernel that cannot be captured
                self._drop()
                self._unable = f"no graph of {bucket} could be captured ({error})"
                text = f"{self._unable}: this model runs without graphs from now on"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return None
            self.stats.captures += 1
            self._graphs[bucket, id(head)] = graph
        self._graphs.move_to_end((bucket, id(head)))
        while len(self._graphs) > self.max_graphs:
            self._wait()  # it may run still, on its buffers
            self._graphs.popitem(last=False)
            self.stats.evicted += 1
        return graph

    # Outside the caller's inference mode: its tensors could not be written to by a caller without.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, bucket: Bucket, head: PackedHead | None) -> _Graph:
        device = self._encoder.device
        if self._recorder is None:
            self._recorder = CudaGraphs(device)
        weights = Weights.of(self._encoder, head)
        inputs = torch.zeros(3, bucket.tokens, dtype=torch.int64, device=device)
        cu_seqlens = torch.zeros(bucket.batch + 1, dtype=torch.int32, device=device)
        # What is recorded is the same whatever these hold: filling rows alone at first.
        fillers = torch.arange(1, bucket.batch + 1, dtype=torch.int32, device=device) * bucket.max_seqlen
        torch.clamp(fillers, max=bucket.tokens, out=cu_seqlens[1:])
        ran: dict[str, Counter[str]] = {}

        def work() -> Outputs:
            ran.clear()  # it may run more than once before it is recorded
            with record() as counted:
                found: Outputs = self._encoder.compute(inputs.unbind(), cu_seqlens, bucket.max_seqlen, head)
            ran.update(counted)
            return found

        return _Graph(inputs, cu_seqlens, fillers, self._recorder.record(work), ran, weights)

    def _wait(self) -> None:
        if self._recorder is not None:
            self._recorder.wait()

    def _drop(self) -> None:
        self._wait()
        self.stats.invalidated += bool(self._graphs)
        self._graphs.clear()
        self._recorder = self._given
