"""What bench_ops.py times: every op of a layer at a model's sizes, beside torch's own ways to compute it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pruned_ops
from torch_ways import compile_each_size, packed_flash_attention

# Lengths of a batch of eight in arrival order: mean 175, as on SQuAD.
MIXED = (63, 118, 131, 149, 164, 187, 222, 366)
EPS = 1e-12


@dataclass(frozen=True)
class Model:
    """The sizes of an encoder's layer."""

    name: str
    hidden: int
    heads: int
    head_dim: int
    ffn: int


MODELS = (
    Model("minilm dense", 384, 12, 32, 1536),
    Model("minilm half", 384, 6, 32, 768),
    Model("base dense", 768, 12, 64, 3072),
    Model("base half", 768, 6, 64, 1536),
)
Runners = dict[str, Callable[[Any], Any]]


@dataclass(frozen=True)
class Case:
    """An op at one size, and the FLOP and bytes that it must compute and move at least.

    shape: tokens, outputs, and the number of terms that each output sums, as the choice of a Triton kernel
    counts them. make: makes new random inputs, and returns runners on them, ours first."""

    op: str
    lengths: tuple[int, ...]
    model: str
    shape: tuple[int, int, int]
    make: Callable[[], Runners]
    flops: float
    bytes: float


@dataclass(frozen=True)
class Place:
    """Where inputs are made. compiled: whether torch's ways are timed compiled, too."""

    dtype: torch.dtype
    device: str
    compiled: bool = False

    def tensor(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, dtype=self.dtype)

    def runners(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Runners:
        """Torch's way to compute an op, and the same way compiled with the most autotuning."""
        runners: Runners = {name: lambda _: function(*arguments)}
        if self.compiled:
            fast = _compiled(function)
            runners["torch.compile"] = lambda _: fast(*arguments)
        return runners


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compile_each_size(function, "max-autotune-no-cudagraphs")


def cases(model: Model, lengths: tuple[int, ...], place: Place) -> list[Case]:
    """The ops of a layer of `model` over a packed batch of these lengths, and the embedding."""
    return [
        _attention(model, lengths, place),
        _linear_gelu(model, lengths, place),
        _linear_add_layer_norm(model, lengths, "heads", model.heads * model.head_dim, place),
        _linear_add_layer_norm(model, lengths, "ffn", model.ffn, place),
        _add_layer_norm(model, lengths, place),
        _embed_layer_norm(model, lengths, place),
    ]


def _torch_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _torch_add_layer_norm(x: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x + bias + residual, scale.shape, scale, shift, EPS)


def _torch_linear_add_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, scale: Tensor, shift: Tensor
) -> Tensor:
    return F.layer_norm(F.linear(x, weight, bias) + residual, scale.shape, scale, shift, EPS)


def _linear_gelu(model: Model, lengths: tuple[int, ...], place: Place) -> Case:
    tokens, hidden, ffn = sum(lengths), model.hidden, model.ffn

    def make() -> Runners:
        x, weight, bias = place.tensor(tokens, hidden), place.tensor(ffn, hidden), place.tensor(ffn)
        return {
            "ours": lambda _: pruned_ops.ops.linear_gelu(x, weight, bias),
            **place.runners("torch linear, gelu", _torch_linear_gelu, (x, weight, bias)),
            "torch linear alone": lambda _: F.linear(x, weight, bias),
        }

    moved = place.dtype.itemsize * (tokens * (hidden + ffn) + hidden * ffn)
    shape = (tokens, ffn, hidden)
    return Case("linear_gelu", lengths, model.name, shape, make, 2.0 * tokens * hidden * ffn, moved)


def _add_layer_norm(model: Model, lengths: tuple[int, ...], place: Place) -> Case:
    tokens, hidden = sum(lengths), model.hidden

    def make() -> Runners:
        x, bias, residual = place.tensor(tokens, hidden), place.tensor(hidden), place.tensor(tokens, hidden)
        arguments = (x, bias, residual, place.tensor(hidden), place.tensor(hidden))
        return {
            "ours": lambda _: pruned_ops.ops.add_layer_norm(*arguments, EPS),
            **place.runners("torch adds, layer_norm", _torch_add_layer_norm, arguments),
        }

    moved = place.dtype.itemsize * 3.0 * tokens * hidden
    return Case("add_layer_norm", lengths, model.name, (tokens, hidden, 0), make, 0.0, moved)


def _attention(model: Model, lengths: tuple[int, ...], place: Place) -> Case:
    tokens, width, head_dim = sum(lengths), model.heads * model.head_dim, model.head_dim
    bounds = [0, *itertools.accumulate(lengths)]
    longest = max(lengths)

    def make() -> Runners:
        qkv = place.tensor(tokens, 3 * width)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=qkv.device)
        runners: Runners = {"ours": lambda _: pruned_ops.ops.attention(qkv, cu_seqlens, longest, head_dim)}
        runners |= _torch_attention(qkv, bounds, model)
        if qkv.is_cuda:
            views = qkv.view(-1, 3, model.heads, head_dim).unbind(1)
            runners |= _packed_attention(views, cu_seqlens, longest)
        return runners

    flops = 4.0 * width * sum(length * length for length in lengths)
    shape = (tokens, model.heads, head_dim)
    return Case(
        "attention", lengths, model.name, shape, make, flops, place.dtype.itemsize * 4.0 * tokens * width
    )


def _torch_attention(qkv: Tensor, bounds: list[int], model: Model) -> Runners:
    """torch's attention over the same sequences padded, and over one after the other."""
    pieces = list(itertools.pairwise(bounds))
    longest = max(end - begin for begin, end in pieces)
    padded = qkv.new_zeros(len(pieces), longest, qkv.size(1))
    mask = torch.zeros(len(pieces), 1, 1, longest, dtype=torch.bool, device=qkv.device)
    for i, (begin, end) in enumerate(pieces):
        padded[i, : end - begin], mask[i, :, :, : end - begin] = qkv[begin:end], True
    heads = padded.view(len(pieces), longest, 3, model.heads, model.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    needed = None if bool(mask.all()) else mask

    def one_by_one(_: Any) -> list[Tensor]:
        parts = (qkv[begin:end].view(1, -1, 3, model.heads, model.head_dim) for begin, end in pieces)
        return [F.scaled_dot_product_attention(*part.permute(2, 0, 3, 1, 4)) for part in parts]

    return {
        "torch sdpa, padded": lambda _: F.scaled_dot_product_attention(query, key, value, needed),
        "torch sdpa, one by one": one_by_one,
    }


def _packed_attention(views: tuple[Tensor, ...], cu_seqlens: Tensor, longest: int) -> Runners:
    """The other ways to compute attention over packed tokens on a GPU; flash-attn where it is installed."""
    runners: Runners = {"torch flash, packed": lambda _: packed_flash_attention(*views, cu_seqlens, longest)}
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return runners
    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    return {**runners, "flash-attn": lambda _: flash_attn_varlen_func(*views, *lengths)}


def _linear_add_layer_norm(
    model: Model, lengths: tuple[int, ...], name: str, inner: int, place: Place
) -> Case:
    tokens, hidden = sum(lengths), model.hidden

    def make() -> Runners:
        linear = (place.tensor(tokens, inner), place.tensor(hidden, inner), place.tensor(hidden))
        arguments = (*linear, place.tensor(tokens, hidden), place.tensor(hidden), place.tensor(hidden))
        return {
            "ours": lambda _: pruned_ops.ops.linear_add_layer_norm(*arguments, EPS),
            **place.runners("torch linear, add, layer_norm", _torch_linear_add_layer_norm, arguments),
        }

    moved = place.dtype.itemsize * (tokens * (inner + 2.0 * hidden) + hidden * inner)
    return Case(
        "linear_add_layer_norm", lengths, f"{model.name}, {name}", (tokens, hidden, inner), make,
        2.0 * tokens * hidden * inner, moved,
    )  # fmt: skip


def _embed_layer_norm(model: Model, lengths: tuple[int, ...], place: Place) -> Case:
    tokens, hidden = sum(lengths), model.hidden
    sizes = (30522, 512, 2)

    def make() -> Runners:
        ids = [torch.randint(size, (tokens,), device=place.device) for size in sizes]
        tables = [place.tensor(size, hidden) for size in sizes]
        norm = (place.tensor(hidden), place.tensor(hidden))

        def by_torch(_: Any) -> Tensor:
            total = sum(F.embedding(rows, table) for rows, table in zip(ids, tables, strict=True))
            return F.layer_norm(total, (hidden,), *norm, EPS)  # type: ignore[arg-type]

        return {
            "ours": lambda _: pruned_ops.ops.embed_layer_norm(*ids, *tables, *norm, EPS),
            "torch embeddings, layer_norm": by_torch,
        }

    moved = place.dtype.itemsize * 4.0 * tokens * hidden
    return Case("embed_layer_norm", lengths, model.name, (tokens, hidden, 0), make, 0.0, moved)
