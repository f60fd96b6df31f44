"""The tasks on rows of texts, by their names."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts.classification import ClassificationTask
from pruned_trainer.tasks.texts.embedding import EmbeddingTask
from pruned_trainer.tasks.texts.reranking import RerankingTask
from pruned_trainer.tasks.texts.tagging import TaggingTask

if TYPE_CHECKING:
    from pruned_trainer.tasks.task import Task

# The modules of the metrics, and what installs each.
_METRICS = {"sklearn": "scikit-learn", "scipy": "scipy", "seqeval": "seqeval"}


def text_task(options: TaskOptions) -> Task:
    """The task of these options. Errors: ValueError where a library of the metrics is missing, so that a run
    does not end for want of it after its training."""
    missing = [name for module, name in _METRICS.items() if find_spec(module) is None]
    if missing:
        raise ValueError(
            f"{options.task} is scored with {', '.join(missing)}: pip install {' '.join(missing)}"
        )
    if options.task == "token-classification":
        return TaggingTask(options)
    if options.task == "reranking":
        return RerankingTask(options)
    if options.task == "embedding":
        return EmbeddingTask(options)
    return ClassificationTask(options)
