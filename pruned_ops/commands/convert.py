"""`pruned-ops import` and `pruned-ops export`: checkpoints of other tools, and for other runtimes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from pruned_ops.checkpoints.export import GRAPH, export_onnx
from pruned_ops.checkpoints.loading import TOKENIZER_FILES


def import_foreign(arguments: argparse.Namespace) -> None:
    """Write what `import_checkpoint` recognises in DIR, with the tokenizer files that lie there, to OUT."""
    from pruned_ops.checkpoints.importing import read_foreign
    from pruned_ops.checkpoints.loading import TOKENIZER_FILES

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


def add_command(commands: Any) -> None:
    """The command's arguments."""
    one = commands.add_parser(
        "export",
        help="write a checkpoint as ONNX, for ONNX Runtime, OpenVINO and others",
        description=f"Write the checkpoint in DIR as OUT/{GRAPH}, its config.json and tokenizer beside it. "
        "Inputs: input_ids, attention_mask and, where the model has token types, token_type_ids, int64 "
        "(batch, seqlen). Outputs: start_logits, end_logits (batch, seqlen), which mean nothing at padding. "
        "Needs the package onnx.",
    )
    one.set_defaults(run=export)
    one.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint")
    one.add_argument("--onnx", type=Path, required=True, metavar="OUT", help="folder for the ONNX model")
    one.add_argument("--overwrite", action="store_true", help="replace what an export left in OUT")


def export(arguments: argparse.Namespace) -> None:
    """Export, and say what was written."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = export_onnx(arguments.folder, arguments.onnx, arguments.overwrite)
    copied = [name for name in TOKENIZER_FILES if (arguments.folder / name).is_file()]
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"beside it: config.json, {', '.join(copied) or f'and no tokenizer: {arguments.folder} has none'}")
