"""What `bench_models.py` does for a GPU: the workloads of its goals in fp16, ours and each rival on the same
weights, by the GPU's clock, within a number of minutes; what does not fit into them is left out by name."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import harness
import pruned_ops
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.stock import model_shape
from pruned_ops.shape import ModelShape
from rivals import cpu as cpu_rivals
from rivals import cuda as cuda_rivals
from whole_models.cases import Source

OURS, OURS_MANY = "ours", "ours-encode-many"
# Of a rival's error, beside twice what Hugging Face's own fp16 has against fp32.
SLACK = 1e-3
# What compiles or exports 24 layers of different sizes comes after all workloads without it, and is begun
# only with so many minutes left.
SLOW = {"ort-cuda": 2.0, "compile-max-autotune": 3.0, "tensorrt": 3.0}
ROUNDS_AT_LEAST = 5


class Deadline:
    """So many minutes from now; None: no end."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def refuse(self, name: str) -> str | None:
        """Why a runner is not begun any more; None if it is."""
        needed = 60 * SLOW.get(name, 0.0)
        if self.left() > needed:
            return None
        return f"the {self.minutes:g} minutes were used up" + (f"; it takes {needed:.0f} s" if needed else "")


@dataclass
class Runner:
    """A runtime on a model; `run` is made when it is first needed."""

    runtime: str
    model_name: str
    make: Callable[[], cpu_rivals.Run]
    model: Any
    run: cpu_rivals.Run | None = None
    refused: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    optimised: Any = None

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.model_name}"

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.model)


def runners(
    source: Source, names: Sequence[str], device: str, dtype: torch.dtype, folder: Path
) -> list[Runner]:
    """Ours and the named rivals on each of the source's models, nothing built yet."""
    found = []
    for model_name in source.names:
        model = source.load(model_name, device).to(dtype)
        fast = pruned_ops.optimize(copy.deepcopy(model))
        files = folder / model_name
        found.append(Runner(OURS, model_name, lambda fast=fast: cuda_rivals.ours(fast), model))
        found[-1].optimised = fast
        for name in names:
            make = lambda n=name, m=model, f=files: cuda_rivals.build_cuda(n, m, [], f)  # noqa: E731
            found.append(Runner(name, model_name, make, model))
    return found


def prepared(
    some: list[Runner], workload: Workload, inputs: list[cpu_rivals.Batch], deadline: Deadline
) -> tuple[list[Runner], list[dict[str, str]]]:
    """Those whose logits on the workload are right, every size compiled and captured; and for each other one
    a row that says why not."""
    ready, refused = [], []
    truth = Truth(inputs)
    for runner in some:
        reason = runner.refused or deadline.refuse(runner.runtime)
        if reason is None:
            try:
                reason = _check(runner, inputs, truth)
            except cpu_rivals.Refused as error:
                reason = runner.refused = str(error)
            except Exception as error:  # whatever a rival's own code raises
                if runner.runtime == OURS:
                    raise
                reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if reason is None:
            ready.append(runner)
        else:
            row = {"runner": runner.name, "runtime": runner.runtime, "model": runner.model_name}
            refused.append({"workload": workload.name, **row, "refused": reason})
    return ready, refused


class Truth:
    """What Hugging Face's eager model says in fp32 of a workload's first and last batch, and how far from it
    a runner may be: twice Hugging Face's own error in the runner's dtype, and SLACK."""

    def __init__(self, inputs: list[cpu_rivals.Batch]) -> None:
        self.samples = [inputs[0], *inputs[1:][-1:]]
        self._known: dict[str, tuple[cpu_rivals.Run, float]] = {}

    def of(self, runner: Runner) -> tuple[cpu_rivals.Run, float]:
        """For the runner's model: what repeats that, and the error allowed."""
        if runner.model_name not in self._known:
            exact = cpu_rivals.hf(copy.deepcopy(runner.model).float(), [], Path())
            with torch.inference_mode():
                said = {id(batch): exact(batch) for batch in self.samples}
            run = lambda batch: said[id(batch)]  # noqa: E731
            own = cpu_rivals.compared(cpu_rivals.hf(runner.model, [], Path()), run, self.samples, "any")
            self._known[runner.model_name] = run, 2 * own["max_error"] + SLACK
        return self._known[runner.model_name]


def _check(runner: Runner, inputs: list[cpu_rivals.Batch], truth: Truth) -> str | None:
    """Run every batch once; why its logits cannot be right, if so."""
    with torch.inference_mode():
        if runner.run is None:
            runner.run = runner.make()
        for batch in inputs:
            runner.run(batch)
        with pruned_ops.record() as ran:
            runner.run(inputs[0])
    said, allowed = truth.of(runner)
    found = cpu_rivals.compared(runner.run, said, truth.samples, "any")
    if not found["max_error"] <= allowed:
        return f"its logits are off by {found['max_error']:.2e}, more than {allowed:.2e}"
    backends = "; ".join(f"{op}: {', '.join(counts)}" for op, counts in ran.items()) or "its own"
    runner.facts |= {"error": found["max_error"], "allowed_error": allowed, "backends": backends}
    return None


def timed(
    ready: list[Runner],
    workload: Workload,
    inputs: list[cpu_rivals.Batch],
    rounds: int,
    deadline: Deadline,
    device: str,
) -> dict[str, Timing]:
    """All in turn, as many rounds as fit, at least ROUNDS_AT_LEAST."""
    runs = {one.name: one.run for one in ready if one.run is not None}
    start = time.monotonic()
    harness.interleaved(runs, workload, inputs, 1, device)
    a_round = (time.monotonic() - start) / (4 if device == "cuda" else 2)  # its warm-up rounds, too
    fit = int(deadline.left() / 2 / a_round) if deadline.left() < float("inf") else rounds
    return harness.interleaved(runs, workload, inputs, max(ROUNDS_AT_LEAST, min(rounds, fit)), device)


def encoded_many(runner: Runner, workload: Workload, inputs: list[cpu_rivals.Batch], rounds: int) -> Timing:
    """Ours by `encode_many`, by the host's clock: tokenised texts in, logits on the host out."""
    texts = [
        ids[: int(mask.sum())].tolist()
        for batch in inputs
        for ids, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True)
    ]
    tokens = max(batch["input_ids"].numel() for batch in inputs)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        for _ in runner.optimised.encode_many(texts, tokens):
            pass
        seconds.append(time.perf_counter() - start)
    return Timing(workload, tuple(seconds[1:]))


def rows(
    timings: dict[str, Timing], ready: list[Runner], peak: dict[str, float], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row each: beside the best rival of its model, ours beside ours dense, and the card's own ceilings."""
    extra: dict[str, dict[str, Any]] = {}
    for one in ready:
        timing = timings[one.name]
        others = [o.name for o in ready if o.model_name == one.model_name and not o.runtime.startswith(OURS)]
        seconds = timing.ms(50) / 1000 * len(timing.workload.batches)
        flops = 2.0 * sum(one.shape.macs(lengths) for lengths in timing.workload.batches)
        weights = sum(p.numel() * p.element_size() for p in one.model.base_model.encoder.parameters())
        moved = weights * len(timing.workload.batches) / seconds
        extra[one.name] = {
            **{
                "runtime": one.runtime,
                "model": one.model_name,
                "precision": str(dtype).removeprefix("torch."),
            },
            **harness.best_rival(timings, one.name, others),
            "gflops": round(flops / seconds / 1e9, 1),
            "peak_gflops": round(peak["flops"] / 1e9, 1),
            "percent_of_peak": round(100 * flops / seconds / peak["flops"], 1),
            "weights_gb_per_s": round(moved / 1e9, 1),
            "percent_of_copy": round(100 * moved / peak["bytes"], 1),
            **one.facts,
        }
        dense = f"{one.runtime} dense"
        if dense in timings:
            extra[one.name]["speedup_vs_own_dense"] = round(timing.speedup_over(timings[dense]), 3)
    first = next((one.name for one in ready if one.runtime == "hf"), ready[0].name)
    return harness.rows(timings, first, extra)


def batches(source: Source, workload: Workload, device: str) -> list[cpu_rivals.Batch]:
    """The workload's inputs, whose lengths the host knows."""
    inputs = workload.inputs(source.config.vocab_size, source.config.pad_token_id, device)
    return [cuda_rivals.SizedBatch(*pair) for pair in zip(inputs, workload.batches, strict=True)]


def measure(
    source: Source,
    names: Sequence[str],
    chosen: list[Workload],
    arguments: Any,
    folder: Path,
    show: Callable[[Workload, list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """All rows: what was timed, and what was left out with the reason. show: gets each workload's."""
    device, deadline = arguments.device, Deadline(arguments.minutes)
    dtype = torch.float16 if device == "cuda" else torch.float32
    peak = harness.ceilings(dtype, device)
    some, made = runners(source, names, device, dtype, folder), dict[str, list[dict[str, Any]]]()
    passes = (False, True) if any(one.runtime in SLOW for one in some) else (False,)
    for slow in passes:  # the slow ones last, and then all anew beside them
        for workload in chosen:
            inputs = batches(source, workload, device)
            ready, refused = prepared(
                [one for one in some if slow or one.runtime not in SLOW], workload, inputs, deadline
            )
            if slow and not any(one.runtime in SLOW for one in ready):
                refused = [row for row in refused if row["runtime"] in SLOW]
                found = made[workload.name]
            else:
                found = _measured(ready, workload, inputs, arguments.rounds, deadline, device, peak, dtype)
            found = found + [row | harness.stamp() for row in refused]
            made[workload.name] = [row | {"device": device} for row in found]
            show(workload, made[workload.name])
    return sorted((row for found in made.values() for row in found), key=lambda row: "refused" in row)


def _measured(
    ready: list[Runner],
    workload: Workload,
    inputs: list[cpu_rivals.Batch],
    rounds: int,
    deadline: Deadline,
    device: str,
    peak: dict[str, float],
    dtype: torch.dtype,
) -> list[dict[str, Any]]:
    """A workload's rows; none where nobody is ready."""
    if not ready:
        return []
    timings = timed(ready, workload, inputs, rounds, deadline, device)
    if workload.name.startswith("offline"):
        for one in [one for one in ready if one.runtime == OURS]:
            many = Runner(OURS_MANY, one.model_name, one.make, one.model, facts=one.facts)
            timings[many.name] = encoded_many(one, workload, inputs, len(timings[one.name].seconds))
            ready = [*ready, many]
    return rows(timings, ready, peak, dtype)
