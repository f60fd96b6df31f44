"""Natural Questions windows: markers, answer types, offsets that survive any tokenizer."""

from __future__ import annotations

import copy
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

from nq_pages import annotation, matching_file, page, parsed
from pruned_ops.models.heads import AnswerType
from pruned_trainer.tasks.natural_questions.documents import NqFormatError, read_documents
from pruned_trainer.tasks.natural_questions.task import NaturalQuestionsTask
from pruned_trainer.tasks.natural_questions.windows import (
    NqWindow,
    answer_span,
    cut_document,
    features,
    located,
    passage,
    with_markers,
)
from real_data import real_data
from tiny_tokenizers import byte_tokenizer, word_tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's normaliser and pre-tokeniser over single characters: accents go, punctuation parts."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    pieces = [f"##{letter}" for letter in letters]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *pieces, *"=[].,"]
    backend = BertWordPieceTokenizer({token: i for i, token in enumerate(vocabulary)}, lowercase=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]",
        unk_token="[UNK]", model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


TOKENIZERS = {"wordpiece": wordpiece, "bytes": byte_tokenizer, "words": word_tokenizer}
# Anything but what parts tokens (a space), JSON's lone surrogates, and tags.
WORD = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" <"), max_size=6)


def covers(window: NqWindow, start: int, end: int) -> tuple[int, int]:
    return int(window.first[start]), int(window.last[end])


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_places_survive_tokenisation(name: str, data: st.DataObject) -> None:
    """Every token's document tokens are those that its characters are of; and an answer found in a window is
    the annotated one, whatever characters the words have."""
    texts = data.draw(st.lists(st.lists(WORD, min_size=1, max_size=12), min_size=1, max_size=3))
    entry = page(1, "q", *(" ".join(["<P>", *words, "</P>"]) for words in texts))
    chosen = data.draw(st.integers(0, len(texts) - 1))
    start = entry["long_answer_candidates"][chosen]["start_token"] + 1
    first = data.draw(st.integers(0, len(texts[chosen]) - 1))
    last = data.draw(st.integers(first, len(texts[chosen]) - 1))
    entry["annotations"] = [annotation(entry, chosen, (start + first, start + last + 1))]
    document = parsed(entry)
    read, windows = cut_document(document, TOKENIZERS[name](), data.draw(st.integers(16, 60)), 5)
    for window, feature in zip(windows, features(document, read, windows), strict=True):
        placed = located(window, read, 0)
        for token, (begin, end) in enumerate(window.offsets):
            inside = [
                word for word in range(len(read.starts))
                if begin >= 0 and read.starts[word] < end and read.ends[word] > begin
            ]  # fmt: skip
            if inside and all(read.token[word] >= 0 for word in inside):
                assert covers(placed, token, token) == (read.token[inside[0]], read.token[inside[-1]] + 1)
                assert placed.candidate[token] == read.candidate[inside[0]]
            else:
                assert placed.first[token] == placed.last[token] == placed.candidate[token] == -1
        if feature["answer_types"] == AnswerType.SHORT:
            begin, end = feature["start_positions"], feature["end_positions"]
            got, expected = covers(placed, begin, end), (start + first, start + last + 1)
            # Words that no token is of (control characters) may be missing at its ends; and a run of
            # white-space words may be one token.
            tokens = [placed.first[i] for i in range(begin, end + 1) if placed.first[i] >= 0]
            assert placed.candidate[begin] == chosen and tokens
            plain = all(word.isalnum() and word.isascii() for word in texts[chosen])
            assert got == expected if plain else got[0] < expected[1] and got[1] > expected[0]


@pytest.mark.parametrize("name", ["minilm-l6-squad2", "roberta-base-tokenizer"])
def test_places_survive_on_real_pages(name: str) -> None:
    kind: Any = RobertaTokenizerFast if name.startswith("roberta") else AutoTokenizer
    tokenizer = kind.from_pretrained(real_data(f"models/{name}"))
    short = 0
    for number, document in enumerate(read_documents([real_data("data/natural_questions/eval.jsonl.gz")])):
        if number == 150:
            break
        answer = answer_span(document)
        read, windows = cut_document(document, tokenizer)
        seen = set()
        for window, feature in zip(windows, features(document, read, windows), strict=True):
            placed = located(window, read, number)
            seen |= {t for a, b in zip(placed.first, placed.last, strict=True) for t in range(a, b)}
            if feature["answer_types"]:
                assert answer is not None and feature["answer_types"] == answer[0]
                assert covers(placed, feature["start_positions"], feature["end_positions"]) == answer[2:]
                short += 1
        missed = set(read.token.tolist()) - {-1} - seen
        # What is of no token are words of characters that BERT's normaliser drops: marks and controls.
        assert all(unicodedata.category(c)[0] in "CM" for i in missed for c in document.tokens[i])
    assert short > 100


def test_markers_say_kind_and_number() -> None:
    texts = ["w1", "<Table> w2 <Tr> w3 </Tr> </Table>", "<Ul> w4 </Ul>", "w5", "<Dd> w6 </Dd>"]
    entry = page(1, "w9", *texts)
    nested = {"start_token": 8, "end_token": 11, "top_level": False}  # the table's row
    entry["long_answer_candidates"].append(nested)
    document = parsed(entry)
    read = passage(document)
    assert read.text == ("[Paragraph=1] w1 [Table=1] w2 w3 [List=1] w4 [Paragraph=2] w5 [Other=1] w6")
    plain = with_markers(word_tokenizer())
    assert "[Table=1]" not in plain.get_vocab()
    knowing = word_tokenizer()
    knowing.add_tokens(["[Table=1]"])
    ids = cut_document(document, with_markers(knowing))[1][0].input_ids
    assert knowing.convert_tokens_to_ids("[Table=1]") in ids
    many = passage(parsed(page(1, "?", *["w1"] * 60)))
    assert many.text.count("[Paragraph=50]") == 11


def typed(entry: dict[str, Any], *labels: Any) -> Any:
    return answer_span(parsed({**entry, "annotations": list(labels)}))


def test_answer_types() -> None:
    entry = page(1, "?", "w1 w2 w3", "w4 w5")  # tokens 3 to 8, 8 to 12
    short, yes = annotation(entry, 1, (9, 10), (10, 11)), annotation(entry, 0, yes_no="YES")
    assert typed(entry) is None and typed(entry, annotation(entry)) is None
    assert typed(entry, annotation(entry, 0)) == (AnswerType.LONG, 0, 3, 8)
    assert typed(entry, yes) == (AnswerType.YES, 0, 3, 8)
    assert typed(entry, annotation(entry, 1, yes_no="NO")) == (AnswerType.NO, 1, 8, 12)
    assert typed(entry, yes, short) == (AnswerType.SHORT, 1, 9, 11)  # the first with a short answer
    nested = copy.deepcopy(entry)
    nested["long_answer_candidates"][0]["top_level"] = False
    assert typed(nested, annotation(nested, 0)) is None
    document = parsed({**entry, "annotations": [annotation(entry, 0)]})
    read, windows = cut_document(document, word_tokenizer(), 64, 8)
    (whole,) = features(document, read, windows)
    placed = located(windows[0], read, 0)
    # Without its tags: a long answer is all of its words.
    assert covers(placed, whole["start_positions"], whole["end_positions"]) == (4, 7)


def test_null_windows_are_thinned_out_and_answers_never() -> None:
    entry = page(5, "w1", *[" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(30)])
    place = entry["document_text"].split(" ").index("w157")
    document = parsed({**entry, "annotations": [annotation(entry, 15, (place, place + 1))]})
    read, windows = cut_document(document, word_tokenizer(), 16, 4)

    def kept(rate: float, seed: int = 0) -> list[dict[str, Any]]:
        return list(features(document, read, windows, rate, seed))

    answers = [feature for feature in kept(0.0) if feature["answer_types"]]
    assert answers and len(kept(0.0)) == len(answers) and len(kept(1.0)) == len(windows)
    sample = kept(0.3)
    assert 0.1 < (len(sample) - len(answers)) / (len(windows) - len(answers)) < 0.5
    same = [feature["input_ids"].tolist() for feature in kept(0.3)]
    assert same == [feature["input_ids"].tolist() for feature in sample]
    assert same != [feature["input_ids"].tolist() for feature in kept(0.3, seed=1)]


def test_candidates_that_overlap() -> None:
    entry = page(1, "?", "w1 w2 w3 w4")
    entry["long_answer_candidates"].append({"start_token": 5, "end_token": 7, "top_level": True})
    document = parsed({**entry, "annotations": [annotation(entry, 1, (5, 6))]})
    read, windows = cut_document(document, word_tokenizer(), 64, 8)
    (feature,) = features(document, read, windows)
    placed = located(windows[0], read, 0)
    assert placed.candidate[feature["start_positions"]] == 1
    assert covers(placed, feature["start_positions"], feature["end_positions"]) == (5, 6)


def test_of_too_few_documents_none_is_held_out(tmp_path: Path) -> None:
    """Each is held out by a draw of its own; all of these have annotations."""
    task = NaturalQuestionsTask(max_length=32, stride=8)
    training, held_out = task.read_training(matching_file(tmp_path / "train.jsonl", 3, 2), False)
    assert held_out is not None and len(task.prepare(training, word_tokenizer())) == 3
    with pytest.raises(NqFormatError, match=r"train\.jsonl: .* holds out 5% .*: give a validation file"):
        task.prepare(held_out, word_tokenizer())
