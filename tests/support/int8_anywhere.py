"""int8 on any machine: where no kernel can run it, the reference does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from inputs import stock_model
from pruned_ops.ops.registry import REFERENCE, use_backend
from pruned_ops.runtime import refusals


@contextmanager
def int8_anywhere() -> Iterator[None]:
    """Inside the block `optimize(model, dtype="int8")` works, and what it makes runs."""
    if refusals.refuse_encoder(stock_model().bert, int8=True) is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch, use_backend(REFERENCE):
        patch.setattr(refusals, "_refuse_int8", lambda encoder: None)
        yield
