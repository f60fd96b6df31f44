"""What can be said about a task's data: the names of the tasks and their options, checked; imports neither
torch nor transformers, so that the command line can show its help at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pruned_ops.shape import checked_int

# Tasks whose data are rows with texts, and how many columns of texts each may name.
TEXT_COLUMNS = {
    "text-classification": (1,),
    "pair-classification": (2,),
    "token-classification": (1,),
    "reranking": (2,),
    "embedding": (1, 2),
}
TASKS = ("squad", "natural_questions", *TEXT_COLUMNS)
# Tasks whose windows hold two texts, a question and what may answer it.
PAIRED = ("squad", "natural_questions", "pair-classification", "reranking")
# Tasks whose texts are cut into windows that overlap, and how many tokens two neighbours share; the others
# cut a text off.
WINDOWED = ("squad", "natural_questions", "token-classification")
STRIDE = 128
# The share of the Natural Questions windows without an answer that the paper's own code trains on.
NULL_RATE = 0.02


@dataclass(frozen=True)
class TaskOptions:
    """A task and what is said about its data; None stands for the task's own default.

    max_length, stride: of windows, in tokens. seed: of all draws. null_rate, num_proc: for Natural Questions
    alone, see `NaturalQuestionsTask`. skip_bad: leave out bad rows, and count them.
    text_columns, label_column: names of columns. scores: the column of numbers that takes the place of class
    labels. corpus: the documents that queries are answered from, where an embedder is judged by retrieval.
    queries: their texts, where the other files hold ids alone.
    Errors: ValueError for options that the task does not have, or that are out of range.
    """

    task: str = "squad"
    max_length: int = 384
    stride: int = STRIDE
    seed: int = 0
    null_rate: float = NULL_RATE
    num_proc: int = 1
    skip_bad: bool = False
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    scores: str | None = None
    corpus: Path | None = None
    queries: Path | None = None

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; one of {TASKS} is needed")
        if self.task != "natural_questions" and (self.null_rate, self.num_proc) != (NULL_RATE, 1):
            raise ValueError("null_rate and num_proc are for --task natural_questions")
        if self.task not in WINDOWED and self.stride != STRIDE:
            raise ValueError(
                f"stride is for tasks in overlapping windows, and {self.task} cuts a text off at max_length"
            )
        if not 0 <= self.null_rate <= 1:
            raise ValueError(f"null_rate is {self.null_rate}: it must lie in [0, 1]")
        for name, least in (("num_proc", 1), ("max_length", 1), ("stride", 0)):
            checked_int(name, getattr(self, name), least)
        for name in ("text_columns", "label_column", "scores", "corpus", "queries"):
            if self.task not in TEXT_COLUMNS and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} is for tasks on rows of texts, and {self.task} has a format of its own"
                )
        self._check_columns()

    def _check_columns(self) -> None:
        """ValueError for columns that do not go with the task, or with each other."""
        if self.text_columns is not None and len(self.text_columns) not in TEXT_COLUMNS[self.task]:
            needed = " or ".join(map(str, TEXT_COLUMNS[self.task]))
            raise ValueError(
                f"text_columns names {len(self.text_columns)} columns, and {self.task} has {needed}"
            )
        if self.label_column is not None and self.scores is not None:
            raise ValueError("label_column is for classes, scores for numbers: name one of them")
        if self.scores is not None and self.task == "token-classification":
            raise ValueError("scores are of whole texts: token-classification has a label_column")
        if self.corpus is not None and self.task != "embedding":
            raise ValueError("a corpus is for --task embedding, which is then judged by retrieval")
        if self.queries is not None and self.corpus is None:
            raise ValueError("queries go with a corpus")
        if self.corpus is not None and (self.scores is not None or len(self.text_columns or ()) == 2):
            raise ValueError(
                "a corpus is searched by queries of one column, without scores of pairs: name one of "
                "text_columns, and no scores"
            )
        if self.queries is not None and self.label_column is not None:
            raise ValueError("queries go with files of query-id, corpus-id and score: leave label_column out")

    @classmethod
    def of(cls, settings: Any) -> TaskOptions:
        """The options among a run's settings, which have these names there."""
        values = {f.name: getattr(settings, f.name) for f in fields(cls) if hasattr(settings, f.name)}
        columns = values.get("text_columns")
        return cls(**{**values, "text_columns": None if columns is None else tuple(columns)})
