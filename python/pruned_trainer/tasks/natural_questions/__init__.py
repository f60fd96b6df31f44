"""Natural Questions: files read one document at a time and checked, and the official metric."""

from pruned_trainer.tasks.faults import Skipped
from pruned_trainer.tasks.natural_questions.documents import (
    Candidate,
    Document,
    NqFormatError,
    nq_files,
    parse_document,
    read_documents,
)
from pruned_trainer.tasks.natural_questions.metrics import nq_metrics

__all__ = [
    "Candidate", "Document", "NqFormatError", "Skipped", "nq_files", "nq_metrics", "parse_document",
    "read_documents",
]  # fmt: skip
