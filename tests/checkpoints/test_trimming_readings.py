"""Trimmed folders of sentence-transformers, which puts prompts before texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from pruned_ops import trim_vocabulary

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
