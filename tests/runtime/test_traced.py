"""torch.export and torch.compile(fullgraph=True), of padded models and of optimised ones: the same logits,
for batches of other sizes than the one that was traced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_optimize import RowCounter

import pruned_ops
from inputs import MODELS, READY, logits, padded_batch, pruned_model
from pruned_ops import LayerShape
from pruned_ops.ops.registry import record

DYNAMIC = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
# The batch that is traced; then others, two with nothing padded.
LENGTHS = [(20, 3, 11, 0, 1), (7, 40), (9, 9, 9), (0, 5), (77,)]


def made(kind: str, optimised: bool) -> Any:
    model = MODELS[kind]()
    return pruned_ops.optimize(model) if optimised else model


def exported(model: Any, batch: dict[str, torch.Tensor]) -> Any:
    with torch.no_grad():
        return torch.export.export(model, (), batch, dynamic_shapes=dict.fromkeys(batch, DYNAMIC))


def check(traced: Any, model: Any, some: list[tuple[int, ...]]) -> None:
    for seed, lengths in enumerate(some):
        batch = padded_batch(lengths, model.config.pad_token_id, seed)
        real = batch["attention_mask"].bool()
        found, expected = logits(traced, batch), logits(model, batch)
        torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("optimised", [False, True], ids=["padded", "optimised"])
def test_export(kind: str, optimised: bool, tmp_path: Path) -> None:
    """Saved and loaded again, too."""
    model = made(kind, optimised)
    program = exported(model, padded_batch(LENGTHS[0], model.config.pad_token_id))
    torch.export.save(program, tmp_path / "model.pt2")
    check(torch.export.load(tmp_path / "model.pt2").module(), model, LENGTHS)


@pytest.mark.parametrize("optimised", [False, True], ids=["padded", "optimised"])
def test_compile_in_one_graph(optimised: bool) -> None:
    """Of small models: tracing is slow."""
    model = pruned_model("roberta" if optimised else "bert", [LayerShape(2, 24), LayerShape(0, 0)])
    model = pruned_ops.optimize(model) if optimised else model
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    check(compiled, model, LENGTHS[:3])


@pytest.mark.skipif("cpu" not in READY, reason="pruned_ops._C is not built")
def test_traced_code_runs_our_kernels_on_real_tokens_only() -> None:
    """And looks at the mask's values, as the model itself does."""
    model = made("pruned-bert", True)
    batch = padded_batch((9, 4))
    traced = exported(model, batch).module()
    with record() as ran:
        logits(traced, batch)
    assert ran == {"embed_layer_norm": {"cpu": 1}, "encoder": {"cpu": 1}}
    with RowCounter() as counter:
        logits(traced, batch)
    assert {rows for name, rows in counter.rows if name == "encoder"} == {13}
    batch["attention_mask"].zero_()
    assert (logits(traced, batch) == torch.finfo(torch.float32).min).all()
    batch["attention_mask"].fill_(2)
    with pytest.raises(RuntimeError, match="attention_mask holds values other than 0 and 1"):
        traced(**batch)
