"""`pruned-ops quantize`: write a checkpoint with int8 weights, if that changes its outputs little enough."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.command_line import check_counts, model_place
from pruned_ops.files import TextFile

if TYPE_CHECKING:
    from pruned_ops.checkpoints.quantizing import Measured, Text


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "quantize",
        help="write a checkpoint with int8 weights, if its outputs stay near enough on your texts",
        description="Write the checkpoint MODEL to OUT with the weights of its linear layers in int8. Half "
        "of the texts choose the layers that stay fp32, and the other half must be within the tolerance; "
        "otherwise nothing is written. It takes folders of transformers and of sentence-transformers, and "
        "runs on a CPU that has int8.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "model", type=model_place, metavar="MODEL", help="folder of a checkpoint, or its name on the hub"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the int8 checkpoint")
    parser.add_argument(
        "--texts",
        type=Path,
        required=True,
        metavar="FILE",
        help="texts like those that it will read, in UTF-8, one on a line (a tab separates the two of a "
        "pair); or .jsonl; .gz too",
    )
    parser.add_argument(
        "--text-columns",
        nargs="+",
        metavar="NAME",
        help="of .jsonl, the column that holds the text, or the two of a pair (default: the only string)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="X",
        help="how far the outputs may be off, as a share of how much they vary from text to text (L2 norm; "
        "default: 0.15)",
    )
    parser.add_argument(
        "--limit", type=int, default=512, metavar="N", help="how many of the texts are used, at most"
    )
    parser.add_argument(
        "--fp32-embeddings", action="store_true", help="keep the embeddings in fp32, not rounded to fp16"
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the checkpoint and print what was measured."""
    from pruned_ops.checkpoints.loading import only_errors
    from pruned_ops.checkpoints.quantizing import quantize
    from pruned_ops.runtime.int8_choice import TOLERANCE

    check_counts(arguments, "limit")
    only_errors()
    tolerance = TOLERANCE if arguments.tolerance is None else arguments.tolerance
    texts = read_texts(arguments.texts, arguments.limit, arguments.text_columns)
    report = quantize(arguments.model, arguments.out, texts, tolerance, not arguments.fp32_embeddings)
    show(report)
    print(f"written to {arguments.out}")


def read_texts(path: Path, limit: int, columns: Sequence[str] | None = None) -> list[Text]:
    """The texts of a file, or `limit` of them spread evenly over it. Errors: `TextFile`'s; ValueError for a
    line with more than a pair."""
    from pruned_ops.measure.timing import spread  # imports torch, which --help does not wait for

    texts: list[Text] = []
    file = TextFile(path, columns, in_place=True)
    for number, parts in file.lines():
        if not file.is_json:
            parts = parts[0].split("\t")
        elif columns is None and len(parts) > 1:  # the others may be labels
            raise ValueError(f"line {number} of {path} has {len(parts)} strings: name --text-columns")
        if len(parts) > 2:
            raise ValueError(f"line {number} of {path} has {len(parts)} texts; a text, or two, are needed")
        texts.append((parts[0], parts[1]) if len(parts) > 1 else parts[0])
    return [texts[place] for place in spread(len(texts), limit)]


def show(report: Measured) -> None:
    """Print what was measured."""
    print(
        f"on {report.texts} texts that nothing was chosen by, the outputs are off by {report.error:.4f} of "
        f"what they vary by (tolerance {report.tolerance}); the lowest cosine of a text's outputs is "
        f"{report.cosine:.5f}"
    )
    stay = f"; in fp32 stay {', '.join(report.fp32_linears)}" if report.fp32_linears else ""
    print(f"{report.linears} of {report.of_linears} linear layers are int8{stay}")
    part = report.megabytes / report.fp32_megabytes
    print(f"{report.megabytes:.1f} MB of weights, {part:.0%} of the {report.fp32_megabytes:.1f} MB in fp32")
