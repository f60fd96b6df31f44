"""At most seven kernels a layer on a GPU: what each configuration launches, counted in Triton's interpreter,
and what the model of time chooses on an H200."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pruned_ops
from by_position import frequencies
from inputs import attention_arguments, randn
from pruned_ops.ops.registry import BACKENDS, use_backend

MISSING = BACKENDS["triton"].missing
if MISSING is not None:
    pytest.skip(f"triton: {MISSING}", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from pruned_ops.ops.backends.triton import configs, launch, tuning  # noqa: E402
from pruned_ops.ops.backends.triton.attention import launch_attention  # noqa: E402
from pruned_ops.ops.backends.triton.configs import GemmConfig  # noqa: E402
from pruned_ops.ops.backends.triton.linear_add_layer_norm import launch_linear_add_layer_norm  # noqa: E402
from pruned_ops.ops.backends.triton.linear_geglu import launch_linear_geglu  # noqa: E402
from pruned_ops.ops.backends.triton.linear_gelu import launch_linear_gelu  # noqa: E402
from pruned_ops.ops.backends.triton.tuning import Problem  # noqa: E402

pytestmark = pytest.mark.skipif(not launch.INTERPRETING, reason="kernels are counted in the interpreter")

MOST = 7
H200 = tuning.Chip(132, configs.SHARED_MEMORY[90], True)
X, WEIGHT, VECTOR = randn(0, 20, 64).half(), randn(1, 64, 64).half(), randn(2, 64).half()
FUSED = tuning.fused_configs(64, torch.float16)[0]
SPLIT = next(config for config in configs.LINEAR_GELU[2] if config.split_k > 1)
SINGLE = next(config for config in configs.LINEAR_GELU[2] if config.split_k == 1 and not config.tma)


class Gemms(TorchDispatchMode):
    """Counts torch's own GEMMs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "linear")
        return func(*args, **(kwargs or {}))


def launches(monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> int:
    """Triton's kernels and torch's GEMMs of one call."""
    started: list[Any] = []
    run = interpreter.GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        started.append(self)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patched, torch.no_grad(), Gemms() as gemms:
        patched.setattr(interpreter.GridExecutor, "__call__", counted)
        work()
    return len(started) + gemms.count


def norm_kernels(config: Any) -> int:
    """Of linear_add_layer_norm; None: cuBLAS's GEMM and a kernel."""
    return 1 if isinstance(config, GemmConfig) and config.split_k == 1 else 2


def gelu_kernels(config: Any) -> int:
    return 1 if config.split_k == 1 else 2


def test_what_each_configuration_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (None, SPLIT, FUSED):
        count = launches(
            monkeypatch,
            lambda c=config: launch_linear_add_layer_norm(X, WEIGHT, VECTOR, X, VECTOR, VECTOR, 1e-12, c),
        )
        assert count == norm_kernels(config)
    for config in (SINGLE, SPLIT):
        work = lambda c=config: launch_linear_gelu(X, WEIGHT, VECTOR, c)  # noqa: E731
        assert launches(monkeypatch, work) == gelu_kernels(config)
        work = lambda c=config: launch_linear_geglu(X, WEIGHT, VECTOR, c)  # noqa: E731
        assert launches(monkeypatch, work) == gelu_kernels(config)
    arguments = attention_arguments((9, 3), 2, 32)
    best = configs.attention_config(9, 32, torch.float32)
    assert launches(monkeypatch, lambda: launch_attention(*arguments, best)) == 1
    more = [torch.arange(12, dtype=torch.int32), frequencies(32), 4, randn(3, 2, 7)]
    with use_backend("triton"):  # query and key are rotated beforehand
        assert launches(monkeypatch, lambda: pruned_ops.ops.attention(*arguments, *more)) == 2


@pytest.mark.parametrize("hidden", [384, 768, 1024])
def test_what_is_chosen_is_at_most_seven_kernels_a_layer(hidden: int) -> None:
    """q|k|v GEMM, attention, and the two or three of each op after them."""
    found = set()
    for tokens in (1, 64, 128, 384, 1024, 3072, 12288, 49152):
        for heads in range(1, hidden // 64 + 1):
            for ffn in range(hidden // 8, 4 * hidden + 1, hidden // 2):
                chosen = [
                    tuning.modelled(
                        Problem(op, "torch.float16", tuning.bucket(tokens), *sizes, 0), True, H200
                    )
                    for op, sizes in (
                        ("linear_add_layer_norm", (hidden, 64 * heads)),
                        ("linear_gelu", (ffn, hidden)),
                        ("linear_add_layer_norm", (hidden, ffn)),
                    )
                ]
                first, middle, last = chosen
                found.add(2 + norm_kernels(first) + gelu_kernels(middle) + norm_kernels(last))
    assert max(found) <= MOST and min(found) < MOST  # some fuse a norm with its GEMM
