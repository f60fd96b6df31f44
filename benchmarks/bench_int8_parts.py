"""Where the time of an encoder goes: products, quantising, GELU, LayerNorm, attention, waiting.

A child process runs `ops.encoder` on random weights under `perf record`; every sample's address is looked up
among the inlined functions of the extension, which says what part of a layer it belongs to. Milliseconds are
of processor time, of all threads together, so that other work on the machine is not counted. With
--instructions the child runs under callgrind instead, which counts instructions; valgrind has no AVX-512, so
these are the AVX2 kernels'. Beside the parts stands what torch's own fp32 product of two large matrices
reaches here: the peak of a core, for all that is known of it without its clock. Needs `perf` or `valgrind`,
binutils, and an extension with line numbers: `PRUNED_OPS_BUILD_LINES=1 python setup.py build_ext --inplace`.
Usage: python benchmarks/bench_int8_parts.py [--threads 1] [--dtypes int8 float32] [--seconds 4] [--save NAME]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import harness
from harness import Row
from option_types import above, at_least
from pruned_ops import ops
from pruned_ops.ops.backends.cpu import extension
from pruned_ops.ops.panels import (
    attention_part,
    ffn_part,
    inner_width,
    is_attention,
    to_int8_panels,
    to_panels,
)

# Hidden size, FFN width, layers, heads. BERT-base's layers are alike: a third of them tells the same.
MODELS = {"MiniLM-L6": (384, 1536, 6, 12), "BERT-base, 4 layers": (768, 3072, 4, 12)}
BATCHES = ((1, 128), (8, 128), (8, 384))
# The first pattern that some function around an address matches, innermost first, names its part.
PARTS = (
    ("waiting", r"libgomp|libiomp|gomp_"),
    ("attention: softmax", r"::(exponentiate|powers|(rough_)?power_of_two|largest_score|new_maximum)\b"),
    ("attention: laying out", r"::(lay_out\w*|transpose_\w+)\b|transpose_mxn"),
    ("attention: products", r"\bmultiply(_amx_row|(_pairs)?<[^\n]*NothingAhead)|::(score|add_block)\b"),
    ("GELU", r"gelu_kernel\.h"),
    ("quantising", r"::(quantize_rows?|top_of|rounded\w*)\b"),
    ("LayerNorm", r"layer_norm"),
    ("products", r"\bmultiply(_int8\w*|_pairs|_amx)?\b"),
    ("attention: rest", r"attention\w*\.(h|cpp)"),
    ("scales and bias", r"tile_kernel\.h|linear_kernel\.h"),
)  # fmt: skip
REST = "rest"
DTYPES = ("int8", "float32")
SQUARE = 1024  # rows and columns of the matrices whose product shows the peak


def arguments(model: str, dtype: str, batch: int, length: int) -> list[object]:
    """`ops.encoder`'s arguments for a dense model of this shape with random weights of `dtype`."""
    hidden, width, layers, heads = MODELS[model]
    torch.manual_seed(0)
    weights: list[Tensor] = []
    widths = [attention_part(heads), ffn_part(width)] * layers
    head_dim = hidden // heads
    for part in widths:
        inner = inner_width(part, head_dim)
        for out, inputs in ((3 * inner if is_attention(part) else inner, hidden), (hidden, inner)):
            weight = torch.randn(out, inputs) / inputs**0.5
            if dtype == "int8":
                panels, scales = to_int8_panels(weight)
                weights += [panels, torch.stack([torch.zeros(out), scales])]
            else:
                weights += [to_panels(weight), torch.zeros(out)]
        weights += [torch.ones(hidden), torch.zeros(hidden)]
    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32)
    return [torch.randn(batch * length, hidden), bounds, length, weights, widths, head_dim, 1e-12]


def multiply_adds(model: str, tokens: int) -> int:
    """Those of the linear layers."""
    hidden, width, layers, _ = MODELS[model]
    return tokens * layers * hidden * (4 * hidden + 2 * width)


def sgemm() -> float:
    """The most billions of multiply-adds a second of a core in torch's fp32 product, in ten tries."""
    left, right = torch.randn(SQUARE, SQUARE), torch.randn(SQUARE, SQUARE)
    best = 0.0
    for _ in range(10):
        start = time.process_time()
        torch.mm(left, right)
        best = max(best, SQUARE**3 / (time.process_time() - start) / 1e9)
    return best


def child(model: str, dtype: str, batch: int, length: int, threads: int, seconds: float) -> None:
    """Run the encoder for so long, three times at least, and print what the parent has to know: how often it
    ran in all, the milliseconds of a run between `start` and `end`, and the peak."""
    torch.set_num_threads(threads)
    inputs = arguments(model, dtype, batch, length)
    calls, used = 0, 0.0
    with torch.inference_mode():
        for _ in range(3):
            ops.encoder(*inputs)
        start, used = time.monotonic(), time.process_time()
        while calls < 3 or time.monotonic() < start + seconds:
            ops.encoder(*inputs)
            calls += 1
        end, used = time.monotonic(), time.process_time() - used
    maps = Path("/proc/self/maps").read_text().splitlines()
    bases = {line.split()[-1]: line.split("-")[0] for line in reversed(maps) if " 00000000 " in line}
    base = int(bases[os.path.realpath(extension.__file__)], 16)  # type: ignore[union-attr]
    facts = {"base": base, "start": start, "end": end, "ms": 1e3 * used / calls, "calls": calls + 3}
    facts["peak"] = sgemm() if seconds else 0.0
    print(json.dumps(facts))


def child_command(model: str, dtype: str, batch: int, length: int, threads: int, seconds: float) -> list[str]:
    run = [model, dtype, batch, length, threads, seconds]
    return [sys.executable, str(Path(__file__).resolve()), "--child", *map(str, run)]


def samples(run: list[str], folder: Path) -> tuple[dict[str, float], Counter[str]]:
    """Run a child under perf: its facts, and how many samples fell on each address or foreign library."""
    data = folder / "perf.data"
    # The kernel's clock interrupts every thread that runs 4,000 times a second.
    record = [
        "perf",
        "record",
        "-q",
        "-e",
        "cpu-clock",
        "-F",
        "4000",
        "-k",
        "CLOCK_MONOTONIC",
        "-o",
        str(data),
    ]
    facts = json.loads(subprocess.run([*record, *run], check=True, capture_output=True, text=True).stdout)
    script = ["perf", "script", "-i", str(data), "-F", "time,ip,dso"]
    counts: Counter[str] = Counter()
    for line in subprocess.run(script, check=True, capture_output=True, text=True).stdout.splitlines():
        match = re.match(r"\s*([\d.]+):\s+([0-9a-f]+) \((.*)\)", line)
        if match and facts["start"] <= float(match[1]) <= facts["end"]:
            ours = os.path.realpath(match[3]) == os.path.realpath(extension.__file__)  # type: ignore[union-attr]
            counts[hex(int(match[2], 16) - facts["base"]) if ours else Path(match[3]).name] += 1
    return facts, counts


def instructions(run: list[str], folder: Path) -> tuple[dict[str, float], Counter[str]]:
    """Run a child under callgrind: its facts, and how many instructions of a call lie at each address."""
    out = folder / "callgrind.out"
    grind = ["valgrind", "--tool=callgrind", "--dump-instr=yes", f"--callgrind-out-file={out}"]
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    process = subprocess.run([*grind, *run], check=True, capture_output=True, text=True, env=environment)
    facts = json.loads(process.stdout)
    counts: Counter[str] = Counter()
    for address, count in costs(out.read_text()):
        counts[hex(address)] += count / facts["calls"]  # type: ignore[assignment]
    return facts, counts


def costs(text: str) -> Iterator[tuple[int, int]]:
    """The addresses of the extension in a callgrind file, relative to it, and each one's own instructions."""
    name = os.path.realpath(extension.__file__)  # type: ignore[union-attr]
    number, ours, called, address = None, False, False, 0
    for line in text.splitlines():
        if match := re.match(r"(c?ob)=\((\d+)\)(?: (.*))?", line):
            if match[3] and os.path.realpath(match[3]) == name:
                number = match[2]  # a name stands at its first place alone, which may be a callee's
            if match[1] == "ob":
                ours = match[2] == number
        elif line.startswith("calls="):
            called = True  # the next line is what the callee cost
        elif match := re.match(r"(0x[0-9a-f]+|[+-]\d+|\*) (?:[+-]?\d+|\*) (\d+)$", line):
            place = match[1]
            address = address if place == "*" else int(place, 0) + (0 if place[:2] == "0x" else address)
            if ours and not called:
                yield address, int(match[2])
            called = False


def parts(found: Counter[str]) -> Counter[str]:
    """Addresses and libraries -> the parts of a layer that they belong to."""
    addresses = [place for place in found if place.startswith("0x")]
    command = ["addr2line", "-a", "-i", "-f", "-C", "-e", extension.__file__]  # type: ignore[union-attr]
    lines = subprocess.run(
        [*command, *addresses] if addresses else ["true"], check=True, capture_output=True, text=True
    ).stdout
    summed: Counter[str] = Counter()
    blocks = re.split(r"^0x[0-9a-f]+\n", lines, flags=re.MULTILINE)[1:]
    if addresses and all("??:" in block for block in blocks):
        sys.exit(
            "the extension has no line numbers: PRUNED_OPS_BUILD_LINES=1 python setup.py build_ext --inplace"
        )
    for address, block in zip(addresses, blocks, strict=True):
        summed[part_of(block)] += found[address]
    for place in found.keys() - set(addresses):
        summed[part_of(place)] += found[place]
    return summed


def part_of(functions: str) -> str:
    """The part that these functions and their files, innermost first, belong to."""
    return next((part for part, pattern in PARTS if re.search(pattern, functions)), REST)


def measure(model: str, dtype: str, batch: int, length: int, options: argparse.Namespace) -> list[Row]:
    seconds = 0 if options.instructions else options.seconds
    run = child_command(model, dtype, batch, length, options.threads, seconds)
    kernels = extension.int8_capability() if dtype == "int8" else extension.cpu_capability()  # type: ignore
    with tempfile.TemporaryDirectory() as folder:
        facts, place_counts = (instructions if options.instructions else samples)(run, Path(folder))
    counted = parts(place_counts)
    total = sum(counted.values())
    return [
        {
            "model": model,
            "dtype": dtype,
            "batch": f"{batch}x{length}",
            "kernels": "AVX2" if options.instructions else kernels,
            "part": part,
            "share": round(count / total, 4),
            **(
                {"million_instructions": round(count / 1e6, 2)}
                if options.instructions
                else {
                    "cpu_ms": round(facts["ms"] * count / total, 3),
                    "sgemm_gmacs": round(facts["peak"], 1),
                }
            ),
            "linear_multiply_adds": multiply_adds(model, batch * length),
            **harness.stamp(),
        }
        for part, count in counted.most_common()
    ]


def show(rows: list[Row], console: Console, column: str) -> None:
    """Print a table of the parts, a column for each batch of a model."""
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in rows):
        of_model = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        batches = list(dict.fromkeys(row["batch"] for row in of_model))
        table = Table("part", *batches, title=f"{model}, {dtype}: {column.replace('_', ' ')}")
        for name in [part for part, _ in PARTS] + [REST]:
            cells = {row["batch"]: row for row in of_model if row["part"] == name}
            if cells:
                table.add_row(
                    name,
                    *(
                        f"{cells[b][column]:.2f} ({cells[b]['share']:.0%})" if b in cells else ""
                        for b in batches
                    ),
                )
        sums = [sum(row[column] for row in of_model if row["batch"] == b) for b in batches]
        table.add_row("in all", *(f"{value:.2f}" for value in sums))
        if column == "cpu_ms":
            products = [row for row in of_model if row["part"] == "products"]
            speeds = [row["linear_multiply_adds"] / row["cpu_ms"] / 1e6 for row in products]
            table.add_row("products, billion a second", *(f"{speed:.1f}" for speed in speeds))
            table.add_row("torch's fp32 product", *(f"{row['sgemm_gmacs']:.1f}" for row in products))
        console.print(table)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, dtype, batch, length, threads, seconds = sys.argv[2:]
        return child(model, dtype, int(batch), int(length), int(threads), float(seconds))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=1, help="of the runtime (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=above(0), default=4, help="that each batch runs (default: %(default)s)"
    )
    names = [f"{batch}x{length}" for batch, length in BATCHES]
    parser.add_argument("--batches", nargs="*", default=names, choices=names, help="sequences x tokens")
    parser.add_argument("--instructions", action="store_true", help="count instructions of the AVX2 kernels")
    parser.add_argument("--dtypes", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--save", metavar="NAME", help="write results/NAME-MACHINE.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)  # what the rows name
    rows = [
        row
        for model in options.models
        for dtype in options.dtypes
        for batch, length in (BATCHES[:1] if options.instructions else BATCHES)
        if f"{batch}x{length}" in options.batches
        for row in measure(model, dtype, batch, length, options)
    ]
    show(rows, Console(width=110), "million_instructions" if options.instructions else "cpu_ms")
    if options.save:
        path = harness.result_path(options.save, "cpu")
        harness.write_rows(path, rows)
        print(path)


if __name__ == "__main__":
    harness.run(main)
