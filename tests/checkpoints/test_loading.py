"""Checkpoints that somebody hostile or careless wrote: refused in one line, nothing loaded, no code run."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForMaskedLM

import family_models
import pruned_ops
from head_models import MODELS as HEAD_MODELS
from head_models import pruned, stock
from inputs import pruned_model, stock_model
from pruned_ops.checkpoints import quantizing
from pruned_ops.checkpoints.loading import (
    cast_and_dtype,
    head_of,
    load_any_head,
    load_config,
    load_model,
    load_to_fine_tune,
    load_tokenizer,
)
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.natural_questions import load_natural_questions
from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask
from pruned_trainer.tasks.squad.task import SquadTask
from tiny_tokenizers import word_tokenizer

CODE = """from pathlib import Path
Path(__file__).with_name("code_was_run").touch()
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizerFast
class C(BertConfig):
    model_type = "{model_type}"
class M(BertForQuestionAnswering):
    config_class = C
class T(BertTokenizerFast):
    pass
"""
NO_FILES: Any = ()
LOADERS: dict[str, Callable[[str], Any]] = {
    "config": lambda folder: load_config(Path(folder)),
    "model": load_model,
    "tokenizer": load_tokenizer,
    "natural questions": load_natural_questions,
    "squad's start": lambda folder: SquadTask().start_model(folder, []),
    "natural questions' start": lambda folder: NaturalQuestionsTask().start_model(folder, NO_FILES),
}


@pytest.fixture(params=["evil", "bert"])
def with_code(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with code beside it, of a model type that only this code knows, or of a known one."""
    stock_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    for name, added in (
        ("config.json", {"AutoConfig": "evil.C", "AutoModelForQuestionAnswering": "evil.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ):
        fields = json.loads((tmp_path / name).read_text())
        fields["auto_map"] = added
        if name == "config.json":
            fields["model_type"] = request.param
        (tmp_path / name).write_text(json.dumps(fields))
    (tmp_path / "evil.py").write_text(CODE.format(model_type=request.param))
    return tmp_path


@pytest.mark.parametrize("loader", LOADERS)
def test_code_beside_a_checkpoint_is_never_run(
    loader: str, with_code: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What stands on standard input, a question say, answers no prompt: it is not read at all."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    try:
        LOADERS[loader](str(with_code))
    except (ValueError, OSError) as error:
        assert "bert" not in loader and str(with_code) in str(error)
    assert sys.stdin.tell() == 0 and not (with_code / "code_was_run").exists()
    assert "[y/N]" not in "".join(capfd.readouterr())


def test_a_model_type_that_only_code_knows_is_refused_by_name(with_code: Path) -> None:
    if json.loads((with_code / "config.json").read_text())["model_type"] == "bert":
        assert load_model(str(with_code)).config.model_type == "bert"
        return
    with pytest.raises(ValueError, match="it is a 'evil' model; only bert, .* are supported$"):
        load_model(str(with_code))


def rewritten(folder: Path, **fields: Any) -> Path:
    """The pruned checkpoint in `folder` with other fields in its config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))
    return folder


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": 1 << 31}, "num_labels is 2147483648: it must lie between 0 and"),
        ({"num_labels": "2"}, "num_labels is '2': an integer is needed"),
        ({"null_score_threshold": float("nan")}, "'NaN' is no finite number"),
        ({"null_score_threshold": [0.0]}, r"null_score_threshold is \[0.0\]"),
        ({"layer_shapes": {"secret": 1}}, "layer_shapes is"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps"),
        ({"model_type": 7}, "it is a 7 model"),
        ({"vocab_size": 10**400}, "is no finite number: line 1 column"),
        ({"title": "\ud800"}, "half a surrogate pair"),
        ({"title": json.loads("[" * 80 + "]" * 80)}, "nested more than 64 deep"),
    ],
)
def test_configs_that_are_none(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    pruned_model().save_pretrained(tmp_path)
    for load in (LOADERS["config"], load_model):
        if load is not load_model and "model_type" in fields:
            continue
        with pytest.raises(ValueError, match=message) as refusal:
            load(str(rewritten(tmp_path, **fields)))
        said = str(refusal.value)
        assert str(tmp_path) in said and "\n" not in said and len(said) < 600


def test_configs_with_a_byte_order_mark_and_in_other_encodings(tmp_path: Path) -> None:
    pruned_model().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text, encoding="utf-16")
    with pytest.raises(ValueError, match=r"config\.json is no JSON: it is UTF-16 or UTF-32 text"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e38])
@pytest.mark.parametrize("kind", ["pruned", "stock"])
def test_weights_that_are_no_numbers(value: float, kind: str, tmp_path: Path) -> None:
    (pruned_model() if kind == "pruned" else stock_model()).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["qa_outputs.bias"][1] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"qa_outputs\.bias holds numbers from .*weights are finite"):
        load_model(str(tmp_path))
    tensors["qa_outputs.bias"] = torch.tensor([1e9, -1e9])  # large, and a number all the same
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["stock-bert-sequence", "pruned-roberta-token", "natural-questions"])
def test_the_head_that_was_saved_is_loaded(name: str, tmp_path: Path) -> None:
    model = HEAD_MODELS[name]()
    model.save_pretrained(tmp_path)
    loaded = load_any_head(str(tmp_path))
    assert type(loaded) is type(model) and not loaded.training
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("make", [stock, pruned])
def test_an_encoder_without_a_head(make: Callable[[str, str], Any], pooled: bool, tmp_path: Path) -> None:
    """A pooler that the checkpoint lacks is not made."""
    model = make("bert", "sequence" if pooled else "token").bert
    model.save_pretrained(tmp_path)
    loaded = load_any_head(str(tmp_path))
    assert type(loaded) is type(model) and (loaded.pooler is not None) is pooled
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["Bert", "MPNet", "Roberta", "DistilBert", "Electra"])
def test_an_embedder_under_the_name_of_a_language_model(kind: str, tmp_path: Path) -> None:
    """As all-mpnet-base-v2 is saved: without the head that its config names. With the head it is refused."""
    model = family_models.stock(kind, "")
    model.save_pretrained(tmp_path / "encoder")
    path = tmp_path / "encoder" / "config.json"
    whole = AutoModelForMaskedLM.from_config(model.config)
    name = type(whole).__name__
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
    loaded = load_any_head(str(tmp_path / "encoder"))
    assert type(loaded) is type(model) and head_of(loaded.config) == "Model"
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    word_tokenizer().save_pretrained(tmp_path / "encoder")
    assert type(quantizing.load(str(tmp_path / "encoder"))[0]) is type(model)  # and no head of random weights
    whole.save_pretrained(tmp_path / "whole")
    word_tokenizer().save_pretrained(tmp_path / "whole")
    assert type(quantizing.load(str(tmp_path / "whole"))[0]) is type(whole)
    with pytest.raises(ValueError, match=f"it is a '{name}' with its head .*AutoModel loads and saves its"):
        load_any_head(str(tmp_path / "whole"))


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForSequenceClassification", "Model"])
def test_an_encoder_that_is_not_whole_is_not_fine_tuned(head: str, tmp_path: Path) -> None:
    """transformers makes what is missing up, at random; of a head that is what is wanted."""
    stock("bert", "token").save_pretrained(tmp_path)
    tensors, name = load_file(tmp_path / "model.safetensors"), "encoder.layer.1.output.dense.weight"
    model = load_to_fine_tune(str(tmp_path), head)
    assert torch.equal(model.base_model.state_dict()[name], tensors.pop(f"bert.{name}"))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"encoder are not what its config says: \S*{name} is missing$"):
        load_to_fine_tune(str(tmp_path), head)


@pytest.mark.parametrize("head", ["ForQuestionAnswering", "ForTokenClassification", "Model"])
@pytest.mark.parametrize(("stem", "layer"), [("Bert", "bert.encoder.layer"), ("ModernBert", "model.layers")])
def test_an_encoder_with_layers_that_its_config_does_not_know_is_not_fine_tuned(
    stem: str, layer: str, head: str, tmp_path: Path
) -> None:
    """It would lose them silently; a head that is not taken is lost as it has to be."""
    family_models.stock(stem, "SequenceClassification").save_pretrained(tmp_path)
    load_to_fine_tune(str(tmp_path), head)
    tensors = load_file(tmp_path / "model.safetensors")
    first = next(name for name in sorted(tensors) if name.startswith(f"{layer}.0."))
    surplus = first.replace(f"{layer}.0.", f"{layer}.12.")
    save_file(tensors | {surplus: tensors[first].clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"not what its config says: it has no place for \S*\.12\."):
        load_to_fine_tune(str(tmp_path), head)


def test_a_vocabulary_alone_is_the_tokenizer_of_the_stock_model(tmp_path: Path) -> None:
    """bert-base-uncased's files name no class: its model type says it, which the pruned model has not."""
    config = pruned_ops.PrunedBertConfig(**stock_model().config.to_dict())
    pruned_ops.PrunedBertForQuestionAnswering(config).save_pretrained(tmp_path)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("the cats").input_ids == [2, 5, 6, 7, 3] and tokenizer.cls_token_id == 2


@pytest.mark.parametrize("stem", family_models.FAMILIES)
def test_a_pruned_config_names_the_tokenizer_of_its_stock_model(stem: str) -> None:
    stock_config = family_models.stock(stem, "").config
    config_class = PRUNED_CONFIGS[stock_config.model_type]
    config = config_class(**stock_config.to_dict())
    (expected,) = (one.tokenizer for one in family_models.family_named(stem).stock if one.stem == stem)
    assert config.tokenizer_class == config_class(**config.to_dict()).tokenizer_class == expected
    assert config_class(**{**stock_config.to_dict(), "tokenizer_class": "Own"}).tokenizer_class == "Own"


def test_a_head_that_is_not_known_is_refused(tmp_path: Path) -> None:
    model = stock("bert", "sequence")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"architectures": ["BertForMultipleChoice"]}))
    with pytest.raises(ValueError, match="it is 'BertForMultipleChoice'; known are Question"):
        load_any_head(str(tmp_path))
    path.write_text(json.dumps(config | {"architectures": ["BertForTokenClassification"]}))
    with pytest.raises(ValueError, match="holds tensors|lacks|describes"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_classifier_of_modernbert_answers_no_questions(head: str, tmp_path: Path) -> None:
    """Its tensors have the names of a question-answering head's."""
    sizes: dict[str, Any] = {
        "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "pad_token_id": 0, "num_labels": 2,
    }  # fmt: skip
    model_class: Any = getattr(transformers, f"ModernBertFor{head}")
    model_class(transformers.ModernBertConfig(**sizes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"it is a 'ModernBertFor{head}', and no fine-tuned question-answer"):
        load_model(str(tmp_path))


def test_a_gpu_computes_all_of_a_model_in_a_half() -> None:
    """A CPU has dtypes of the linears, and no float16."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert cast_and_dtype("float16", gpu) == (torch.float16, None)
    assert cast_and_dtype("bfloat16", gpu) == (torch.bfloat16, None)
    assert cast_and_dtype("bfloat16", cpu) == (None, "bfloat16")
    for dtype in (None, "int8"):
        assert cast_and_dtype(dtype, gpu) == cast_and_dtype(dtype, cpu) == (None, dtype)
    with pytest.raises(ValueError, match="float16 is for a GPU; on a CPU there are bfloat16 and int8"):
        cast_and_dtype("float16", cpu)
