"""`pruned-ops bench`: how long a batch takes here, in our runtime and in plain Hugging Face."""

from __future__ import annotations

import argparse
import copy
import io
import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pruned_ops.checkpoints.loading import load_folder, load_tokenizer
from pruned_ops.measure.launch_bound import HALF, TWIN, LaunchBound, half_of, tiny_twin
from pruned_ops.measure.timing import Runner, Timing, Workload, interleave, machine, versions
from pruned_ops.models.inputs import longest_sequence
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import record
from pruned_ops.qa.questions import lengths_of
from pruned_ops.runtime.optimize import optimize

OURS, THEIRS = "pruned_ops", "Hugging Face"
WINDOW = 384  # tokens of a window of --data, at most


@dataclass(frozen=True)
class Row:
    """One model in one runtime. p50_ms, p90_ms: of a batch, over all batches of all rounds. speedup: over
    Hugging Face's time of the same model. backends: op -> who ran it (ours)."""

    model: str
    runtime: str
    dtype: str
    p50_ms: float
    p90_ms: float
    sequences_per_s: float
    macs: float
    speedup: float
    backends: Mapping[str, str]


@dataclass(frozen=True)
class Benchmark:
    """What came out. against_dense: our dense time over our pruned time, with --dense."""

    title: str
    rows: tuple[Row, ...]
    against_dense: float | None
    launch_bound: LaunchBound

    @property
    def sentences(self) -> list[str]:
        """What the times say."""
        if self.against_dense is None:
            return [self.launch_bound.sentence]
        macs = {row.model: row.macs for row in self.rows}
        faster = (
            f"the pruned model is {self.against_dense:.2f} times as fast as the dense one, both in our "
            f"runtime, with {macs['pruned'] / max(1, macs['dense']):.3f} of its multiply-accumulates"
        )
        return [faster, self.launch_bound.sentence]


def add_command(commands: Any) -> None:
    """The command's arguments."""
    one = commands.add_parser(
        "bench",
        help="time a checkpoint here, beside Hugging Face's runtime and the dense model",
        description="Time the checkpoint in DIR in our runtime, and as saved in plain Hugging Face (eager, "
        "sdpa, padded); with --dense that model, too. All take the same batches in turn, in one process. "
        "Leave the machine alone meanwhile.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    one.set_defaults(run=run)
    one.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint")
    one.add_argument("--dense", type=Path, metavar="DIR2", help="the checkpoint before pruning")
    lengths = one.add_mutually_exclusive_group()
    lengths.add_argument(
        "--lengths", "--length", type=int, nargs="+", default=[128], metavar="N",
        help="tokens of a sequence; several are mixed in the batches",
    )  # fmt: skip
    lengths.add_argument("--data", type=Path, help="SQuAD-format JSON, or .jsonl, that gives the lengths")
    one.add_argument("--batch-size", type=int, default=8)
    one.add_argument("--batches", type=int, default=4, help="different batches")
    one.add_argument("--rounds", type=int, default=9, help="how often each batch is timed")
    one.add_argument(
        "--padding", choices=["longest", "fixed"], default="longest",
        help="batches are as long as their longest sequence, or all as the longest of all",
    )  # fmt: skip
    one.add_argument("--dtype", choices=["fp32", "int8"], default="fp32", help="of our runtime's linears")
    one.add_argument("--threads", type=int, help="of the CPU (as torch has it where it is not given)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one.add_argument("--device", default=device, help="where the models run")
    one.add_argument("--html", type=Path, metavar="FILE", help="draw it, as a page of its own")
    one.add_argument("--overwrite", action="store_true", help="replace the file of --html")


def run(arguments: argparse.Namespace) -> None:
    """Measure, show, and draw where that is asked for."""
    check_arguments(arguments)
    folders = {"pruned": arguments.folder} if arguments.dense else {"model": arguments.folder}
    if arguments.dense:
        folders["dense"] = arguments.dense
    models = {name: load_folder(folder, arguments.device) for name, folder in folders.items()}
    workload = make_workload(arguments)
    with _threads(arguments.threads):
        found = measure(models, workload, arguments.rounds, arguments.dtype, arguments.padding == "fixed")
        show(found)
        if arguments.html is not None:
            write_page(found, arguments.html, arguments.command_line)
            print(f"drawn in {arguments.html}")


def check_arguments(arguments: argparse.Namespace) -> None:
    """OSError or ValueError for what can be known to fail before a model is loaded."""
    for name in ("batch_size", "batches", "rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
    if min(arguments.lengths) < 1:
        raise ValueError(f"--lengths has {min(arguments.lengths)}; at least 1 is needed")
    page: Path | None = arguments.html
    if page is None:
        return
    if page.is_dir() or not page.absolute().parent.is_dir():
        raise FileNotFoundError(f"{page} cannot be written: --html names a file in a folder that is there")
    if not os.access(page.absolute().parent, os.W_OK):
        raise PermissionError(f"{page.parent} cannot be written to")
    if page.exists() and not arguments.overwrite:
        raise FileExistsError(f"{page} exists; --overwrite replaces it")


def make_workload(arguments: argparse.Namespace) -> Workload:
    """The batches' lengths: of a file's questions in arrival order, or those given, mixed (seed 0)."""
    size, batches = arguments.batch_size, arguments.batches
    if arguments.data is not None:
        tokenizer = load_tokenizer(str(arguments.folder))
        return Workload.arrival_order(
            lengths_of(arguments.data, tokenizer, WINDOW, needed=size * batches), size, batches
        )
    given: list[int] = arguments.lengths
    if len(given) == 1:
        return Workload.fixed(given[0], size, batches)
    mixed = [given[i % len(given)] for i in range(size * batches)]
    random.Random(0).shuffle(mixed)
    cut = tuple(tuple(mixed[first : first + size]) for first in range(0, len(mixed), size))
    return Workload(f"mixed-b{size}", cut)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(
    models: Mapping[str, Any], workload: Workload, rounds: int, dtype: str = "fp32", fixed: bool = False
) -> Benchmark:
    """Time saved models, each in both runtimes; the first is also looked at for whether it is launch-bound.

    fixed: all batches are padded to the longest sequence of all. Errors: ValueError for models that cannot
    take the same inputs, and as `optimize`'s.
    """
    inputs = _inputs(list(models.values()), workload, fixed)
    runners: dict[str, Runner] = {}
    ours: dict[str, Any] = {}
    kind = "int8" if dtype == "int8" else None
    for name, model in models.items():
        ours[name] = optimize(copy.deepcopy(model), dtype=kind)
        runners[f"{OURS} {name}"] = _runner(ours[name])
        runners[f"{THEIRS} {name}"] = _runner(model)
    first = next(iter(models))
    runners[HALF] = lambda batch: ours[first](**half_of(batch))
    runners[TWIN] = _runner(optimize(tiny_twin(models[first]), dtype=kind))
    backends = {f"{OURS} {name}": _backends(model, inputs[0]) for name, model in ours.items()}
    timings = interleave(runners, workload, inputs, rounds, warmup=2)
    rows = []
    for name, model in models.items():
        shape = model_shape(model)
        macs = sum(shape.macs(batch) for batch in workload.batches) / len(workload.batches)
        base = timings[f"{THEIRS} {name}"]
        for runtime, precision in ((OURS, dtype), (THEIRS, "fp32")):
            key = f"{runtime} {name}"
            rows.append(_row(name, runtime, precision, timings[key], macs, base, backends.get(key, {})))
    against = None
    if "dense" in models:
        against = timings[f"{OURS} {first}"].speedup_over(timings[f"{OURS} dense"])
    bound = LaunchBound.of(models[first], workload, timings[f"{OURS} {first}"], timings[HALF], timings[TWIN])
    return Benchmark(_title(workload, inputs, fixed), tuple(rows), against, bound)


def _inputs(models: list[Any], workload: Workload, fixed: bool) -> list[dict[str, Tensor]]:
    configs = [model.config for model in models]
    longest = max(map(max, workload.batches))
    allowed = min(map(longest_sequence, configs))
    if longest > allowed:
        raise ValueError(f"the sequences have {longest} tokens; the model's position table allows {allowed}")
    padding = {config.pad_token_id for config in configs}
    if len(padding) > 1:
        raise ValueError("the two models pad with different ids, so they do not take the same inputs")
    vocabulary = min(config.vocab_size for config in configs)
    return workload.inputs(vocabulary, padding.pop(), models[0].device, longest if fixed else None)


def _runner(model: Any) -> Runner:
    return lambda batch: model(**batch)


def _backends(model: Any, batch: dict[str, Tensor]) -> dict[str, str]:
    with torch.inference_mode(), record() as ran:
        model(**batch)
    return {op: ", ".join(sorted(counts)) for op, counts in ran.items()}


def _row(
    model: str, runtime: str, dtype: str, timing: Timing, macs: float, base: Timing, ran: Mapping[str, str]
) -> Row:
    p50, p90 = timing.call_ms(50), timing.call_ms(90)
    return Row(model, runtime, dtype, p50, p90, timing.sequences_per_s, macs, timing.speedup_over(base), ran)


def _title(workload: Workload, inputs: list[dict[str, Tensor]], fixed: bool) -> str:
    padded = sum(batch["input_ids"].numel() for batch in inputs)
    where = machine()
    device = inputs[0]["input_ids"].device
    place = where["accelerator"] if device.type == "cuda" else f"{where['processor']}"
    torch_version = versions()["torch"]
    return (
        f"{workload.name}: {len(workload.batches)} batches, {workload.tokens:,} tokens, {padded:,} with "
        f"padding to {'the longest of all' if fixed else 'the longest of a batch'}; {place}, "
        f"threads: {where['threads']}, torch {torch_version}"
    )


def show(found: Benchmark) -> None:
    """The times, what they say of one another, and which backend ran each op."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for name in ("model", "runtime", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("ms p50", "ms p90", "seq/s", "speed-up", "M MACs"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found.rows:
        numbers = (f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}", f"{row.sequences_per_s:.1f}")
        table.add_row(
            row.model, row.runtime, row.dtype, *numbers, f"{row.speedup:.2f}x", f"{row.macs / 1e6:,.1f}"
        )
    print(found.title)
    Console().print(table)
    print("milliseconds, and millions of MACs, are a batch's; speed-ups are over Hugging Face's runtime")
    for row in found.rows:
        if row.backends:
            ran = ", ".join(f"{op}: {names}" for op, names in row.backends.items())
            print(f"{row.model} ran {ran}")
    for sentence in found.sentences:
        print(sentence)


if TYPE_CHECKING:
    from pruned_ops.commands.bench import Benchmark

_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,td:nth-child(2),td:nth-child(3){text-align:left}svg{max-width:100%;height:auto}"
)
_COLUMNS = ("model", "runtime", "dtype", "ms p50", "ms p90", "sequences/s", "against Hugging Face")


def write_page(found: Benchmark, path: Path, command: str) -> None:
    """A drawing of the times, the table, and the sentences; the file is there whole, or as it was before."""
    cells = [
        (row.model, row.runtime, row.dtype, f"{row.p50_ms:.2f}", f"{row.p90_ms:.2f}",
         f"{row.sequences_per_s:.1f}", f"{row.speedup:.2f}x")
        for row in found.rows
    ]  # fmt: skip
    head = "".join(f"<th>{escape(name)}</th>" for name in _COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>\n" for line in cells
    )
    said = "".join(f"<p>{escape(one)}.</p>\n" for one in found.sentences)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>pruned-ops bench</title>'
        f"<style>{_STYLE}</style></head><body>\n"
        f"<h1>Milliseconds a batch</h1>\n<p>{escape(found.title)}.</p>\n"
        f"{_drawing(found)}\n<table><tr>{head}</tr>\n{body}</table>\n{said}"
        f"<p><code>{escape(command)}</code></p>\n</body></html>\n"
    )
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)


def _drawing(found: Benchmark) -> str:
    """Bars to p50, whiskers to p90, as SVG."""
    from matplotlib.figure import Figure  # only for those who draw

    rows = found.rows[::-1]
    figure = Figure(figsize=(7.5, 0.8 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [f"{row.model}, {row.runtime} {row.dtype}" for row in rows]
    p50 = [row.p50_ms for row in rows]
    above = [max(0.0, row.p90_ms - row.p50_ms) for row in rows]
    colours = ["#1f77b4" if row.backends else "#b0b0b0" for row in rows]
    axes.barh(names, p50, xerr=[[0.0] * len(rows), above], color=colours, capsize=3)
    axes.set_xlabel("milliseconds a batch: bar to p50, whisker to p90")
    axes.grid(axis="x", alpha=0.3)
    drawn = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(drawn, format="svg", metadata=no_metadata)
    svg = drawn.getvalue()
    return svg[svg.index("<svg") :]  # without the XML prologue, which has no place inside HTML
