"""How right an answer is, by the rule of the official SQuAD 2.0 evaluator."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case, without punctuation, without the articles a, an, the, with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def answer_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact, F1) in percent, each the best over the answers; without answers, "" is the right one."""
    gold = [text for text in map(normalised, answers) if text] or [""]
    predicted = normalised(prediction)
    f1 = max(_token_f1(predicted.split(), text.split()) for text in gold)
    return 100.0 * (predicted in gold), 100.0 * f1


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    same = (Counter(predicted) & Counter(gold)).total()
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(gold)
    return 2 * precision * recall / (precision + recall)
