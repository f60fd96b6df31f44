"""Attention in fp32 under a CPU's bf16 autocast, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pruned_trainer.training.attention_precision import AttentionInFp32


def test_attention_alone_computes_in_fp32() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.zeros(2, 1, 1, 9).index_fill(3, torch.tensor([8]), torch.finfo(torch.bfloat16).min)
    exact = F.scaled_dot_product_attention(x.float(), x.float(), x.float(), attn_mask=mask)
    (wanted,) = torch.autograd.grad(exact.square().sum(), x)
    with AttentionInFp32(), torch.autocast("cpu", torch.bfloat16):
        got = F.scaled_dot_product_attention(x, x, x, attn_mask=mask.bfloat16())
        assert (x @ x.mT).dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(got.square().sum(), x)
    assert got.dtype == torch.float32 and torch.equal(got, exact) and torch.equal(gradient, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
    with AttentionInFp32():
        assert F.scaled_dot_product_attention(x, x, x).dtype == torch.bfloat16
