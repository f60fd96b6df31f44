"""pruned-ops: info | latency-table | import | export | ask | check | bench."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pruned_ops.checkpoints.export import add_command as add_export
from pruned_ops.commands.ask import add_command as add_ask
from pruned_ops.commands.bench import add_command as add_bench
from pruned_ops.commands.check import add_command as add_check
from pruned_ops.measure.latency import LatencyTable, measure_table
from pruned_ops.measure.timing import Workload, machine, versions
from pruned_ops.ops.backends import cpu
from pruned_ops.ops.registry import BACKENDS, OPS, REFERENCE
from pruned_ops.qa.questions import lengths_of
from pruned_ops.shape import LayerShape


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What the user can mend is one line on stderr, not a
    traceback."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["pruned-ops", *argv])
    try:
        return arguments.run(arguments) or 0  # a command that has no status of its own succeeded
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"pruned-ops {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The command line, with every default shown."""
    parser = argparse.ArgumentParser(prog="pruned-ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("info", help="which backends can run here, and why others cannot")
    one.set_defaults(run=lambda _: info())
    one = commands.add_parser(
        "latency-table",
        help="measure what layers of every size take on this machine",
        description="Measure what layers of every size take on this machine. Leave it alone meanwhile: what "
        "else runs is measured along.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    one.set_defaults(run=latency_table)
    one.add_argument("file", type=Path, metavar="FILE", help="where the table is written, as JSON")
    one.add_argument("--model", type=Path, required=True, help="folder of a BERT or RoBERTa checkpoint")
    lengths = one.add_mutually_exclusive_group(required=True)
    lengths.add_argument("--data", type=Path, help="SQuAD-format JSON whose questions give the lengths")
    lengths.add_argument("--length", type=int, help="tokens of every sequence, in place of --data")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    one.add_argument("--device", default=device, help=f"where the model will run, in fp32 (here: {device})")
    one.add_argument("--batch-size", type=int, default=8)
    one.add_argument("--batches", type=int, default=16, help="batches of the workload")
    one.add_argument("--max-length", type=int, default=384, help="tokens of a window of --data")
    one.add_argument("--stride", type=int, default=128, help="tokens that two windows of --data share")
    one.add_argument("--rounds", type=int, default=5, help="medians are over so many")
    one.add_argument("--overwrite", action="store_true", help="replace the latency table that is in FILE")
    one = commands.add_parser("import", help="take in a checkpoint that another tool pruned")
    one.set_defaults(run=import_foreign)
    one.add_argument("folder", type=Path, metavar="DIR", help="config.json and weights, masks beside them")
    one.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned_ops checkpoint")
    one.add_argument("--head-dim", type=int, help="a head's width (default: hidden_size / heads)")
    add_export(commands)
    add_ask(commands)
    add_check(commands)
    add_bench(commands)
    return parser


def info() -> None:
    """Versions, machine, backends with the reason where one is missing, and the order of backends for each
    op."""
    for name, value in {**versions(), **machine()}.items():
        print(f"{name:>15}  {value if value is not None else '-'}")
    if cpu.extension is not None:
        built = cpu.extension.build_info()
        features = [name for name, there in cpu.extension.cpu_features().items() if there]
        print(f"{'extension':>15}  built with torch {built['torch']}, {built['compiler']}")
        print(f"{'kernels':>15}  {', '.join(built['capabilities'])}; runs {cpu.extension.cpu_capability()}")
        cuda = built.get("cuda")  # an extension of before there were CUDA kernels does not say
        compiled = f"CUDA {cuda['version']}, for {cuda['architectures']}" if cuda else "not built"
        print(f"{'cuda kernels':>15}  {compiled}")
        print(f"{'cpu features':>15}  {', '.join(features) or 'none of those asked about'}")
    print("backends")
    for backend in BACKENDS.values():
        state = "available" if backend.missing is None else f"not available: {backend.missing}"
        print(f"{backend.name:>15}  {state} ({backend.description})")
    print(f"{REFERENCE:>15}  available (plain PyTorch; runs what no backend takes)")
    print("ops, with their backends in the order in which they are asked")
    for op in OPS.values():
        print(f"{op.name:>22}  {', '.join([*op.kernels, REFERENCE])}")


def import_foreign(arguments: argparse.Namespace) -> None:
    """Write what `import_checkpoint` recognises in DIR, with the tokenizer files that lie there, to OUT."""
    from pruned_ops.checkpoints.importing import TOKENIZER_FILES, read_foreign

    out: Path = arguments.out
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; give another OUT")
    model, notes = read_foreign(arguments.folder, arguments.head_dim)
    model.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (arguments.folder / name).is_file():
            shutil.copyfile(arguments.folder / name, out / name)
    for note in notes:
        print(f"  {note}")
    shapes = ", ".join(f"{s['num_heads']}/{s['ffn_width']}" for s in model.config.layer_shapes)
    print(f"heads/FFN width a layer: {shapes}")
    print(f"written to {out}")


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


if __name__ == "__main__":
    sys.exit(main())
