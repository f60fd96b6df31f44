"""From texts to a model's inputs, on the host, without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from pruned_ops.serving.refusals import Refusal

# A text of more characters for each token that the model takes is cut, or refused, before it is tokenised:
# few tokens are so long, and a tokenizer takes a hundred times the memory of a text.
CHARACTERS_PER_TOKEN = 250
# So many characters are tokenised at once, for the same reason; one text may have more.
_CHARACTERS_AT_ONCE = 1 << 18

Side = Literal["right", "left"]
Text = str | tuple[str, str]


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """A tokenised text, or pair. input_ids: (tokens,) int32. token_type_ids: the same, None for all 0."""

    input_ids: NDArray[np.int32]
    token_type_ids: NDArray[np.int32] | None

    def __len__(self) -> int:
        return len(self.input_ids)


class TextEncoder:
    """Tokenises texts and pairs as a model was trained, at most `max_tokens` of each.

    tokenizer: the fast tokenizer beside the model; it stays as it is, and any thread may use it. The calls
    for one encoder come from one thread. vocabulary: the rows of the model's table of words, which may be
    more than the tokenizer's tokens, or fewer."""

    def __init__(self, tokenizer: Any, max_tokens: int, vocabulary: int, lower_case: bool = False) -> None:
        self.max_tokens, self._vocabulary, self._lower_case = max_tokens, vocabulary, lower_case
        self._has_types = "token_type_ids" in tokenizer.model_input_names
        self._serialised = tokenizer.backend_tokenizer.to_str()
        self._cutting: dict[Side, Any] = {}

    def encode(self, texts: Sequence[Text], cut: bool, side: Side = "right") -> list[TokenSequence]:
        """The tokens of each text or pair. cut: whether a longer text loses its end (side: its beginning),
        and of a pair the longer part; otherwise it is a Refusal with its place among the texts."""
        tokenizer = self._tokenizer(side)
        sequences: list[TokenSequence] = []
        for batch in _in_pieces([self._limited(text, cut, i, side) for i, text in enumerate(texts)]):
            for encoding in tokenizer.encode_batch_fast(batch):
                if not cut and encoding.overflowing:
                    raise self._too_long(texts[len(sequences)], len(sequences), "tokens", self.max_tokens)
                self._check_ids(encoding.ids, len(sequences))
                types = np.array(encoding.type_ids, dtype=np.int32) if self._has_types else None
                if types is not None and not types.any():
                    types = None
                sequences.append(TokenSequence(np.array(encoding.ids, dtype=np.int32), types))
        return sequences

    def of_ids(self, lists: Sequence[Sequence[int]], cut: bool, side: Side = "right") -> list[TokenSequence]:
        """Texts that come as the model's own token ids, special tokens included. cut, side: as for `encode`;
        no special token is put in the place of one that is cut."""
        sequences = []
        for index, ids in enumerate(lists):
            if len(ids) > self.max_tokens and not cut:
                raise self._too_long(ids, index, "tokens", self.max_tokens)
            self._check_ids(ids, index)
            kept = ids[: self.max_tokens] if side == "right" else ids[-self.max_tokens :]
            sequences.append(TokenSequence(np.array(kept, dtype=np.int32), None))
        return sequences

    def _check_ids(self, ids: Sequence[int], index: int) -> None:
        """Refusal where there is no token, or one that the model has no embedding of."""
        if not ids:
            raise Refusal("empty", f"input {index} has no token", "input")
        if min(ids) < 0 or max(ids) >= self._vocabulary:
            last = self._vocabulary - 1
            raise Refusal("invalid", f"input {index} has a token id outside 0 to {last}", "input")

    def _tokenizer(self, side: Side) -> Any:
        """A tokenizer that cuts on this side, and does not pad. It is the encoder's own, because the settings
        of one that is shared may be changed by whoever else calls it."""
        if side not in self._cutting:
            tokenizer = Tokenizer.from_str(self._serialised)
            tokenizer.no_padding()
            tokenizer.enable_truncation(self.max_tokens, direction=side)
            self._cutting[side] = tokenizer
        return self._cutting[side]

    def _limited(self, text: Text, cut: bool, index: int, side: Side) -> Text:
        limit = CHARACTERS_PER_TOKEN * self.max_tokens
        parts = list(text) if isinstance(text, tuple) else [text]
        if not cut and any(len(part) > limit for part in parts):
            raise self._too_long(text, index, "characters", limit)
        parts = [part[:limit] if side == "right" else part[-limit:] for part in parts]
        parts = [part.lower() for part in parts] if self._lower_case else parts
        return (parts[0], parts[1]) if isinstance(text, tuple) else parts[0]

    def _too_long(self, text: Text | Sequence[int], index: int, unit: str, limit: int) -> Refusal:
        has = f"input {index} has"
        if isinstance(text, tuple):
            has = f"input {index} is a pair {'of which one text' if unit == 'characters' else 'that'} has"
        return Refusal(
            "too_large",
            f"{has} more than {limit} {unit}, and the model takes {self.max_tokens} tokens: "
            "shorten it, or ask for truncation",
            "input",
        )


def _in_pieces(texts: list[Text]) -> Iterator[list[Text]]:
    """The texts in lists of about _CHARACTERS_AT_ONCE characters."""
    piece: list[Text] = []
    characters = 0
    for text in texts:
        size = len(text) if isinstance(text, str) else len(text[0]) + len(text[1])
        if piece and characters + size > _CHARACTERS_AT_ONCE:
            yield piece
            piece, characters = [], 0
        piece.append(text)
        characters += size
    if piece:
        yield piece
