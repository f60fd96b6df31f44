"""`pruned-ops latency-table`: measure a latency table, write it, print what it holds."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from pruned_ops.measure.latency import LatencyTable
from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload
from pruned_ops.qa.questions import lengths_of
from pruned_ops.shape import LayerShape


def latency_table(arguments: argparse.Namespace) -> None:
    """Measure a latency table, write it, and show what is in it."""
    start = time.perf_counter()
    for name in ("batch_size", "batches", "rounds", "length"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; at least 1 is needed")
    check_output(arguments.file, arguments.overwrite)
    config = _load("config", arguments.model)
    size, batches = arguments.batch_size, arguments.batches
    if arguments.data is None:
        workload = Workload.fixed(arguments.length, size, batches)
    else:
        tokenizer = _load("tokenizer", arguments.model)
        cut = (arguments.max_length, arguments.stride)
        lengths = lengths_of(arguments.data, tokenizer, *cut, needed=size * batches)
        workload = Workload.arrival_order(lengths, size, batches)
    table = measure_table(
        config, workload, arguments.rounds, arguments.device, command=arguments.command_line
    )
    table.save(arguments.file)
    print_table(table, config.num_hidden_layers)
    print(f"written to {arguments.file} after {time.perf_counter() - start:.0f} s")


def check_output(path: Path, overwrite: bool) -> None:
    """OSError or ValueError where a table cannot be written to `path`, or where that would replace what is
    none: found out before a minute of measuring."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder; FILE is written into it")
    if not os.access(path.absolute().parent, os.W_OK):
        raise PermissionError(f"{path.parent} cannot be written to")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; FILE names a file")
    if path.exists():
        if not overwrite:
            raise FileExistsError(f"{path} exists; --overwrite replaces it")
        try:
            LatencyTable.load(path)
        except ValueError as error:
            raise ValueError(f"{error}; it is not replaced") from error


def _load(what: str, folder: Path) -> Any:
    """The config or the tokenizer in a checkpoint's folder; OSError or ValueError where there is none."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    needed = ("config.json",) if what == "config" else ("tokenizer.json", "vocab.txt", "vocab.json")
    if not any((folder / name).is_file() for name in needed):
        raise FileNotFoundError(f"{folder} holds no {what}: {' or '.join(needed)} is needed")
    auto = AutoConfig if what == "config" else AutoTokenizer
    try:
        return auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # each library on the way raises its own kind for a broken file
        raise ValueError(f"the {what} in {folder} cannot be loaded: {error}") from error


def print_table(table: LatencyTable, num_layers: int) -> None:
    """What parts of a few sizes take, the alignment, and a whole dense model of so many layers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    shown = Table(title=f"ms per batch of {table.workload.name}, one layer")
    shown.add_column("part")
    for column in ("none", "a quarter", "half", "dense"):
        shown.add_column(column, justify="right")
    heads, width = table.attention[-1][0], table.ffn[-1][0]
    for name, dense, ms in (("num_heads", heads, table.attention_ms), ("ffn_width", width, table.ffn_ms)):
        sizes = (0, dense // 4, dense // 2, dense)
        shown.add_row(name, *(f"{ms(size):.2f} ({size})" for size in sizes))
    console.print(shown)
    dense_ms, empty_ms = (
        table.predict([shape] * num_layers) for shape in (LayerShape(heads, width), LayerShape(0, 0))
    )
    costs = ", ".join(f"{align}: {cost:.3f}" for align, cost in table.alignment)
    print(
        f"{num_layers} dense layers take {dense_ms:.1f} ms, empty ones {empty_ms:.1f}, of which "
        f"{table.base_ms:.1f} are no layer's"
    )
    print(f"relative cost of FFN widths by alignment: {costs}; {table.align} is enough")
