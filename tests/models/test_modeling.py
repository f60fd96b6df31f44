"""Configs and models on disk: invariants 3 (reload bit for bit), 6 (zero is a number), 7 (structure is
written down)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering

import pruned_ops
from inputs import padded_batch, pruned_model, stock_model
from pruned_ops import LayerShape, ModelShape, PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.measure.comparison import compare
from pruned_ops.measure.timing import Workload
from pruned_ops.models.inputs import pool_tokens
from tiny_tokenizers import word_tokenizer

CLASSES: dict[str, tuple[Any, Any]] = {
    "bert": (PrunedBertConfig, pruned_ops.PrunedBertForQuestionAnswering),
    "roberta": (PrunedRobertaConfig, pruned_ops.PrunedRobertaForQuestionAnswering),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_dense_shapes_are_the_stock_model(kind: str, training: bool) -> None:
    """Logits, loss, gradients and hidden states; the same parameter names."""
    config_class, model_class = CLASSES[kind]
    stock = stock_model(kind, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pruned = model_class(config_class(**stock.config.to_dict()))
    pruned.load_state_dict(stock.state_dict())
    batch = padded_batch((20, 3, 11), stock.config.pad_token_id)
    batch |= {"start_positions": torch.tensor([2, 1, 99]), "end_positions": torch.tensor([3, 1, 4])}
    real = batch["attention_mask"].bool()
    outputs = []
    for model in (stock, pruned):
        model.train(training)
        output = model(**batch, output_hidden_states=True)
        output.loss.backward()
        outputs.append(output)
    close = {"atol": 2e-5, "rtol": 1e-4}
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **close)
    torch.testing.assert_close(outputs[1].start_logits[real], outputs[0].start_logits[real], **close)
    for ours, theirs in zip(outputs[1].hidden_states, outputs[0].hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **close)
    theirs_by_name = dict(stock.named_parameters())
    assert theirs_by_name.keys() == dict(pruned.named_parameters()).keys()
    for name, ours in pruned.named_parameters():
        torch.testing.assert_close(ours.grad, theirs_by_name[name].grad, **close)


RELOAD = """
import sys, torch, pruned_ops
from transformers import AutoModelForQuestionAnswering
for folder in sys.argv[1:]:
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    inputs, logits = torch.load(folder + ".pt")
    with torch.no_grad():
        output = model(**inputs)
    assert torch.equal(output.start_logits, logits[0]) and torch.equal(output.end_logits, logits[1])
    print(model.config.shape)
"""


def test_reload_in_a_fresh_process(tmp_path: Path) -> None:
    """hidden_size 90 that no head count divides, a layer of 0 heads, one of FFN width 0, one of neither."""
    models = {str(tmp_path / kind): pruned_model(kind) for kind in ("bert", "roberta")}
    for folder, model in models.items():
        inputs = padded_batch(pad_token_id=model.config.pad_token_id)
        with torch.no_grad():
            output = model(**inputs)
        model.save_pretrained(folder)
        torch.save((inputs, (output.start_logits, output.end_logits)), f"{folder}.pt")
        names = sorted(path.name for path in Path(folder).iterdir())
        assert names == ["README.md", "config.json", "model.safetensors"]
    done = subprocess.run([sys.executable, "-c", RELOAD, *models], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(model.config.shape) for model in models.values()]


def test_the_bare_encoder_from_a_checkpoint_with_a_head(tmp_path: Path) -> None:
    model = pruned_model()
    model.save_pretrained(tmp_path)
    by_name = type(model.bert).from_pretrained(pretrained_model_name_or_path=tmp_path)
    batch = padded_batch()
    with torch.no_grad():
        expected = model.bert(**batch).last_hidden_state
        for encoder in (AutoModel.from_pretrained(tmp_path), by_name):
            assert torch.equal(encoder(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_zero_trains(kind: str) -> None:
    model = pruned_model(kind).train()
    batch = padded_batch((9, 4), model.config.pad_token_id)
    positions = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 3])}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch, **positions).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_row_of_padding_only_is_no_nan() -> None:
    with torch.no_grad():
        assert torch.isfinite(pruned_model()(**padded_batch((4, 0))).start_logits).all()


@pytest.mark.parametrize("mask", [torch.full((2, 4), -1e4), torch.ones(1, 4), torch.ones(2, 1, 4, 4)])
def test_a_mask_that_would_be_misread_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="attention_mask"):
        pruned_model()(**{**padded_batch((4, 2)), "attention_mask": mask})


def test_config_round_trip(tmp_path: Path) -> None:
    config = PrunedBertConfig(
        hidden_size=96,
        num_hidden_layers=3,
        head_dim=16,
        layer_shapes=[LayerShape(4, 72), {"num_heads": 0, "ffn_width": 8}, LayerShape(1, 0)],
        num_attention_heads=6,
        intermediate_size=200,
        null_score_threshold=-1.5,
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is PrunedBertConfig and again.shape == config.shape
    assert (again.num_attention_heads, again.intermediate_size, again.null_score_threshold) == (6, 200, -1.5)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["layer_shapes"][1] == {"num_heads": 0, "ffn_width": 8} and written["head_dim"] == 16
    assert config.shape == ModelShape((LayerShape(4, 72), LayerShape(0, 8), LayerShape(1, 0)), 96, 16)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_any_stock_config_is_a_dense_pruned_one(kind: str) -> None:
    stock = stock_model(kind).config
    config = CLASSES[kind][0](**stock.to_dict())
    assert config.shape == ModelShape((LayerShape(4, 96),) * 3, 64, 16)
    assert config.model_type == f"pruned_{kind}"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_shapes": [LayerShape(1, 8)], "num_hidden_layers": 2}, "1 entries, num_hidden_layers is 2"),
        ({"layer_shapes": [{"num_heads": -1, "ffn_width": 8}]}, r"layer_shapes\[0\]: num_heads is -1"),
        (
            {"layer_shapes": [{"num_heads": 1, "ffn_width": 10**12}]},
            r"layer_shapes\[0\]: ffn_width is 1000000000000",
        ),
        ({"layer_shapes": [{"num_heads": 1}]}, r"layer_shapes\[0\].*exactly the keys"),
        ({"layer_shapes": [{"num_heads": 1.5, "ffn_width": 8}]}, "an integer is needed"),
        ({"layer_shapes": [{"num_heads": True, "ffn_width": 8}]}, "an integer is needed"),
        ({"layer_shapes": "many"}, "a list with one entry a layer"),
        (
            {"layer_shapes": [LayerShape(13, 8)], "num_attention_heads": 12},
            "num_heads is 13.*num_attention_heads is 12",
        ),
        (
            {"layer_shapes": [LayerShape(1, 9)], "intermediate_size": 8},
            "ffn_width is 9.*intermediate_size is 8",
        ),
        ({"layer_shapes": [LayerShape(1, 8)], "head_dim": -4}, "head_dim is -4"),
        ({"layer_shapes": [LayerShape(1, 8)], "hidden_size": 0}, "hidden_size is 0"),
        ({"layer_shapes": [LayerShape(1, 8)], "vocab_size": 10**9}, "vocab_size is 1000000000"),
        (
            {"layer_shapes": [LayerShape(1000, 1_000_000)] * 100, "hidden_size": 100_000, "head_dim": 100},
            "refused",
        ),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"hidden_act": "tanh"}, "hidden_act is 'tanh'; gelu, relu, silu, gelu_new are supported"),
        ({"is_decoder": True}, "is_decoder"),
        ({"pad_token_id": -7}, "pad_token_id is -7"),
        ({"pad_token_id": 10**9}, "pad_token_id is 1000000000"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
        ({"null_score_threshold": "low"}, "null_score_threshold"),
    ],
)
def test_a_config_that_lies_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Made by hand and read from a file, in both cases before any memory is taken."""
    with pytest.raises(ValueError, match=message):
        PrunedBertConfig(**fields)
    if all(not isinstance(s, LayerShape) for s in fields.get("layer_shapes", [])):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "pruned_bert", **fields}))
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("fault", ["missing", "unexpected", "misshapen", "config"])
def test_a_checkpoint_that_disagrees_with_its_config_is_refused(
    fault: str, kind: str, tmp_path: Path
) -> None:
    pruned_model(kind).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{kind}.encoder.layer.0.attention.self.query.bias"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors[name.replace("layer.0", "layer.7")] = tensors[name].clone()
    elif fault == "misshapen":
        tensors[name] = tensors[name][:-1].clone()
    else:
        config = json.loads((tmp_path / "config.json").read_text())
        config["layer_shapes"][0]["num_heads"] = 3
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = {"missing": "missing", "unexpected": "unexpected"}.get(fault, r"shape.*config.json says")
    with pytest.raises(ValueError, match=wanted):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForQuestionAnswering])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_layer_too_many_in_a_bare_encoders_checkpoint_is_refused(
    kind: str, auto: Any, tmp_path: Path
) -> None:
    """Its tensors have no prefix that tells them from a head's."""
    pruned_model(kind).base_model.save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "encoder.layer.7.attention.self.query.bias"
    tensors[name] = torch.zeros(64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"unexpected \S*{name}"):
        auto.from_pretrained(tmp_path)


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    model = pruned_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModelForQuestionAnswering.from_pretrained(tmp_path)


def test_shape_counts() -> None:
    """Parameters against the modules themselves, MACs against counting by hand."""
    model = pruned_model()
    encoder = sum(p.numel() for p in model.bert.encoder.parameters())
    assert model.config.shape.parameters() == encoder
    shape = ModelShape((LayerShape(2, 10),), 8, 4)
    lengths = [3, 5]
    by_hand = sum(n * (4 * 8 * 8 + 2 * 8 * 10) + 2 * n * n * 8 for n in lengths)
    assert shape.macs(lengths) == by_hand
    wide = ModelShape((LayerShape(12, 3072),) * 12, 768, 64)
    assert wide.macs(np.array([384, 384], np.int32)) == wide.macs([384, 384])  # type: ignore[arg-type]
    for window in (None, 0, 1, 3, 9):
        near = [abs(q - k) for n in lengths for q in range(n) for k in range(n)]
        pairs = sum(window is None or distance <= window for distance in near)
        windowed = ModelShape(shape.layers * 2, 8, 4, windows=(None, window))
        assert windowed.macs(lengths) == 2 * by_hand - 2 * 8 * (len(near) - pairs)


def test_a_config_without_a_padding_id(tmp_path: Path) -> None:
    """Batches are filled up with id 0, and no real token's outputs depend on it; RoBERTa counts by it."""
    dense, same = stock_model(pad_token_id=None), stock_model(pad_token_id=0)
    same.load_state_dict(dense.state_dict())
    narrow = pruned_ops.PrunedBertForQuestionAnswering(PrunedBertConfig(**dense.config.to_dict()))
    narrow.load_state_dict(dense.state_dict())
    narrow.save_pretrained(tmp_path)
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert again.config.pad_token_id is None
    questions, contexts = ["w1 w2", "w3"], ["w4 w5 w6 w7", "w8 w9"]
    answers = [
        pruned_ops.QuestionAnswerer(model, word_tokenizer(96)).answer(questions, contexts)
        for model in (dense, again, same)
    ]
    for other in answers[:2]:
        assert [a.answer for a in other] == [a.answer for a in answers[2]]
        assert [a.score for a in other] == pytest.approx([a.score for a in answers[2]], abs=1e-5)
    assert compare({"dense": pruned_ops.restore(dense)}, Workload.fixed(7, 2, 1), rounds=1).rows
    with pytest.raises(ValueError, match="pad_token_id is None: an integer is needed"):
        PrunedRobertaConfig(pad_token_id=None)


@pytest.mark.parametrize(("pooling", "expected"), [("mean", 4.0), ("cls", 3.0)])
def test_tokens_are_pooled_on_whichever_side_the_padding_is(pooling: str, expected: float) -> None:
    states = torch.tensor([[3.0, 5.0, 9.0], [9.0, 3.0, 5.0], [1.0, 1.0, 1.0]])[:, :, None]
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    assert pool_tokens(states, mask, pooling).tolist() == [[expected], [expected], [0.0]]
    assert pool_tokens(states, None, pooling)[2].tolist() == [1.0]
    with pytest.raises(ValueError, match="pooling is 'max'; mean or cls is needed"):
        pool_tokens(states, mask, "max")
