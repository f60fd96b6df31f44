"""Backend "triton": kernels for fp16, bf16 and fp32 on GPUs of sm_80 and later, one file per op.

With TRITON_INTERPRET=1 they run on the CPU in Triton's interpreter, and then only if they are asked for.
"""

from typing import Any

from pruned_ops.ops.backends.triton import launch
from pruned_ops.ops.registry import Backend, add_backend


def _tune(*args: Any, **kind: Any) -> int:
    from pruned_ops.ops.backends.triton import timing  # needs Triton

    return timing.tune(*args, **kind)


_missing = launch.missing()
BACKEND = add_backend(
    Backend(
        "triton", _missing, "Triton kernels, compiled when they first run", launch.INTERPRETING, tune=_tune
    )
)

if _missing is None:  # the kernels need Triton to be imported at all
    from pruned_ops import ops
    from pruned_ops.ops.backends.triton import (
        add_layer_norm,
        attention,
        embed_layer_norm,
        linear_add_layer_norm,
        linear_geglu,
        linear_gelu,
    )
    from pruned_ops.ops.registry import register

    for op, launcher, refuse in (
        (ops.attention, attention.attention, attention.refuse),
        (ops.linear_gelu, linear_gelu.linear_gelu, launch.refuse),
        (ops.linear_geglu, linear_geglu.linear_geglu, launch.refuse),
        (ops.add_layer_norm, add_layer_norm.add_layer_norm, add_layer_norm.refuse),
        (
            ops.linear_add_layer_norm,
            linear_add_layer_norm.linear_add_layer_norm,
            linear_add_layer_norm.refuse,
        ),
        (ops.embed_layer_norm, embed_layer_norm.embed_layer_norm, embed_layer_norm.refuse),
    ):
        register(op, BACKEND, launch.on_its_device(launch.guarded(launcher)), refuse)
