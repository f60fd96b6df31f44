"""`pruned-ops trim-vocabulary`: a checkpoint with only those pieces of its vocabulary that texts need."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pruned_ops.files import TextFile
from pruned_ops.shape import checked_int

if TYPE_CHECKING:
    from pruned_ops.checkpoints.trimmed_texts import Agreement


def add_command(commands: Any) -> None:
    """Add the command and its options to the parser's commands."""
    parser = commands.add_parser(
        "trim-vocabulary",
        help="remove the pieces of the vocabulary that your texts do not have",
        description="Write the checkpoint in DIR to OUT with only those pieces of its vocabulary that occur "
        "in the texts, beside special tokens and single characters. A text whose pieces were kept has the "
        "same outputs as before; others are cut into smaller pieces.",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="folder of a checkpoint, or of sentence-transformers"
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the trimmed checkpoint")
    texts = "UTF-8, one text a line, or .jsonl, whose strings are all texts; .gz too"
    parser.add_argument(
        "--texts", type=Path, required=True, metavar="FILE", help=f"texts whose pieces are kept: {texts}"
    )
    parser.add_argument(
        "--text-columns",
        nargs="+",
        metavar="NAME",
        help="of .jsonl, the columns that hold texts (default: all)",
    )
    parser.add_argument(
        "--keep", type=int, metavar="N",
        help="keep only the N pieces that the texts have most often (default: all of theirs)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=Path, metavar="FILE", help="other texts: say how many of them have pieces removed"
    )


def run(arguments: argparse.Namespace) -> None:
    """Trim the checkpoint, and print what was removed and what texts lose by it."""
    from pruned_ops.checkpoints.loading import only_errors
    from pruned_ops.checkpoints.trimming import trim_vocabulary

    if arguments.keep is not None:
        checked_int("--keep", arguments.keep, 0)
    columns = arguments.text_columns
    texts = TextFile(arguments.texts, columns)
    held_out = None if arguments.held_out is None else TextFile(arguments.held_out, columns)
    only_errors()
    trimming = trim_vocabulary(arguments.folder, arguments.out, texts, arguments.keep, held_out)
    for name, (before, after) in (
        ("word embedding rows", trimming.rows),
        ("parameters", trimming.parameters),
    ):
        print(f"{name}: {before:,} -> {after:,} ({after / before:.1%})")
    print(f"{arguments.texts}: {_said(trimming.texts)}")
    if trimming.held_out is not None:
        print(f"{arguments.held_out}: {_said(trimming.held_out)}")
    if trimming.left_out:
        print(f"not taken along: {', '.join(trimming.left_out)}")
    print(f"written to {arguments.out}")


def _said(agreement: Agreement) -> str:
    """What the texts of a file lose, in words."""
    if agreement.same == agreement.texts:
        return f"all {agreement.texts:,} texts are cut as before"
    before, after = agreement.unknown
    return (
        f"{agreement.same:,} of {agreement.texts:,} texts ({agreement.same / agreement.texts:.2%}) are cut "
        f"as before, {agreement.texts - agreement.same:,} are not wholly kept: {agreement.gone:,} of "
        f"{agreement.pieces:,} pieces were removed; unknown pieces {before:,} -> {after:,}"
    )
