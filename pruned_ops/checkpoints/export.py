"""Exporting to ONNX: a folder with a graph that ONNX Runtime fuses and OpenVINO reads, with its config and
its tokenizer; `pruned-ops export`."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from pruned_ops.checkpoints.loading import TOKENIZER_FILES, checkpoint_folder, load_model
from pruned_ops.models.stock import ENCODERS
from pruned_ops.runtime.optimize import restore
from pruned_ops.runtime.packed_encoder import OptimisedEncoder
from pruned_ops.runtime.packed_heads import ANSWERERS
from pruned_ops.runtime.refusals import refuse_encoder

GRAPH = "model.onnx"
# A protobuf, and so an ONNX file, holds less than so many bytes.
LARGEST = 1 << 31


def export_onnx(model: Any, path: str | PathLike[str], overwrite: bool = False) -> Path:
    """Write a question-answering BERT or RoBERTa, stock or pruned, as ONNX to the folder `path`; returns the
    graph's file in it.

    model: a checkpoint's folder, whose tokenizer is copied too, or a model in fp32. An optimised model stays
    as it is: a copy of it gets the original fp32 weights back and is exported. The graph takes batches of any
    size and length, padded on any side. overwrite: replaces files of the same names in `path`; others stay.
    Errors: ImportError without the package onnx; OSError where there is no checkpoint, or `path` is there
    already or cannot be written; ValueError for another model, or one whose graph would compute something
    else.
    """
    try:
        from pruned_ops.checkpoints.onnx_graph import plain_graph
    except ImportError as error:
        raise ImportError(
            f'the package onnx cannot be imported ({error}): pip install onnx (the extra "onnx" brings it '
            "with ONNX Runtime)"
        ) from error
    with _staged(Path(path), overwrite) as stage:
        if isinstance(model, (str, PathLike)):
            folder = checkpoint_folder(Path(model))
            for name in ("config.json", *TOKENIZER_FILES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
            model = _original(load_model(str(folder)))
        else:
            model = _original(model)
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(stage)
        (stage / GRAPH).write_bytes(plain_graph(model).SerializeToString())
    return Path(path) / GRAPH


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A folder inside `out` whose files move up into `out` when the block ends well; nothing is left of it
    otherwise."""
    if out.suffix == ".onnx":
        raise ValueError(f"{out} names a file; a folder is needed, {GRAPH} is written into it")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; a folder is needed")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder; {out.name} is made in it")
    is_new = not out.exists()
    if not is_new and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; --overwrite (overwrite=True) replaces an export in it")
    out.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as stage:
            yield Path(stage)
            # The graph comes last: where it is, the rest is.
            for file in sorted(Path(stage).iterdir(), key=lambda file: file.name == GRAPH):
                os.replace(file, out / file.name)
    except BaseException:
        if is_new:
            shutil.rmtree(out)
        raise


def _original(model: Any) -> Any:
    """The model with its own encoder: itself, or a restored copy of an optimised model. ValueError for a
    model whose graph would compute something else."""
    name = type(model).__name__
    if not any(type(model).forward is answerer.forward for answerer in ANSWERERS):
        known = ", ".join(answerer.__name__ for answerer in ANSWERERS)
        raise ValueError(f"a {name} cannot be exported: question-answering models can ({known})")
    if isinstance(model.base_model, OptimisedEncoder):
        model = restore(copy.deepcopy(model))
    encoder = model.base_model
    reason = (
        refuse_encoder(encoder) if type(encoder) in ENCODERS else f"its encoder is a {type(encoder).__name__}"
    )
    if reason is None and type(model.qa_outputs) is not nn.Linear:
        reason = f"its qa_outputs is a {type(model.qa_outputs).__name__}, not a plain Linear"
    others = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    if reason is None and others:
        reason = f"it holds {', '.join(sorted(others))}: call model.float() first"
    if reason is not None:
        raise ValueError(f"this {name} cannot be exported: {reason}")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size >= LARGEST:
        raise ValueError(f"the weights take {size:,} bytes; an ONNX file holds less than {LARGEST:,}")
    return model
