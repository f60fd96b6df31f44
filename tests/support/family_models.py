"""Small random models of every family and head that is known, stock and pruned, and batches for them.

A new family is a row in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from inputs import ODD_SHAPES, generator, shake
from pruned_ops.models.families.description import STOCK_HEADS, Family
from pruned_ops.models.families.known import FAMILIES as KNOWN
from pruned_ops.models.heads import pruned_class
from tiny_tokenizers import byte_tokenizer, word_tokenizer

# With what the names of the publisher's classes begin -> fields of its config beside SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"type_vocab_size": 1},
    "XLMRoberta": {"type_vocab_size": 1},
    "Camembert": {"type_vocab_size": 1},
    "DistilBert": {},
    "Ernie": {},
    "Data2VecText": {"type_vocab_size": 1},
    "Electra": {"embedding_size": 48},
    "MPNet": {},
    "DebertaV2": {  # texts are longer than the single distances
        "type_vocab_size": 0,
        "relative_attention": True,
        "position_buckets": 8,
        "max_relative_positions": 16,
        "pos_att_type": "p2c|c2p",
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "ModernBert": {  # the second layer is local, and texts are longer than its window
        "local_attention": 8,
        "bos_token_id": None,
        "eos_token_id": None,
        "cls_token_id": None,
        "sep_token_id": None,
    },
}
# Under BERT's names; those of its fields that a family lacks are left out.
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 100, "max_position_embeddings": 80, "type_vocab_size": 2, "pad_token_id": 1,
    # Larger than the publishers' 0.02, so that a wrong head, bias or position shows in the logits.
    "initializer_range": 0.2,
}  # fmt: skip
ANSWERS, TEXTS, TOKENS, WORDS = (
    "QuestionAnswering", "SequenceClassification", "TokenClassification", "MaskedLM",
)  # fmt: skip
# Every stock model: with what its class's name begins, and its head; "" for a bare encoder.
MODELS = [
    (stem, head)
    for family in KNOWN
    for stem in (each.stem for each in family.stock)
    for head in ("", *STOCK_HEADS)
]
# One stock model of every family, by its pruned model type.
PRUNED_TYPES = {family.pruned_type: family.stock[0].stem for family in KNOWN}


def family_named(stem: str) -> Family:
    """The family with such a stock model."""
    return next(family for family in KNOWN if stem in (each.stem for each in family.stock))


def fields(stem: str, **more: Any) -> dict[str, Any]:
    """The fields of a small config, by the publisher's names."""
    family, wanted = family_named(stem), {**SIZES, **FAMILIES[stem], **more}
    return {family.own_name(name): value for name, value in wanted.items() if name not in family.constants}


def stock(stem: str, head: str, **more: Any) -> Any:
    """A small random stock model, in evaluation mode. more: fields of its config, by BERT's names."""
    torch.manual_seed(0)
    ending = f"For{head}" if head else "Model"
    labels = {} if head in ("", ANSWERS) else {"num_labels": 3}
    config = getattr(transformers, f"{stem}Config")(**{**labels, **fields(stem, **more)})
    return shake(getattr(transformers, f"{stem}{ending}")(config).eval(), 0)


def pruned(pruned_type: str, head: str, **more: Any) -> Any:
    """A small random pruned model of odd layer shapes, in evaluation mode."""
    torch.manual_seed(0)
    model_class, stem = pruned_class(head, pruned_type), PRUNED_TYPES[pruned_type]
    sizes: dict[str, Any] = {"hidden_size": 90, "num_hidden_layers": len(ODD_SHAPES), **more}
    if family_named(stem).relative_bias is not None:
        sizes["head_indices"] = [list(range(4 - layer.num_heads, 4)) for layer in ODD_SHAPES]
    config = model_class.config_class(
        **fields(stem, **sizes), head_dim=16, layer_shapes=list(ODD_SHAPES), num_labels=3
    )
    return shake(model_class(config).eval(), 0)


def saved(pruned_type: str, head: str, folder: Path, **fields: Any) -> Path:
    """The folder of a stock model with a tokenizer: of words, with types of tokens; or where the model has
    one type only, of bytes without types."""
    stem = PRUNED_TYPES[pruned_type]
    if FAMILIES[stem].get("type_vocab_size") == 1:
        tokenizer = byte_tokenizer()
        stock(stem, head, **{"vocab_size": 300, **fields}).save_pretrained(folder)
    else:
        tokenizer = word_tokenizer(24)
        stock(stem, head, pad_token_id=0, **fields).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def batch(kind: str, lengths: Sequence[int] = (20, 3, 11, 7)) -> dict[str, Tensor]:
    """Inputs that are padded on the "right", on the "left", or have "holes" in their mask."""
    longest = max(lengths)
    ids = torch.randint(5, 100, (len(lengths), longest), generator=generator(0))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    if kind == "left":
        mask = mask.flip(1)
    ids = ids.masked_fill(mask == 0, SIZES["pad_token_id"])
    if kind == "holes":
        holes = torch.rand(mask.shape, generator=generator(1)) < 0.3
        holes[:, 0] = False
        mask = mask.masked_fill(holes, 0)
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The logits, or the hidden states of a bare encoder, at the real tokens; the labels of texts whole."""
    with torch.no_grad():
        output = model(**inputs)
    real = inputs["attention_mask"].bool()
    return {
        name: value[real] if value.shape[:2] == real.shape else value
        for name, value in output.items()
        if isinstance(value, Tensor) and name != "pooler_output"
    }


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all outputs, which have to be the same ones."""
    assert found.keys() == expected.keys() and found
    return max(float((found[name] - expected[name]).abs().max()) for name in found)


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The smallest over all outputs."""
    return min(
        float(torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0))
        for name in expected
    )
