"""Sentences in words: each word's first token, whatever the tokenizer drops, keeps or cuts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.task import Score
from pruned_trainer.tasks.texts.examples import read_class
from pruned_trainer.tasks.texts.tagging import ENTITIES, TaggingTask, WordAccuracy, is_bio, tags_of
from pruned_trainer.tasks.texts.words import encode_words
from text_files import checkpoint, write_rows
from tiny_tokenizers import byte_tokenizer

ZERO = "\u200d\ufeff"


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's own steps, which remove zero-width characters and split words at punctuation."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "new", "york", "##er", "is", "a", ".", "##s", "city"]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )


WORDS = ["New", ZERO, "Yorkers", ".", "", "is", "a.city", ZERO]
# The words that have a token, and what their first token is.
SEEN = {0: "new", 2: "york", 3: ".", 5: "is", 6: "a"}


def firsts(windows: Any, tokenizer: Any) -> dict[int, str]:
    """Each word's first token, and that no word comes twice."""
    found: dict[int, str] = {}
    for window in windows:
        for word, token in zip(window.words, window.tokens, strict=True):
            assert int(word) not in found
            found[int(word)] = tokenizer.convert_ids_to_tokens(int(window.input_ids[token]))
    return found


@pytest.mark.parametrize("max_length", [64, 7, 4])
def test_dropped_words_shift_nothing(max_length: int) -> None:
    tokenizer = wordpiece()
    windows = encode_words(tokenizer, [WORDS, ["city"]], max_length, stride=2)
    assert max(map(len, windows)) <= max_length and (len(windows) > 2) == (max_length < 64)
    assert firsts([w for w in windows if w.sentence == 0], tokenizer) == SEEN
    assert firsts([w for w in windows if w.sentence == 1], tokenizer) == {0: "city"}


def test_a_word_counts_where_most_of_its_surroundings_are_seen() -> None:
    windows = encode_words(wordpiece(), [["is", "a", "city", "new", "york", "."]], 6, stride=2)
    assert [window.words.tolist() for window in windows] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("stride", [3, 4, 128])
def test_a_stride_as_long_as_a_window_makes_no_window_for_each_token(stride: int) -> None:
    """128 is the default, and 128 tokens are a usual length for words with labels."""
    words = ["is", "a", "city", "new"] * 5
    windows = encode_words(wordpiece(), [words], 6, stride)
    assert len(windows) == 9  # of four words each, a step of two
    assert sorted(word for window in windows for word in window.words) == list(range(20))


def test_bytes_with_the_space_before_a_word() -> None:
    tokenizer = byte_tokenizer()
    (window,) = encode_words(tokenizer, [["ab", "é", "c"]], 64, stride=8)
    assert [tokenizer.convert_ids_to_tokens(int(window.input_ids[t])) for t in window.tokens] == [
        "a",
        "Ã",
        "c",
    ]
    with pytest.raises(FormatError, match="max_length 2 leaves no room"):
        encode_words(tokenizer, [["ab"]], 2, stride=8)


def test_tags_of_words_without_a_token() -> None:
    windows = encode_words(wordpiece(), [WORDS], 64, stride=2)
    names = ("B-x", "I-x", "O")
    logits = np.zeros((len(windows[0]), 3))
    logits[:, 1] = 1
    tags = tags_of(windows, [len(WORDS)], names, [logits])
    assert tags == [["I-x" if word in SEEN else "O" for word in range(len(WORDS))]]


def test_resampled_entity_scores_are_seqeval_s() -> None:
    rng = np.random.default_rng(0)
    names = np.array(["O", "B-creative-work", "I-creative-work", "B-x", "I-x"])
    assert is_bio(names) and not is_bio(("NOUN", "O"))
    gold, said = ([names[rng.integers(5, size=n)].tolist() for n in range(1, 21)] for _ in range(2))
    said[5:10] = gold[5:10]
    draws = np.concatenate([np.arange(20)[None], rng.integers(20, size=(4, 20))])
    for metric in (*ENTITIES, WordAccuracy(Score("accuracy", "accuracy"))):
        resampled = metric.resampled(metric.statistics(gold, said), draws)
        expected = [metric.value([gold[i] for i in rows], [said[i] for i in rows]) for rows in draws.tolist()]
        np.testing.assert_allclose(resampled, expected)
        assert 0 < expected[0] < 100


def test_a_word_without_a_label_is_no_class_and_is_not_judged(tmp_path: Path) -> None:
    """-100 stands for none, as in data that were made for transformers."""
    rows = [{"tokens": ["w1", "w2", "w3"], "tags": [-100, 0, 1]}, {"tokens": ["w4"], "tags": [1]}]
    task = TaggingTask(TaskOptions(task="token-classification", max_length=24, stride=4))
    examples = task.read(write_rows(tmp_path / "train.jsonl", rows), "train")
    start = checkpoint(tmp_path / "start", BertModel)
    model = task.start_model(str(start), examples)
    assert list(model.config.id2label.values()) == ["LABEL_0", "LABEL_1"]
    tokenizer = load_tokenizer(str(start))
    labels = [feature["labels"].tolist() for feature in task.features(examples, tokenizer, model)]
    assert labels == [[-100, -100, 0, 1, -100], [-100, 1, -100]]
    prepared = task.prepare(examples, tokenizer, model)
    assert prepared.gold == [[None, "LABEL_0", "LABEL_1"], ["LABEL_1"]]
    right = [["LABEL_1", "LABEL_0", "LABEL_1"], ["LABEL_1"]]
    assert [metric.value(prepared.gold, right) for metric in prepared.metrics] == [100.0]
    gold: list[list[str | None]] = [[None, "B-x", "I-x"], ["O"]]
    for metric in ENTITIES:
        assert metric.value(gold, [["B-x", "B-x", "I-x"], ["O"]]) == 100.0
    none = write_rows(tmp_path / "none.jsonl", [{"tokens": ["w1"], "tags": [-100]}])
    with pytest.raises(FormatError, match="row 0: no word has a label: all are -100"):
        task.read(none, "train")
    with pytest.raises(FormatError, match="row 1: the label is -100, which stands for none"):
        read_class(-100, "row 1")
