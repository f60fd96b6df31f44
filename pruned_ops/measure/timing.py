"""Measuring speed: workloads of real lengths, runners interleaved in one process, medians, and the machine.

Timings on shared machines are noisy. So every runner sees the same batches in the same round, in an order
that rotates, and reports take the median over rounds, and the median of the rounds' ratios.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from pruned_ops.version import __version__

Runner = Callable[[dict[str, Tensor]], Any]

# A ratio is settled when its interval reaches no further than this share of it to either side.
SETTLED = 0.02
# The rounds of a ratio that does not settle, as multiples of those that were asked for.
MOST_ROUNDS = 4
# No round is added to those that were asked for once all have taken so many seconds.
SETTLING_SECONDS = 120.0


@dataclass(frozen=True)
class Workload:
    """Batches of sequences, given by their lengths in tokens."""

    name: str
    batches: tuple[tuple[int, ...], ...]

    @classmethod
    def arrival_order(cls, lengths: Sequence[int], batch_size: int, batches: int) -> Workload:
        """The first `batches` batches of `lengths`, in the order given: the caller shuffles, as
        `arrival_lengths` does."""
        if len(lengths) < batch_size:
            raise ValueError(f"{len(lengths)} sequences do not fill a batch of {batch_size}")
        full = [
            tuple(lengths[i : i + batch_size]) for i in range(0, len(lengths) - batch_size + 1, batch_size)
        ]
        return cls(f"arrival-b{batch_size}", tuple(full[:batches]))

    @classmethod
    def fixed(cls, length: int, batch_size: int, batches: int) -> Workload:
        """Batches of sequences of one length, where there is no padding to save."""
        return cls(f"fixed{length}-b{batch_size}", ((length,) * batch_size,) * batches)

    def spread(self, most: int) -> Workload:
        """At most so many of its batches, evenly spread in order of their tokens."""
        ordered = sorted(self.batches, key=sum)
        return Workload(self.name, tuple(ordered[i] for i in spread(len(ordered), most)))

    @property
    def sequences(self) -> int:
        return sum(len(batch) for batch in self.batches)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.batches))

    @property
    def mean_tokens(self) -> float:
        """Tokens of a batch in the mean."""
        return self.tokens / len(self.batches)

    def inputs(
        self,
        vocab_size: int,
        pad_token_id: int,
        device: torch.device | str = "cpu",
        pad_to: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Padded model inputs of these lengths, with seeded random ids, all but the padding's: the time does
        not depend on them. pad_to: the length of every batch; by default that of its longest sequence."""
        generator = torch.Generator().manual_seed(0)
        inputs = []
        for batch in self.batches:
            lengths = torch.tensor(batch)
            mask = torch.arange(pad_to or max(batch)) < lengths[:, None]
            ids = torch.randint(vocab_size - 1, mask.shape, generator=generator)
            ids += ids >= pad_token_id  # over the padding's, wherever that is
            padded = {"input_ids": ids.masked_fill(~mask, pad_token_id), "attention_mask": mask.long()}
            inputs.append({name: tensor.to(device) for name, tensor in padded.items()})
        return inputs


def spread(number: int, most: int) -> list[int]:
    """At most so many places out of `number`, evenly spread: the middle ones of equal parts."""
    count = min(most, number)
    return [(2 * i + 1) * number // (2 * count) for i in range(count)]


@dataclass(frozen=True)
class Timing:
    """The times of one runner on one workload. seconds: how long each round took (all batches once). calls:
    how long each batch took, round after round."""

    workload: Workload
    seconds: tuple[float, ...]
    calls: tuple[float, ...] = ()

    def ms(self, percentile: int) -> float:
        """Milliseconds per batch, at this percentile of the rounds."""
        return 1000 * _percentile(self.seconds, percentile) / len(self.workload.batches)

    def call_ms(self, percentile: int) -> float:
        """Milliseconds of a batch, at this percentile of the batches: how long a caller waits."""
        return 1000 * _percentile(self.calls, percentile)

    @property
    def sequences_per_s(self) -> float:
        """Sequences a second, at the median of the rounds."""
        return self.workload.sequences / statistics.median(self.seconds)

    def speedup_over(self, slower: Timing) -> float:
        """How many times as fast this runner is: the median over rounds of slower's seconds over its own.
        Both were measured in the same rounds."""
        return statistics.median(self._ratios(slower))

    def speedup_interval(self, slower: Timing) -> tuple[float, float]:
        """An interval of at least 95% for the median of `speedup_over`, by the ranks of the rounds' ratios,
        whatever their distribution; all of them where there are fewer than 9 rounds."""
        ratios = sorted(self._ratios(slower))
        rank = _left_out(len(ratios))
        return ratios[rank], ratios[-1 - rank]

    def _ratios(self, slower: Timing) -> list[float]:
        """slower's seconds over this runner's, round by round."""
        return [slow / fast for slow, fast in zip(slower.seconds, self.seconds, strict=True)]


def _left_out(number: int) -> int:
    """How many of so many sorted values may be left out at each end, so that the others' range holds the
    median with a probability of 95%, if any may.

    The median is below all but `left` of them where at most so many are below it, which each is with a
    probability of a half: the beginnings of the binomial distribution are added up, times 2 ** number."""
    left, beyond = 0, 1
    while True:
        beyond += math.comb(number, left + 1)
        if 40 * beyond > 2**number:  # both ends together: more than 5%
            return left
        left += 1


def _percentile(values: Sequence[float], percentile: int) -> float:
    ordered = sorted(values)
    place = (len(ordered) - 1) * percentile / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleave(
    runners: Mapping[str, Runner],
    workload: Workload,
    inputs: Sequence[dict[str, Tensor]],
    rounds: int,
    warmup: int = 1,
    seconds: Callable[[Callable[[], Any]], float] | None = None,
    settle: tuple[str, str] | None = None,
) -> dict[str, Timing]:
    """Time every runner on every batch, batch by batch in turn, for `rounds` rounds after `warmup` untimed
    ones. seconds: a function that runs a call and returns how long it took; by default `host_seconds`.

    settle: two runners, of which the second is the slower one; rounds go on, up to MOST_ROUNDS times as many
    or until all have taken SETTLING_SECONDS, while the 95% interval of their ratio reaches further than
    SETTLED of it."""
    seconds = host_seconds if seconds is None else seconds
    names = list(runners)
    calls: dict[str, list[float]] = {name: [] for name in names}

    def is_enough(rounds_run: int) -> bool:
        if rounds_run < rounds:
            return False
        if settle is None or rounds_run >= MOST_ROUNDS * rounds:
            return True
        if sum(map(sum, calls.values())) >= SETTLING_SECONDS:
            return True
        faster, slower = (_timing(workload, tuple(calls[name]), len(inputs)) for name in settle)
        return is_settled(faster.speedup_over(slower), faster.speedup_interval(slower))

    with torch.inference_mode():
        number = -warmup
        while not is_enough(number):
            for i, batch in enumerate(inputs):
                turn = (number + i) % len(names)
                for name in names[turn:] + names[:turn]:
                    took = seconds(partial(runners[name], batch))
                    if number >= 0:
                        calls[name].append(took)
            number += 1
    return {name: _timing(workload, tuple(values), len(inputs)) for name, values in calls.items()}


def is_settled(ratio: float, interval: tuple[float, float]) -> bool:
    """Whether the interval of a ratio reaches no further than SETTLED of it to either side."""
    low, high = interval
    return (1 - SETTLED) * ratio <= low and high <= (1 + SETTLED) * ratio


def _timing(workload: Workload, calls: tuple[float, ...], batches: int) -> Timing:
    rounds = [calls[first : first + batches] for first in range(0, len(calls), batches)]
    return Timing(workload, tuple(map(sum, rounds)), calls)


def host_seconds(call: Callable[[], Any]) -> float:
    """How long a call takes by the host's clock, with the work that it left to a GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def event_seconds(call: Callable[[], Any]) -> float:
    """How long a call takes by the GPU's clock, from an idle GPU to the end of what the call launched: the
    host's part before the first launch counts, and so does any gap between launches."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """A GPU is the current one inside the block: its streams are those on which events are recorded. On a CPU
    nothing changes."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch computes on a CPU with so many threads inside the block; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device | str | None = None) -> dict[str, Any]:
    """The machine that numbers are measured on: processor, cores, threads, instruction set, accelerator.
    device: the GPU, where it need not be the current one."""
    gpu = None if device is None or torch.device(device).type != "cuda" else device
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return processor_of(file.read())
    except OSError:
        return platform.processor() or platform.machine()


def processor_of(cpuinfo: str) -> str:
    """The first processor of /proc/cpuinfo; ARM's have numbers instead of names."""
    first = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in first.items()}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        return f"{name} (family {fields['cpu family']}, model {fields['model']})"
    if "CPU part" in fields:
        return f"{name} (implementer {fields['CPU implementer']}, part {fields['CPU part']})"
    return name


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that matter to speed and results; None for a package that is
    not installed."""
    numbers: dict[str, str | None] = {"python": platform.python_version(), "pruned-ops": __version__}
    for package in ("torch", "transformers", "tokenizers", "triton", "numpy"):
        try:
            numbers[package] = version(package)
        except PackageNotFoundError:
            numbers[package] = None
    return numbers
