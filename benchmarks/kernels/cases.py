"""What bench_ops.py times: every op of a layer at a model's sizes, beside torch's own ways to compute it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import pruned_ops

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
    """An op at one size: its runners (ours first), and the FLOP and bytes that it must compute and move at
    least.

    shape: tokens, outputs, and the number of terms that each output sums, as the choice of a Triton kernel
    counts them."""

    op: str
    lengths: tuple[int, ...]
    model: str
    shape: tuple[int, int, int]
    runners: Runners
    flops: float
    bytes: float


def cases(model: Model, lengths: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Case]:
    """The ops of a layer of `model` over a packed batch of these lengths, and the embedding."""
    torch.manual_seed(0)

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    return [
        _attention(model, lengths, tensor),
        _linear_gelu(model, lengths, tensor, device),
        _linear_add_layer_norm(model, lengths, "heads", model.heads * model.head_dim, tensor),
        _linear_add_layer_norm(model, lengths, "ffn", model.ffn, tensor),
        _add_layer_norm(model, lengths, tensor, device),
        _embed_layer_norm(model, lengths, tensor, device),
    ]


def _linear_gelu(model: Model, lengths: tuple[int, ...], tensor: Callable[..., Tensor], device: str) -> Case:
    tokens, hidden, ffn = sum(lengths), model.hidden, model.ffn
    x, weight, bias = tensor(tokens, hidden), tensor(ffn, hidden), tensor(ffn)
    return Case(
        "linear_gelu", lengths, model.name, (tokens, ffn, hidden),
        {
            "ours": lambda _: pruned_ops.ops.linear_gelu(x, weight, bias),
            **_with_compiled("torch linear, gelu", lambda: F.gelu(F.linear(x, weight, bias)), device),
            "torch linear alone": lambda _: F.linear(x, weight, bias),
        },
        2.0 * tokens * hidden * ffn, x.element_size() * (tokens * (hidden + ffn) + hidden * ffn),
    )  # fmt: skip


def _add_layer_norm(
    model: Model, lengths: tuple[int, ...], tensor: Callable[..., Tensor], device: str
) -> Case:
    tokens, hidden = sum(lengths), model.hidden
    x, bias, residual = tensor(tokens, hidden), tensor(hidden), tensor(tokens, hidden)
    norm = (tensor(hidden), tensor(hidden))
    return Case(
        "add_layer_norm", lengths, model.name, (tokens, hidden, 0),
        {
            "ours": lambda _: pruned_ops.ops.add_layer_norm(x, bias, residual, *norm, EPS),
            **_with_compiled(
                "torch adds, layer_norm",
                lambda: F.layer_norm(x + bias + residual, (hidden,), *norm, EPS),
                device,
            ),
        },
        0.0, x.element_size() * 3.0 * tokens * hidden,
    )  # fmt: skip


def _attention(model: Model, lengths: tuple[int, ...], tensor: Callable[..., Tensor]) -> Case:
    width, heads, head_dim = model.heads * model.head_dim, model.heads, model.head_dim
    qkv = tensor(sum(lengths), 3 * width)
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=qkv.device)
    longest = max(lengths)
    padded = torch.zeros(len(lengths), longest, 3 * width, dtype=qkv.dtype, device=qkv.device)
    mask = torch.zeros(len(lengths), 1, 1, longest, dtype=torch.bool, device=qkv.device)
    for i, (begin, end) in enumerate(itertools.pairwise(bounds)):
        padded[i, : end - begin], mask[i, :, :, : end - begin] = qkv[begin:end], True
    query, key, value = padded.view(len(lengths), longest, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
    even = None if len(set(lengths)) == 1 else mask

    def one_by_one(_: Any) -> list[Tensor]:
        parts = (qkv[begin:end] for begin, end in itertools.pairwise(bounds))
        views = (part.view(1, -1, 3, heads, head_dim).permute(2, 0, 3, 1, 4) for part in parts)
        return [F.scaled_dot_product_attention(*view) for view in views]

    rivals = {
        "torch sdpa, padded": lambda _: F.scaled_dot_product_attention(query, key, value, even),
        "torch sdpa, one by one": one_by_one,
    }
    if qkv.is_cuda:
        rivals |= _packed_attention(qkv.view(-1, 3, heads, head_dim).unbind(1), cu_seqlens, longest)
    return Case(
        "attention", lengths, model.name, (sum(lengths), heads, head_dim),
        {
            "ours": lambda _: pruned_ops.ops.attention(qkv, cu_seqlens, longest, head_dim),
            **rivals,
        },
        4.0 * width * sum(n * n for n in lengths), qkv.element_size() * 4.0 * sum(lengths) * width,
    )  # fmt: skip


def _packed_attention(views: tuple[Tensor, ...], cu_seqlens: Tensor, longest: int) -> Runners:
    """The other ways to compute attention over packed tokens on a GPU; flash-attn where it is installed."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = (cu_seqlens, cu_seqlens, longest, longest)
    runners: Runners = {"torch varlen_attn": lambda _: varlen_attn(*views, *lengths)}
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return runners
    return {**runners, "flash-attn": lambda _: flash_attn_varlen_func(*views, *lengths)}


def _with_compiled(name: str, work: Callable[[], Any], device: str) -> Runners:
    """Torch's way to compute an op, and on a GPU the same way compiled with the most autotuning."""
    runners: Runners = {name: lambda _: work()}
    if device == "cuda":
        fast = torch.compile(work, mode="max-autotune-no-cudagraphs", dynamic=False)
        runners["torch.compile"] = lambda _: fast()
    return runners


def _linear_add_layer_norm(
    model: Model, lengths: tuple[int, ...], name: str, inner: int, tensor: Callable[..., Tensor]
) -> Case:
    tokens, hidden = sum(lengths), model.hidden
    x, weight, bias = tensor(tokens, inner), tensor(hidden, inner), tensor(hidden)
    residual, norm = tensor(tokens, hidden), (tensor(hidden), tensor(hidden))
    return Case(
        "linear_add_layer_norm", lengths, f"{model.name}, {name}", (tokens, hidden, inner),
        {
            "ours": lambda _: pruned_ops.ops.linear_add_layer_norm(x, weight, bias, residual, *norm, EPS),
            **_with_compiled(
                "torch linear, add, layer_norm",
                lambda: F.layer_norm(F.linear(x, weight, bias) + residual, (hidden,), *norm, EPS),
                str(x.device.type),
            ),
        },
        2.0 * tokens * hidden * inner,
        x.element_size() * (tokens * (inner + 2.0 * hidden) + hidden * inner),
    )  # fmt: skip


def _embed_layer_norm(
    model: Model, lengths: tuple[int, ...], tensor: Callable[..., Tensor], device: str
) -> Case:
    tokens, hidden = sum(lengths), model.hidden
    sizes = (30522, 512, 2)
    ids = [torch.randint(size, (tokens,), device=device) for size in sizes]
    tables, norm = [tensor(size, hidden) for size in sizes], (tensor(hidden), tensor(hidden))

    def by_torch(_: Any) -> Tensor:
        total = sum(F.embedding(rows, table) for rows, table in zip(ids, tables, strict=True))
        return F.layer_norm(total, (hidden,), *norm, EPS)  # type: ignore[arg-type]

    return Case(
        "embed_layer_norm", lengths, model.name, (tokens, hidden, 0),
        {
            "ours": lambda _: pruned_ops.ops.embed_layer_norm(*ids, *tables, *norm, EPS),
            "torch embeddings, layer_norm": by_torch,
        },
        0.0, tables[0].element_size() * 4.0 * tokens * hidden,
    )  # fmt: skip
