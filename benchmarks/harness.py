"""What every benchmark shares: interleaved timing, self-contained CSV rows, and the machine's ceilings.

A row names its command, machine, versions, workload and runner; nothing is left to the file's name or to
memory.
"""

from __future__ import annotations

import csv
import datetime
import io
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from pruned_ops.files import write_whole
from pruned_ops.measure.timing import Runner, Timing, Workload, event_seconds, interleave, machine, versions

# A line of a result file: the name of a column -> its value.
Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
# The packages of the rivals, whose versions stand beside those that pruned_ops.measure names.
RIVAL_PACKAGES = (
    *("onnx", "onnxruntime", "openvino", "nncf", "ctranslate2"),
    *("onnxruntime-gpu", "flash-attn", "torch-tensorrt"),
)
# OpenMP's threads spin for 5 to 7 ms (measured) after the last region of a runner, on cores that the next one
# needs where that has threads of its own: without a rest ONNX Runtime took 17 ms a batch instead of 15.
REST = 0.01


def ceilings(
    dtype: torch.dtype, device: str, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """The largest rate of torch's products, and of copying, here: FLOP/s and bytes/s."""
    size = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    block = torch.empty(1 << (30 if device == "cuda" else 27), dtype=torch.uint8, device=device)
    copy = torch.empty_like(block)
    return {
        "flops": 2.0 * size**3 / _best(lambda: torch.mm(a, b), device, clock),
        "bytes": 2.0 * block.numel() / _best(lambda: copy.copy_(block), device, clock),
    }


def _best(work: Callable[[], Any], device: str, clock: Callable[[], float], times: int = 40) -> float:
    """The least seconds of several runs."""
    seconds = []
    for _ in range(times):
        start = clock()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return min(seconds)


def interleaved(
    runners: Mapping[str, Runner],
    workload: Workload,
    inputs: Sequence[dict[str, Tensor]],
    rounds: int,
    device: str = "cpu",
    cpu_time: bool = False,
) -> dict[str, Timing]:
    """pruned_ops.measure.interleave with an untimed rest of REST seconds after each runner; on a GPU without
    a rest, and timed by the GPU's events. cpu_time: count what this process computes, not what passes."""
    if device == "cuda":
        return interleave(runners, workload, inputs, rounds, warmup=3, seconds=event_seconds)
    spaced: dict[str, Runner] = {}
    for name, runner in runners.items():
        spaced |= {name: runner, f"rest after {name}": lambda batch: time.sleep(REST)}
    timings = interleave(spaced, workload, inputs, rounds, seconds=process_seconds if cpu_time else None)
    return {name: timings[name] for name in runners}


def process_seconds(call: Callable[[], Any]) -> float:
    """How long the threads of this process compute for a call, those of a rival's own among them: other work
    on the machine counts little."""
    start = time.process_time()
    call()
    return time.process_time() - start


def gpu_is_lost() -> bool:
    """Whether an error, as an illegal access is one, has left this process's GPU of no use: every later call
    fails, and only another process can use the GPU. It waits for what the GPU is at."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def rows(
    timings: Mapping[str, Timing], first_rival: str, extra: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """A row for each runner: milliseconds per batch, sequences and real tokens per second, and how many times
    as fast as `first_rival` it is.

    speedup_vs_rival is the median over rounds of (rival's seconds / this runner's), from the same rounds.
    extra: more fields for each runner's row.
    """
    origin = stamp()
    lines = []
    for name, timing in timings.items():
        workload = timing.workload
        lines.append(
            {
                "workload": workload.name,
                "runner": name,
                "sequences": workload.sequences,
                "real_tokens": workload.tokens,
                **{f"ms_p{p}": round(timing.ms(p), 3) for p in (20, 50, 80)},
                "sequences_per_s": round(timing.sequences_per_s, 2),
                "tokens_per_s": round(timing.sequences_per_s * workload.tokens / workload.sequences, 1),
                "rival": first_rival,
                "speedup_vs_rival": round(timing.speedup_over(timings[first_rival]), 3),
                "rounds": len(timing.seconds),
                **extra.get(name, {}),
                **origin,
            }
        )
    return lines


def cpu_seconds(process: int) -> float:
    """The seconds that the threads of a process have computed so far, by the kernel's own clock of it: /proc
    counts in hundredths, of which short texts take a few."""
    return time.clock_gettime((~process << 3) | 2)  # as clock_getcpuclockid(3) numbers these clocks


def stamp() -> Row:
    """When, where and how a row was measured: its command, date, machine and versions."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        **{f"machine_{key}": value for key, value in machine().items()},
        **{f"version_{key}": value for key, value in (versions() | rival_versions()).items()},
    }


def rival_versions() -> dict[str, str | None]:
    """Versions of the rivals' packages; None where one is not installed."""
    installed: dict[str, str | None] = {}
    for package in RIVAL_PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            installed[package] = None
    return installed


def best_rival(timings: Mapping[str, Timing], name: str, others: Sequence[str]) -> dict[str, Any]:
    """The fastest of `others` by the median, and how many times as fast as it `name` is: the median of the
    rounds' ratios. It is empty where there are no others."""
    if not others:
        return {}
    best = min(others, key=lambda other: timings[other].ms(50))
    return {"best_rival": best, "speedup_vs_best_rival": round(timings[name].speedup_over(timings[best]), 3)}


def out_path(given: Path | None, benchmark: str, device: str = "cuda") -> Path:
    """The CSV that a benchmark will write: `given`, or `result_path`. OSError where it cannot be written,
    which is better known before the measurement than after it."""
    path = given or result_path(benchmark, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a CSV is written")
    with tempfile.TemporaryFile(dir=path.parent):
        return path


def run(main: Callable[[], int | None]) -> NoReturn:
    """End the script with main's exit status. What the user can mend, as a file that is not there, is one
    line on stderr and status 2, as in our commands, and not a traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as error:
        print(f"{Path(sys.argv[0]).stem}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def result_path(benchmark: str, device: str = "cuda") -> Path:
    """results/BENCHMARK-MACHINE.csv: one file per kind of machine; a GPU names it unless `device` is cpu."""
    return RESULTS / f"{file_stem(benchmark, machine(), device)}.csv"


def file_stem(benchmark: str, description: Mapping[str, Any], device: str = "cuda") -> str:
    """BENCHMARK-MACHINE, in small letters, digits and hyphens, from what `machine` says of a machine."""
    accelerator = description["accelerator"] if device == "cuda" else None
    kind = re.sub(r"[^a-z0-9]+", "-", str(accelerator or description["processor"]).lower()).strip("-")
    return f"{benchmark}-{kind}-{description.get('threads', description['cores'])}t"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows, with one header; an earlier file of the same machine is replaced, or left as it was
    where this does not come to its end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV that `write_rows` wrote; numbers as numbers, empty cells left out."""
    with path.open(newline="", encoding="utf-8") as file:
        return [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def _number(text: str) -> Any:
    if text.isalpha() and text not in ("nan", "inf"):
        return text  # float takes "infinity", which is also the name of a server
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
