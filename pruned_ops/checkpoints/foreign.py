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

from pruned_ops.models.modeling import answering_class
from pruned_ops.shape import MAX_LAYERS, MAX_WIDTH, checked_int

# What training left behind, or what does not bear on the answers: pooler, position numbers, CoFi's gates and
# its distillation matrix.
_LEFT_OUT = re.compile(
    r"(^|\.)(pooler|position_ids|token_type_ids|(mha_)?layer_transformation|l0_module|cls)(\.|$)"
)
_SIZES = {
    "hidden_size": MAX_WIDTH, "num_attention_heads": MAX_WIDTH, "intermediate_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 24,
    "type_vocab_size": MAX_WIDTH,
}  # fmt: skip
# What of a foreign config describes the model; the rest is that tool's own.
_FIELDS = (
    *_SIZES, "model_type", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "layer_norm_eps", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "id2label",
    "label2id",
)  # fmt: skip
# Of the model types that can be imported.
_TOKENIZERS = {
    "bert": "BertTokenizerFast", "roberta": "RobertaTokenizerFast", "xlm-roberta": "XLMRobertaTokenizerFast",
    "camembert": "CamembertTokenizerFast",
}  # fmt: skip

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

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields that describe the model, and the tokenizer's class, by which the files beside
        it load under the new model type."""
        kept = {name: self.config[name] for name in _FIELDS if name in self.config}
        tokenizer = self.config.get("tokenizer_class") or _TOKENIZERS[self.kind]
        return {**kept, "tokenizer_class": tokenizer}


def open_source(folder: Path) -> Source:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _TOKENIZERS:
        raise ValueError(f"{folder} is a {kind!r} model; {', '.join(_TOKENIZERS)} can be imported")
    prefix = f"{answering_class(kind).base_model_prefix}."
    if config.get("layer_norm_type", "layer_norm") != "layer_norm":
        raise ValueError(f"{folder} has {config['layer_norm_type']} in place of LayerNorm: not supported")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{folder} has {config['position_embedding_type']} positions; only absolute ones")
    for name, high in _SIZES.items():  # before anything is as large as they say
        checked_int(f"{folder}: {name}", config.get(name), 1, high)
    if not isinstance(config.get("pruned_heads") or {}, dict):
        raise ValueError(f"{folder}: pruned_heads is {config['pruned_heads']!r}, not layer -> heads")
    encoder: Tensors = {}
    head: Tensors = {}
    for name, tensor in _read_tensors(folder).items():
        name = name.removeprefix("module.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if _LEFT_OUT.search(name):
            continue
        into = encoder if name.startswith(prefix) else head
        # A copy of its own: masks and what is constant are folded in place.
        into[name.removeprefix(prefix)] = tensor.detach().to(torch.float32, copy=True)
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
            listed = json.loads(index.read_text(encoding="utf-8"))
            if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
                raise ValueError(f"{index} has no weight_map")
            shards = sorted(set(map(str, listed["weight_map"].values())))
            if any(Path(shard).name != shard for shard in shards):
                raise ValueError(f"{index} names files outside its folder")
            return {name: tensor for shard in shards for name, tensor in _read_file(folder / shard).items()}
    raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")


def _read_file(path: Path) -> Tensors:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has its own kind
            raise ValueError(f"{path} cannot be read: {_first_line(error)}") from None
    found = unpickled(path)
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no dictionary of tensors")
    for name, tensor in found.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} repeats its memory to seem {tuple(tensor.shape)} large")
    return dict(found)


def unpickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's own kinds, and torch's
        raise ValueError(f"{path} cannot be read as tensors alone: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def activation_name(source: Source) -> str:
    name = source.config.get("hidden_act", "gelu")
    if not isinstance(name, str) or name not in ACT2FN:
        raise ValueError(f"{source.folder}: hidden_act {name!r} is not known")
    return name
