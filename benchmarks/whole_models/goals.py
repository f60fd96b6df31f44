"""What bench_models.py does for a GPU: the workloads of its goals, ours and each rival on the same weights.

The models are in fp16 and timed by the GPU's clock, within a number of minutes; what does not fit into them
is left out by name. On a CPU, where most rivals refuse, it runs in fp32.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import harness
import pruned_ops
from harness import Row
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.stock import layer_list, model_shape
from pruned_ops.ops.registry import backends_of
from pruned_ops.shape import ModelShape
from rivals.cuda import SizedBatch, build_cuda_rival, packed_batch
from rivals.rival import Batch, Logits, Refused, Run, compare_logits, forward
from single_kernels.journal import FAILED, WRONG
from whole_models.cases import Source, fingerprint

OURS, OURS_MANY = "ours", "ours-encode-many"
# A rival may err by this much more than twice the error of Hugging Face's own fp16 against fp32.
SLACK = 1e-3
# Rivals that compile or export 24 layers of different sizes come after all workloads without them, and are
# begun only with so many minutes left.
SLOW = {"ort-cuda": 2.0, "compile-max-autotune": 3.0, "tensorrt": 3.0}
ROUNDS_AT_LEAST = 5


class Deadline:
    """The end of the time for a run: so many minutes from now, or never where `minutes` is None."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """The seconds until then."""
        return float("inf") if self._end is None else self._end - time.monotonic()

    def refuse(self, name: str) -> str | None:
        """Why a runner of this name is not begun any more; None if there is time for it."""
        needed = 60 * SLOW.get(name, 0.0)
        if self.left() > needed:
            return None
        return f"the {self.minutes:g} minutes were used up" + (f"; it takes {needed:.0f} s" if needed else "")


@dataclass
class Runner:
    """A runtime on a model. run: made by `make` when it is first needed. facts: fields of its rows.
    optimised: our optimised model, where the runtime is ours and was made."""

    runtime: str
    model_name: str
    make: Callable[[], Run]
    model: Any
    run: Run | None = None
    refused: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    optimised: Any = None

    @property
    def name(self) -> str:
        return f"{self.runtime} {self.model_name}"

    @property
    def shape(self) -> ModelShape:
        return model_shape(self.model)


def ours(model: Any, model_name: str) -> Runner:
    """Our runtime on a model, to which it passes the lengths that the host knows."""

    def make() -> Run:
        fast = runner.optimised = pruned_ops.optimize(copy.deepcopy(model))

        def run(batch: Batch) -> Logits:
            output = fast(**batch, packed_batch=packed_batch(batch))
            return output.start_logits, output.end_logits

        return run

    runner = Runner(OURS, model_name, make, model)
    return runner


def all_runners(
    source: Source, names: Sequence[str], device: str, dtype: torch.dtype, folder: Path, cached: bool
) -> list[Runner]:
    """Ours and the named rivals on each of the source's models; none of them is built yet. cached: whether
    the folder may hold the rivals' files of other models, and keeps these for a later run."""
    runners = []
    for model_name in source.names:
        model = source.load(model_name, device).to(dtype)
        files = folder / (fingerprint(model) if cached else model_name)
        runners.append(ours(model, model_name))
        for name in names:
            make = partial(build_cuda_rival, name, model, [], files)
            runners.append(Runner(name, model_name, make, model))
    return runners


def prepared(
    runners: list[Runner], workload: Workload, inputs: list[Batch], deadline: Deadline
) -> tuple[list[Runner], list[Row]]:
    """The runners whose logits on the workload are right, with every size compiled and captured; and for each
    other runner a row that says why not. Where that is ours, which has to run, the row has a field `fault`,
    WRONG or FAILED."""
    ready, refused = [], []
    truth = Truth(inputs)
    for runner in runners:
        reason, fault = runner.refused or deadline.refuse(runner.runtime), None
        if reason is None:
            try:
                reason, fault = _check(runner, inputs, truth), WRONG
            except Refused as error:
                reason = runner.refused = str(error)
            except Exception as error:  # the other runners may run
                reason, fault = _in_a_line(error), FAILED
        if reason is None:
            ready.append(runner)
        else:
            refused.append(left_out(runner, workload, reason, fault))
    return ready, refused


def left_out(runner: Runner, workload: Workload, reason: str, fault: str | None) -> Row:
    """The row of a runner that is not timed. Only ours is at fault."""
    row = {"runner": runner.name, "runtime": runner.runtime, "model": runner.model_name}
    at_fault = {} if fault is None or not runner.runtime.startswith(OURS) else {"fault": fault}
    return {"workload": workload.name, **row, "refused": reason, **at_fault}


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Truth:
    """The logits of Hugging Face's fp32 model on a workload's first and last batch, and how far a runner's
    may be from them: twice the error of Hugging Face in the runner's dtype, and SLACK."""

    def __init__(self, inputs: list[Batch]) -> None:
        self.samples = [inputs[0], *inputs[1:][-1:]]
        self._known: dict[str, tuple[Run, float]] = {}

    def of(self, runner: Runner) -> tuple[Run, float]:
        """For the runner's model: a runner that repeats those logits, and the error allowed."""
        if runner.model_name not in self._known:
            exact = forward(copy.deepcopy(runner.model).float())
            with torch.inference_mode():
                logits = {id(batch): exact(batch) for batch in self.samples}
            repeat = lambda batch: logits[id(batch)]  # noqa: E731
            own_errors = compare_logits(forward(runner.model), repeat, self.samples, "any")
            self._known[runner.model_name] = repeat, 2 * own_errors["max_error"] + SLACK
        return self._known[runner.model_name]


def _check(runner: Runner, inputs: list[Batch], truth: Truth) -> str | None:
    """Run every batch once; return why the runner's logits cannot be right, None where they can."""
    eager_before = _eager(runner)
    with torch.inference_mode():
        if runner.run is None:
            runner.run = runner.make()
        run = runner.run
        for batch in inputs:
            run(batch)
        backends = backends_of(lambda: run(inputs[0]))
    exact, allowed = truth.of(runner)
    error = compare_logits(run, exact, truth.samples, "any")["max_error"]
    if not error <= allowed:
        return f"its logits are off by {error:.2e}, more than {allowed:.2e}"
    shown = "; ".join(f"{op}: {backend}" for op, backend in backends.items()) or "its own"
    runner.facts |= {"error": error, "allowed_error": allowed, "backends": shown}
    if runner.optimised is not None:
        runner.facts["without_graph"] = _eager(runner) - eager_before
    return None


def _eager(runner: Runner) -> int:
    """How many batches our model has run without a graph so far, in all workloads."""
    return 0 if runner.optimised is None else runner.optimised.engine.stats.eager


def timed(
    ready: list[Runner],
    workload: Workload,
    inputs: list[Batch],
    rounds: int,
    deadline: Deadline,
    device: str,
) -> dict[str, Timing]:
    """Times all runners in turn, for as many rounds as fit into the time, at least ROUNDS_AT_LEAST."""
    runs = {runner.name: runner.run for runner in ready if runner.run is not None}
    start = time.monotonic()
    harness.interleaved(runs, workload, inputs, 1, device)
    a_round = (time.monotonic() - start) / (4 if device == "cuda" else 2)  # its warm-up rounds, too
    fit = int(deadline.left() / 2 / a_round) if deadline.left() < float("inf") else rounds
    return harness.interleaved(runs, workload, inputs, max(ROUNDS_AT_LEAST, min(rounds, fit)), device)


def encoded_many(runner: Runner, workload: Workload, inputs: list[Batch], rounds: int) -> Timing:
    """Times our `encode_many` by the host's clock: tokenised texts in, logits on the host out."""
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
) -> list[Row]:
    """A row for each runner: beside the best rival of its model, its own dense model and the card's
    ceilings."""
    extra: dict[str, Row] = {}
    for runner in ready:
        timing = timings[runner.name]
        rivals = [
            rival.name
            for rival in ready
            if rival.model_name == runner.model_name and not rival.runtime.startswith(OURS)
        ]
        extra[runner.name] = {
            "runtime": runner.runtime,
            "model": runner.model_name,
            "precision": str(dtype).removeprefix("torch."),
            **harness.best_rival(timings, runner.name, rivals),
            **_rates(runner, timing, peak),
            **runner.facts,
        }
        dense = f"{runner.runtime} dense"
        if dense in timings:
            extra[runner.name]["speedup_vs_own_dense"] = round(timing.speedup_over(timings[dense]), 3)
    first = next((runner.name for runner in ready if runner.runtime == "hf"), ready[0].name)
    return harness.rows(timings, first, extra)


def _rates(runner: Runner, timing: Timing, peak: dict[str, float]) -> Row:
    """Real products a second, and bytes of weights a second, beside the ceilings."""
    seconds = timing.ms(50) / 1000 * len(timing.workload.batches)
    flops = 2.0 * sum(runner.shape.macs(lengths) for lengths in timing.workload.batches)
    weights = sum(p.nbytes for p in layer_list(runner.model.base_model).parameters())
    moved = weights * len(timing.workload.batches) / seconds
    return {
        "gflops": round(flops / seconds / 1e9, 1),
        "peak_gflops": round(peak["flops"] / 1e9, 1),
        "percent_of_peak": round(100 * flops / seconds / peak["flops"], 1),
        "weights_gb_per_s": round(moved / 1e9, 1),
        "percent_of_copy": round(100 * moved / peak["bytes"], 1),
    }


def batches(source: Source, workload: Workload, device: str) -> list[Batch]:
    """The workload's inputs, whose lengths the host knows."""
    inputs = workload.inputs(source.config.vocab_size, source.config.pad_token_id, device)
    return [SizedBatch(*pair) for pair in zip(inputs, workload.batches, strict=True)]


def measure_goals(
    source: Source,
    names: Sequence[str],
    chosen: list[Workload],
    arguments: Any,
    folder: Path,
    show: Callable[[Workload, list[Row]], None],
) -> list[Row]:
    """All rows: those that were timed, then those that were left out, with the reason. show: gets the rows of
    each workload."""
    device = arguments.device
    dtype = torch.float16 if device == "cuda" else torch.float32
    peak = harness.ceilings(dtype, device)
    runners = all_runners(source, names, device, dtype, folder, arguments.cache is not None)
    # From here on: to make a large random model takes a CPU seconds, in which the GPU has nothing to do.
    deadline = Deadline(arguments.minutes)
    rows_of = dict[str, list[Row]]()
    passes = (False, True) if any(runner.runtime in SLOW for runner in runners) else (False,)
    for slow in passes:  # the slow ones last, and then all anew beside them
        for workload in chosen:
            inputs = batches(source, workload, device)
            able = [runner for runner in runners if slow or runner.runtime not in SLOW]
            ready, refused = prepared(able, workload, inputs, deadline)
            if slow and not any(runner.runtime in SLOW for runner in ready):
                refused = [row for row in refused if row["runtime"] in SLOW]
                measured = rows_of[workload.name]
            else:
                measured, failed = _measured(
                    ready, workload, inputs, arguments.rounds, deadline, device, peak, dtype
                )
                refused += failed
            measured = measured + [row | harness.stamp() for row in refused]
            rows_of[workload.name] = [row | {"device": device} for row in measured]
            show(workload, rows_of[workload.name])
    return sorted(
        (row for workload_rows in rows_of.values() for row in workload_rows), key=lambda row: "refused" in row
    )


def _measured(
    ready: list[Runner],
    workload: Workload,
    inputs: list[Batch],
    rounds: int,
    deadline: Deadline,
    device: str,
    peak: dict[str, float],
    dtype: torch.dtype,
) -> tuple[list[Row], list[Row]]:
    """A workload's rows, none where no runner is ready; and those of what failed."""
    if not ready:
        return [], []
    try:
        timings = timed(ready, workload, inputs, rounds, deadline, device)
    except Exception as error:  # the next workload may run
        return [], [left_out(runner, workload, _in_a_line(error), FAILED) for runner in ready]
    failed = list[Row]()
    if workload.name.startswith("offline"):
        for our_runner in [runner for runner in ready if runner.runtime == OURS]:
            many = Runner(
                OURS_MANY, our_runner.model_name, our_runner.make, our_runner.model, facts=our_runner.facts
            )
            try:
                timings[many.name] = encoded_many(
                    our_runner, workload, inputs, len(timings[our_runner.name].seconds)
                )
            except Exception as error:  # the others were timed
                failed.append(left_out(many, workload, _in_a_line(error), FAILED))
            else:
                ready = [*ready, many]
    return rows(timings, ready, peak, dtype), failed
