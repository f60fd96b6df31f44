"""The time of every configuration of a kernel at the shapes of the goals, beside what it has to beat: cuBLAS,
torch's attention and flash attention, copying. One that computes something else than the op is not timed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.measure.graph_timing import replay_seconds
from pruned_ops.measure.timing import host_seconds
from pruned_ops.ops.registry import OPS, given_up
from single_kernels.cases import EPS, Place
from single_kernels.journal import WRONG, Journal
from single_kernels.names import add_layer_norm_name, attention_name, described, linear_gelu_name
from single_kernels.right import ready_backends, relative
from single_kernels.rotation import input_sets, rotated
from torch_ways import packed_flash_attention

SPREAD = tuple(48 + 336 * place // 31 for place in range(32))
# head_dim, heads, lengths.
ATTENTION = (
    (64, 16, (384,) * 32),
    (64, 16, (128,) * 96),
    (64, 16, SPREAD),
    (64, 16, (512,) * 24),
    (64, 8, (384,) * 32),
    (32, 12, (128,) * 96),
    (64, 16, (32,) * 384),
    (64, 16, (16,) * 768),
)
# tokens, hidden size, FFN width.
LINEAR_GELU = (
    (12288, 1024, 4096),
    (12288, 1024, 2048),
    (12288, 1024, 1168),
    (12288, 1024, 1848),
    (3072, 1024, 4096),
    (128, 1024, 4096),
)
# tokens, inner dimension, outputs: a layer's other products, which the goals of whole models stand on.
LINEARS = (
    (12288, 1024, 3072),
    (12288, 1024, 1024),
    (12288, 4096, 1024),
    (12288, 1168, 1024),
    (12288, 1152, 1024),
    (12288, 512, 1024),
)
# The same with the norm behind it, for so few tokens that the inner dimension is split over programs.
FEW = ((128, 1024, 1024), (128, 4096, 1024), (384, 1024, 1024), (384, 4096, 1024))
NORMS = ((12288, 1024), (49152, 1024), (12288, 384))
# Rows and warps of a program of the LayerNorm kernels, beside those that `tune` knows.
MORE_ROWS = ((2, 4), (8, 8))
# Rounds of a graph; each is launched twice.
ROUNDS = 6
# The relative error in norm against the op's reference in the same dtype, from which on a kernel is wrong.
# Ways to round in fp16 differ by a thousandth; one wrong tile of the 3,072 of (12288, 4096) is 2 hundredths.
WRONG_FROM = 0.01
# The way of linear_add_layer_norm whose result is not compared, because it changes its residual.
INTO_RESIDUAL = "cuBLAS into the residual, then the norm"
# Configurations of a GEMM that are timed without TMA: the most promising ones by the formula.
PLAIN_GEMMS = 4


@dataclass(frozen=True)
class Sweep:
    """What a sweep writes to, where it runs, and whether on the sizes of a dry run."""

    journal: Journal
    place: Place
    tiny: bool

    def sizes(self, real: tuple[Any, ...], tiny: Any) -> tuple[Any, ...]:
        return (tiny,) if self.tiny else real

    def time(
        self,
        problem: str,
        name: str,
        shapes: Sequence[tuple[int, ...]],
        call: Callable[..., Any],
        flops: float,
        nbytes: float,
        expected: Callable[..., Tensor] | None = None,
    ) -> None:
        """Time a call on random tensors of these shapes; a line with its microseconds and rates. expected:
        computes what the call has to."""
        facts = {"problem": problem, "name": name}

        def measure() -> None:
            if expected is not None:
                inputs = self._inputs(shapes)
                error = relative(call(*inputs), expected(*inputs))
                if not error < WRONG_FROM:
                    self.journal.note(WRONG, **facts, error=error, allowed=WRONG_FROM)
                    return
            rounds = self._seconds(shapes, call, nbytes)
            seconds = statistics.median(rounds)
            rates = {"tflops": flops / seconds / 1e12, "tb_per_s": nbytes / seconds / 1e12}
            # The slowest round beside the fastest: a clock that still rose, or fell, shows here.
            spread = max(rounds) / min(rounds)
            self.journal.note("timed", **facts, us=1e6 * seconds, **rates, spread=spread)

        self.journal.attempt(measure, **facts)

    def _seconds(
        self, shapes: Sequence[tuple[int, ...]], call: Callable[..., Any], nbytes: float
    ) -> tuple[float, ...]:
        """The seconds of one call in each round."""
        make = partial(self._inputs, shapes)
        if self.place.device != "cuda":
            return (host_seconds(rotated(make, call, 1)[0]),)
        return replay_seconds(rotated(make, call, input_sets(nbytes)), ROUNDS)

    def _inputs(self, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        return [self.place.tensor(*shape) for shape in shapes]


def ceilings(sweep: Sweep) -> None:
    """torch's largest product and largest copy: what all others are compared with."""
    ((size, numbers),) = sweep.sizes(((8192, 1 << 29),), (64, 1 << 11))
    moved = sweep.place.dtype.itemsize * 3.0 * size**2
    sweep.time("ceiling", f"product of {size}", [(size, size)] * 2, torch.mm, 2.0 * size**3, moved)
    moved = sweep.place.dtype.itemsize * 2.0 * numbers
    sweep.time("ceiling", f"copy of {numbers} numbers", [(numbers,)] * 2, Tensor.copy_, 0.0, moved)


def attention(sweep: Sweep) -> None:
    for head_dim, heads, lengths in sweep.sizes(ATTENTION, (16, 2, (9, 17))):
        tokens, width = sum(lengths), heads * head_dim
        bounds = torch.tensor(
            [0, *itertools.accumulate(lengths)], dtype=torch.int32, device=sweep.place.device
        )
        flops = 4.0 * width * sum(length * length for length in lengths)
        nbytes = sweep.place.dtype.itemsize * 4.0 * tokens * width
        problem = attention_name(heads, head_dim, lengths)
        sizes = {"cu_seqlens": bounds, "max_seqlen": max(lengths), "head_dim": head_dim}
        exact = partial(OPS["attention"].reference, **sizes)
        for name, call in _attentions(sweep.place, head_dim, heads, lengths, bounds):
            expected = None if name.startswith("torch") else exact
            sweep.time(problem, name, [(tokens, 3 * width)], call, flops, nbytes, expected)


def _attentions(
    place: Place, head_dim: int, heads: int, lengths: tuple[int, ...], bounds: Tensor
) -> Iterator[tuple[str, Callable[[Tensor], Any]]]:
    """The ways to compute attention over packed qkv (tokens, 3 * heads * head_dim)."""
    longest = max(lengths)
    backends = ready_backends("attention", place.device)
    if "triton" in backends:
        from pruned_ops.ops.backends.triton import configs
        from pruned_ops.ops.backends.triton.attention import launch_attention

        short = configs.short_config(longest, head_dim, place.dtype)
        for config in (*configs.ATTENTION[place.dtype.itemsize][head_dim], *([short] if short else [])):
            yield (
                f"triton {described(config)}",
                lambda qkv, config=config: launch_attention(qkv, bounds, longest, head_dim, config),
            )
    for name in backends:
        if name != "triton":
            launch = OPS["attention"].kernels[name].launch
            yield name, lambda qkv, launch=launch: launch(qkv, bounds, longest, head_dim)
    if place.device == "cuda":
        yield (
            "torch flash, packed",
            lambda qkv: packed_flash_attention(*qkv.view(-1, 3, heads, head_dim).unbind(1), bounds, longest),
        )
    if len(set(lengths)) == 1:
        shape = (len(lengths), longest, 3, heads, head_dim)
        yield (
            "torch sdpa",
            lambda qkv: F.scaled_dot_product_attention(*qkv.view(shape).permute(2, 0, 3, 1, 4)),
        )


def linear_gelu(sweep: Sweep) -> None:
    for tokens, hidden, width in sweep.sizes(LINEAR_GELU, (20, 64, 72)):
        shapes = [(tokens, hidden), (width, hidden), (width,)]
        flops = 2.0 * tokens * hidden * width
        nbytes = sweep.place.dtype.itemsize * (tokens * (hidden + width) + hidden * width)
        problem = linear_gelu_name(tokens, hidden, width)
        for name, call in _linear_gelus(sweep.place, tokens, hidden, width):
            expected = None if name.startswith("cuBLAS") else OPS["linear_gelu"].reference
            sweep.time(problem, name, shapes, call, flops, nbytes, expected)


def _linear_gelus(
    place: Place, tokens: int, hidden: int, width: int
) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The ways to compute linear_gelu."""
    yield "cuBLAS linear alone", F.linear
    yield "cuBLAS linear, gelu", lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))
    backends = ready_backends("linear_gelu", place.device)
    if "triton" in backends:
        from pruned_ops.ops.backends.triton.linear_gelu import launch_linear_gelu

        for config in gemm_configs(place, tokens, hidden, width):
            yield (
                f"triton {described(config)}",
                lambda x, weight, bias, config=config: launch_linear_gelu(x, weight, bias, config),
            )
    yield from ((name, OPS["linear_gelu"].kernels[name].launch) for name in backends if name != "triton")


def gemm_configs(place: Place, tokens: int, hidden: int, width: int) -> list[Any]:
    """The configurations to time: the most promising ones by the formula, and for many tokens all with TMA,
    among which the formula knows no difference in how many of them a multiprocessor holds."""
    from pruned_ops.ops.backends.triton import configs, tuning

    size = place.dtype.itemsize
    chip = tuning.Chip.of(torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu"))
    fitting = tuning.fitting(configs.LINEAR_GELU[size], tokens, width, hidden, size, True, chip)
    with_tma = [config for config in fitting if config.tma and tokens > 1024]
    plain = [config for config in fitting if not config.tma]
    return list(dict.fromkeys([fitting[0], *plain[:PLAIN_GEMMS], *with_tma]))


def linears(sweep: Sweep) -> None:
    """cuBLAS at a layer's other shapes."""
    for tokens, inner, outputs in sweep.sizes(LINEARS, (20, 64, 72)):
        shapes = [(tokens, inner), (outputs, inner)]
        nbytes = sweep.place.dtype.itemsize * (tokens * (inner + outputs) + inner * outputs)
        problem = f"linear {tokens}x{inner}->{outputs}"
        sweep.time(problem, "cuBLAS, no bias", shapes, F.linear, 2.0 * tokens * inner * outputs, nbytes)


def norms(sweep: Sweep) -> None:
    for tokens, hidden in sweep.sizes(NORMS, (20, 64)):
        bias, scale, shift = (sweep.place.tensor(hidden) for _ in range(3))
        nbytes = sweep.place.dtype.itemsize * 3.0 * tokens * hidden
        problem = add_layer_norm_name(tokens, hidden)
        vectors = {"bias": bias, "norm_weight": scale, "norm_bias": shift}
        exact = partial(_exact_norm, vectors)
        for name, call in _add_layer_norms(sweep.place, bias, scale, shift):
            expected = None if name.startswith("torch") else exact
            sweep.time(problem, name, [(tokens, hidden)] * 2, call, 0.0, nbytes, expected)


def _exact_norm(vectors: dict[str, Tensor], x: Tensor, residual: Tensor) -> Tensor:
    return OPS["add_layer_norm"].reference(x, residual=residual, eps=EPS, **vectors)


def _add_layer_norms(
    place: Place, bias: Tensor, scale: Tensor, shift: Tensor
) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Any]]]:
    """The ways to compute add_layer_norm of x and a residual."""
    backends = ready_backends("add_layer_norm", place.device)
    if "triton" in backends:
        from pruned_ops.ops.backends.triton import configs
        from pruned_ops.ops.backends.triton.add_layer_norm import launch_add_layer_norm

        others = (configs.RowConfig(rows, warps) for rows, warps in MORE_ROWS)
        for config in dict.fromkeys([*configs.row_configs(bias.size(0)), *others]):
            yield (
                f"triton {described(config)}",
                lambda x, residual, config=config: launch_add_layer_norm(
                    x, bias, residual, scale, shift, EPS, config
                ),
            )
    for name in backends:
        if name != "triton":
            launch = OPS["add_layer_norm"].kernels[name].launch
            yield (
                name,
                lambda x, residual, launch=launch: launch(x, bias, residual, scale, shift, EPS),
            )
    yield (
        "torch layer_norm of a sum",
        lambda x, residual: F.layer_norm(x + residual, scale.shape, scale, shift, EPS),
    )


def linear_add_layer_norms(sweep: Sweep) -> None:
    """A product and the norm behind it: split over programs, or cuBLAS's."""
    for tokens, inner, outputs in sweep.sizes(FEW, (20, 64, 72)):
        bias, scale, shift = (sweep.place.tensor(outputs) for _ in range(3))
        shapes = [(tokens, inner), (outputs, inner), (tokens, outputs)]
        nbytes = sweep.place.dtype.itemsize * (tokens * (inner + 2.0 * outputs) + inner * outputs)
        problem = f"linear_add_layer_norm {tokens}x{inner}->{outputs}"
        flops = 2.0 * tokens * inner * outputs
        exact = partial(_normed, OPS["linear_add_layer_norm"].reference, (bias, scale, shift))
        for name, launch in _linear_add_layer_norms(sweep.place):
            expected = None if name.startswith("torch") or name == INTO_RESIDUAL else exact
            call = partial(_normed, launch, (bias, scale, shift))
            sweep.time(problem, name, shapes, call, flops, nbytes, expected)


def _into_residual(*arguments: Any) -> Tensor:
    """As a model's layers run it: the residual is given up, so cuBLAS adds into it. Sums of many rounds may
    pass the largest number of fp16, which takes no other time."""
    from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm

    x, weight, bias, residual, *norm = arguments
    with given_up(residual):
        return launch_linear_add_layer_norm(x, weight, bias, residual, *norm, config=None)


def _normed(
    launch: Callable[..., Tensor], vectors: Sequence[Tensor], x: Tensor, weight: Tensor, residual: Tensor
) -> Tensor:
    """A linear_add_layer_norm by its own three arguments."""
    bias, scale, shift = vectors
    return launch(x, weight, bias, residual, scale, shift, EPS)


def _linear_add_layer_norms(place: Place) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The ways to compute linear_add_layer_norm of few tokens, as functions of the op's arguments."""
    backends = ready_backends("linear_add_layer_norm", place.device)
    if "triton" in backends:
        from pruned_ops.ops.backends.triton import configs
        from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm

        yield "cuBLAS, then the norm", partial(launch_linear_add_layer_norm, config=None)
        yield INTO_RESIDUAL, _into_residual
        for config in configs.LINEAR_GELU[place.dtype.itemsize]:
            if config.split_k > 1:
                yield f"triton {described(config)}", partial(launch_linear_add_layer_norm, config=config)
    kernels = OPS["linear_add_layer_norm"].kernels
    yield from ((name, kernels[name].launch) for name in backends if name != "triton")
    yield (
        "torch linear, layer_norm of a sum",
        lambda x, weight, bias, residual, scale, shift, eps: F.layer_norm(
            F.linear(x, weight, bias) + residual, scale.shape, scale, shift, eps
        ),
    )


SECTIONS: tuple[Callable[[Sweep], None], ...] = (
    *(ceilings, attention, linear_gelu, norms, linears),
    linear_add_layer_norms,
)


def in_order(again: bool) -> tuple[Callable[[Sweep], None], ...]:
    """The sections of a sweep. again: first the ceilings, and then those for which an earlier sweep may have
    had no time."""
    first, *others = SECTIONS
    return (first, *reversed(others)) if again else SECTIONS
