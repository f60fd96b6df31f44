"""Trimmed folders of sentence-transformers, which puts prompts before texts and may make them lower-case."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from pruned_ops import trim_vocabulary
from text_models import text_folder

TEXTS = ["Paris is big", "Rome is old", "Oslo is cold"]
PROMPTS = {"query": "query: ", "document": "", "again": "query: "}


def folder_of_library(folder: Path, **settings: Any) -> Path:
    """Make a checkpoint's folder one of sentence-transformers. settings: those of its Transformer."""
    module = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([module]))
    (folder / "sentence_bert_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_folder(folder: Path, prompts: dict[str, str]) -> Path:
    """A BERT with byte-level BPE in which most words are a piece with a space before them and one without."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS, *(f"query: {text}" for text in TEXTS)] * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="<s>", sep_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=backend.get_vocab_size(), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64, pad_token_id=1,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    return folder_of_library(folder)


def cut(folder: Path, text: str) -> list[str]:
    return AutoTokenizer.from_pretrained(folder).tokenize(text)


def test_texts_are_cut_as_before_behind_a_prompt(tmp_path: Path) -> None:
    """Byte-level BPE has another piece for a text's first word there: that with the prompt's space."""
    source = byte_level_folder(tmp_path / "in", PROMPTS)
    done = trim_vocabulary(source, tmp_path / "out", TEXTS[:2], held_out=TEXTS)
    assert cut(source, "query: Paris is big")[2:] == ["ĠParis", "Ġis", "Ġbig"]
    for text in (*TEXTS[:2], *(f"query: {text}" for text in TEXTS[:2])):
        assert cut(tmp_path / "out", text) == cut(source, text)
    assert done.rows[1] < done.rows[0]
    assert (done.texts.texts, done.texts.same, done.texts.gone) == (2, 2, 0)
    assert done.held_out is not None and (done.held_out.texts, done.held_out.same) == (3, 2)


def test_a_text_is_the_same_only_behind_every_prompt(tmp_path: Path) -> None:
    """By itself, after a bracket, a word has the piece without a space."""
    same = {}
    for name, prompts in (("plain", {}), ("prompted", PROMPTS)):
        source = byte_level_folder(tmp_path / name, prompts)
        done = trim_vocabulary(source, tmp_path / f"{name}-out", ["(Paris"], held_out=["Paris"])
        assert done.held_out is not None and done.held_out.texts == 1
        same[name] = done.held_out.same, done.held_out.gone
    assert same == {"plain": (1, 0), "prompted": (0, 1)}


@pytest.mark.parametrize("name", ["sentence_bert_config.json", "sentence_roberta_config.json"])
def test_texts_are_counted_in_lower_case(name: str, tmp_path: Path) -> None:
    """Where the folder says so, and its tokenizer does not do it."""
    source = Path(text_folder(tmp_path / "in"))
    folder_of_library(source, do_lower_case=True)
    (source / "sentence_bert_config.json").rename(source / name)
    settings = {"prompts": {"query": "W9 "}}
    (source / "config_sentence_transformers.json").write_text(json.dumps(settings))
    done = trim_vocabulary(source, tmp_path / "out", ["W1 W2", "W4"], held_out=["w1 W4", "W5"])
    left = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert {"w1", "w2", "w4", "w9"} <= left.keys() and "w5" not in left
    assert (done.texts.same, done.texts.unknown) == (2, (0, 0))
    assert done.held_out is not None and (done.held_out.same, done.held_out.unknown) == (1, (0, 2))
    (source / name).write_text('{"do_lower_case": false}')
    cased = trim_vocabulary(source, tmp_path / "cased", ["w1 W2"])
    assert "w2" not in AutoTokenizer.from_pretrained(tmp_path / "cased").get_vocab()
    assert cased.texts.unknown == (3, 3)


def test_the_librarys_embeddings_stay(tmp_path: Path) -> None:
    """Of texts with a prompt, in lower case."""
    st = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    plain = st.SentenceTransformer(text_folder(tmp_path / "plain"), device="cpu", prompts={"query": "W9 "})
    plain.save_pretrained(str(tmp_path / "in"))
    path = tmp_path / "in" / "sentence_bert_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_lower_case": True}))
    texts = ["W1 W2 W3", "w4 W2"]
    trim_vocabulary(tmp_path / "in", tmp_path / "out", texts)
    before, after = (st.SentenceTransformer(str(tmp_path / name), device="cpu") for name in ("in", "out"))
    for settings in ({}, {"prompt_name": "query"}):
        np.testing.assert_array_equal(after.encode(texts, **settings), before.encode(texts, **settings))
    assert not np.array_equal(after.encode("W1"), after.encode("W2"))


@pytest.mark.parametrize(
    ("texts", "held_out", "message"),
    [
        (iter(["the cat"]), None, "texts is a list_iterator; a list, or what can be read twice, is needed"),
        ("the cat", None, "texts is a str; a list, or what can be read twice, is needed"),
        ({"the cat": 1}, None, "texts is a dict; a list, or"),
        (5, None, "texts is a int; a list, or"),
        (["the cat", None], None, "texts: entry 1 is a NoneType; a string is needed"),
        ([("the", "cat")], None, "texts: entry 0 is a tuple; a string is needed"),
        (["the cat"], [b"the"], "held_out: entry 0 is a bytes; a string is needed"),
        (["the cat"], [], "held_out holds no text"),
    ],
)
def test_texts_are_texts_that_can_be_read_again(
    texts: Any, held_out: Any, message: str, tmp_path: Path
) -> None:
    folder = byte_level_folder(tmp_path / "in", {})
    with pytest.raises(ValueError, match=message):
        trim_vocabulary(folder, tmp_path / "out", texts, held_out=held_out)
    assert sorted(tmp_path.iterdir()) == [folder]
