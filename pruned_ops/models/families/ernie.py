"""ERNIE: BERT under its own name. Its task types are not computed."""

from __future__ import annotations

from dataclasses import replace

from pruned_ops.models.families.bert import BERT
from pruned_ops.models.families.description import Stock

ERNIE = replace(
    BERT,
    name="ERNIE",
    stock=(Stock("Ernie", "ernie", "BertTokenizerFast"),),
    prefix="ernie",
    fixed={"use_task_id": False},
)
