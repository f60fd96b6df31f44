"""Natural Questions windows: markers, answer types, offsets that survive any tokenizer; and predictions."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nq_pages import annotation, original, page, write
from real_data import real_data
from tiny_tokenizers import byte_tokenizer, word_tokenizer
from tokenizers import BertWordPieceTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, RobertaTokenizerFast

from pruned_ops.natural_questions import AnswerType
from pruned_trainer.tasks.natural_questions import Document, nq_metrics, parse_document, read_documents
from pruned_trainer.tasks.natural_questions_features import (
    NqWindow,
    answer_span,
    cut,
    features,
    located,
    passage,
    with_markers,
)
from pruned_trainer.tasks.natural_questions_predictions import (
    LOWEST,
    decode_documents,
    predictions_json,
)


def parsed(entry: dict[str, Any]) -> Document:
    return parse_document(json.dumps(entry).encode())


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT's normaliser and pre-tokeniser over single characters: accents go, punctuation parts."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{one}" for one in letters), *"=[].,"]
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
    read, windows = cut(document, TOKENIZERS[name](), data.draw(st.integers(16, 60)), 5)
    for window, feature in zip(windows, features(document, read, windows), strict=True):
        found = located(window, read, 0)
        for token, (begin, end) in enumerate(window.offsets):
            inside = [
                word for word in range(len(read.starts))
                if begin >= 0 and read.starts[word] < end and read.ends[word] > begin
            ]  # fmt: skip
            if inside and all(read.token[word] >= 0 for word in inside):
                assert covers(found, token, token) == (read.token[inside[0]], read.token[inside[-1]] + 1)
                assert found.candidate[token] == read.candidate[inside[0]]
            else:
                assert found.first[token] == found.last[token] == found.candidate[token] == -1
        if feature["answer_types"] == AnswerType.SHORT:
            begin, end = feature["start_positions"], feature["end_positions"]
            got, wanted = covers(found, begin, end), (start + first, start + last + 1)
            # Words that no token is of (control characters) may be missing at its ends; and a run of
            # white-space words may be one token.
            told = [found.first[i] for i in range(begin, end + 1) if found.first[i] >= 0]
            assert found.candidate[begin] == chosen and told
            plain = all(word.isalnum() and word.isascii() for word in texts[chosen])
            assert got == wanted if plain else got[0] < wanted[1] and got[1] > wanted[0]


@pytest.mark.parametrize("name", ["minilm-l6-squad2", "roberta-base-tokenizer"])
def test_places_survive_on_real_pages(name: str) -> None:
    kind: Any = RobertaTokenizerFast if name.startswith("roberta") else AutoTokenizer
    tokenizer = kind.from_pretrained(real_data(f"models/{name}"))
    short = 0
    for number, document in enumerate(read_documents([real_data("data/natural_questions/eval.jsonl.gz")])):
        if number == 150:
            break
        answer = answer_span(document)
        read, windows = cut(document, tokenizer)
        seen = set()
        for window, feature in zip(windows, features(document, read, windows), strict=True):
            found = located(window, read, number)
            seen |= {t for a, b in zip(found.first, found.last, strict=True) for t in range(a, b)}
            if feature["answer_types"]:
                assert answer is not None and feature["answer_types"] == answer[0]
                assert covers(found, feature["start_positions"], feature["end_positions"]) == answer[2:]
                short += 1
        missed = set(read.token.tolist()) - {-1} - seen
        # What is of no token are words of characters that BERT's normaliser drops: marks and controls.
        assert all(unicodedata.category(c)[0] in "CM" for i in missed for c in document.tokens[i])
    assert short > 100


def test_what_is_trained_is_what_is_right(tmp_path: Path) -> None:
    """A model that says exactly what its windows' labels say finds every long answer of real pages, and every
    short one that is a single span: features and decoding are each other's inverse."""
    tokenizer = AutoTokenizer.from_pretrained(real_data("models/minilm-l6-squad2"))
    path = tmp_path / "gold.jsonl"
    with gzip.open(real_data("data/natural_questions/eval.jsonl.gz")) as file:
        path.write_bytes(b"".join(itertools.islice(file, 120)))
    documents = list(read_documents([path]))
    windows: list[NqWindow] = []
    logits: list[Any] = []
    for number, document in enumerate(documents):
        read, cut_windows = cut(document, tokenizer)
        for window, feature in zip(cut_windows, features(document, read, cut_windows), strict=True):
            found = located(window, read, number)
            windows.append(found)
            start, end, kind = feature["start_positions"], feature["end_positions"], feature["answer_types"]
            logits += logits_of([found], 0, start, end, AnswerType(kind))
    written = predictions_json(documents, decode_documents(windows, logits, len(documents)))
    (tmp_path / "predictions.json").write_text(json.dumps(written))
    metrics = nq_metrics(path, tmp_path / "predictions.json")
    assert metrics["long-best-threshold-f1"] == 1.0
    answered = [document for document in documents if answer_span(document)]
    single = sum(any(len(label.short) == 1 for label in document.labels) for document in answered)
    expected = single / len(answered)
    assert metrics["short-best-threshold-f1"] == pytest.approx(expected, abs=0.03) and expected > 0.8


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
    ids = cut(document, with_markers(knowing))[1][0].input_ids
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
    read, windows = cut(document, word_tokenizer(), 64, 8)
    (whole,) = features(document, read, windows)
    found = located(windows[0], read, 0)
    # Without its tags: a long answer is all of its words.
    assert covers(found, whole["start_positions"], whole["end_positions"]) == (4, 7)


def test_null_windows_are_thinned_out_and_answers_never() -> None:
    entry = page(5, "w1", *[" ".join(f"w{10 * i + j}" for j in range(10)) for i in range(30)])
    place = entry["document_text"].split(" ").index("w157")
    document = parsed({**entry, "annotations": [annotation(entry, 15, (place, place + 1))]})
    read, windows = cut(document, word_tokenizer(), 16, 4)

    def kept(rate: float, seed: int = 0) -> list[dict[str, Any]]:
        return list(features(document, read, windows, rate, seed))

    answers = [one for one in kept(0.0) if one["answer_types"]]
    assert answers and len(kept(0.0)) == len(answers) and len(kept(1.0)) == len(windows)
    some = kept(0.3)
    assert 0.1 < (len(some) - len(answers)) / (len(windows) - len(answers)) < 0.5
    same = [one["input_ids"].tolist() for one in kept(0.3)]
    assert same == [one["input_ids"].tolist() for one in some]
    assert same != [one["input_ids"].tolist() for one in kept(0.3, seed=1)]


def test_candidates_that_overlap() -> None:
    entry = page(1, "?", "w1 w2 w3 w4")
    entry["long_answer_candidates"].append({"start_token": 5, "end_token": 7, "top_level": True})
    document = parsed({**entry, "annotations": [annotation(entry, 1, (5, 6))]})
    read, windows = cut(document, word_tokenizer(), 64, 8)
    (one,) = features(document, read, windows)
    found = located(windows[0], read, 0)
    assert found.candidate[one["start_positions"]] == 1
    assert covers(found, one["start_positions"], one["end_positions"]) == (5, 6)


def logits_of(windows: list[NqWindow], best: int, start: int, end: int, kind: AnswerType) -> Any:
    """Flat logits, but for a span in one window, and its type."""
    made = []
    for number, window in enumerate(windows):
        first, last, types = np.zeros(len(window)), np.zeros(len(window)), np.zeros(5)
        if number == best:
            first[start], last[end], types[kind] = 3.0, 4.0, 1.0
            first[window.cls_index] = 0.5
        made.append((first, last, types))
    return made


def located_windows(document: Document, number: int, *how: int) -> list[NqWindow]:
    read, windows = cut(document, word_tokenizer(), *how)
    return [located(window, read, number) for window in windows]


def test_a_large_and_an_empty_document(tmp_path: Path) -> None:
    words = [f"w{i % 400}" for i in range(100_000)]
    large = page(1, "w1", *(" ".join(words[i : i + 1000]) for i in range(0, 100_000, 1000)))
    empty = page(2, "w1", document_text="")
    documents = [parsed(original(large)), parsed(original(empty))]
    windows = [w for i, one in enumerate(documents) for w in located_windows(one, i)]
    assert len(windows) > 300 and windows[-1].document == 1 and (windows[-1].candidate == -1).all()
    at = np.flatnonzero(windows[200].candidate >= 0)
    logits = logits_of(windows, 200, at[10], at[12], AnswerType.SHORT)
    answers = decode_documents(windows, logits, 2)
    assert answers[0].start == windows[200].first[at[10]] and answers[0].end == windows[200].last[at[12]]
    assert answers[0].score == 6.5 and answers[1].score == LOWEST
    written = predictions_json(documents, answers)
    assert written["predictions"][1]["long_answer"]["start_token"] == -1
    path, gold = (
        tmp_path / "predictions.json",
        write(tmp_path / "gold.jsonl", [original(large), original(empty)]),
    )
    path.write_text(json.dumps(written))
    assert nq_metrics(gold, path)["long-best-threshold-f1"] == 0.0  # no annotator gave an answer


def test_predictions_of_the_annotated_answers_are_all_right(tmp_path: Path) -> None:
    """A model that says what the annotators say has an F1 of 1, yes, no and long answers included."""
    entries, kinds = [], (AnswerType.SHORT, AnswerType.YES, AnswerType.NO)
    for key, kind in enumerate(kinds):
        entry = page(key, "w1", "w1 w2", "w3 w4 w5")
        yes_no = kind.name if kind != AnswerType.SHORT else "NONE"
        short = [(8, 10)] if kind == AnswerType.SHORT else []
        entries.append(original({**entry, "annotations": [annotation(entry, 1, *short, yes_no=yes_no)]}))
    documents = list(read_documents([write(tmp_path / "gold.jsonl", entries)]))
    windows, logits = [], []
    for number, (document, kind) in enumerate(zip(documents, kinds, strict=True)):
        found = located_windows(document, number, 64, 8)
        span = (np.flatnonzero(found[0].first == 8)[0], np.flatnonzero(found[0].last == 10)[0])
        windows += found
        logits += logits_of(found, 0, *span, kind)
    written = predictions_json(
        [one.without_text() for one in documents], decode_documents(windows, logits, 3)
    )
    first = written["predictions"][0]
    text = " ".join(documents[0].tokens).encode()
    place = first["short_answers"][0]
    assert text[place["start_byte"] : place["end_byte"]].decode() == "w3 w4"
    assert first["long_answer"]["candidate_index"] == 1 and first["long_answer_score"] == 6.5
    assert [one["yes_no_answer"] for one in written["predictions"]] == ["NONE", "YES", "NO"]
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(written))
    metrics = nq_metrics(tmp_path / "gold.jsonl", path)
    assert metrics["long-best-threshold-f1"] == metrics["short-best-threshold-f1"] == 1.0


def test_a_span_lies_in_one_candidate() -> None:
    (window,) = located_windows(parsed(page(1, "w1", "w2 w3", "w4 w5")), 0, 64, 8)
    start, end = np.flatnonzero(window.candidate == 0)[-1], np.flatnonzero(window.candidate == 1)[0]
    (answer,) = decode_documents([window], logits_of([window], 0, start, end, AnswerType.LONG), 1)
    assert answer.candidate in (0, 1)
    lies = window.first[window.candidate == answer.candidate]
    assert lies[0] <= answer.start < answer.end <= lies[-1] + 1


def test_decoding_refusals() -> None:
    (window,) = located_windows(parsed(page(1, "w1", "w2 w3")), 0, 64, 8)
    good = logits_of([window], 0, 4, 4, AnswerType.SHORT)
    with pytest.raises(ValueError, match="1 windows, but logits of 0"):
        decode_documents([window], [], 1)
    with pytest.raises(ValueError, match=r"no window of document 1 \(1 in all\)"):
        decode_documents([window], good, 2)
    with pytest.raises(ValueError, match="window 0 has 7 tokens, but logits of"):
        decode_documents([window], [(good[0][0][1:], *good[0][1:])], 1)
    with pytest.raises(ValueError, match="the logits of window 0 are not finite"):
        decode_documents([window], [(*good[0][:2], np.full(5, np.nan))], 1)
    with pytest.raises(ValueError, match="example 1: question 0 is too long"):
        cut(parsed(page(1, " ".join(["w1"] * 30), "w2 w3")), word_tokenizer(), 32, 4)
