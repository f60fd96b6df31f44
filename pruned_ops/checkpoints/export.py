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

from pruned_ops.checkpoints.loading import (
    TOKENIZER_FILES,
    VOCABULARY_FILES,
    checkpoint_folder,
    load_any_head,
    load_tokenizer,
)
from pruned_ops.files import check_place
from pruned_ops.layers.int8 import DEQUANTIZE
from pruned_ops.models.families.known import family_of
from pruned_ops.models.stock import is_encoder
from pruned_ops.runtime.encoder_weights import is_stored_in_int8
from pruned_ops.runtime.known_heads import packed_head
from pruned_ops.runtime.optimize import restore
from pruned_ops.runtime.packed_encoder import OptimisedEncoder
from pruned_ops.runtime.packed_heads import PackedHead
from pruned_ops.runtime.refusals import refuse_encoder

GRAPH = "model.onnx"
# A protobuf, and so an ONNX file, holds less than so many bytes.
LARGEST = 1 << 31
# The files in which a checkpoint keeps its weights.
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def export_onnx(
    model: Any, path: str | PathLike[str], overwrite: bool = False, token_types: bool | None = None
) -> Path:
    """Write an encoder, stock or pruned, as ONNX to the folder `path`; returns the graph's file in it.

    model: a checkpoint's folder, whose tokenizer is copied too, or a model in fp32: for question answering,
    sequence or token classification, or an encoder without a head. An optimised model stays as it is: a copy
    of it gets the original fp32 weights back and is exported. The graph takes batches of any size and length,
    padded on any side. overwrite: replaces files of the same names in `path`, and for a checkpoint's folder
    those of an earlier export's tokenizer; others stay. token_types: whether the graph asks for
    token_type_ids; by default where the model has several types and the tokenizer in its folder, if there is
    one, gives them.
    Errors: ImportError without the package onnx; OSError where there is no checkpoint, or `path` is there
    already, holds another checkpoint's weights or cannot be written; ValueError for another model, or one
    whose graph would compute something else.
    """
    try:
        from pruned_ops.checkpoints.onnx_graph import plain_graph
    except ImportError as error:
        raise ImportError(
            f'the package onnx cannot be imported ({error}): pip install onnx (the extra "onnx" brings it '
            "with ONNX Runtime)"
        ) from error
    source = Path(model) if isinstance(model, (str, PathLike)) else None
    with _staged(Path(path), overwrite, source) as stage:
        if source is not None:
            folder = checkpoint_folder(source)
            for name in ("config.json", *TOKENIZER_FILES):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, stage / name)
            model = _original(load_any_head(str(folder)))
            if token_types is None:
                token_types = _gives_types(folder)
        else:
            model = _original(model)
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(stage)
        graph = plain_graph(model, _asks_for_types(model, token_types))
        (stage / GRAPH).write_bytes(graph.SerializeToString())
    return Path(path) / GRAPH


def _asks_for_types(model: Any, token_types: bool | None) -> bool:
    """Whether the graph asks for token types: as was said, or where the model has several."""
    several = family_of(model.config).value(model.config, "type_vocab_size") > 1
    if token_types and not several:
        raise ValueError(f"this {type(model).__name__} has no token types, and token_types asks for them")
    return several if token_types is None else token_types


def _gives_types(folder: Path) -> bool | None:
    """False where the folder's tokenizer gives no token types; None where they are the model's matter."""
    if not any((folder / name).is_file() for name in VOCABULARY_FILES):
        return None
    return None if "token_type_ids" in load_tokenizer(str(folder))("text") else False


@contextmanager
def _staged(out: Path, overwrite: bool, source: Path | None) -> Iterator[Path]:
    """A folder inside `out` whose files move up into `out` when the block ends well; nothing is left of it
    otherwise. source: the checkpoint's folder that is exported; files of another tokenizer in `out` would be
    read beside its own, and are removed."""
    if out.suffix == ".onnx":
        raise ValueError(f"{out} names a file; a folder is needed, {GRAPH} is written into it")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; a folder is needed")
    if not out.absolute().parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder; {out.name} is made in it")
    out = out.resolve()  # a symlink stays one
    is_new = not out.exists()
    check_place(out if is_new else out / GRAPH)
    if not is_new and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"{out} is not empty; --overwrite (overwrite=True) replaces an export in it")
    is_other = source is not None and not is_new and source.resolve() != out
    if is_other and any(True for pattern in WEIGHTS for _ in out.glob(pattern)):
        raise FileExistsError(
            f"{out} holds another checkpoint's weights, whose config would be replaced: name another folder"
        )
    out.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as stage:
            yield Path(stage)
            for name in TOKENIZER_FILES if is_other else ():
                if not (Path(stage) / name).exists():
                    (out / name).unlink(missing_ok=True)
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
    if isinstance(model, nn.Module) and is_stored_in_int8(model):
        raise ValueError(f"this {name} cannot be exported, its weights are stored in int8: {DEQUANTIZE}")
    if isinstance(getattr(model, "base_model", None), OptimisedEncoder):
        model = restore(copy.deepcopy(model))
    head = packed_head(model)
    if head is None and not is_encoder(model):
        raise ValueError(
            f"a {name} cannot be exported: models for question answering, sequence classification and token "
            "classification can, and encoders without a head"
        )
    encoder = model.base_model
    reason = refuse_encoder(encoder) if is_encoder(encoder) else f"its encoder is a {type(encoder).__name__}"
    reason = reason or _refuse_head(model, head)
    others = {str(parameter.dtype) for parameter in model.parameters()} - {"torch.float32"}
    if reason is None and others:
        reason = f"it holds {', '.join(sorted(others))}: call model.float() first"
    if reason is not None:
        raise ValueError(f"this {name} cannot be exported: {reason}")
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size >= LARGEST:
        raise ValueError(f"the weights take {size:,} bytes; an ONNX file holds less than {LARGEST:,}")
    return model


def _refuse_head(model: Any, head: PackedHead | None) -> str | None:
    """Why the head would compute something else in a graph: it is not as its class makes it."""
    if head is None:
        pooler = getattr(model, "pooler", None)
        linears = () if pooler is None else (pooler.dense,)
    else:
        linears = head.linears
        if not linears:
            return "its head is another one than its class makes"
        if not head.predicts():
            return "what comes before its last linear is not what its class makes"
        if head.is_hooked():
            return "its head has hooks, or another forward, which a graph would not have"
    names = {module: name for name, module in model.named_modules()}
    for linear in linears:
        if type(linear) is not nn.Linear:
            return f"its {names[linear]} is a {type(linear).__name__}, not a plain Linear"
    return None
