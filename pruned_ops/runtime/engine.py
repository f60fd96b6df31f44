"""The Engine records a model's forward, from token ids to logits, as CUDA graphs, and launches these again.

A pruned layer's kernels are shorter than their launches, and a graph costs one launch for all of them. There
is a graph for each bucket of sizes: sizes are rounded up to the bucket's (tokens by at most `waste`), inputs
are copied into its buffers, and results out of them. Once there are many, batches share them.
"""

from __future__ import annotations

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.weights import AlignedWeights, PanelWeights
from pruned_ops.ops.registry import is_watched, record, replayed
from pruned_ops.runtime.arrivals import ForkLock
from pruned_ops.runtime.cuda_graphs import CAPTURE, CudaGraphs, Recorder, capture_stream
from pruned_ops.runtime.graph_inputs import Bucket, GraphInputs
from pruned_ops.runtime.packed_heads import Outputs, PackedHead
from pruned_ops.shape import checked_int


def pieces(lengths: Sequence[int], max_tokens: int) -> Iterator[tuple[int, list[int]]]:
    """Cut a batch between sequences into pieces of at most max_tokens, or of one longer sequence.

    Yields each piece's first row and its sequences' lengths. Every sequence is in exactly one piece, also one
    without tokens."""
    first, piece, tokens = 0, list[int](), 0
    for length in lengths:
        if tokens and tokens + length > max_tokens:
            yield first, piece
            first, piece, tokens = first + tokens, [], 0
        piece.append(length)
        tokens += length
    if piece:
        yield first, piece


class Graphable(Protocol):
    """The part of a PackedEncoder that an engine uses."""

    encoder: PrunedEncoder
    heads: list[PackedHead]
    around: list[str]

    @property
    def device(self) -> torch.device: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def compute(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs: ...


@dataclass
class Weights:
    """The weights that a graph reads, and the addresses at which it reads them.

    slots: where to find each weight again, as a module's parameters or buffers and a name in them.
    held: keeps their memory until the graph is gone, even where the model has moved its weights meanwhile.
    laid_out, of_head: the encoder's layout and the modules that the head reads, which may be replaced."""

    slots: list[tuple[dict[str, Any], str]]
    addresses: list[int]
    held: list[Tensor]
    laid_out: PanelWeights | AlignedWeights | None
    of_head: tuple[nn.Module, ...]

    @classmethod
    def of(cls, encoder: Graphable, head: PackedHead | None) -> Weights:
        of_head = () if head is None else head.read
        modules = dict.fromkeys(module for root in (encoder, *of_head) for module in root.modules())
        slots = [
            (tensors, name)
            for module in modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        held = [tensors[name].detach() for tensors, name in slots]
        addresses = [weight.data_ptr() for weight in held]
        return cls(slots, addresses, held, encoder.encoder.laid_out, of_head)

    def moved(self, encoder: Graphable, head: PackedHead | None) -> bool:
        """Whether one of the weights is elsewhere now, or another one is in its place."""
        if encoder.encoder.laid_out is not self.laid_out:
            return True
        if head is not None and head.read != self.of_head:
            return True
        return [tensors[name].data_ptr() for tensors, name in self.slots] != self.addresses


@dataclass
class EngineStats:
    """The counts of what an engine did.

    replays: graphs launched. tokens: real tokens in these; wasted: rows that filled their buckets.
    captures: graphs made. evicted: graphs dropped for others. invalidated: how often all graphs were dropped
    because weights had moved.
    eager: batches run without a graph, because the hidden states of every layer or a backend were asked for,
    there was no token, or nothing could be captured.
    outside: replays whose graph ended with the hidden states, so that the head ran after it, by the name of
    the class around the encoder."""

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
    """A graph with its inputs. ran: the ops in the graph, which count as run at every replay."""

    inputs: GraphInputs
    replay: Callable[[], Outputs]
    ran: dict[str, Counter[str]]
    weights: Weights


class Engine:
    """Runs a PackedEncoder's batches by CUDA graphs on a GPU, and eagerly where that cannot be.

    waste: the share of rows that a bucket may add; twice that once there are max_graphs (see `_bucket`).
    max_tokens: a larger batch is split between sequences. max_graphs: the number of graphs that are kept,
    those used last. recorder: a stand-in for CUDA graphs, for tests.
    The known heads run inside the graph; `stats.outside` counts the others. Results are the caller's own.
    Several threads and streams may use it: one graph runs at a time. The GPU is waited for only by captures
    and where graphs are dropped.
    """

    def __init__(
        self,
        encoder: Graphable,
        waste: float = 0.05,
        max_tokens: int = 1 << 16,
        max_graphs: int = 128,
        recorder: Recorder | None = None,
    ) -> None:
        if not 0 <= waste < 1:
            raise ValueError(f"waste is {waste!r}; a share from 0 to below 1 is needed")
        checked_int("max_tokens", max_tokens, 1)
        checked_int("max_graphs", max_graphs, 1)
        self.waste, self.max_tokens, self.max_graphs = waste, max_tokens, max_graphs
        self._encoder = encoder
        self.recorder = recorder
        self._reset()

    def _reset(self) -> None:
        self.stats = EngineStats()
        self._lock = ForkLock()
        self._recorder = self.recorder  # the one in use; on a GPU the first capture makes CUDA's
        self._streams: dict[torch.device, torch.cuda.Stream] = {}  # on which CUDA's recorders capture
        self._graphs: OrderedDict[tuple[Bucket, int], _Graph] = OrderedDict()
        self._unable: str | None = None  # why nothing is captured any more

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles begin without graphs, which belong to one process and its memory."""
        kept = ("waste", "max_tokens", "max_graphs", "_encoder", "recorder")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        """The number of graphs that are kept."""
        return len(self._graphs)

    @property
    def serves(self) -> bool:
        """Whether batches run by graphs now: on a GPU, unless a capture failed, single ops are watched or
        their backend is chosen, or the caller records a graph of their own."""
        if torch.compiler.is_compiling() or not self._has_recorder:
            return False
        return not (self._unable or is_watched() or self._is_recorded_around())

    def _is_recorded_around(self) -> bool:
        """Whether the caller records a graph of their own around this one."""
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
        """The head's outputs, or the last hidden states, for packed ids, positions and types, and the places
        that a bias by position reads, int64 (tokens,) each. The tensors are the caller's own, whatever runs
        later. collect: as PackedEncoder.compute's; with it the batch runs eagerly."""
        if not self.serves or collect is not None or batch.tokens == 0:
            if not torch.compiler.is_compiling() and self._has_recorder:
                with self._lock:
                    self.stats.eager += 1
            return self._encoder.compute(inputs, batch.cu_seqlens, batch.max_seqlen, head, collect)
        if batch.tokens <= self.max_tokens:
            return self._run(inputs, batch.cu_seqlens, batch.batch_size, batch.max_seqlen, head)
        outputs = []
        for first, lengths in pieces(batch.lengths, self.max_tokens):
            bounds = [0, *accumulate(lengths)]
            cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(inputs[0].device, non_blocking=True)
            rows = [tensor[first : first + bounds[-1]] for tensor in inputs]
            outputs.append(self._run(rows, cu_seqlens, len(lengths), max(lengths), head))
        return Outputs(*(_joined(tensors) for tensors in zip(*outputs, strict=True)))

    def warm_up(self, batches: Iterable[Sequence[int]]) -> int:
        """Capture now the graphs for batches of these lengths (tokens of each sequence), with known heads.

        Returns how many graphs were new. Errors: RuntimeError where batches do not run by graphs.
        """
        if not self.serves:
            reason = self._unable or "it is not on a GPU, or a backend is asked for"
            raise RuntimeError(f"batches of this model do not run by CUDA graphs here: {reason}")
        before = self.stats.captures
        heads: list[PackedHead | None] = [
            head if head.computes() and head.in_graph else None for head in self._encoder.heads
        ] or [None]
        for lengths in batches:
            for sizes in self._sizes(lengths):
                with self._lock:
                    for head in heads:
                        self._graph(*sizes, head)
        return self.stats.captures - before

    def lengths_of_graphs(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """The lengths in which a batch of these lengths runs, as one graph or several."""
        return [Bucket.of(*sizes, self.waste).lengths for sizes in self._sizes(lengths)]

    def _sizes(self, lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """Tokens, sequences and the longest length of each piece of a batch that runs as a graph."""
        for _, piece in pieces(lengths, self.max_tokens):
            if sum(piece):
                yield sum(piece), len(piece), max(piece)

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
        while True:
            with self._lock:
                graph = self._graph(tokens, batch, max_seqlen, head)
                if graph is None:
                    self.stats.eager += 1
                    break
                outputs = self._replayed(graph, inputs, cu_seqlens, batch)
                # This look at the weights takes as long as the launch, so it is taken while the GPU works.
                # The graph holds what it reads, so that a run on weights that have moved does no harm.
                if graph.weights.moved(self._encoder, head):
                    self._drop()
                    continue
                self.stats.replays += 1
                self.stats.tokens += tokens
                self.stats.wasted += graph.inputs.bucket.tokens - tokens
                if head is None and self._encoder.around:
                    self.stats.outside[" or ".join(self._encoder.around)] += 1
            replayed(graph.ran)
            return outputs
        return self._encoder.compute(inputs, cu_seqlens, max_seqlen, head)

    def _replayed(self, graph: _Graph, inputs: Sequence[Tensor], cu_seqlens: Tensor, batch: int) -> Outputs:
        assert self._recorder is not None
        tokens = inputs[0].size(0)
        with self._recorder.ordered():
            graph.inputs.load(inputs, cu_seqlens)
            rows, firsts = graph.replay()
            return Outputs(
                None if rows is None else rows[:tokens].clone(),
                None if firsts is None else firsts[:batch].clone(),
            )

    def _bucket(self, tokens: int, batch: int, max_seqlen: int, head: PackedHead | None) -> Bucket:
        """The size of the graph that is to run a batch: the batch's own, as long as there is room for another
        graph. After that it is the smallest that holds the batch, or else a new and coarse one: of batches of
        all sizes, as a server's are, nearly each would have a graph recorded for it, and another dropped."""
        own_bucket = Bucket.of(tokens, batch, max_seqlen, self.waste)
        if (own_bucket, id(head)) in self._graphs or len(self._graphs) < self.max_graphs:
            return own_bucket
        most = 2 * self.waste
        holding = (
            kept
            for kept, of_head in self._graphs
            if of_head == id(head) and kept.holds(tokens, batch, max_seqlen, most)
        )
        return min(holding, key=lambda kept: (kept.tokens, kept.batch), default=own_bucket.coarser())

    def _graph(self, tokens: int, batch: int, max_seqlen: int, head: PackedHead | None) -> _Graph | None:
        """The graph that runs a batch, captured now if it is new; None where it cannot be."""
        bucket = self._bucket(tokens, batch, max_seqlen, head)
        graph = self._graphs.get((bucket, id(head)))
        if graph is None:
            if self._unable:  # since `serves` was asked, another thread or an earlier piece has failed
                return None
            failure = None
            try:
                graph = self._captured(bucket, head)
            except Exception as error:  # no memory, or a kernel that cannot be compiled or captured
                failure = error.with_traceback(None)  # which would hold what was recorded so far
            if graph is None:
                again = self._gives_way(bucket, failure)
                return self._graph(tokens, batch, max_seqlen, head) if again else None
            self.stats.captures += 1
            self._graphs[bucket, id(head)] = graph
        self._graphs.move_to_end((bucket, id(head)))
        while len(self._graphs) > self.max_graphs:
            self._wait()  # the graph may still run, on its buffers
            self._graphs.popitem(last=False)
            self.stats.evicted += 1
        return graph

    def _gives_way(self, bucket: Bucket, failure: Exception | None) -> bool:
        """Drop all graphs after a capture that failed. Returns whether another may succeed: where the memory
        for so many graphs was lacking, half of them are kept from now on. Else nothing is captured any more,
        which a warning says."""
        held = len(self._graphs)
        self._drop()
        if held and isinstance(failure, torch.OutOfMemoryError):
            self.max_graphs = max(held // 2, 1)
            return True
        self._unable = f"no graph of {bucket} could be captured ({failure})"
        text = f"{self._unable}: this model runs without graphs from now on"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False

    # Not in the caller's inference mode: callers outside of it could not write to the buffers made here.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _captured(self, bucket: Bucket, head: PackedHead | None) -> _Graph:
        device = self._encoder.device
        if self._recorder is None:
            if device not in self._streams:
                self._streams[device] = capture_stream(device)
            self._recorder = CudaGraphs(device, self._streams[device])
        weights = Weights.of(self._encoder, head)
        # What is recorded does not depend on what the buffers hold.
        rows = 4 if self._encoder.encoder.kind.reads_places else 3
        with CAPTURE:  # it starts a kernel: of two threads that do so first, Triton may give one none
            inputs = GraphInputs(bucket, device, rows)
        ran: dict[str, Counter[str]] = {}

        def work() -> Outputs:
            ran.clear()  # a recorder may run this more than once before it records
            with record() as counted:
                outputs = self._encoder.compute(inputs.ids, inputs.cu_seqlens, bucket.max_seqlen, head)
            ran.update(counted)
            return outputs

        return _Graph(inputs, self._recorder.record(work), ran, weights)

    def _wait(self) -> None:
        if self._recorder is not None:
            self._recorder.wait()

    def _drop(self) -> None:
        self._wait()
        self.stats.invalidated += bool(self._graphs)
        self._graphs.clear()
        self._recorder = self.recorder


def _joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The same output of all pieces of a batch as one; None where there is no such output."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None
