"""Trimming the vocabulary of a tokenizer: which pieces stay, and the tokenizer that has only those.

A text whose pieces all stay is cut into the same pieces as before, whatever else is removed. Why:

WordPiece and WordLevel take the longest piece that matches. If that one stays, it is still the longest. There
is one trap: a word that fails after some matches is unknown as a whole, and without those matches it might
succeed. It fails at a character that no piece may begin with. Where such characters do occur inside pieces,
the matches before the failure count as pieces of the text, so that they stay; `counting` sees to it.

BPE joins the pair of the lowest rank again and again. Nothing is joined across the ends of a piece of the
result, so a piece is always made by the same joins, which are those of its own text. They stay, with
what they make on the way. The joins that a text needs then all stay, and those that are left keep their
order, so that the lowest of them is the same at every step. Bytes and single characters stay.

Unigram takes the path of the highest score. A path of pieces that stay keeps its score, and no other path
gains any: that of an unknown character is measured from the lowest score of all, whose piece stays. Equal
scores are decided by where pieces begin, not by ids, and so as before.

Single characters stay in each kind, so that a word with a piece that was removed is cut into smaller ones.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Trimmed:
    """A trimmed tokenizer. definition: what its tokenizer.json holds. old_ids: the old id of each new one."""

    definition: dict[str, Any]
    old_ids: list[int]

    @property
    def new_ids(self) -> dict[int, int]:
        """Old id -> new id, of the pieces that stayed."""
        return {old_id: new_id for new_id, old_id in enumerate(self.old_ids)}


class Vocabulary:
    """The vocabulary of a tokenizer of the tokenizers library, read from the definition that its
    tokenizer.json holds. Pieces are named by their ids.

    Errors: ValueError for a tokenizer of a kind whose pieces cannot be removed.
    """

    def __init__(self, definition: dict[str, Any]) -> None:
        self.definition = definition
        self._model = definition["model"]
        self.kind: str = self._model["type"]
        if self.kind not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
            raise ValueError(f"its pieces are {self.kind}'s; WordPiece, WordLevel, BPE and Unigram are known")
        for name in ("continuing_subword_prefix", "end_of_word_suffix"):
            if self.kind == "BPE" and self._model.get(name):
                raise ValueError(
                    f"its BPE has a {name} ({self._model[name]!r}), and only BPE without is known"
                )
        vocab = self._model["vocab"]
        if self.kind == "Unigram":
            vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
        # The ids of the model's pieces, and of all tokens that are added to them.
        self._ids: dict[str, int] = vocab
        self._added: dict[str, int] = {token["content"]: token["id"] for token in definition["added_tokens"]}

    @classmethod
    def read(cls, text: str) -> Vocabulary:
        """The vocabulary in the text of a tokenizer.json. Errors: ValueError where it is none, too."""
        try:
            normal = Tokenizer.from_str(text).to_str()  # files of older versions become the newest form
        except Exception as error:  # the library raises a plain Exception
            raise ValueError(f"it is no tokenizer: {error}") from None
        return cls(json.loads(normal))

    @property
    def ids(self) -> dict[str, int]:
        """Piece -> id, of the added tokens too."""
        return self._ids | self._added

    def always(self, named: Iterable[int] = ()) -> set[int]:
        """The pieces that stay whatever the texts are: added tokens, what the tokenizer itself puts in, the
        ids in `named`, single characters and bytes, and what the score of unknown characters hangs on."""
        kept = set(self._added.values()) | set(named)
        kept |= set(_template_ids(self.definition.get("post_processor")))
        if self.definition.get("padding"):
            kept.add(self.definition["padding"]["pad_id"])
        unknown = self._model.get("unk_token")
        if unknown is not None and unknown in self.ids:
            kept.add(self.ids[unknown])
        if self._model.get("unk_id") is not None:
            kept.add(self._model["unk_id"])
        start = self._model["continuing_subword_prefix"] if self.kind == "WordPiece" else ""
        if self.kind != "WordLevel":
            kept |= {
                number
                for piece, number in self._ids.items()
                if len(piece) == 1 or len(piece.removeprefix(start)) == 1 or _BYTE.fullmatch(piece)
            }
        if self.kind == "Unigram":
            scores = [score for _, score in self._model["vocab"]]
            kept.add(scores.index(min(scores)))
        return kept & set(self.ids.values())

    @cached_property
    def counting(self) -> Tokenizer:
        """The tokenizer to count pieces with: without padding and truncation, and a WordPiece that does not
        fail at a character that occurs inside pieces. The pieces of any text include those of this tokenizer,
        but for the ones that only it has, and those that an unknown word matched before it failed."""
        definition = {**self.definition, "padding": None, "truncation": None}
        if self.kind == "WordPiece":
            start = self._model["continuing_subword_prefix"]
            inside = {
                character
                for piece in self._ids
                for character in (piece.removeprefix(start) if piece.startswith(start) else piece[1:])
            }
            lacking = sorted(start + character for character in inside if start + character not in self._ids)
            free = max(self.ids.values(), default=-1) + 1
            vocab = self._ids | {piece: free + number for number, piece in enumerate(lacking)}
            definition["model"] = {**self._model, "vocab": vocab}
        return Tokenizer.from_str(json.dumps(definition))

    def count(self, batches: Iterable[list[str]]) -> Counter[int]:
        """How often each piece occurs in the texts, as `counting` cuts them."""
        tokenizer, counts = self.counting, Counter[int]()
        for texts in batches:
            for encoding in tokenizer.encode_batch_fast(texts):
                counts.update(encoding.ids)
        named, ids = {number: tokenizer.id_to_token(number) for number in counts}, self.ids
        return Counter({ids[piece]: counts[number] for number, piece in named.items() if piece in ids})

    def trim(self, used: Collection[int], always: Collection[int], fixed: int | None = None) -> Trimmed:
        """The tokenizer with the pieces that are used, those that stay always, and those that BPE makes
        them of. fixed: the piece that has the same id afterwards, where the others are enough for that; the
        others keep their order."""
        kept = self._closed({*used, *always})
        model_ids = set(self._ids.values())
        old_ids = sorted(kept & model_ids)
        if fixed in old_ids and fixed < len(old_ids):
            old_ids.remove(fixed)
            old_ids.insert(fixed, fixed)
        old_ids += sorted(kept - model_ids)  # tokens that are added behind the model's pieces
        trimmed = Trimmed({}, old_ids)
        return Trimmed(self._renumbered(trimmed.new_ids), old_ids)

    def _closed(self, kept: set[int]) -> set[int]:
        """The pieces with all that BPE makes on the way to one of them."""
        if self.kind != "BPE":
            return kept
        ranks = self._ranks
        pieces = {number: piece for piece, number in self._ids.items()}
        parts = {part for number in kept if number in pieces for part in joined(pieces[number], ranks)}
        return kept | {self._ids[part] for part in parts}

    @property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {(left, right): rank for rank, (left, right) in enumerate(self._model["merges"])}

    def _renumbered(self, new_ids: dict[int, int]) -> dict[str, Any]:
        """The definition with these pieces alone, under their new ids."""
        definition = copy.copy(self.definition)
        model = definition["model"] = copy.copy(self._model)
        vocab = {piece: new_ids[number] for piece, number in self._ids.items() if number in new_ids}
        vocab = dict(sorted(vocab.items(), key=lambda item: item[1]))
        if self.kind == "Unigram":
            scores = dict(map(tuple, model["vocab"]))
            model["vocab"] = [[piece, scores[piece]] for piece in vocab]
            if model.get("unk_id") is not None:
                model["unk_id"] = new_ids[model["unk_id"]]
        else:
            model["vocab"] = vocab
        if self.kind == "BPE":
            model["merges"] = [
                [left, right]
                for left, right in model["merges"]
                if left in vocab and right in vocab and left + right in vocab
            ]
        definition["added_tokens"] = sorted(
            ({**token, "id": new_ids[token["id"]]} for token in definition["added_tokens"]),
            key=lambda token: token["id"],
        )
        if definition.get("padding"):
            padding = definition["padding"]
            definition["padding"] = {**padding, "pad_id": new_ids[padding["pad_id"]]}
        definition["post_processor"] = _renumbered_template(definition.get("post_processor"), new_ids)
        return definition


def joined(piece: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """All that BPE makes of the characters of a piece until it has made the piece, which comes last. Nothing
    where it never makes it: then no text has this piece."""
    parts, merged = list(piece), []
    while len(parts) > 1:
        pairs = [
            (ranks[pair], at) for at, pair in enumerate(zip(parts, parts[1:], strict=False)) if pair in ranks
        ]
        if not pairs:
            return []
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merged.append(parts[at])
    return merged


def _template_ids(processor: Any) -> Iterator[int]:
    """The ids that a post-processor puts around a text; ValueError for one that is not known."""
    kind = None if processor is None else processor["type"]
    if kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            yield from token["ids"]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield processor["cls"][1]
        yield processor["sep"][1]
    elif kind == "Sequence":
        for step in processor["processors"]:
            yield from _template_ids(step)
    elif kind not in (None, "ByteLevel"):
        raise ValueError(f"its post-processor is a {kind}, whose ids are not known")


def _renumbered_template(processor: Any, new_ids: dict[int, int]) -> Any:
    """The post-processor with the new ids."""
    kind = None if processor is None else processor["type"]
    if kind == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [new_ids[number] for number in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    if kind in ("BertProcessing", "RobertaProcessing"):
        return {
            **processor,
            **{end: [processor[end][0], new_ids[processor[end][1]]] for end in ("cls", "sep")},
        }
    if kind == "Sequence":
        return {
            **processor,
            "processors": [_renumbered_template(p, new_ids) for p in processor["processors"]],
        }
    return processor
