"""Foreign checkpoints in every known layout: imported, saved, reloaded, optimised, the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification

import pruned_ops
from foreign_checkpoints import stored
from head_models import stock
from inputs import logits, padded_batch, stock_model
from pruned_ops import LayerShape
from pruned_ops.checkpoints.importing import read_foreign
from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.checkpoints.tensors import Tensors
from pruned_ops.cli import main
from pruned_trainer import Decision, attached, compact
from pruned_trainer.pruning.decision import Kept, LayerDecision
from tiny_tokenizers import word_tokenizer

HEAD_DIM, HEADS, FFN, LAYERS = 16, 4, 96, 3
KEPT = [([0, 2, 3], range(96)), ([1], range(0, 96, 2)), ([0, 1, 2, 3], range(10))]


@pytest.fixture(params=["bert", "roberta", "xlm-roberta"])
def dense(request: pytest.FixtureRequest) -> Any:
    return stock_model(request.param)


def decision(kept: Any = KEPT, hidden: Any = None) -> Decision:
    layers = tuple(
        LayerDecision(Kept(tuple(h), (1.0,) * len(h)), Kept(tuple(f), (1.0,) * len(f))) for h, f in kept
    )
    return Decision(layers, 1, {}, {}, None if hidden is None else Kept(tuple(hidden), (1.0,) * len(hidden)))


def parts(model: Any, layer: int) -> dict[str, Any]:
    return dict(model.base_model.encoder.layer[layer].named_modules())


def check(folder: Path, expected: Any, shapes: list[LayerShape], tmp_path: Path) -> list[str]:
    """Import, save, reload, optimise: the source's logits each time. Returns what was recognised."""
    batch = padded_batch((20, 3, 11, 1), pad_token_id=expected.config.pad_token_id)
    real = batch["attention_mask"].bool()
    truth = logits(expected, batch)[real]
    model, notes = read_foreign(folder)
    assert list(model.config.shape.layers) == shapes
    torch.testing.assert_close(logits(model, batch)[real], truth, atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "imported")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "imported")
    assert torch.equal(logits(again, batch), logits(model, batch))
    fast = logits(pruned_ops.optimize(again), batch)
    torch.testing.assert_close(fast[real], truth, atol=3e-5, rtol=1e-4)
    return notes


def narrow_shapes(kept: Any = KEPT) -> list[LayerShape]:
    return [LayerShape(len(h), len(f)) for h, f in kept]


def test_heads_that_transformers_4_pruned(dense: Any, tmp_path: Path) -> None:
    """`pruned_heads` in the config, q, k, v and output narrowed, the FFN whole, a pooler beside."""
    kept = [(heads, range(FFN)) for heads, _ in KEPT]
    narrow = compact(dense, decision(kept))
    prefix = dense.base_model_prefix

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["pruned_heads"] = {"0": [1], "1": [0, 2, 3]}
        tensors.update({name: t.clone() for name, t in narrow.state_dict().items()})
        tensors[f"{prefix}.pooler.dense.weight"] = torch.ones(64, 64)
        tensors[f"{prefix}.embeddings.position_ids"] = torch.arange(80)[None]

    folder = stored(tmp_path / "v4", dense, change)
    notes = check(folder, narrow, narrow_shapes(kept), tmp_path)
    assert any("layer 1 has 1 heads, as pruned_heads says" in note for note in notes)


def test_zero_rows_columns_and_heads(dense: Any, tmp_path: Path) -> None:
    """As nn_pruning leaves them: weights zeroed, biases as they were; what is constant goes into a bias."""
    with torch.no_grad():
        for number, (heads, units) in enumerate(KEPT):
            found = parts(dense, number)
            for head in set(range(HEADS)) - set(heads):
                rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
                if head % 2:  # its values are gone, their bias is not
                    found["attention.self.value"].weight[rows] = 0
                else:
                    found["attention.output.dense"].weight[:, rows] = 0
            for unit in set(range(FFN)) - set(units):
                if unit % 3:
                    found["intermediate.dense"].weight[unit] = 0
                else:
                    found["output.dense"].weight[:, unit] = 0
    folder = stored(tmp_path / "zeros", dense, lambda config, tensors: None)
    notes = check(folder, dense, narrow_shapes(), tmp_path)
    heads, units = sum(HEADS - len(h) for h, _ in KEPT), sum(FFN - len(f) for _, f in KEPT)
    assert notes == [f"{heads} heads and {units} FFN units without effect, left out"]


def test_smaller_layers_missing_layers_and_a_smaller_hidden_size(dense: Any, tmp_path: Path) -> None:
    """As CoFi leaves them: sizes in the tensors alone, a layer gone, what trained it still there."""
    hidden = list(range(0, 64, 3))
    narrow = compact(dense, decision(hidden=hidden))
    two = compact(dense, decision(hidden=hidden))
    del two.base_model.encoder.layer[1]
    prefix = dense.base_model_prefix

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        for name, tensor in narrow.state_dict().items():
            if ".layer.1." not in name or "LayerNorm" in name:  # those it keeps, unsliced
                tensors[name] = tensor.clone()
        tensors["layer_transformation.weight"] = torch.ones(4, 4)
        tensors["mha_layer_transformation.weight"] = torch.ones(4, 4)
        tensors[f"{prefix}.l0_module.head_loga"] = torch.ones(3)

    folder = stored(tmp_path / "cofi", dense, change)
    shapes = [shape for number, shape in enumerate(narrow_shapes()) if number != 1]
    notes = check(folder, two, shapes, tmp_path)
    assert "layers 1 are missing altogether" in notes and f"hidden size {len(hidden)} of 64" in notes


def saved_as(folder: Path, architecture: str, model: Any, head: Tensors) -> Path:
    """The encoder of a question-answering model as a checkpoint of another class, with this head."""
    prefix = model.base_model_prefix

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        for name, tensor in model.state_dict().items():
            if not name.startswith("qa_outputs"):
                tensors[name] = tensor.clone()
        tensors.update({name.replace("PREFIX", prefix): tensor for name, tensor in head.items()})
        config.update(architectures=[architecture], intermediate_size=FFN, num_attention_heads=HEADS)
        config.update(model_type=prefix, hidden_size=64, id2label={str(i): f"l{i}" for i in range(3)})
        config.pop("num_labels", None)
        config.pop("label2id", None)

    return stored(folder, model, change)


def weights(width: int, hidden: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width, hidden) / hidden**0.5, torch.randn(width)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("architecture", ["CoFi{}ForSequenceClassification", None])
def test_cofis_classifiers(kind: str, architecture: str | None, tmp_path: Path) -> None:
    """The first linear on top has fewer columns, as the hidden size, and all of its rows."""
    hidden = list(range(0, 64, 3))
    narrow = compact(stock_model(kind), decision(hidden=hidden))
    (first, first_bias), (last, last_bias) = weights(64, len(hidden)), weights(3, 64)
    names = {
        "bert": ("PREFIX.pooler.dense", "classifier"),
        "roberta": ("classifier.dense", "classifier.out_proj"),
    }[kind]
    head = {f"{names[0]}.weight": first, f"{names[0]}.bias": first_bias}
    head |= {f"{names[1]}.weight": last, f"{names[1]}.bias": last_bias}
    name = "Odd" if architecture is None else architecture.format(kind.capitalize())
    folder = saved_as(tmp_path / "in", name, narrow, head)
    model, notes = read_foreign(folder)
    assert type(model).__name__ == f"Pruned{kind.capitalize()}ForSequenceClassification"
    assert f"hidden size {len(hidden)} of 64" in notes and model.config.pooler_size == 64
    assert model.config.id2label == {0: "l0", 1: "l1", 2: "l2"}
    batch = padded_batch((20, 3, 11, 1), pad_token_id=model.config.pad_token_id)
    with torch.no_grad():
        states = narrow.base_model(**batch).last_hidden_state[:, 0]
        expected = F.linear(torch.tanh(F.linear(states, first, first_bias)), last, last_bias)
        torch.testing.assert_close(model(**batch).logits, expected, atol=2e-5, rtol=1e-4)
        model.save_pretrained(tmp_path / "imported")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "imported")
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        fast = pruned_ops.optimize(again)
        torch.testing.assert_close(fast(**batch).logits, expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("head", ["sequence", "token"])
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_nn_prunings_classifiers(kind: str, head: str, tmp_path: Path) -> None:
    """Zeroed heads and units under a classifier; the same logits of a narrow one."""
    dense = stock(kind, head)
    with torch.no_grad():
        found = parts(dense, 1)
        found["attention.output.dense"].weight[:, :HEAD_DIM] = 0
        found["output.dense"].weight[:, 10:] = 0
    dense.save_pretrained(tmp_path / "in")
    model = pruned_ops.import_checkpoint(tmp_path / "in")
    assert list(model.config.shape.layers) == [LayerShape(4, 96), LayerShape(3, 10)]
    batch = padded_batch((20, 3, 11, 1), pad_token_id=model.config.pad_token_id)
    real = batch["attention_mask"].bool() if head == "token" else slice(None)
    with torch.no_grad():
        ours, theirs = model(**batch).logits[real], dense(**batch).logits[real]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_bare_encoder(tmp_path: Path) -> None:
    """Its tensors have no prefix; the pooler comes along."""
    dense = stock("bert", "sequence").bert
    dense.save_pretrained(tmp_path / "in")
    model = pruned_ops.import_checkpoint(tmp_path / "in")
    assert type(model).__name__ == "PrunedBertModel"
    with torch.no_grad():
        ours, theirs = model(**padded_batch((9, 4))), dense(**padded_batch((9, 4)))
    torch.testing.assert_close(ours.pooler_output, theirs.pooler_output, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.last_hidden_state[0], theirs.last_hidden_state[0], atol=2e-5, rtol=1e-4)


def test_cofis_gates_beside_a_narrower_hidden_size_alone(tmp_path: Path) -> None:
    """The weights are narrowed: nothing is left for the gates to do."""
    hidden = list(range(0, 64, 3))
    whole = [(range(HEADS), range(FFN))] * LAYERS
    narrow = compact(stock_model(), decision(whole, hidden))
    folder = saved_as(tmp_path / "in", "CoFiBertModel", narrow, {})
    torch.save({}, folder / "zs.pt")
    assert f"hidden size {len(hidden)} of 64" in read_foreign(folder)[1]


@pytest.mark.parametrize("kind", ["MaskedLM", "NextSentencePrediction"])
def test_a_head_that_is_left_out_is_named(kind: str, tmp_path: Path) -> None:
    config = stock_model().config
    model = getattr(transformers, f"BertFor{kind}")(config)
    model.save_pretrained(tmp_path)
    imported, notes = read_foreign(tmp_path)
    assert type(imported).__name__ == "PrunedBertModel"
    assert notes == [f"the head of a 'BertFor{kind}', left out: the encoder alone is here"]


@pytest.mark.parametrize("names", [("mask.pt",), ("head_mask.pt", "neuron_mask.pt")])
def test_masks_beside_a_dense_model(names: tuple[str, ...], dense: Any, tmp_path: Path) -> None:
    """TextPruner's pair, and retraining-free pruning's, whose values are not only 0 and 1."""
    heads, ffn = torch.zeros(LAYERS, HEADS), torch.zeros(LAYERS, FFN)
    for number, (kept_heads, units) in enumerate(KEPT):
        heads[number, kept_heads], ffn[number, list(units)] = 1.0, 1.0
    if len(names) == 2:
        heads[0, 0], ffn[1, 2] = 1.5, 0.25
    folder = stored(tmp_path / "masked", dense, lambda config, tensors: None)
    for name, value in zip(names, [(heads, ffn)] if len(names) == 1 else [heads, ffn], strict=True):
        torch.save(value, folder / name)
    with attached(dense) as gates:
        gates.fixed = pruned_ops_values(heads, ffn)
        notes = check(folder, dense, narrow_shapes(), tmp_path)
    assert sum("folded into them" in note for note in notes) == 2


def pruned_ops_values(heads: Tensor, ffn: Tensor) -> Any:
    from pruned_trainer import PerGate

    return PerGate(list(heads), list(ffn), torch.ones(64))


def test_relu_and_pickled_parameters(tmp_path: Path) -> None:
    """Also fields of the config that would get in the way: they are the other tool's."""
    model = stock_model(hidden_act="relu")

    def change(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config.update(output_attentions=True, auto_map={"x": "y"}, shape=[1], quantization_config={})

    folder = stored(tmp_path / "relu", model, change)
    (folder / "model.safetensors").unlink()
    torch.save(dict(model.named_parameters()), folder / "pytorch_model.bin")
    check(folder, model, [LayerShape(HEADS, FFN)] * LAYERS, tmp_path)


def test_the_command(dense: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stored(tmp_path / "in", dense, lambda config, tensors: None)
    word_tokenizer(96).save_pretrained(folder)
    assert main(["import", str(folder), str(tmp_path / "out")]) == 0
    screen = capsys.readouterr().out
    assert "heads/FFN width a layer: 4/96, 4/96, 4/96" in screen and "written to" in screen
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    AutoModelForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert main(["import", str(folder), str(tmp_path / "out")]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("pieces", ["sentencepiece.bpe.model", "spm.model"])
def test_a_sentence_piece_model_comes_along(pieces: str, tmp_path: Path) -> None:
    """XLM-R's and DeBERTa's tokenizers may consist of one, and nothing else is there to load them from."""
    folder = stored(tmp_path / "in", stock_model("xlm-roberta"), lambda config, tensors: None)
    (folder / pieces).write_bytes(b"pieces")
    assert main(["import", str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / pieces).read_bytes() == b"pieces"
    with pytest.raises(FileNotFoundError, match=f"holds {pieces} without tokenizer.json, .*save_pretrained"):
        load_tokenizer(str(tmp_path / "out"))
