"""On transformers 4 (`make test-transformers4`): what it and two pruning tools saved comes in, and our
checkpoints cross to transformers 5 and back with a difference of 0."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
)

import pruned_ops
from inputs import logits, padded_batch, pruned_model
from pruned_ops import LayerShape

pytestmark = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) >= 5,
    reason=f"this is transformers {transformers.__version__}; make test-transformers4 runs it on 4",
)
# The Python of an environment with transformers 5.
ROOT = Path(__file__).resolve().parents[2]
OTHER = os.environ.get("PRUNED_OPS_TRANSFORMERS5")


def bert(layers: int, model_class: Any = BertForQuestionAnswering) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
    return model_class(BertConfig(vocab_size=120, num_hidden_layers=layers, **sizes)).eval()


def imported(folder: Path, source: Any) -> Any:
    """The imported model; the source's logits are the same within rounding."""
    batch = padded_batch((20, 3, 11, 1))
    real = batch["attention_mask"].bool()
    model = pruned_ops.import_checkpoint(folder)
    if not hasattr(source, "qa_outputs"):
        with torch.no_grad():
            ours, theirs = model(**batch).logits, source(**batch).logits
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
        return model
    torch.testing.assert_close(logits(model, batch)[real], logits(source, batch)[real], atol=2e-5, rtol=1e-4)
    return model


def test_heads_that_transformers_itself_pruned(tmp_path: Path) -> None:
    source = bert(3)
    source.prune_heads({0: [1], 2: [0, 3]})
    source.save_pretrained(tmp_path)
    layers = imported(tmp_path, source).config.shape.layers
    assert layers == (LayerShape(3, 96), LayerShape(4, 96), LayerShape(2, 96))


@pytest.mark.parametrize("model_class", [BertForQuestionAnswering, BertForSequenceClassification])
def test_what_nn_pruning_made(model_class: Any, tmp_path: Path) -> None:
    """Dense with zero heads and FFN units, as it trains; and narrowed by its own optimize_model."""
    patcher = pytest.importorskip("nn_pruning.inference_model_patcher")
    source = bert(12, model_class)  # it knows no other number of layers
    with torch.no_grad():
        for number, layer in enumerate(source.bert.encoder.layer):
            attention = layer.attention
            if number % 2:
                for linear in (attention.self.query, attention.self.key, attention.self.value):
                    linear.weight[16:32] = 0
                attention.output.dense.weight[:, 16:32] = 0
            for tensor in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
                tensor[5 * number : 40] = 0
            layer.output.dense.weight[:, 5 * number : 40] = 0
    shapes = tuple(LayerShape(4 - n % 2, 96 - max(40 - 5 * n, 0)) for n in range(12))
    source.save_pretrained(tmp_path / "zeros")
    assert imported(tmp_path / "zeros", source).config.shape.layers == shapes
    narrow = patcher.optimize_model(source, "dense")
    narrow.save_pretrained(tmp_path / "narrow")
    assert imported(tmp_path / "narrow", narrow).config.shape.layers == shapes


@pytest.mark.parametrize("even", [True, False])
def test_what_textpruner_made(even: bool, tmp_path: Path) -> None:
    """A narrowed model where all FFNs are as wide, which is all that it saves; masks beside the dense one."""
    textpruner = pytest.importorskip("textpruner")
    heads = torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    units = torch.ones(3, 96)
    units[:, 60:] = 0
    if not even:
        units[2, ::2] = 0
    source = bert(3)
    source.save_pretrained(tmp_path / "masked")
    general = textpruner.GeneralConfig(output_dir=str(tmp_path), use_device="cpu")
    config = textpruner.TransformerPruningConfig(pruning_method="masks")
    pruner = textpruner.TransformerPruner(source, config, general)
    pruner.prune(head_mask=heads, ffn_mask=units, save_model=even)
    shutil.copy(Path(pruner.save_masks()) / "mask.pt", tmp_path / "masked")
    shapes = (LayerShape(3, 60), LayerShape(2, 60), LayerShape(4, 60 if even else 30))
    assert imported(tmp_path / "masked", source.eval()).config.shape.layers == shapes
    for folder in tmp_path.glob("pruned_*"):
        assert even and imported(folder, source).config.shape.layers == shapes


CROSSING = """
import sys, torch, transformers
from pathlib import Path
from inputs import logits, padded_batch
from transformers import AutoModelForQuestionAnswering
import pruned_ops
assert int(transformers.__version__.split(".")[0]) == 5
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForQuestionAnswering.from_pretrained(folder / "from4").eval()
    batch = padded_batch(pad_token_id=model.config.pad_token_id)
    torch.save([logits(model, batch), logits(pruned_ops.optimize(model), batch)], folder / "said.pt")
    pruned_ops.restore(model).save_pretrained(folder / "from5")
"""


@pytest.mark.skipif(OTHER is None, reason="PRUNED_OPS_TRANSFORMERS5 names no other Python")
def test_checkpoints_cross_to_transformers_5_and_back(tmp_path: Path) -> None:
    models = {tmp_path / kind: pruned_model(kind) for kind in ("bert", "roberta")}
    for folder, model in models.items():
        model.save_pretrained(folder / "from4")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "python", ROOT / "tests" / "support")))
    done = subprocess.run(
        [str(OTHER), "-c", CROSSING, *models], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, model in models.items():
        batch = padded_batch(pad_token_id=model.config.pad_token_id)
        padded, fast = torch.load(folder / "said.pt")
        assert torch.equal(padded, logits(model, batch))
        again = AutoModelForQuestionAnswering.from_pretrained(folder / "from5").eval()
        assert torch.equal(logits(again, batch), padded)
        torch.testing.assert_close(logits(pruned_ops.optimize(again), batch), fast, rtol=0, atol=0)
