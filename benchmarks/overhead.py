"""The host's share of the time: ops, packing, a replay and a whole call at sizes that need next to no
arithmetic.

`make overhead` runs this, and compares it with the last run on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

import pruned_ops
from pruned_ops import LayerShape, ModelShape, PrunedEncoder
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.runtime.engine import Engine

HIDDEN = 16
BOUNDS = torch.tensor([0, 2], dtype=torch.int32)
X, VECTOR, MATRIX = torch.randn(2, HIDDEN), torch.randn(HIDDEN), torch.randn(HIDDEN, HIDDEN)
IDS, TABLE = torch.zeros(2, dtype=torch.int64), torch.randn(2, HIDDEN)
OPS: dict[str, tuple[Any, ...]] = {
    "attention": (torch.randn(2, 3 * HIDDEN), BOUNDS, 2, HIDDEN),
    "linear_gelu": (X, MATRIX, VECTOR),
    "add_layer_norm": (X, VECTOR, X, VECTOR, VECTOR, 1e-12),
    "linear_add_layer_norm": (X, MATRIX, VECTOR, X, VECTOR, VECTOR, 1e-12),
    "embed_layer_norm": (IDS, IDS, IDS, TABLE, TABLE, TABLE, VECTOR, VECTOR, 1e-12),
}


@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: Any, op: str) -> None:
    benchmark(getattr(pruned_ops.ops, op), *OPS[op])


@pytest.mark.parametrize("layers", [1, 12])
def test_encoder(benchmark: Any, layers: int) -> None:
    encoder = PrunedEncoder(ModelShape((LayerShape(1, HIDDEN),) * layers, HIDDEN, HIDDEN))
    encoder.pack()
    batch = PackedBatch.from_mask(None, 1, 2, torch.device("cpu"))
    with torch.inference_mode():
        benchmark(encoder, X, batch)


def test_packing(benchmark: Any) -> None:
    """A batch is made from a mask, and rows are packed and unpacked."""
    mask, padded = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.randn(2, 3, HIDDEN)

    def both() -> None:
        batch = PackedBatch.from_mask(mask, 2, 3, torch.device("cpu"))
        batch.unpack(batch.pack(padded))

    benchmark(both)


@pytest.mark.parametrize("kind", ["hf", "ours"])
def test_whole_call(benchmark: Any, kind: str) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 6,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    model: Any = BertForQuestionAnswering(BertConfig(**sizes)).eval()
    if kind == "ours":
        model = pruned_ops.optimize(model)
    ids = torch.ones(1, 8, dtype=torch.long)
    with torch.inference_mode():
        benchmark(model, input_ids=ids, attention_mask=torch.ones_like(ids))


class Nothing:
    """Stands in for CUDA graphs: neither their launch nor what they compute costs anything."""

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        outputs = work()
        return lambda: outputs

    def ordered(self) -> Any:
        return nullcontext()

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("part", ["replay", "call"])
def test_engine(benchmark: Any, part: str) -> None:
    """A replay's cost on the host apart from the launch, or a whole call's: 24 layers, a text of 8 tokens."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": 24,
        "num_attention_heads": 1,
        "intermediate_size": 16,
    }
    model: Any = pruned_ops.optimize(BertForQuestionAnswering(BertConfig(**sizes)).eval())
    encoder = model.bert.packed
    encoder.engine = Engine(encoder, recorder=Nothing())
    ids = torch.ones(1, 8, dtype=torch.long)
    batch = PackedBatch.from_mask(None, 1, 8, ids.device)
    with torch.inference_mode():
        if part == "replay":
            benchmark(encoder.engine.run, [ids[0]] * 3, batch, encoder.heads[0])
        else:
            benchmark(model, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert encoder.engine.stats.captures == 1
