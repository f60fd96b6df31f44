"""Inputs for ops and small models for everything else, all made from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    CamembertConfig,
    CamembertForQuestionAnswering,
    RobertaConfig,
    RobertaForQuestionAnswering,
    XLMRobertaConfig,
    XLMRobertaForQuestionAnswering,
)

import pruned_ops
from pruned_ops import LayerShape
from pruned_ops.ops.panels import attention_part, ffn_part, inner_width, is_attention, to_panels
from pruned_ops.ops.registry import BACKENDS, REFERENCE

# The folder of the test helpers, for the sys.path of a script that a test runs in a process of its own.
SUPPORT = str(Path(__file__).parent)
# Every backend that can run here on CPU tensors; a test's id contains the one it runs. Where there is a GPU,
# test_triton.py and test_cuda.py run the others on it.
READY = [
    REFERENCE,
    *(
        name
        for name, backend in BACKENDS.items()
        if backend.missing is None and (name not in ("triton", "cuda") or backend.on_demand)
    ),
]
# Of these, the ones whose rows are interpreted, one after another.
INTERPRETED = [name for name in READY if name in BACKENDS and BACKENDS[name].on_demand]

# Lengths around the block sizes of kernels, empty and single ones included.
LENGTHS = [(1,), (5, 3, 9), (15, 16, 17), (0, 7, 0), (63, 64, 65), (130, 1, 257), (511,), (0,), ()]
# Layers of all odd kinds: without heads, without an FFN, and of odd widths. Their models have a hidden size
# of 90, which is no multiple of their head_dim of 16.
ODD_SHAPES = [LayerShape(4, 72), LayerShape(0, 72), LayerShape(1, 0), LayerShape(0, 0), LayerShape(3, 5)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=generator(seed))


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)


def attention_arguments(lengths: Sequence[int], num_heads: int, head_dim: int, seed: int = 0) -> list[Any]:
    qkv = randn(seed, sum(lengths), 3 * num_heads * head_dim)
    return [qkv, cu_seqlens(lengths), max(lengths, default=0), head_dim]


def arguments_for(op: str, tokens: int = 37, hidden: int = 90, width: int = 56, seed: int = 0) -> list[Any]:
    """Arguments of any op at these sizes. `width` is the FFN width, or about 16 times the number of heads."""
    norm = [randn(seed + 1, hidden) + 1, randn(seed + 2, hidden), 1e-12]
    x, residual = randn(seed + 3, tokens, width), randn(seed + 4, tokens, hidden)
    if op == "attention":
        first = tokens // 3
        return attention_arguments((first, tokens - first), width // 16, 16, seed)
    if op == "linear_gelu":
        return [residual, randn(seed + 5, width, hidden), randn(seed + 6, width)]
    if op == "linear_geglu":
        return [residual, randn(seed + 5, 2 * width, hidden), randn(seed + 6, 2 * width)]
    if op == "add_layer_norm":
        return [randn(seed + 7, tokens, hidden), randn(seed + 8, hidden), residual, *norm]
    if op == "linear_add_layer_norm":
        return [x, randn(seed + 9, hidden, width), randn(seed + 10, hidden), residual, *norm]
    if op == "encoder":
        return encoder_arguments(tokens, hidden, width, seed)
    ids = [torch.randint(rows, (tokens,), generator=generator(seed + rows)) for rows in (50, 40, 2)]
    tables = [randn(seed + 20 + rows, rows, hidden) for rows in (50, 40, 2)]
    return [*ids, *tables, *norm]


def constant_rows(op: str, hidden: int, value: float) -> list[Any]:
    """Arguments of an op that ends in a LayerNorm, whose every row of the sum holds `value` everywhere."""
    arguments = arguments_for(op, 9, hidden)
    for place, argument in enumerate(arguments[:-3]):  # all but the LayerNorm's weight, bias and eps
        if isinstance(argument, Tensor) and argument.is_floating_point():
            arguments[place] = torch.zeros_like(argument)
    large = 3  # the residual, or the table of words
    if op == "add_layer_norm":
        large = 2
    arguments[large] = torch.full_like(arguments[large], value)
    return arguments


def moved_to(device: str, arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Move all tensors to this device, and the floating ones to this dtype."""
    return [
        (a.to(device, dtype) if a.is_floating_point() else a.to(device)) if isinstance(a, Tensor) else a
        for a in arguments
    ]


def encoder_arguments(tokens: int, hidden: int, width: int, seed: int) -> list[Any]:
    """A layer, an empty layer and one more FFN: five parts, the third and fourth without heads or width."""
    first, head_dim = tokens // 3, 16
    widths = [attention_part(width // 16), ffn_part(width), attention_part(0), ffn_part(0), ffn_part(width)]
    weights = []
    for i, part in enumerate(widths):
        inner = inner_width(part, head_dim)
        first_out = 3 * inner if is_attention(part) else inner
        for place, (out, inputs) in enumerate(((first_out, hidden), (hidden, inner))):
            weight = randn(seed + 40 + 10 * i + place, out, inputs) / max(1, inputs) ** 0.5
            weights += [to_panels(weight), randn(seed + 42 + 10 * i + place, out)]
        weights += [randn(seed + 44 + 10 * i, hidden) + 1, randn(seed + 45 + 10 * i, hidden)]
    x = randn(seed + 39, tokens, hidden)
    return [x, cu_seqlens((first, tokens - first)), tokens - first, weights, widths, head_dim, 1e-12]


def stock_model(kind: str = "bert", seed: int = 0, **fields: Any) -> Any:
    """A small random stock question-answering model, in evaluation mode."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "bert": (BertConfig, BertForQuestionAnswering),
        "roberta": (RobertaConfig, RobertaForQuestionAnswering),
        "xlm-roberta": (XLMRobertaConfig, XLMRobertaForQuestionAnswering),
        "camembert": (CamembertConfig, CamembertForQuestionAnswering),
    }[kind]
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
        "max_position_embeddings": 80,
        "type_vocab_size": 2 if kind == "bert" else 1,
        # Larger than BERT's 0.02, so that a wrong head, bias or position shows in the logits.
        "initializer_range": 0.2,
    }
    model = model_class(config_class(**{**sizes, **fields})).eval()
    return shake(model, seed)


def pruned_model(kind: str = "bert", shapes: Sequence[LayerShape] = tuple(ODD_SHAPES), seed: int = 0) -> Any:
    """A small random pruned model with odd layer shapes, in evaluation mode."""
    torch.manual_seed(seed)
    config_class, model_class = {
        "bert": (pruned_ops.PrunedBertConfig, pruned_ops.PrunedBertForQuestionAnswering),
        "roberta": (pruned_ops.PrunedRobertaConfig, pruned_ops.PrunedRobertaForQuestionAnswering),
    }[kind]
    config = config_class(
        hidden_size=90,
        head_dim=16,
        layer_shapes=list(shapes),
        vocab_size=100,
        max_position_embeddings=80,
        initializer_range=0.2,
    )
    return shake(model_class(config).eval(), seed)


def shake(model: Any, seed: int) -> Any:
    """Add noise to biases and LayerNorm parameters, whose initial values, 0 and 1, would hide their loss."""
    noise = generator(seed + 100)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=noise)
    return model


def padded_batch(
    lengths: Sequence[int] = (20, 3, 11, 0, 1), pad_token_id: int = 0, seed: int = 0
) -> dict[str, Tensor]:
    """Right-padded model inputs of these lengths. By default one row holds padding only."""
    longest = max(lengths)
    ids = torch.randint(5, 100, (len(lengths), longest), generator=generator(seed))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad_token_id), "attention_mask": mask}


MODELS = {
    "stock-bert": lambda: stock_model("bert"),
    "stock-roberta": lambda: stock_model("roberta"),
    "pruned-bert": lambda: pruned_model("bert"),
    "pruned-roberta": lambda: pruned_model("roberta"),
}


def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Start and end logits, (batch, seqlen, 2), without gradients."""
    with torch.no_grad():
        output = model(**batch)
    return torch.stack([output.start_logits, output.end_logits], -1)
