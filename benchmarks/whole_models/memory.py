"""Measures the peak memory of ours and of Hugging Face's model, each in its own process, and its growth."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pruned_ops
from harness import Row
from pruned_ops.measure.timing import Workload
from whole_models.cases import Source

STATUS = Path("/proc/self/status")
BATCHES, EARLY = 1000, 100


def megabytes(name: str) -> float:
    """A field of /proc/self/status in MiB. getrusage would count what the parent had before the exec."""
    for line in STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{STATUS} has no {name}")


def watch(
    source: Source, model_name: str, runtime: str, workload: Workload, device: str, threads: int
) -> dict[str, float]:
    """The memory of this process in MiB over BATCHES batches, which repeat the workload's: after loading,
    after EARLY batches, at the end, and the peak of all."""
    torch.set_num_threads(threads)
    model = source.load(model_name, device)
    if runtime == "ours":
        model = pruned_ops.optimize(model)
    inputs = workload.inputs(model.config.vocab_size, model.config.pad_token_id, device)
    memory = {"loaded": megabytes("VmRSS")}
    with torch.inference_mode():
        for number in range(1, BATCHES + 1):
            model(**inputs[number % len(inputs)])
            if number == EARLY:
                memory["early"] = megabytes("VmRSS")
    return memory | {"end": megabytes("VmRSS"), "peak": megabytes("VmHWM")}


def report_memory(source: Source, workload: Workload, device: str) -> list[Row]:
    """Print and return the memory of each runner. Errors: OSError where there is no /proc/self/status."""
    if not STATUS.exists():
        raise OSError(f"memory is read from {STATUS}, which this system does not have")
    table = Table(title=f"MiB resident, {BATCHES} batches of {workload.name}")
    table.add_column("")
    columns = ("loaded", f"after {EARLY}", f"after {BATCHES}", f"growth from {EARLY}", "peak")
    for column in columns:
        table.add_column(column, justify="right")
    rows = []
    for model_name in source.names:
        for runtime in ("ours", "hf"):
            # Spawned, not forked: a fork would start with all that this process holds.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                memory = pool.submit(
                    watch, source, model_name, runtime, workload, device, torch.get_num_threads()
                ).result()
            memory["growth"] = memory["end"] - memory["early"]
            numbers = (memory[key] for key in ("loaded", "early", "end", "growth", "peak"))
            table.add_row(f"{runtime} {model_name}", *(f"{number:.1f}" for number in numbers))
            rows.append({"runner": f"{runtime} {model_name}", **memory})
    Console().print(table)
    return rows
