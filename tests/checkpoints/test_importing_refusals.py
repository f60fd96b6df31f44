"""Foreign checkpoints that are not imported: broken, hostile, or of another kind; the refusal says which."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pruned_ops
from foreign_checkpoints import stored
from inputs import stock_model
from pruned_ops.checkpoints.loading import load_model

HEADS, LAYERS = 4, 3


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit(99)",))


def broken(folder: Path, name: str) -> tuple[str, int | None]:
    """Spoil a checkpoint; what its refusal says, and a head_dim to ask for."""
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    message, head_dim = "", None
    if name == "no json":
        (folder / "config.json").write_text("{")
        return "is no JSON", None
    if name == "code in a pickle":
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
        return "cannot be read as tensors alone", None
    if name == "other model":
        config["model_type"], message = "albert", "is a 'albert' model"
    if name == "no norm":
        config["layer_norm_type"], message = "no_norm", "has no_norm in place of LayerNorm"
    if name == "half a layer":
        tensors = {n: t for n, t in tensors.items() if "layer.1.attention.self" not in n}
        message = "layer 1 lacks attention.self.key.bias"
    if name == "classifier":
        tensors["classifier.weight"] = tensors.pop("qa_outputs.weight")
        message = "no question-answering head"
    if name == "sequence classifier":
        config["architectures"] = ["BertForSequenceClassification"]
        message = "no sequence classification head (classifier); outside the encoder: qa_outputs.bias"
    if name == "sizes that disagree":
        key = "bert.encoder.layer.2.intermediate.dense.bias"
        tensors[key], message = tensors[key][:5], "intermediate.dense.bias is (5,), beside the others (96,)"
    if name == "head_dim":
        message, head_dim = "no multiple of head_dim 24: say a head's width", 24
    if name == "pruned_heads":
        config["pruned_heads"], message = {"1": [0]}, "pruned_heads takes 1 of 4 heads from layer 1"
    if name == "hostile":
        config["vocab_size"], message = 1 << 40, "vocab_size is 1099511627776"
    if name == "hostile layers":
        config["num_hidden_layers"], message = 1 << 40, "num_hidden_layers is 1099511627776"
    if name == "too many layers":
        config["num_hidden_layers"], message = 2, "there are tensors of layer 2, the config has 2 layers"
    if name == "cofi's gates":
        torch.save({}, folder / "zs.pt")
        message = "zs.pt beside weights that are not narrowed"
    if name == "truncated":
        (folder / "model.safetensors").write_bytes(b"no tensors")
        return "model.safetensors cannot be read", None
    if name == "repeated memory":
        (folder / "model.safetensors").unlink()
        torch.save({"x": torch.zeros(1).expand(1 << 20, 1 << 10)}, folder / "pytorch_model.bin")
        return "x repeats its memory", None
    if name == "heads":
        config["num_attention_heads"], message = 5, "5 heads do not divide a hidden size of 64"
    if name == "vocabulary":
        config["vocab_size"], message = 120, "word_embeddings"
    if name == "two masks":
        torch.save((torch.ones(3, 4), None), folder / "mask.pt")
        torch.save(torch.ones(3, 4), folder / "head_mask.pt")
        message = "two masks of heads, one of them in head_mask.pt"
    if name == "choices":
        config["architectures"], message = ["BertForMultipleChoice"], "which chooses among texts"
    if name == "mask":
        torch.save((torch.ones(3, 5), None), folder / "mask.pt")
        message = "the mask of heads has 5 columns"
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    return message, head_dim


@pytest.mark.parametrize(
    "name",
    [
        "no json", "code in a pickle", "other model", "no norm", "half a layer", "classifier",
        "sizes that disagree", "head_dim", "pruned_heads", "hostile", "vocabulary", "mask", "hostile layers",
        "too many layers", "sequence classifier", "cofi's gates", "truncated", "repeated memory", "heads",
        "two masks", "choices",
    ],
)  # fmt: skip
def test_what_is_refused(name: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "in", stock_model(), lambda config, tensors: None)
    message, head_dim = broken(folder, name)
    with pytest.raises(ValueError) as refusal:
        pruned_ops.import_checkpoint(folder, head_dim)
    assert message and message in str(refusal.value)


QUERY = "bert.encoder.layer.1.attention.self.query.bias"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": ["bert"]}, r"is a \['bert'\] model"),
        ({"hidden_size": "64"}, "hidden_size is '64': an integer is needed"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_act": 3}, "hidden_act 3 is not known"),
        ({"head_dim": "16"}, "head_dim is '16'"),
        ({"pruned_heads": {"0": 5}}, "pruned_heads is {'0': 5}, not layer -> heads"),
        ({"num_labels": 1 << 31}, "num_labels is 2147483648"),
        ({"id2label": ["a"]}, r"id2label is \['a'\]"),
        ({"tokenizer_class": 7}, "tokenizer_class is 7"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps"),
        ({"layer_norm_eps": float("nan")}, "'NaN' is no finite number: line 1 column"),
        ({"hidden_dropout_prob": []}, "hidden_dropout_prob"),
        ({"classifier_dropout": "much"}, "classifier_dropout is 'much': a number is needed"),
        ({"pad_token_id": 1.5}, "pad_token_id"),
    ],
)
def test_configs_with_wrong_values_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = stored(tmp_path / "in", stock_model(), lambda config, tensors: config.update(fields))
    with pytest.raises(ValueError, match=message) as refusal:
        pruned_ops.import_checkpoint(folder)
    assert str(folder) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e38])
def test_weights_that_are_no_numbers_are_refused(value: float, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[QUERY][3] = value

    folder = stored(tmp_path / "in", stock_model(), change)
    with pytest.raises(ValueError, match=rf"in: '{QUERY}' holds numbers from .*: weights are fin"):
        pruned_ops.import_checkpoint(folder)


@pytest.mark.parametrize("digit", ["\u0661", "01", "9" * 5000])
def test_layers_are_numbered_in_plain_digits(digit: str, tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[QUERY.replace("layer.1", f"layer.{digit}")] = tensors.pop(QUERY)

    folder = stored(tmp_path / "in", stock_model(), change)
    with pytest.raises(ValueError, match=r"layer 1 lacks attention\.self\.query\.bias"):
        pruned_ops.import_checkpoint(folder)


@pytest.mark.parametrize(
    "mask",
    [
        torch.full((LAYERS, HEADS), float("nan")),
        torch.full((LAYERS, HEADS), 1e30),
        torch.ones(LAYERS, HEADS, dtype=torch.complex64),
        torch.ones(LAYERS, HEADS).to_sparse(),
        torch.ones(LAYERS),
        [[1.0] * HEADS] * LAYERS,
        "heads",
    ],
)
def test_masks_that_are_none_are_refused(mask: Any, tmp_path: Path) -> None:
    folder = stored(tmp_path / "in", stock_model(), lambda config, tensors: None)
    torch.save(mask, folder / "head_mask.pt")
    with pytest.raises(ValueError, match=r"in: the mask of heads"):
        pruned_ops.import_checkpoint(folder)


@pytest.mark.parametrize("shard", ["../out.safetensors", "/etc/hostname", "..", "", "a/b", "a\\b", 7, None])
def test_an_index_does_not_lead_out_of_its_folder(shard: Any, tmp_path: Path) -> None:
    folder = stored(tmp_path / "in", stock_model(), lambda config, tensors: None)
    (folder / "model.safetensors").rename(tmp_path / "out.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {QUERY: shard}}))
    for load in (pruned_ops.import_checkpoint, load_model):
        with pytest.raises(ValueError, match=r"index\.json (leads out of its folder|has no weight_map)"):
            load(str(folder))


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        pruned_ops.import_checkpoint(tmp_path)
