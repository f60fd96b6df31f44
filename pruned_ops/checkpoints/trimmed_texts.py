"""The texts that a vocabulary is trimmed for: whether they are texts, and how the trimmed tokenizer cuts them
beside the one before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.checkpoints.sentence_folder import Reading
from pruned_ops.checkpoints.vocabulary import Trimmed, Vocabulary
from pruned_ops.files import shown

BATCH = 1000  # texts that are tokenised at once, each behind each prompt


@dataclass(frozen=True)
class Agreement:
    """How the trimmed tokenizer cuts texts, beside the one before. texts, same: how many there are, and how
    many of them are cut into the same pieces, by themselves and behind every prompt. pieces, gone: how many
    pieces the tokenizer before cuts all that into, and how many of those were removed. unknown: unknown
    pieces before and after."""

    texts: int
    same: int
    pieces: int
    gone: int
    unknown: tuple[int, int]


def check_texts(name: str, texts: Any) -> int:
    """How many texts there are. Errors: ValueError for what is no list and nothing that can be gone through
    again, and for the first entry that is no string."""
    is_one = isinstance(texts, (str, bytes, Mapping, Iterator))
    if is_one or not (hasattr(texts, "__iter__") or hasattr(texts, "__getitem__")):
        kind = type(texts).__name__
        raise ValueError(f"{name} is a {kind}; a list, or what can be read twice, is needed")
    count = 0
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{name}: entry {count} is a {type(text).__name__}; a string is needed")
        count += 1
    return count


class Comparison:
    """Holds the trimmed tokenizer, as stock transformers loads it, against the one before.

    tokenizer, vocabulary: those before. reading: how texts come to the tokenizer. folder: the trimmed one's.
    Errors: ValueError where it has other pieces or ids than were written."""

    def __init__(
        self, tokenizer: Any, vocabulary: Vocabulary, reading: Reading, trimmed: Trimmed, folder: Path
    ) -> None:
        self._before, self._vocabulary, self._reading, self._trimmed = tokenizer, vocabulary, reading, trimmed
        self._after: Any = load_tokenizer(str(folder))
        new_ids = trimmed.new_ids
        expected = {p: new_ids[old] for p, old in vocabulary.ids.items() if old in new_ids}
        loaded = self._after.get_vocab()
        odd = sorted(
            piece for piece in expected.keys() | loaded.keys() if expected.get(piece) != loaded.get(piece)
        )
        if odd:
            raise ValueError(
                f"{type(self._after).__name__} does not load the trimmed tokenizer as it was written: "
                f"{shown(odd[0])} has the id {loaded.get(odd[0])}, not {expected.get(odd[0])}"
            )
        for tokenizer in (self._before, self._after):
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()

    def __call__(self, texts: Iterable[str]) -> Agreement:
        """Cut the texts with both. Errors: ValueError for a text of kept pieces that is cut otherwise."""
        new_ids, total, same, pieces, gone, unknown = self._trimmed.new_ids, 0, 0, 0, 0, [0, 0]
        tokenizers = self._before, self._after
        for forms in self._cut(texts):
            total, is_same = total + 1, True
            for form, before, after in forms:
                mapped = [new_ids.get(piece) for piece in before]
                pieces, gone = pieces + len(before), gone + mapped.count(None)
                is_same = is_same and mapped == after
                if mapped != after and None not in mapped and self._all_kept(form):
                    raise ValueError(
                        f"the trimmed tokenizer cuts a text of kept pieces otherwise: {shown(form)}"
                    )
                for at, (tokenizer, ids) in enumerate(zip(tokenizers, (before, after), strict=True)):
                    unknown[at] += 0 if tokenizer.unk_token_id is None else ids.count(tokenizer.unk_token_id)
            same += is_same
        return Agreement(total, same, pieces, gone, (unknown[0], unknown[1]))

    def _cut(self, texts: Iterable[str]) -> Iterator[list[tuple[str, list[int], list[int]]]]:
        """For each text its forms, with the ids that the tokenizers before and after cut them into."""
        for batch in batches(texts, max(1, BATCH // len(self._reading.forms("")))):
            forms = [self._reading.forms(text) for text in batch]
            flat = [form for of_text in forms for form in of_text]
            before, after = (
                [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch_fast(flat)]
                for tokenizer in (self._before, self._after)
            )
            cut = zip(flat, before, after, strict=True)
            for of_text in forms:
                yield list(islice(cut, len(of_text)))

    def _all_kept(self, text: str) -> bool:
        """Whether all pieces of a text were kept, with those that unknown words matched."""
        return self._vocabulary.count([[text]]).keys() <= self._trimmed.new_ids.keys()


def batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """The texts, so many at a time."""
    left = iter(texts)
    while batch := list(islice(left, size)):
        yield batch
