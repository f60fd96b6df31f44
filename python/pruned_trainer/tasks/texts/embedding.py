"""Embeddings of texts: an encoder's states, pooled to one vector, judged by the similarity of pairs or by
what a query finds among documents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pruned_ops.checkpoints.loading import load_to_fine_tune
from pruned_ops.checkpoints.sentence_folder import modules_of, pooling_config, pooling_modes
from pruned_ops.models.inputs import POOLINGS, pool_tokens
from pruned_trainer.distributed import say
from pruned_trainer.tasks.faults import FormatError
from pruned_trainer.tasks.task import Score
from pruned_trainer.tasks.texts.base import TextTask
from pruned_trainer.tasks.texts.encoding import encode
from pruned_trainer.tasks.texts.examples import (
    Examples,
    read_labelled,
    read_score,
)
from pruned_trainer.tasks.texts.metrics import SCORES, FloatArray, Mean, Metric
from pruned_trainer.tasks.texts.pair_training import PairTraining, pair_features
from pruned_trainer.tasks.texts.prepared import PreparedTexts
from pruned_trainer.tasks.texts.ranking import RETRIEVAL, TOP
from pruned_trainer.tasks.texts.retrieval import Retrieval, read_retrieval

HEAD = "Model"
PAIR, SCORE = ("text_a", "text_b"), "score"
TEXT, ID, TITLE, RELEVANT = "text", "id", "title", "relevant"
# The modules of sentence-transformers that are computed here, or that change no cosine.
MODULES = ("Transformer", "Pooling", "Normalize", "Dropout")
# The documents that are searched where models are chosen between.
CHOOSING_DOCUMENTS = 1000


@dataclass(frozen=True)
class CosineAgreement(Mean):
    """The mean cosine of the embeddings with the teacher's. gold, predicted: (texts, width)."""

    score: Score = Score("agreement", "cosine with the teacher's embeddings")

    def each(self, gold: Any, predicted: Any) -> FloatArray:
        return _cosines(np.asarray(gold, np.float64), np.asarray(predicted, np.float64))


AGREEMENT: tuple[Metric, ...] = (CosineAgreement(),)


@dataclass(frozen=True)
class EmbeddingTask(TextTask):
    """embedding: rows with a pair of texts and a score; with a corpus, rows with a query and the ids of the
    documents that are relevant to it. What is learned is the teacher's embedding of each text."""

    head = HEAD
    reads_pairs = False

    # -- models ------------------------------------------------------------------------------------------

    def start_model(self, source: str, examples: Any) -> PreTrainedModel:
        """The bare encoder of the checkpoint; a line names the modules that it is trained without."""
        model = load_to_fine_tune(source, HEAD)
        self.check_model(model, source)
        return model

    def check_model(self, model: PreTrainedModel, source: str) -> None:
        """A pooling that is neither mean nor cls is refused, and an encoder that its modules.json has
        elsewhere than the checkpoint that was loaded. The config then says how the model's states are pooled,
        and a line names the modules that it is trained and judged without."""
        inner = [module.path for module in modules_of(source) if module.name == "Transformer"]
        if inner and PurePosixPath(inner[0]) != PurePosixPath():
            raise ValueError(
                f"{source} has a checkpoint, and the one of its modules.json in {inner[0]}: keep the one "
                'that is meant, in the folder itself, with the path "" in modules.json'
            )
        model.config.pooling = pooling_of(source, model.config)
        others = other_modules(source)
        if others:
            say(
                f"{source} has {', '.join(others)} among its modules (modules.json), which nothing computes "
                "here: embeddings are trained and judged without, and the files are kept as they are"
            )

    # -- data --------------------------------------------------------------------------------------------

    def read(self, source: Path | str, split: str) -> Examples | Retrieval:
        with self.skipping_bad() as skipped:
            if self.options.corpus is not None:
                return read_retrieval(source, split, self.options, skipped)
            columns = self.options.text_columns or PAIR
            if len(columns) != 2:
                raise FormatError(f"{source}: pairs are needed: --text-columns names two columns")
            label = self.options.scores or self.options.label_column or SCORE
            return read_labelled(source, split, columns, label, read_score, skipped)

    def to_choose_on(self, examples: Examples | Retrieval) -> Examples | Retrieval:
        """Of a search all queries, on fewer documents: each model has to embed them all."""
        return examples.on_fewer(CHOOSING_DOCUMENTS) if isinstance(examples, Retrieval) else examples

    @property
    def columns(self) -> tuple[str, ...]:
        return self.options.text_columns or (TEXT,)

    def describe(self, examples: Examples | Retrieval) -> str:
        if isinstance(examples, Retrieval):
            return f"{len(examples):,} queries on {len(examples.documents):,} documents"
        if not examples.is_labelled:
            return f"{len(_distinct(examples)):,} texts without labels"
        return f"{len(examples):,} pairs"

    def prepare(
        self,
        examples: Examples | Retrieval,
        tokenizer: PreTrainedTokenizerFast,
        model: PreTrainedModel,
        teacher: PreTrainedModel | None = None,
    ) -> PreparedTexts:
        texts = _distinct(examples)
        prepared = PreparedTexts(
            noun="texts",
            count=len(texts),
            windows=encode(tokenizer, [(text,) for text in texts], self.options.max_length),
            gold=None,
            metrics=AGREEMENT,
            read=partial(_embeddings, model.config.pooling),
            assemble=np.stack,
            show=lambda predicted: {"texts": len(predicted)},
        )
        if isinstance(examples, Retrieval):
            return _search(prepared, examples, texts)
        if examples.is_labelled:
            return _similarity(prepared, examples, texts)
        return prepared.taught_by(teacher, lambda predicted: predicted, AGREEMENT)

    def features(
        self, examples: Examples | Retrieval, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> list[dict[str, Any]]:
        """A window for each text, without labels: what is learned of it is the teacher's embedding."""
        texts = [(text,) for text in _distinct(examples)]
        return [window.feature() for window in encode(tokenizer, texts, self.options.max_length)]

    def to_fine_tune(
        self, examples: Examples | Retrieval, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel
    ) -> tuple[nn.Module, list[dict[str, Any]]]:
        """The encoder with a loss on pairs: by their scores, or each query with a document that is relevant
        to it."""
        if isinstance(examples, Retrieval):
            judged = zip(examples.queries, examples.relevant, strict=True)
            pairs = [(query.texts[0], examples.documents[n]) for query, relevant in judged for n in relevant]
            scores = None
        else:
            pairs = [(row.texts[0], row.texts[1]) for row in examples.rows]
            scores = [float(row.label) for row in examples.rows]
        first, second = (
            encode(tokenizer, [(text,) for text in side], self.options.max_length)
            for side in zip(*pairs, strict=True)
        )
        features = pair_features(list(zip(first, second, strict=True)), scores)
        return PairTraining(model, model.config.pooling), features


def _embeddings(pooling: str, outputs: Any, mask: Tensor) -> Tensor:
    """(texts, width) of an encoder's outputs."""
    return pool_tokens(outputs.last_hidden_state, mask, pooling)


def _distinct(examples: Examples | Retrieval) -> list[str]:
    """Each text once, in the order of the rows; of a search the queries', then the documents'."""
    if isinstance(examples, Retrieval):
        return list(dict.fromkeys([*(query.texts[0] for query in examples.queries), *examples.documents]))
    return list(dict.fromkeys(text for row in examples.rows for text in row.texts))


def _similarity(prepared: PreparedTexts, examples: Examples, texts: Sequence[str]) -> PreparedTexts:
    """Pairs, judged by how the cosines of their embeddings go with their scores."""
    place = {text: number for number, text in enumerate(texts)}
    first, second = (np.array([place[row.texts[side]] for row in examples.rows]) for side in (0, 1))

    def cosines(embeddings: Sequence[Any]) -> FloatArray:
        vectors = np.stack(embeddings).astype(np.float64)
        return _cosines(vectors[first], vectors[second])

    return replace(
        prepared, noun="pairs", count=len(examples), gold=np.array([row.label for row in examples.rows]),
        metrics=SCORES, assemble=cosines, show=lambda predicted: predicted.tolist(),
    )  # fmt: skip


def _search(prepared: PreparedTexts, search: Retrieval, texts: Sequence[str]) -> PreparedTexts:
    """Queries, judged by the order in which the cosines put the documents."""
    place = {text: number for number, text in enumerate(texts)}
    asked = np.array([place[query.texts[0]] for query in search.queries])
    documents = np.array([place[text] for text in search.documents])
    gold = np.zeros((len(search), len(documents)))
    for row, relevant in zip(gold, search.relevant, strict=True):
        row[list(relevant)] = list(relevant.values())

    def similarities(embeddings: Sequence[Any]) -> FloatArray:
        vectors = np.stack(embeddings).astype(np.float64)
        vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors[asked] @ vectors[documents].T

    def first(predicted: FloatArray) -> list[list[int]]:
        return np.argsort(-predicted, axis=1, kind="stable")[:, :TOP].tolist()

    return replace(
        prepared, noun="queries", count=len(search), gold=gold, metrics=RETRIEVAL, assemble=similarities,
        show=first,
    )  # fmt: skip


def _cosines(first: FloatArray, second: FloatArray) -> FloatArray:
    """(texts,) cosines of the rows of two matrices; 0 with a vector of zeros."""
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return (first * second).sum(1) / np.maximum(norms, 1e-12)


def other_modules(source: str) -> list[str]:
    """The modules that sentence-transformers lists beside the checkpoint and that are not computed here, by
    the names of their classes; none where it is no folder of sentence-transformers."""
    return [module.name for module in modules_of(source) if module.name not in MODULES]


def pooling_of(source: str, config: Any) -> str:
    """How the checkpoint's embeddings are pooled: as its config says, else as sentence-transformers wrote it
    beside the model; "mean" where neither does. Errors: ValueError for a way that is neither mean nor cls."""
    known = getattr(config, "pooling", None)
    if known in POOLINGS:
        return str(known)
    if known is not None:
        raise ValueError(f"{source} pools by {known!r}, as its config says; mean and cls are known")
    modes = pooling_modes(pooling_config(source))
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(f"{source} pools by {', '.join(modes) or 'nothing'}; mean and cls are known")
    return modes[0]
