"""SQuAD 1.1 and 2.0: files read and checked, and the official SQuAD 2.0 metric.

Nothing here needs the `datasets` library. These names lead from a file to a result: load_squad,
training_features, predict_logits, best_null_threshold, evaluate, bootstrap_interval.
"""

from pruned_ops.qa.logits import predict_logits
from pruned_trainer.tasks.faults import Skipped
from pruned_trainer.tasks.squad.examples import (
    Example,
    GoldAnswer,
    SquadFile,
    SquadFormatError,
    load_squad,
    parse_squad,
    split_articles,
)
from pruned_trainer.tasks.squad.metrics import (
    EvaluationResult,
    QuestionScores,
    best_null_threshold,
    bootstrap_interval,
    evaluate,
    question_scores,
    squad_metrics,
)
from pruned_trainer.tasks.squad.task import training_features

__all__ = [
    "EvaluationResult", "Example", "GoldAnswer", "QuestionScores", "Skipped", "SquadFile", "SquadFormatError",
    "best_null_threshold", "bootstrap_interval", "evaluate", "load_squad", "parse_squad", "predict_logits",
    "question_scores", "split_articles", "squad_metrics", "training_features",
]  # fmt: skip
