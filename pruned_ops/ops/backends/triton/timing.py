"""`tune` times the configurations of a model's shapes on this GPU, once. Requests only look its choices up
(tuning.py)."""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pruned_ops.ops.backends.triton import launch, tuning
from pruned_ops.ops.backends.triton.add_layer_norm import launch_add_layer_norm
from pruned_ops.ops.backends.triton.attention import HEAD_DIMS, launch_attention
from pruned_ops.ops.backends.triton.configs import AttentionConfig, GemmConfig, RowConfig
from pruned_ops.ops.backends.triton.embed_layer_norm import launch_embed_layer_norm
from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm
from pruned_ops.ops.backends.triton.linear_geglu import launch_linear_geglu
from pruned_ops.ops.backends.triton.linear_gelu import launch_linear_gelu
from pruned_ops.ops.backends.triton.tuning import Config, Problem
from pruned_ops.ops.registry import KernelError, given_up
from pruned_ops.shape import ModelShape

Works = Sequence[Callable[[], Tensor]]
Timer = Callable[[Works], float]
# So many configurations of a shape are timed, the most promising ones, and torch's own kernels beside them.
TIMED = 6
EPS = 1e-12
# Rows of the table for embed_layer_norm: as many as a vocabulary has.
ROWS = 30_000
# Launches of a graph, and its replays. Few, because a model has some sixty shapes of six configurations each.
LAUNCHES, REPLAYS = 24, 7
# Milliseconds in which the GPU is busy before that: its clock falls while a configuration is compiled.
WARM_UP = 50.0
# The launches take turns on so many sets of numbers at most, which together are L2_SIZES as large as L2.
MOST_SETS, L2_SIZES = 8, 3


def graph_ms(works: Works) -> float:
    """The median time of one of `works`, which do the same on different numbers, by replays of a CUDA graph.

    The host's part of a launch, tens of microseconds, is not in it: an engine replays graphs, too. Nor is
    that of a graph, because the GPU is busy with the one before it meanwhile."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, LAUNCHES // len(works))

    def replayed() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    with torch.cuda.stream(stream):
        for work in works:
            work()  # compiles, and takes what memory it needs
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            for _ in range(rounds):
                # An output that is freed lends its memory to the next: all would be written into L2.
                outputs = [work() for work in works]
            del outputs
        busy = 0.0
        while busy < WARM_UP:
            busy += replayed()
        times = [replayed() for _ in range(REPLAYS)]
    return statistics.median(times) / rounds / len(works)


@functools.lru_cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream for timing. There is one, because torch keeps a cuBLAS workspace for each that it sees. Its
    priority is not that of a caller's streams, so that it is none of those (torch has 32 of each)."""
    return torch.cuda.Stream(device, priority=-1)


def tune(
    shape: ModelShape,
    batches: Iterable[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = graph_ms,
    *,
    gated: bool = False,
    norm_first: bool = False,
) -> int:
    """Choose the configurations for a model of this shape at these batches (lengths of their sequences).

    gated, norm_first: as `problems` takes them. Returns the number of problems (ops at a shape) that were
    timed; those known already are not timed again.
    """
    known = tuning.known(device)
    needed = dict.fromkeys(problems(shape, batches, dtype, gated, norm_first))
    untimed = [problem for problem in needed if problem not in known]
    if not untimed:
        return 0
    progress = tqdm(untimed, desc=f"timing kernels on {device}", unit="shape", disable=len(untimed) < 2)
    with torch.inference_mode(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        timed = {problem: fastest(problem, device, timer) for problem in progress}
    tuning.remember(device, timed)
    tuning.forget()
    return len(untimed)


def problems(
    shape: ModelShape,
    batches: Iterable[Sequence[int]],
    dtype: torch.dtype,
    gated: bool = False,
    norm_first: bool = False,
) -> list[Problem]:
    """The problems for which a forward pass of this model needs a configuration.

    gated: its FFNs are `linear_geglu`'s. norm_first: its LayerNorms are torch's, but for the embedding's."""
    activated = "linear_geglu" if gated else "linear_gelu"
    needed, name, hidden, head_dim = [], str(dtype), shape.hidden_size, shape.head_dim
    exact = dtype == torch.float32 and launch.precision(dtype) == "ieee"
    for lengths in batches:
        tokens, longest = tuning.bucket(sum(lengths)), tuning.length_bucket(max(lengths))
        # First, because linear_add_layer_norm is timed with the norm that was chosen here.
        norms = ("embed_layer_norm",) if norm_first else ("add_layer_norm", "embed_layer_norm")
        needed += [Problem(op, name, tokens, hidden, 0) for op in norms]
        for layer in shape.layers:
            if layer.num_heads and head_dim in HEAD_DIMS:
                needed.append(Problem("attention", name, tokens, layer.num_heads, head_dim, longest))
            if layer.ffn_width and not exact:
                needed.append(Problem(activated, name, tokens, layer.ffn_width, hidden))
            for inner in (layer.num_heads * head_dim, layer.ffn_width):
                if inner and dtype != torch.float32 and not norm_first:
                    needed.append(Problem("linear_add_layer_norm", name, tokens, hidden, inner))
    return needed


def fastest(problem: Problem, device: torch.device, timer: Timer) -> Config | None:
    """The configuration that takes the least time; None if torch's own kernels do. One that cannot be
    compiled for this GPU, or loaded, is warned of and left out. Errors: KernelError where none can."""
    tma = problem.inner * problem.torch_dtype.itemsize % launch.ALIGNMENT == 0
    promising: list[Config | None] = [*tuning.candidates(problem, tma, tuning.Chip.of(device))[:TIMED]]
    if problem.op.startswith("linear"):
        promising.insert(0, None)
    operands = [_operands(problem, device)]
    size = sum(tensor.nbytes for tensor in operands[0])
    sets = min(MOST_SETS, 1 + L2_SIZES * launch.l2_bytes(device) // size)
    operands += [_operands(problem, device) for _ in range(sets - 1)]

    times: dict[Config | None, float] = {}
    for config in promising:
        try:
            times[config] = launch.guarded(timer)([_work(problem, config, tensors) for tensors in operands])
        except KernelError as error:
            if not times and config == promising[-1]:
                raise
            warnings.warn(f"{problem.op} is tuned without {config}: {error}", RuntimeWarning, stacklevel=2)
    return min(times, key=times.__getitem__)


def _operands(problem: Problem, device: torch.device) -> list[Tensor]:
    """Random tensors of this shape, in the order in which `_work` takes them."""
    dtype, tokens, outputs, inner = problem.torch_dtype, problem.tokens, problem.outputs, problem.inner

    def numbers(*size: int) -> Tensor:
        return torch.randn(*size, device=device).mul_(0.1).to(dtype)

    if problem.op == "attention":
        lengths = [problem.longest] * (tokens // problem.longest) + [tokens % problem.longest]
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        return [numbers(tokens, 3 * outputs * inner), bounds]
    if problem.op == "embed_layer_norm":
        ids = torch.randint(ROWS, (tokens,), device=device)
        return [ids, numbers(ROWS, outputs), numbers(outputs)]
    x = numbers(tokens, inner or outputs)
    if problem.op in ("linear_gelu", "linear_geglu"):
        rows = outputs if problem.op == "linear_gelu" else 2 * outputs
        return [x, numbers(rows, inner), numbers(rows)]
    if problem.op == "linear_add_layer_norm":
        return [x, numbers(outputs, inner), numbers(outputs), numbers(tokens, outputs)]
    return [x, numbers(outputs), numbers(tokens, outputs)]


def _work(problem: Problem, config: Config | None, operands: list[Tensor]) -> Callable[[], Tensor]:
    """A function that runs the op on these operands with this configuration."""
    if isinstance(config, AttentionConfig):
        qkv, bounds = operands
        return lambda: launch_attention(qkv, bounds, problem.longest, problem.inner, config)
    if isinstance(config, RowConfig) and problem.op == "embed_layer_norm":
        ids, table, vector = operands
        return lambda: launch_embed_layer_norm([ids] * 3, [table] * 3, vector, vector, EPS, config)
    if isinstance(config, RowConfig):
        x, vector, residual = operands
        return lambda: launch_add_layer_norm(x, vector, residual, vector, vector, EPS, config)
    if problem.op == "linear_add_layer_norm":
        return lambda: _linear_add_layer_norm(operands, config)
    x, weight, bias = operands
    if problem.op == "linear_geglu":
        return lambda: launch_linear_geglu(x, weight, bias, config)
    if config is None:
        return lambda: F.gelu(F.linear(x, weight, bias))
    return lambda: launch_linear_gelu(x, weight, bias, config)


def _linear_add_layer_norm(operands: list[Tensor], config: GemmConfig | None) -> Tensor:
    x, weight, bias, residual = operands
    with given_up(residual):  # as all layers but the first do
        return launch_linear_add_layer_norm(x, weight, bias, residual, bias, bias, EPS, config)
