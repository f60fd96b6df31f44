"""A checkpoint that another tool pruned, as it lies in its folder: its config, and its tensors in fp32, those
of the encoder and those of the head. Whatever cannot be imported is refused here, before anything is made."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from pruned_ops.checkpoints.loading import check_weights, checkpoint_folder, read_config
from pruned_ops.checkpoints.tensors import Tensors, read_tensors
from pruned_ops.files import shown
from pruned_ops.models.families.description import Family, TextHeadNames
from pruned_ops.models.families.known import BY_TYPE, FAMILIES
from pruned_ops.shape import MAX_LAYERS, MAX_WIDTH, checked_int

# Tensors that do not bear on the outputs: position numbers, CoFi's gates and its distillation matrix.
_LEFT_OUT = re.compile(r"(^|\.)(position_ids|token_type_ids|(mha_)?layer_transformation|l0_module|cls)(\.|$)")
POOLER = ("pooler.dense.weight", "pooler.dense.bias")
CLASSIFIER = ("classifier.weight", "classifier.bias")
# What follows "For" in a class's name -> how a head is called, and its tensors.
_HEADS: dict[str, tuple[str, tuple[str, ...]]] = {
    "": ("encoder without a head", ()),
    "QuestionAnswering": ("question-answering head (qa_outputs)", ("qa_outputs.weight", "qa_outputs.bias")),
    "SequenceClassification": ("sequence classification head (classifier)", CLASSIFIER),
    "TokenClassification": ("token classification head (classifier)", CLASSIFIER),
}
# The sizes in a config, by BERT's names, and the largest of each.
_SIZES = {
    "hidden_size": MAX_WIDTH, "num_attention_heads": MAX_WIDTH, "intermediate_size": MAX_WIDTH,
    "num_hidden_layers": MAX_LAYERS, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 24,
    "type_vocab_size": MAX_WIDTH,
}  # fmt: skip
# The fields of a foreign config that describe the model, by BERT's names, beside those of dropout; the others
# are that tool's own.
_FIELDS = (
    *_SIZES, "model_type", "hidden_act", "layer_norm_eps", "initializer_range", "pad_token_id",
    "bos_token_id", "eos_token_id", "id2label", "label2id", "problem_type", "embedding_size",
    "tokenizer_class",
)  # fmt: skip
# The publishers' models that can be imported, by model type.
_STOCK = {stock.model_type: stock for family in FAMILIES for stock in family.stock}


@dataclass
class Source:
    """A foreign checkpoint: its config, its tensors by name within the encoder, those of the head of this
    name, and notes on what was recognised so far. heads: those of each layer's heads that have an effect."""

    folder: Path
    kind: str
    head_name: str
    config: dict[str, Any]
    encoder: Tensors
    head: Tensors
    notes: list[str] = field(default_factory=list)
    heads: list[list[int]] = field(default_factory=list)

    @property
    def architecture(self) -> str:
        """The name of the model's class as the config gives it; "" where it gives none."""
        return _architecture(self.config)

    @property
    def family(self) -> Family:
        """The description of the encoder."""
        return BY_TYPE[self.kind]

    def size(self, name: str) -> int:
        """A size that the config holds, by BERT's name."""
        return self.config[self.family.own_name(name)]

    @property
    def fields(self) -> dict[str, Any]:
        """The config's fields that describe the model."""
        names = [*map(self.family.own_name, _FIELDS), *self.family.dropout_fields, *self.family.fixed]
        return {name: self.config[name] for name in names if name in self.config}

    @property
    def activation(self) -> str:
        """The activation's name, which transformers knows."""
        name = self.config.get(self.family.own_name("hidden_act"), "gelu")
        if not isinstance(name, str) or name not in ACT2FN:
            raise ValueError(f"{self.folder}: hidden_act {shown(name)} is not known")
        return name

    @property
    def head_dim(self) -> int:
        """A head's width: the config's head_dim, or its hidden_size / num_attention_heads."""
        if self.config.get("head_dim"):
            return self.config["head_dim"]
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        if hidden % heads:
            raise ValueError(
                f"{self.folder}: {heads} heads do not divide a hidden size of {hidden}: say a head's width "
                "(head_dim)"
            )
        return hidden // heads


def open_source(folder: Path) -> Source:
    """The checkpoint in a folder, with every tensor in fp32. Errors: OSError where files are missing;
    ValueError for a model that cannot be imported."""
    checkpoint_folder(folder)
    config = read_config(folder)
    if config.get("quantization_config"):
        raise ValueError(
            f"{folder}: its weights are quantised, and can only be run: give the fp32 checkpoint"
        )
    kind = _checked_kind(folder, config)
    family = BY_TYPE[kind]
    prefix, words = f"{family.prefix}.", tuple(f"{name}." for name in family.words_head)
    tensors: Tensors = {}
    for name, tensor in read_tensors(folder).items():
        name = name.removeprefix("module.")
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        if not _LEFT_OUT.search(name) and not name.startswith(words):
            tensors[name] = numbers_of(tensor, f"{folder}: {shown(name)}")
    if not any(name.startswith(prefix) for name in tensors):  # a bare encoder saves its tensors without it
        tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    encoder = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    head = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    head_name = _head_name(config, set(encoder) | set(head), family.text_head)
    pools_texts = head_name == "SequenceClassification" and family.text_head.first is None
    if head_name != "" and not pools_texts:
        encoder = {name: tensor for name, tensor in encoder.items() if name not in POOLER}
    _check_head(folder, head_name, encoder, head, family.text_head)
    return Source(folder, kind, head_name, config, encoder, head)


def _architecture(config: dict[str, Any]) -> str:
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures and isinstance(architectures[0], str):
        return architectures[0]
    return ""


def _head_name(config: dict[str, Any], names: set[str], text_head: TextHeadNames) -> str:
    """What follows "For" in the name of the model's class: as the config says, or else by the tensors."""
    architecture = _architecture(config)
    name = architecture.partition("For")[2]
    if name in _HEADS and (name or architecture.endswith("Model")):
        return name
    if "qa_outputs.weight" in names:
        return "QuestionAnswering"
    first = POOLER[0] if text_head.first is None else f"{text_head.first}.weight"
    if {first, f"{text_head.last}.weight"} <= names:
        return "SequenceClassification"
    return "TokenClassification" if CLASSIFIER[0] in names else ""


def _check_head(folder: Path, name: str, encoder: Tensors, head: Tensors, text_head: TextHeadNames) -> None:
    """ValueError where the tensors outside the encoder are not those of the head."""
    called, expected = _HEADS[name]
    lacking: set[str] = set()
    if name == "SequenceClassification":
        linears = [name for name in (text_head.first, text_head.last) if name is not None]
        expected = tuple(f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias"))
        if text_head.first is None:
            lacking = set(POOLER) - set(encoder)
    if set(head) != set(expected) or lacking:
        others = ", ".join(sorted(head)[:5]) or "none"
        besides = f"; it lacks {', '.join(sorted(lacking))}" if lacking else ""
        raise ValueError(f"{folder} has no {called}; outside the encoder: {others}{besides}")


def _checked_kind(folder: Path, config: dict[str, Any]) -> str:
    """The model type of a config that can be imported; ValueError for any other config."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _STOCK:
        raise ValueError(f"{folder} is a {shown(kind)} model; {', '.join(_STOCK)} can be imported")
    if _architecture(config).endswith("ForMultipleChoice"):  # its tensors are those of a classifier
        raise ValueError(
            f"{folder} is a {shown(_architecture(config))}, which chooses among texts: not supported"
        )
    family = BY_TYPE[kind]
    if family.stack_kind is not None and family.relative_bias is None:
        raise ValueError(
            f"{folder} is a {family.name}, of which no other tool's checkpoints are known: a dense one needs "
            "no import, and is pruned and optimised as it is"
        )
    norm, positions = config.get("layer_norm_type"), config.get("position_embedding_type")
    if norm not in (None, "layer_norm"):
        raise ValueError(f"{folder} has {str(norm)[:60]} in place of LayerNorm: not supported")
    if positions not in (None, "absolute"):
        raise ValueError(f"{folder} has {str(positions)[:60]} positions; only absolute ones")
    for name, high in _SIZES.items():  # before anything is as large as they say
        if name not in family.constants:
            name = family.own_name(name)
            checked_int(f"{folder}: {name}", config.get(name), 1, high)
    for name in family.dropout_fields:
        if not isinstance(config.get(name), (float, int, NoneType)):
            raise ValueError(f"{folder}: {name} is {shown(config[name])}: a number is needed")
    pruned = config.get("pruned_heads") or {}
    if not isinstance(pruned, dict) or not all(isinstance(heads, list) for heads in pruned.values()):
        raise ValueError(f"{folder}: pruned_heads is {shown(pruned)}, not layer -> heads")
    tokenizer = config.get("tokenizer_class")
    if not isinstance(tokenizer, (str, NoneType)):
        raise ValueError(f"{folder}: tokenizer_class is {shown(tokenizer)}: a name is needed")
    return kind


def numbers_of(tensor: object, where: str) -> Tensor:
    """A copy in fp32, in which masks and constants can be folded; ValueError for anything but a plain tensor
    of finite numbers."""
    plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
    if not isinstance(tensor, Tensor) or not plain or tensor.is_quantized or tensor.is_complex():
        raise ValueError(f"{where} is no plain tensor of real numbers")
    numbers = tensor.detach().to(torch.float32, copy=True)
    check_weights([(where, numbers)])
    return numbers
