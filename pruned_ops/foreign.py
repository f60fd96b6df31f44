"""Foreign checkpoints as files: config and tensors, read without running anything, and checked for what
cannot be taken in at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.activations import ACT2FN

KINDS = ("bert", "roberta")
# What training left behind, or what does not bear on the answers: pooler, position numbers, CoFi's gates and
# its distillation matrix.
_LEFT_OUT = re.compile(r"(^|\.)(pooler|position_ids|token_type_ids|layer_transformation|l0_module|cls)(\.|$)")

Tensors = dict[str, Tensor]


@dataclass
class Source:
    """A foreign checkpoint: its config, tensors by name within the encoder (and the answer head's), and what
    was recognised so far."""

    folder: Path
    kind: str
    config: dict[str, Any]
    encoder: Tensors
    head: Tensors
    notes: list[str] = field(default_factory=list)


def open_source(folder: Path) -> Source:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{folder} is a {kind!r} model; {', '.join(KINDS)} can be imported")
    if config.get("layer_norm_type", "layer_norm") != "layer_norm":
        raise ValueError(f"{folder} has {config['layer_norm_type']} in place of LayerNorm: not supported")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder} has {config['position_embedding_type']} positions; only absolute ones")
    encoder: Tensors = {}
    head: Tensors = {}
    for name, tensor in _read_tensors(folder).items():
        name = name.removeprefix("module.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if _LEFT_OUT.search(name):
            continue
        into = encoder if name.startswith(f"{kind}.") else head
        into[name.removeprefix(f"{kind}.")] = tensor.float()
    if set(head) != {"qa_outputs.weight", "qa_outputs.bias"}:
        found = ", ".join(sorted(head)[:5]) or "none"
        raise ValueError(
            f"{folder} has no question-answering head (qa_outputs); outside the encoder: {found}"
        )
    return Source(folder, kind, config, encoder, head)


def _read_tensors(folder: Path) -> Tensors:
    """Of one file or several shards; pickled ones through weights_only alone."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _read_file(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if any(Path(shard).name != shard for shard in shards):
                raise ValueError(f"{index} names files outside its folder")
            return {name: tensor for shard in shards for name, tensor in _read_file(folder / shard).items()}
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        return load_file(path)
    found = unpickled(path)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    return dict(found)


def unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own kinds, and torch's
        raise ValueError(f"{path} cannot be read as tensors alone: {str(error).splitlines()[0]}") from None


def dense_size(source: Source, name: str) -> int:
    value = source.config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{source.folder}: {name} is {value!r} in config.json; a positive integer is needed")
    return value


def activation_name(source: Source) -> str:
    name = source.config.get("hidden_act", "gelu")
    if name not in ACT2FN:
        raise ValueError(f"{source.folder}: hidden_act {name!r} is not known")
    return name
