"""pruned-ops: info | latency-table | import | export | ask | check | bench."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import torch

from pruned_ops.commands.ask import add_command as add_ask
from pruned_ops.commands.bench import add_command as add_bench
from pruned_ops.commands.check import add_command as add_check
from pruned_ops.commands.convert import add_command as add_export
from pruned_ops.commands.convert import import_foreign
from pruned_ops.commands.info import info
from pruned_ops.commands.latency_table import latency_table


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


if __name__ == "__main__":
    sys.exit(main())
