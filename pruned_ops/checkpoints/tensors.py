"""The tensors in a checkpoint's files, by name and as they are stored: safetensors or pickled, one file or
several shards. Nothing but tensors is unpickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from pruned_ops.checkpoints.loading import first_line, shard_names

Tensors = dict[str, Tensor]


def read_tensors(folder: Path) -> Tensors:
    """The tensors in a folder. Errors: OSError where there are none; ValueError for files that cannot be read
    as tensors alone."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = shard_names(index)
            return {name: tensor for shard in shards for name, tensor in _read_file(folder / shard).items()}
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_file(path: Path) -> Tensors:
    """The tensors of one file, each with memory of its own size."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has its own kind
            raise ValueError(f"{path} cannot be read: {first_line(error)}") from None
    tensors = unpickled(path)
    if not isinstance(tensors, Mapping) or not all(map(_is_named_tensor, tensors.items())):
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, tensor in tensors.items():
        is_stored = tensor.layout is torch.strided
        if is_stored and tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} repeats its memory to seem {tuple(tensor.shape)} large")
    return dict(tensors)


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def unpickled(path: Path) -> Any:
    """The tensors that a file holds, in whatever containers; ValueError for a file with anything else."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own kinds, and torch's
        raise ValueError(f"{path} cannot be read as tensors alone: {first_line(error)}") from None
