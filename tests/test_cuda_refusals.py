"""What the CUDA backend refuses, and where it is chosen; no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_ops import SKIPPED, moved, native
from inputs import arguments_for, attention_arguments, randn

pytestmark = SKIPPED


def refused_natively(op: str, arguments: list[Any], match: str) -> None:
    """By the extension itself, whoever calls it."""
    with pytest.raises(RuntimeError, match=f"{op}: {match}"):
        getattr(native(), op)(*arguments)


def test_what_the_cuda_ops_refuse() -> None:
    qkv, bounds, longest, _ = moved(attention_arguments((5, 3), 2, 32), torch.float16)
    refused_natively("attention", [qkv.float(), bounds, longest, 32], "the tensors are Float, the kernel")
    refused_natively(
        "attention", [qkv, bounds, longest, 48], "head_dim is 48, the kernel takes 32, 64 or 128"
    )
    refused_natively("attention", [qkv, bounds, longest, 128], "qkv has 192 columns, which is not a multiple")
    refused_natively("attention", [qkv[0], bounds, longest, 32], "qkv has 1 dimensions")
    refused_natively("attention", [qkv, bounds.long(), longest, 32], "cu_seqlens is Long, Int")
    refused_natively("attention", [qkv, bounds[:0], longest, 32], "cu_seqlens has shape")
    refused_natively("attention", [qkv, bounds, -1, 32], "max_seqlen is -1")
    far = qkv[:1].expand(2**31, 192)
    refused_natively("attention", [far, bounds, longest, 32], "the number of tokens is 2147483648")
    x, weight, bias = moved([randn(0, 5, 8), randn(1, 6, 8), randn(2, 6)], torch.bfloat16)
    for given, match in (
        ([x.double(), weight, bias], "the tensors are Double"),
        ([x, weight.half(), bias], "weight is Half, the kernel takes BFloat16"),
        ([x, weight[:, :7], bias], "x has 8 columns, 7 are needed"),
        ([x, weight, bias[:5]], r"bias has shape \[5\], \[6\] is needed"),
        ([x[:1].expand(2**31, 8), weight, bias], "the number of tokens is 2147483648"),
        ([x, weight[:1].expand(2**31, 8), bias], "weight's width is 2147483648"),
    ):
        refused_natively("linear_gelu", given, match)


@pytest.mark.parametrize("op", ["add_layer_norm", "linear_add_layer_norm"])
def test_what_the_cuda_norms_refuse(op: str) -> None:
    dtype = torch.float16
    given = moved(arguments_for(op, 5, 24, 16), dtype)
    residual, norm = len(given) - 4, len(given) - 3
    for place, value, match in (
        (residual, given[residual][:4], "x has 5 rows, residual has 4"),
        (residual, given[residual].float(), "residual is Float, the kernel takes Half"),
        (norm, given[norm][:-1], r"norm_weight has shape \[23\]"),
        (norm + 1, given[norm + 1].to(torch.bfloat16), "norm_bias is BFloat16"),
        (norm + 2, -1.0, "eps is -1, at least 0"),
        (residual - 1, given[residual - 1][:3], r"bias has shape \[3\]"),
    ):
        refused_natively(op, [*given[:place], value, *given[place + 1 :]], match)
    wide = moved(arguments_for(op, 2, 8193, 16), dtype)
    refused_natively(op, wide, "hidden is 8193, the kernel takes at most 8192")


def test_what_the_cuda_embedding_refuses() -> None:
    given = moved(arguments_for("embed_layer_norm", 5, 24), torch.float16)
    for place, value, match in (
        (0, given[0][:, None], "input_ids has 2 dimensions"),
        (1, given[1][:4], r"position_ids has shape \[4\], \[5\] is needed"),
        (2, given[2].to(torch.int16), "token_type_ids is Short"),
        (3, given[3][:0], "word has no row"),
        (4, given[4][:, :-1], "position has 23 columns, 24 are needed"),
        (5, given[5].float(), "token_type is Float, the kernel takes Half"),
        (8, -1.0, "eps is -1"),
    ):
        refused_natively("embed_layer_norm", [*given[:place], value, *given[place + 1 :]], match)
