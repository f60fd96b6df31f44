"""pruned-ops: run, time, check and convert encoders, stock or pruned."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from pruned_ops.command_line import CommandParser, status_of_a_broken_pipe
from pruned_ops.commands import (
    ask,
    bench,
    check,
    convert,
    info,
    latency_table,
    quantize,
    serve,
    trim_vocabulary,
)

# In the order of their help: what most people need comes first.
COMMANDS = (info, check, bench, quantize, serve, ask, convert, trim_vocabulary, latency_table)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit status."""
    return run(parse(sys.argv[1:] if argv is None else argv))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command. No torch is needed here: `pruned_cli` parses before it imports torch."""
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["pruned-ops", *argv])
    return arguments


def build_parser() -> CommandParser:
    """The parser, with every command's options."""
    parser = CommandParser.of_program("pruned-ops", __doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command that was parsed; returns the exit status. What the user can mend is one line on stderr,
    not a traceback."""
    import torch  # which the package has imported by now, and the parser does without

    try:
        status = arguments.run(arguments) or 0  # a command that has no status of its own succeeded
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        return status_of_a_broken_pipe()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"pruned-ops {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
