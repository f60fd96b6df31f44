"""The error budget that every backend is held to.

The truth is the reference in fp64. The budget is the reference's own error in the inputs' dtype; a backend's
error may be at most twice the budget plus 1e-5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from pruned_ops.ops.registry import OPS, BackendError, Op, record, use_backend


def in_fp64(arguments: Sequence[Any]) -> list[Any]:
    """The same arguments with every floating tensor in fp64."""
    return [in_fp64(a) if isinstance(a, list) else a.double() if _is_floating(a) else a for a in arguments]


def _is_floating(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


def largest(x: Tensor) -> float:
    """Largest absolute value, 0 for an empty tensor."""
    return float(x.abs().max()) if x.numel() else 0.0


def assert_within_budget(op: Op, backend: str, arguments: Sequence[Any]) -> Tensor:
    """Run `op` on `backend`; check that this backend ran, and that its error is within the budget.

    If the backend refuses these arguments, check that asking for it raises an error with its reason, and
    return the reference's output.
    """
    kernel = op.kernels.get(backend)
    refusal = kernel.refuse(*arguments) if kernel is not None else None
    if refusal is not None:
        with use_backend(backend), pytest.raises(BackendError, match=re.escape(refusal)):
            op(*arguments)
        return op.reference(*arguments)
    with use_backend(backend), record() as ran:
        output = op(*arguments)
    assert ran[op.name] == {backend: 1}
    within_budget(op.name, output, arguments)
    return output


def within_budget(op: str, output: Tensor, arguments: Sequence[Any]) -> None:
    """Check the shape, dtype and error of an output that a kernel computed from these arguments."""
    reference = OPS[op].reference
    truth = reference(*in_fp64(arguments))
    budget = largest(reference(*arguments).double() - truth)
    floating = next(a for a in arguments if isinstance(a, Tensor) and a.is_floating_point())
    assert output.shape == truth.shape and output.dtype == floating.dtype
    error = largest(output.double() - truth)
    assert error <= 2 * budget + 1e-5, f"{op}: error {error:.3g}, budget {budget:.3g}"
