"""`pruned-ops import` and `pruned-ops export`: checkpoints of other tools, and for other runtimes."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from pruned_ops.files import check_new_folder, new_folder


def add_command(commands: Any) -> None:
    """Add both commands and their options to the parser's commands."""
    parser = commands.add_parser(
        "export",
        help="write a checkpoint as ONNX, for ONNX Runtime, OpenVINO and others",
        description="Write the checkpoint in DIR as OUT/model.onnx, its config.json and tokenizer beside it. "
        "Inputs: input_ids, attention_mask and, where model and tokenizer have token types, token_type_ids, "
        "int64 (batch, seqlen). Outputs, by the model's head: start_logits and end_logits; logits; or "
        "last_hidden_state. At padding they mean nothing. Needs the package onnx.",
    )
    parser.set_defaults(run=export)
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of a checkpoint")
    parser.add_argument("--onnx", type=Path, required=True, metavar="OUT", help="folder for the ONNX model")
    parser.add_argument("--overwrite", action="store_true", help="replace what an export left in OUT")
    parser = commands.add_parser(
        "import",
        help="take in a checkpoint that another tool pruned",
        description="Write the checkpoint in DIR, which another tool pruned, to OUT as a pruned_ops "
        "checkpoint: its logits are the same, and its config.json says how many heads and FFN units every "
        "layer has.",
    )
    parser.set_defaults(run=import_foreign)
    parser.add_argument(
        "folder",
        type=Path,
        metavar="DIR",
        help="folder with config.json, weights and, where there are any, masks",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="new folder for the pruned_ops checkpoint")
    parser.add_argument(
        "--head-dim", type=int, metavar="N", help="a head's width (default: hidden_size / heads)"
    )


def import_foreign(arguments: argparse.Namespace) -> None:
    """Write the model that `import_checkpoint` recognises in DIR to OUT, with the tokenizer files of DIR."""
    from pruned_ops.checkpoints.importing import read_foreign

    out: Path = arguments.out
    check_new_folder(out)
    model, notes = read_foreign(arguments.folder, arguments.head_dim)
    with new_folder(out) as stage:
        model.save_pretrained(stage)
        for path in _tokenizer_files(arguments.folder):
            shutil.copyfile(path, stage / path.name)
    for note in notes:
        print(f"  {note}")
    shapes = ", ".join(f"{s['num_heads']}/{s['ffn_width']}" for s in model.config.layer_shapes)
    print(f"heads/FFN width a layer: {shapes}")
    print(f"written to {out}")


def export(arguments: argparse.Namespace) -> None:
    """Export the checkpoint, and print what was written."""
    from pruned_ops.checkpoints.export import export_onnx
    from pruned_ops.checkpoints.loading import only_errors

    only_errors()
    path = export_onnx(arguments.folder, arguments.onnx, arguments.overwrite)
    copied = ", ".join(file.name for file in _tokenizer_files(arguments.folder))
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"beside it: config.json, {copied or f'and no tokenizer: {arguments.folder} has none'}")


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files of a tokenizer that a checkpoint's folder holds."""
    from pruned_ops.checkpoints.loading import TOKENIZER_FILES

    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
