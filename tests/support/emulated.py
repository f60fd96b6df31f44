"""The ops on the CUDA kernels in the emulator: tests/cuda_on_host, pruned_ops.ops' signatures."""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cuda_on_host.build import build, compiler
from torch import Tensor

GUARD = 64  # numbers before and after an output that must stay as they are


def missing() -> str | None:
    """Why the emulator cannot be here, or None."""
    if not shutil.which(compiler()):
        return f"there is no {compiler()}; the kernels are compiled for the host when they are tested"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return None if header.exists() else f"there is no {header}; a module is compiled for this Python"


@functools.cache
def kernels() -> Any:
    """The module of the kernels as they are."""
    return build()


@dataclass
class Emulated:
    """The ops, with threads in this order: "ascending", "descending", or "random" from the seed.

    multiprocessors: of the GPU that the kernels find. fault: of those planted in the module's kernels, 0 for
    none. statistics: of the last call, one for each launch. Errors are `EmulatorError` of the module.
    """

    module: Any = field(default_factory=kernels)
    order: str = "ascending"
    seed: int = 0
    multiprocessors: int = 132
    fault: int = 0
    statistics: list[dict[str, Any]] = field(default_factory=list)

    def run(
        self,
        op: str,
        buffers: Mapping[str, Tensor],
        writable: set[str],
        *arguments: Any,
        name: str | None = None,
    ) -> None:
        """One call of the module's function on these buffers. name: what errors call it."""
        self.statistics = []
        if writable and not any(buffers[one].numel() for one in writable):
            return
        places = [
            (buffer, tensor.data_ptr(), extent(tensor), buffer in writable)
            for buffer, tensor in buffers.items()
            if tensor.numel()
        ]
        self.module.configure(name or op, places, self.order, self.seed, self.multiprocessors, self.fault)
        getattr(self.module, op)(*arguments)
        self.statistics = self.module.statistics()

    def attention(self, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, head_dim: int) -> Tensor:
        if qkv.data_ptr() % 16 or qkv.stride(0) * qkv.element_size() % 16 or qkv.stride(1) != 1:
            qkv = aligned(qkv)
        cu_seqlens = cu_seqlens.contiguous()
        tokens, width, batch = qkv.size(0), qkv.size(1) // 3, cu_seqlens.size(0) - 1
        longest = min(max_seqlen, tokens)
        if longest == 0 or batch == 0:
            return qkv.new_zeros(tokens, width)
        out = Output(tokens, width, qkv.dtype)
        buffers = {"qkv": qkv, "cu_seqlens": cu_seqlens, "out": out.tensor}
        self.run(
            "attention", buffers, {"out"}, qkv.data_ptr(), cu_seqlens.data_ptr(), out.tensor.data_ptr(),
            tokens, batch, width // head_dim, head_dim, longest, qkv.stride(0),
            dtype_name(qkv),
        )  # fmt: skip
        return out.checked()

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x, weight, bias = rows(x), rows(weight), bias.contiguous()
        out = Output(x.size(0), weight.size(0), x.dtype)
        buffers = {"x": x, "weight": weight, "bias": bias, "out": out.tensor}
        self.run("linear_gelu", buffers, {"out"}, linear(x, weight, bias, out))
        return out.checked()

    def add_layer_norm(
        self, x: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        x = rows(x)
        buffers = norm_buffers(bias, residual, norm_weight, norm_bias)
        out = Output(x.size(0), x.size(1), x.dtype)
        buffers.update(x=x, out=out.tensor)
        self.run("add_layer_norm", buffers, {"out"}, add(x, buffers, eps))
        return out.checked()

    def linear_add_layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor,
        norm_bias: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        x, weight = rows(x), rows(weight)
        buffers = norm_buffers(bias, residual, norm_weight, norm_bias)
        product, out = (Output(x.size(0), weight.size(0), x.dtype) for _ in range(2))
        buffers.update(x=x, weight=weight, product=product.tensor, out=out.tensor)
        self.run(
            "linear_add_layer_norm", buffers, {"product", "out"},
            linear(x, weight, None, product), add(product.tensor, buffers, eps),
        )  # fmt: skip
        product.checked()
        return out.checked()

    def embed_layer_norm(
        self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, position: Tensor,
        token_type: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float,
    ) -> Tensor:  # fmt: skip
        ids = [tensor.contiguous() for tensor in (input_ids, position_ids, token_type_ids)]
        tables = [rows(tensor) for tensor in (word, position, token_type)]
        weight, bias = norm_weight.contiguous(), norm_bias.contiguous()
        out = Output(ids[0].size(0), word.size(1), word.dtype)
        names = ("input_ids", "position_ids", "token_type_ids", "word", "position", "token_type")
        buffers = dict(zip(names, [*ids, *tables], strict=True))
        buffers.update(norm_weight=weight, norm_bias=bias, out=out.tensor)
        self.run(
            "embed_layer_norm", buffers, {"out"}, [tensor.data_ptr() for tensor in ids],
            [tensor.data_ptr() for tensor in tables], weight.data_ptr(), bias.data_ptr(),
            out.tensor.data_ptr(), [tensor.size(0) for tensor in tables],
            [tensor.stride(0) for tensor in tables], [tensor.dtype == torch.int64 for tensor in ids],
            *out.tensor.shape, eps, dtype_name(word),
        )  # fmt: skip
        return out.checked()


class Output:
    """NaN where a kernel is to write, between numbers that must stay."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.whole = torch.full((rows * columns + 2 * GUARD,), 7.0, dtype=dtype)
        self.tensor = self.whole[GUARD : GUARD + rows * columns].view(rows, columns)
        self.tensor.fill_(float("nan"))

    def checked(self) -> Tensor:
        """What was written; AssertionError if something was beside it."""
        assert bool((self.whole[:GUARD] == 7).all()) and bool((self.whole[-GUARD:] == 7).all())
        return self.tensor.clone()


def extent(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def rows(tensor: Tensor) -> Tensor:
    """With the last dimension contiguous, as the kernels take matrices."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Output) -> tuple[Any, ...]:
    """The module's LinearTuple."""
    return (
        x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), out.tensor.data_ptr(),
        x.size(0), x.size(1), weight.size(0), x.stride(0), weight.stride(0), dtype_name(x),
    )  # fmt: skip


def norm_buffers(
    bias: Tensor | None, residual: Tensor, weight: Tensor, norm_bias: Tensor
) -> dict[str, Tensor]:
    buffers = {
        "residual": rows(residual),
        "norm_weight": weight.contiguous(),
        "norm_bias": norm_bias.contiguous(),
    }
    if bias is not None:
        buffers["bias"] = bias.contiguous()
    return buffers


def add(x: Tensor, buffers: Mapping[str, Tensor], eps: float) -> tuple[Any, ...]:
    """The module's AddTuple."""
    residual, bias = buffers["residual"], buffers.get("bias")
    return (
        x.data_ptr(), 0 if bias is None else bias.data_ptr(), residual.data_ptr(),
        buffers["norm_weight"].data_ptr(), buffers["norm_bias"].data_ptr(), buffers["out"].data_ptr(),
        *x.shape, x.stride(0), residual.stride(0), eps, dtype_name(x),
    )  # fmt: skip
