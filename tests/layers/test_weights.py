"""The layout of weights for GPU kernels: aligned, and odd FFN widths filled up with zeros. Run on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pruned_ops
from inputs import ODD_SHAPES, cu_seqlens, padded_batch, randn
from pruned_ops import LayerShape, ModelShape, PrunedEncoder
from pruned_ops.layers.kinds import StackKind
from pruned_ops.layers.parts import PrunedFFN
from pruned_ops.layers.weights import ALIGNMENT, AlignedWeights, PanelWeights
from pruned_ops.ops.registry import OPS, is_given_up


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout that weights get on a GPU."""
    monkeypatch.setattr(AlignedWeights, "refuse", staticmethod(lambda parts: None))
    monkeypatch.setattr(PanelWeights, "refuse", staticmethod(lambda parts: "not now"))


def unaligned(weight: Tensor) -> Tensor:
    """The same numbers, one number after an aligned address."""
    memory = torch.empty(weight.numel() + 1 + ALIGNMENT, dtype=weight.dtype)
    start = -memory.data_ptr() % ALIGNMENT // weight.element_size() + 1
    view = memory[start : start + weight.numel()].view(weight.shape)
    return view.copy_(weight)


def ffn(width: int, act: str = "gelu", dtype: torch.dtype = torch.float64) -> PrunedFFN:
    torch.manual_seed(0)
    return PrunedFFN(48, width, hidden_act=act).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("act", ["gelu", "relu", "silu", "gelu_new"])
@pytest.mark.parametrize("width", [1, 7, 8, 35])
def test_widths_filled_up_compute_the_same(width: int, act: str) -> None:
    part, x = ffn(width, act), randn(1, 9, 48).double()
    expected = part(x)
    output = AlignedWeights([part])(x, cu_seqlens((9,)), 9)
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_matrices_begin_and_go_on_at_whole_alignments(dtype: torch.dtype) -> None:
    part = ffn(35, dtype=dtype)
    for linear in part.linears:
        linear.weight.data = unaligned(linear.weight.data)
    parts = AlignedWeights([part])
    ((up, down),) = parts.weights
    for weight in (up, down):
        assert weight.data_ptr() % ALIGNMENT == 0
        assert weight.stride(0) * weight.element_size() % ALIGNMENT == 0
    assert up.size(0) == down.size(1) == parts.biases[0].size(0) == (64 if dtype == torch.float16 else 48)
    assert not up[35:].any() and not down[:, 35:].any() and not parts.biases[0][35:].any()


@pytest.mark.parametrize("gated", [False, True])
def test_a_bias_that_is_not_there_is_zeros_made_once(gated: bool, as_on_a_gpu: None) -> None:
    """Made in every forward pass, they were a kernel of every graph."""
    torch.manual_seed(0)
    part = (
        PrunedFFN(48, 7, kind=StackKind(norm_first=True, gated=gated, ffn_bias=False))
        .double()
        .requires_grad_(False)
    )
    x = randn(1, 9, 48).double()
    expected, parts = part(x), AlignedWeights([part])
    (bias,) = parts.biases
    assert bias is not None and bias.numel() == parts.weights[0][0].size(0) and not bias.any()
    torch.testing.assert_close(parts(x, cu_seqlens((9,)), 9), expected, rtol=1e-13, atol=1e-13)


def test_an_aligned_weight_is_not_copied() -> None:
    aligned, odd = ffn(32), ffn(33)
    parts = AlignedWeights([aligned, odd])
    for number, (part, copied) in enumerate(((aligned, False), (odd, True))):
        for i, linear in enumerate(part.linears):
            assert (parts.weights[number][i].data_ptr() != linear.weight.data_ptr()) == copied
            assert parts.holds_alone(number, i) == copied
            assert torch.equal(parts.weight_of(number, i), linear.weight)


def test_an_encoder_runs_aligned_and_gets_its_weights_back(as_on_a_gpu: None) -> None:
    """Layers without heads and without an FFN too; moving and casting it aligns it anew."""
    shape = ModelShape(tuple(ODD_SHAPES), 90, 16)
    torch.manual_seed(0)
    encoder: Any = PrunedEncoder(shape).requires_grad_(False)
    x, batch = randn(1, 12, 90), pruned_ops.PackedBatch(cu_seqlens((5, 7)), 7, None, 1, 12)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    expected = encoder(x, batch)
    encoder.pack(keep_weights=False)
    for linear in encoder.layers[-1].ffn.linears:  # copied, and not held twice
        assert linear.weight.isnan().all() and linear.weight.untyped_storage().nbytes() == 4
    assert encoder.running_shape.layers == tuple(
        LayerShape(layer.num_heads, -(-layer.ffn_width // 16) * 16) for layer in ODD_SHAPES
    )
    torch.testing.assert_close(encoder(x, batch), expected, rtol=1e-5, atol=1e-5)
    states: list[Tensor] = []
    torch.testing.assert_close(encoder(x, batch, states), expected, rtol=1e-5, atol=1e-5)
    assert len(states) == len(ODD_SHAPES)
    encoder.double()
    assert encoder.running_shape.layers[-1].ffn_width == 16
    encoder.float().unpack()
    assert encoder.running_shape == shape
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_the_sums_of_earlier_parts_are_given_up(as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All residuals but the caller's, for ops that add into them; nothing while code is traced."""
    shape = ModelShape((LayerShape(1, 8), LayerShape(2, 16)), 32, 16)
    encoder: Any = PrunedEncoder(shape).requires_grad_(False)
    encoder.pack()
    seen: list[bool] = []
    original = OPS["linear_add_layer_norm"].reference

    def adding(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *norm: Any) -> Tensor:
        seen.append(is_given_up(residual))
        output = original(x, weight, bias, residual, *norm)
        if seen[-1]:
            residual.fill_(torch.nan)
        return output

    x, batch = randn(1, 12, 32), pruned_ops.PackedBatch(cu_seqlens((5, 7)), 7, None, 1, 12)
    states: list[Tensor] = []
    with pruned_ops.use_backend("reference"):
        before, expected = x.clone(), encoder(x, batch)
        monkeypatch.setattr(OPS["linear_add_layer_norm"], "reference", adding)
        assert torch.equal(encoder(x, batch), expected) and torch.equal(x, before)
        assert seen == [False, True, True, True]
        assert torch.equal(encoder(x, batch, states), expected) and torch.equal(states[1], expected)
        assert not any(state.isnan().any() for state in states) and seen[4:] == [False, True] * 2
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(encoder(x, batch), expected) and not any(seen[8:])


def test_an_optimised_model_runs_aligned(model: Any, as_on_a_gpu: None) -> None:
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**batch)
        output = pruned_ops.optimize(model)(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.start_logits[real], expected.start_logits[real], rtol=1e-4, atol=1e-5)
    pruned_ops.restore(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_tune_says_what_it_needs(model: Any) -> None:
    with pytest.raises(ValueError, match="takes an optimised model"):
        pruned_ops.tune(model, [(8, 8)])
    fast: nn.Module = pruned_ops.optimize(model)
    with pytest.raises(ValueError, match="is on the CPU"):
        pruned_ops.tune(fast, [(8, 8)])
    for wrong in ((), (8, 0)):
        with pytest.raises(ValueError, match="no sequences, or with one of no tokens"):
            pruned_ops.tune(fast, [wrong])
