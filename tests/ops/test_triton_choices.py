"""Which configuration of a Triton kernel runs for a shape, and what runs where none can: refusals, and other
backends in its place."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import pruned_ops
from inputs import arguments_for, attention_arguments, moved_to
from numerics import within_budget
from pruned_ops.ops.registry import BACKENDS, OPS, given_up, record, use_backend

MISSING = BACKENDS["triton"].missing
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"triton: {MISSING}")

if MISSING is None:
    from triton.runtime.errors import OutOfResources

    from pruned_ops.ops.backends.triton import add_layer_norm, configs, linear_add_layer_norm, tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
moved = partial(moved_to, DEVICE)


def test_another_backend_runs_what_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which `record` names, and a warning once; who asked for Triton is told."""
    arguments = moved(arguments_for("add_layer_norm", 9, 48), torch.float32)
    op = OPS["add_layer_norm"]
    own = op.kernels["triton"]
    willing = replace(own, backend=replace(own.backend, on_demand=False))
    others = {name: kernel for name, kernel in op.kernels.items() if name != "triton"}
    monkeypatch.setattr(op, "kernels", {"triton": willing, **others})
    monkeypatch.setattr(op, "_warned", set())
    with record() as ran:
        op(*arguments)
    assert ran["add_layer_norm"] == {"triton": 1}

    def failing(*args: Any) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(add_layer_norm, "launch_add_layer_norm", failing)
    with record() as ran, pytest.warns(RuntimeWarning, match="'triton' failed to run add_layer_norm.*300000"):
        within_budget("add_layer_norm", op(*arguments), arguments)
    assert ran["add_layer_norm"].total() == 1 and "triton" not in ran["add_layer_norm"]
    with warnings.catch_warnings(), pruned_ops.debug():
        warnings.simplefilter("error")
        op(*arguments)
    with (
        use_backend("triton"),
        pytest.raises(pruned_ops.BackendError, match="add_layer_norm: OutOf"),
    ):
        op(*arguments)


def test_a_residual_that_is_no_more_is_not_added_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = moved(arguments_for("linear_add_layer_norm", 9, 48, 24), torch.float32)

    def failing(*args: Any) -> Tensor:
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(linear_add_layer_norm, "launch_add_layer_norm", failing)
    with given_up(arguments[3]), pytest.raises(RuntimeError, match="add_layer_norm: out of resource"):
        OPS["linear_add_layer_norm"].kernels["triton"].launch(*arguments)


def test_the_attention_that_is_chosen_keeps_a_multiprocessor_busy() -> None:
    """Most warps first, then few rows past the end, then the taller tile."""
    for head_dim, longest, rows in (
        (32, 384, 64), (64, 384, 128), (64, 128, 128), (64, 192, 64), (64, 130, 64), (128, 512, 64),
    ):  # fmt: skip
        config = configs.attention_config(longest, head_dim, torch.float16)
        assert config.block_m == rows and config.programs * config.warps >= 16, (head_dim, longest, config)


def test_what_triton_refuses() -> None:
    qkv, lengths, longest, _ = moved(attention_arguments((5,), 1, 48), torch.float32)
    with use_backend("triton"):
        with pytest.raises(pruned_ops.BackendError, match="head_dim is 48, the kernel takes 16, 32, 64, 128"):
            pruned_ops.ops.attention(qkv, lengths, longest, 48)
        with pytest.raises(pruned_ops.BackendError, match="several dtypes"):
            pruned_ops.ops.linear_gelu(qkv, qkv[:3].half(), qkv[0, :3])
        with pytest.raises(pruned_ops.BackendError, match="fp32, fp16 and bf16 are taken"):
            pruned_ops.ops.linear_gelu(qkv.double(), qkv[:3].double(), qkv[0, :3].double())
        with pytest.raises(RuntimeError, match="linear_gelu: bias has shape"):
            pruned_ops.ops.linear_gelu(qkv, qkv[:3], qkv[0, :4])


def test_the_interpreter_runs_only_on_demand() -> None:
    if DEVICE == "cuda":
        pytest.skip("there is a GPU: Triton is no interpreter here")
    arguments = moved(arguments_for("linear_gelu"), torch.float16)
    with record() as ran:
        pruned_ops.ops.linear_gelu(*arguments)
    assert ran["linear_gelu"] == {"reference": 1}


def test_the_model_chooses_what_fits_the_shape() -> None:
    """Few tokens: small or split tiles; many: large ones; TMA and shared memory only as there is."""
    h200, a100 = (
        tuning.Chip(132, configs.SHARED_MEMORY[90], True),
        tuning.Chip(108, configs.SHARED_MEMORY[80], False),
    )
    known = configs.LINEAR_GELU[2]
    few = tuning.fitting(known, 16, 3072, 768, 2, True, h200)[0]
    many = tuning.fitting(known, 32768, 3072, 768, 2, True, h200)[0]
    assert few.block_m <= 64 and many.block_m >= 128 and many.tma
    # As many tiles as there are multiprocessors beat fewer, larger ones, and splitting.
    for tokens, width, hidden, tiles in ((256, 3072, 768, 96), (128, 1536, 384, 48), (1408, 768, 384, 132)):
        best = tuning.fitting(known, tokens, width, hidden, 2, True, h200)[0]
        launched = -(-tokens // best.block_m) * -(-width // best.block_n)
        assert best.split_k == 1 and tiles <= launched <= 132, (tokens, width, hidden, best)
    for config in tuning.fitting(known, 4096, 3072, 768, 2, True, a100):
        assert not config.tma and config.shared_bytes(2) <= configs.SHARED_MEMORY[80]
    assert not any(c.tma for c in tuning.fitting(known, 4096, 3072, 768, 2, False, h200))
    assert not any(c.split_k > 1 for c in tuning.fitting(known, 16, 3072, 64, 2, True, h200))
    assert tuning.fused_configs(1025, torch.float16) == []
    assert {c.block_n for c in tuning.fused_configs(384, torch.float16)} == {512}
