"""`tune` times the configurations of a model's shapes on this GPU, once. Requests only look its choices up
(tuning.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pruned_ops.ops.backends.triton import launch, tuning
from pruned_ops.ops.backends.triton.attention import HEAD_DIMS, launch_attention
from pruned_ops.ops.backends.triton.configs import AttentionConfig, GemmConfig
from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm
from pruned_ops.ops.backends.triton.linear_gelu import launch_linear_gelu
from pruned_ops.ops.backends.triton.tuning import Config, Problem
from pruned_ops.shape import ModelShape

Timer = Callable[[Callable[[], Tensor]], float]
# So many configurations of a shape are timed, the most promising ones, and torch's own kernels beside them.
TIMED = 6
EPS = 1e-12


def median_ms(work: Callable[[], Tensor]) -> float:
    """The median time of `work` by CUDA events, with a cold L2. It is measured briefly, because a model has
    about sixty shapes with about six configurations each."""
    from triton.testing import do_bench

    return float(do_bench(work, warmup=5, rep=20, return_mode="median"))


def tune(
    shape: ModelShape,
    batches: Iterable[Sequence[int]],
    dtype: torch.dtype,
    device: torch.device,
    timer: Timer = median_ms,
) -> int:
    """Choose the configurations for a model of this shape at these batches (lengths of their sequences).

    Returns the number of problems (ops at a shape) that were timed; those known already are not timed again.
    """
    known = tuning.known(device)
    new = [problem for problem in dict.fromkeys(problems(shape, batches, dtype)) if problem not in known]
    if not new:
        return 0
    tensors: dict[tuple[int, ...], Tensor] = {}
    timed = {
        problem: fastest(problem, device, timer, tensors)
        for problem in tqdm(new, desc=f"timing kernels on {device}", unit="shape", disable=len(new) < 2)
    }
    tuning.remember(device, timed)
    tuning.forget()
    return len(new)


def problems(shape: ModelShape, batches: Iterable[Sequence[int]], dtype: torch.dtype) -> list[Problem]:
    """The problems for which a forward pass of this model needs a configuration."""
    needed, name, hidden, head_dim = [], str(dtype), shape.hidden_size, shape.head_dim
    exact = dtype == torch.float32 and launch.precision(dtype) == "ieee"
    for lengths in batches:
        tokens, longest = tuning.bucket(sum(lengths)), tuning.length_bucket(max(lengths))
        for layer in shape.layers:
            if layer.num_heads and head_dim in HEAD_DIMS:
                needed.append(Problem("attention", name, tokens, layer.num_heads, head_dim, longest))
            if layer.ffn_width and not exact:
                needed.append(Problem("linear_gelu", name, tokens, layer.ffn_width, hidden))
            for inner in (layer.num_heads * head_dim, layer.ffn_width):
                if inner and dtype != torch.float32:
                    needed.append(Problem("linear_add_layer_norm", name, tokens, hidden, inner))
    return needed


def fastest(
    problem: Problem, device: torch.device, timer: Timer, tensors: dict[tuple[int, ...], Tensor]
) -> Config | None:
    """The configuration that takes the least time; None if torch's own kernels do."""
    tma = problem.inner * problem.torch_dtype.itemsize % launch.ALIGNMENT == 0
    promising: list[Config | None] = [*tuning.candidates(problem, tma, tuning.Chip.of(device))[:TIMED]]
    if problem.op != "attention":
        promising.insert(0, None)
    return min(promising, key=lambda config: timer(_runner(problem, config, device, tensors)))


def _runner(
    problem: Problem, config: Config | None, device: torch.device, tensors: dict[tuple[int, ...], Tensor]
) -> Callable[[], Tensor]:
    """A function that runs the op at this shape with this configuration, on random numbers.

    tensors: the random tensors by shape, made on demand and shared by all problems.
    """
    dtype, tokens, outputs, inner = problem.torch_dtype, problem.tokens, problem.outputs, problem.inner

    def numbers(*size: int) -> Tensor:
        if size not in tensors:
            tensors[size] = torch.randn(*size, device=device).mul_(0.1).to(dtype)
        return tensors[size]

    if problem.op == "attention":
        assert isinstance(config, AttentionConfig)
        lengths = [problem.longest] * (tokens // problem.longest) + [tokens % problem.longest]
        bounds = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        qkv = numbers(tokens, 3 * outputs * inner)
        return lambda: launch_attention(qkv, bounds, problem.longest, inner, config)
    assert config is None or isinstance(config, GemmConfig)
    x, weight, bias = numbers(tokens, inner), numbers(outputs, inner), numbers(outputs)
    if problem.op == "linear_add_layer_norm":
        residual = numbers(tokens, outputs)
        return lambda: launch_linear_add_layer_norm(x, weight, bias, residual, bias, bias, EPS, config)
    if config is None:
        return lambda: F.gelu(F.linear(x, weight, bias))
    return lambda: launch_linear_gelu(x, weight, bias, config)
