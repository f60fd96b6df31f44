"""The parser of `pruned-ops` and `pruned-trainer`. It imports nothing heavy, so that --help is quick."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pruned_ops.shape import checked_int
from pruned_ops.version import __version__

# The status that a shell reports of a program that wrote to a pipe which nobody reads any more.
BROKEN_PIPE = 128 + 13


def status_of_a_broken_pipe() -> int:
    """The exit status where nobody reads on, as in `pruned-ops info | head`; what is left of the output is
    not written when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


class CommandParser(argparse.ArgumentParser):
    """A parser whose help page ends an option's sentence with its default, where it has one and the sentence
    does not say it. The parsers of its commands are of this kind too."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", _Help)
        super().__init__(*arguments, **settings)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's own; paths that begin with ~ lie in the home folder, which a shell says for those
        alone that stand at the beginning of a word."""
        arguments = super().parse_args(args, namespace)
        for name, value in vars(arguments).items():
            if isinstance(value, Path):
                setattr(arguments, name, Path(os.path.expanduser(value)))
        return arguments

    @classmethod
    def of_program(cls, name: str, description: str) -> CommandParser:
        """The parser of a whole program: its commands are added by `add_subparsers`."""
        epilog = f"{name} COMMAND --help shows a command's options, those that most people need first."
        parser = cls(prog=name, description=description, epilog=epilog)
        parser.add_argument("--version", action="version", version=f"{name} {__version__}")
        return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def model_place(text: str) -> str:
    """A folder or a hub name, out of an argument; ~ is the home folder."""
    return os.path.expanduser(text)


def add_device(parser: Any) -> None:
    """Add --device, the place where a model runs."""
    parser.add_argument("--device", help="where the model runs (default: a GPU where there is one)")


def add_dtype(parser: Any, help_text: str, float16: bool = False) -> None:
    """Add --dtype, whose values are fp32 and the dtypes that `optimize` has beside it. float16: also that,
    in which a GPU may compute a whole model."""
    choices = ["fp32", *(["float16"] if float16 else []), "bfloat16", "int8"]
    parser.add_argument("--dtype", choices=choices, default="fp32", help=help_text)


def dtype_of(arguments: argparse.Namespace) -> str | None:
    """The --dtype as `optimize` takes it: None for fp32."""
    dtype: str = arguments.dtype
    return None if dtype == "fp32" else dtype


def say_skipped(skipped: Sequence[str] | None) -> None:
    """Tell on the error stream how many questions were skipped, with the first of them."""
    if skipped:
        number = f"{len(skipped)} bad question{'s' if len(skipped) > 1 else ''}"
        print(f"{number} skipped; the first: {skipped[0]}", file=sys.stderr)


def check_counts(arguments: argparse.Namespace, *names: str) -> None:
    """ValueError that names the first of these options that is given and less than 1."""
    for name in names:
        value = getattr(arguments, name)
        if value is not None:
            checked_int(f"--{name.replace('_', '-')}", value, 1)
