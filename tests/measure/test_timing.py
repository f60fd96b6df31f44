"""Timing: intervals of ratios, rounds that go on until one is settled, and the machine's name. Nothing here
asserts a speed."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from pruned_ops.measure.timing import (
    SETTLED,
    Timing,
    Workload,
    current_device,
    interleave,
    machine,
    processor_of,
    threads,
)

WORKLOAD = Workload("tiny", ((5, 3), (9, 1)))


def test_processors_of_arm_differ() -> None:
    """They have no name, and a table of one is refused on another."""
    neoverse = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n\nprocessor\t: 1\n"
    assert processor_of(neoverse).endswith(" (implementer 0x41, part 0xd0c)")
    assert processor_of(neoverse) != processor_of(neoverse.replace("0xd0c", "0xd40"))
    x86 = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
    assert processor_of(x86) == "AMD EPYC (family 25, model 17)"


def test_a_ratio_has_an_interval() -> None:
    """Ranks of the rounds' ratios: all of them at first, the inner ones of many."""
    own = Timing(WORKLOAD, (1.0,) * 5)
    slower = Timing(WORKLOAD, (2.0, 1.0, 3.0, 5.0, 4.0))
    assert own.speedup_over(slower) == 3.0 and own.speedup_interval(slower) == (1.0, 5.0)
    many = Timing(WORKLOAD, tuple(float(n) for n in range(1, 101)))
    low, high = Timing(WORKLOAD, (1.0,) * 100).speedup_interval(many)
    assert (low, high) == (40.0, 61.0)  # the interval of a median by the binomial distribution
    for rounds in range(1, 101):
        numbers = Timing(WORKLOAD, tuple(float(n) for n in range(rounds)))
        low, high = Timing(WORKLOAD, (1.0,) * rounds).speedup_interval(numbers)
        inside = [math.comb(rounds, below) for below in range(rounds + 1) if low < below <= high]
        assert low + high == rounds - 1
        assert sum(inside) >= 0.95 * 2**rounds or (low, high) == (0, rounds - 1)


@pytest.mark.parametrize(
    ("noise", "second", "rounds"),
    [(0.0, 1.0, 5), (2 * SETTLED, 1.0, 20), (2 * SETTLED, 5.0, 8), (2 * SETTLED, 50.0, 5)],
)
def test_timing_goes_on_until_a_ratio_is_settled(noise: float, second: float, rounds: int) -> None:
    """Without noise the rounds that were asked for are enough; with too much of it there is an end, sooner
    where a round takes long."""
    calls = {"own": 0, "slower": 0}

    def seconds(call: Any) -> float:
        name = call()
        calls[name] += 1
        return second * (1.0 if name == "own" else 2.0 * (1 + noise * (-1) ** calls[name]))

    runners = {name: (lambda batch, name=name: name) for name in calls}
    workload = Workload("one", ((1,),))
    timings = interleave(runners, workload, [{}], 5, warmup=1, seconds=seconds, settle=("own", "slower"))
    assert {len(timing.seconds) for timing in timings.values()} == {rounds}
    assert calls == {"own": rounds + 1, "slower": rounds + 1}


def test_a_gpu_that_is_not_the_current_one_is_named_and_made_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else events would be recorded on the streams of another, and their times would be about nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert machine("cuda:1")["accelerator"] == "GPU cuda:1"
    assert machine()["accelerator"] == machine("cpu")["accelerator"] == "GPU None"
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: (entered.append(device), nullcontext())[1])
    for name in ("cpu", "cuda:1"):
        with current_device(torch.device(name)):
            pass
    assert entered == [torch.device("cuda:1")]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    with threads(None):
        assert torch.get_num_threads() == before
