"""Whether every op is right on the sizes of real models, on every backend: the relative error in norm,
against the reference in fp64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruned_ops.ops.registry import BACKENDS, OPS
from single_kernels.cases import EPS, Place
from single_kernels.journal import WRONG, Facts, Journal

# Sequences around the edges of tiles, one of them empty.
LENGTHS = (1, 63, 64, 65, 128, 129, 300, 384, 0, 17)
# head_dim and heads; hidden size and FFN width: BERT-large's, pruned ones, and odd ones.
HEADS = ((64, 16), (64, 5), (32, 12), (128, 2))
WIDTHS = ((1024, 4096), (1024, 1168), (384, 1843), (90, 72))
# ModernBERT's window to either side, and the distance from which on MPNet's bias stays the same.
WINDOW, REACH = 64, 128
TINY_HEADS, TINY_WIDTHS = ((16, 2),), ((32, 40),)


def ready_backends(op: str, device: str) -> list[str]:
    """The backends that can run this op on tensors of this device: all besides the reference, which computes
    what is expected. (Some of the cpu's ops are torch's own, and would run on a GPU under its name.)"""
    return [
        name
        for name in OPS[op].kernels
        if BACKENDS[name].missing is None and (name != "cpu" or device == "cpu")
    ]


def check_all(journal: Journal, place: Place, tiny: bool) -> None:
    """Compare every op on every size; a line each. tiny: sizes for a dry run."""
    for op, size, arguments in _problems(place, tiny):
        expectation = functools.cache(partial(_budget, op, arguments))
        for backend in ready_backends(op, place.device):
            facts = {"op": op, "size": size, "backend": backend, "dtype": str(place.dtype)}
            journal.attempt(partial(_compare, journal, facts, arguments, expectation), **facts)


def _problems(place: Place, tiny: bool) -> Iterator[tuple[str, str, list[Any]]]:
    """Ops with the name of a size and arguments of that size."""
    bounds = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=place.device)
    tokens = sum(LENGTHS)
    for head_dim, heads in TINY_HEADS if tiny else HEADS:
        qkv = place.tensor(tokens, 3 * heads * head_dim)
        yield "attention", f"{heads}x{head_dim}", [qkv, bounds, max(LENGTHS), head_dim]
    for head_dim, heads in TINY_HEADS if tiny else HEADS[:3]:
        yield from _attentions_by_position(place, bounds, head_dim, heads)
    for hidden, width in TINY_WIDTHS if tiny else WIDTHS:
        x, residual = place.tensor(tokens, hidden), place.tensor(tokens, hidden)
        norm = [place.tensor(hidden), place.tensor(hidden), EPS]
        up, down = place.tensor(width, hidden) * 0.03, place.tensor(hidden, width) * 0.03
        bias, inner = place.tensor(hidden), place.tensor(tokens, width)
        yield "linear_gelu", f"{hidden}->{width}", [x, up, place.tensor(width)]
        gated = place.tensor(2 * width, hidden) * 0.03
        yield "linear_geglu", f"{hidden}->{width}", [x, gated, place.tensor(2 * width)]
        yield "linear_add_layer_norm", f"{width}->{hidden}", [inner, down, bias, residual, *norm]
        yield "add_layer_norm", f"{hidden}", [x, bias, residual, *norm]
        sizes = (3000, 512, 2)
        ids = [torch.randint(size, (tokens,), device=place.device) for size in sizes]
        yield "embed_layer_norm", f"{hidden}", [*ids, *(place.tensor(size, hidden) for size in sizes), *norm]


def _attentions_by_position(
    place: Place, bounds: Tensor, head_dim: int, heads: int
) -> Iterator[tuple[str, str, list[Any]]]:
    """Attention as ModernBERT has it, in layers with a window and without, and MPNet with its bias, whose
    positions begin anywhere, as after padding on the left."""
    places = torch.cat([torch.arange(n, dtype=torch.int32) + n % 7 for n in LENGTHS]).to(place.device)
    frequencies = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=place.device) / head_dim)
    bias = place.tensor(heads, 2 * REACH + 1)
    for name, by_position in (
        ("rotary", [places, frequencies, None, None]),
        ("rotary, window", [places, frequencies, WINDOW, None]),
        ("bias", [places, None, None, bias]),
    ):
        qkv = place.tensor(sum(LENGTHS), 3 * heads * head_dim)
        yield "attention", f"{heads}x{head_dim} {name}", [qkv, bounds, max(LENGTHS), head_dim, *by_position]


def _budget(op: str, arguments: list[Any]) -> tuple[Tensor, float]:
    """What is expected, in fp64, and the relative error that is allowed: twice the reference's own in the
    arguments' dtype, and 1e-5."""
    reference: Callable[..., Tensor] = OPS[op].reference
    exact = reference(
        *(
            argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
            for argument in arguments
        )
    )
    return exact, 2 * relative(reference(*arguments), exact) + 1e-5


def relative(output: Tensor, exact: Tensor) -> float:
    """The relative error in norm."""
    exact = exact.double()
    return float((output.double() - exact).norm() / exact.norm())


def _compare(
    journal: Journal, facts: Facts, arguments: list[Any], expectation: Callable[[], tuple[Tensor, float]]
) -> None:
    kernel = OPS[facts["op"]].kernels[facts["backend"]]
    reason = kernel.refuse(*arguments)
    if reason is not None:
        journal.note("refused", **facts, reason=reason)
        return
    expected, allowed = expectation()
    error = relative(kernel.launch(*arguments), expected)
    verdict = "right" if error <= allowed else WRONG  # NaN is not allowed either
    journal.note(verdict, **facts, error=error, allowed=allowed)
