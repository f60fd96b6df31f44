"""AMX: when it runs, and that it shares a thread's tiles with torch's own. test_int8.py has what it sums."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F

import pruned_ops  # noqa: F401 (registers the ops)
from bf16_cases import in_bf16
from inputs import encoder_arguments, randn
from int8_cases import in_int8
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.registry import OPS, use_backend

CAPABILITIES = () if extension is None else (extension.int8_capability(), extension.bf16_capability())
needs_amx = pytest.mark.skipif("AMX_INT8" not in CAPABILITIES, reason="int8 does not run by AMX here")


@pytest.mark.skipif(extension is None, reason="pruned_ops._C is not built")
def test_amx_runs_where_it_is() -> None:
    """Linux refuses it to no process that this suite runs in, unless the variable asks for less."""
    assert extension is not None
    asked = os.environ.get("ATEN_CPU_CAPABILITY", "")
    for name, found in zip(("AMX_INT8", "AMX_BF16"), CAPABILITIES, strict=True):
        compiled = name in extension.build_info()["capabilities"]
        expected = compiled and extension.cpu_features()[name.lower()] and not asked
        assert (found == name) == expected


@needs_amx
def test_tiles_are_shared_with_torch() -> None:
    """torch's products in bfloat16 shape the same registers of the same thread for themselves, in turn with
    ours of several shapes."""
    plain = [encoder_arguments(rows, 64, 96, seed=0) for rows in (40, 5)]
    ours = [narrow(arguments) for arguments in plain for narrow in (in_int8, in_bf16)]
    x, weight = randn(0, 48, 256).bfloat16(), randn(1, 128, 256).bfloat16()
    theirs = F.linear(x, weight)
    with use_backend("cpu"):
        expected = [OPS["encoder"](*arguments) for arguments in ours]
        for _ in range(3):
            for arguments, found in zip(ours, expected, strict=True):
                assert torch.equal(F.linear(x, weight), theirs)
                assert torch.equal(OPS["encoder"](*arguments), found)
