"""Faults planted in the CUDA kernels themselves are found in the emulator: dropped barriers and waits, wrong
lanes, masks off by one, accesses past the end."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated import Emulated, kernels, missing
from numerics import within_budget
from planted import FAULTS, USUAL, Fault, Wait, faulty_kernels, number_of, waits

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cuda_on_host: {missing()}")

ORDERS = ["ascending", "descending", "random"]


def symptoms(op: str, make: Callable[[], list[Any]], fault: int) -> list[str]:
    """What goes wrong, over the orders of threads; an order's first."""
    arguments = [a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in make()]
    found, outputs = [], []
    for order in ORDERS:
        # One multiprocessor, so that the GEMM's tiles are large; its blocks then have 8 warps.
        emulated = Emulated(faulty_kernels(), order=order, multiprocessors=1, fault=fault)
        try:
            outputs.append(getattr(emulated, op)(*arguments))
            if any(launch["bank_conflicts"] for launch in emulated.statistics):
                found.append("conflicts")
            within_budget(op, outputs[-1], arguments)
        except faulty_kernels().EmulatorError as error:
            found.append(str(error))
        except AssertionError:
            found.append("wrong")
    if any(not torch.equal(outputs[0], other) for other in outputs[1:]):
        found.append("wrong")
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"cuda-{fault.op}-{fault.name}")
def test_a_planted_fault_is_found(fault: Fault) -> None:
    found = symptoms(fault.op, fault.make, number_of(fault))
    assert any(re.search(fault.shows, one) for one in found), found


@pytest.mark.parametrize("wait", waits(), ids=lambda wait: f"cuda-{wait.file}-{wait.line}-{wait.statement}")
def test_no_wait_can_be_left_out(wait: Wait) -> None:
    assert any(symptoms(op, make, number_of(wait)) for op, make in USUAL[wait.file])


def test_the_faults_are_in_a_copy() -> None:
    assert faulty_kernels() is not kernels() and faulty_kernels().__file__ != kernels().__file__


def test_without_a_fault_nothing_is_found() -> None:
    """The copy is what it is a copy of."""
    for cases in USUAL.values():
        for op, make in cases:
            assert not symptoms(op, make, 0)
