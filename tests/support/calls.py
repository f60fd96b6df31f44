"""Small models, rows and arguments for calls of `pruned_trainer.prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, TrainingArguments

from head_models import SIZES
from pruned_trainer import Target

DENSE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
HALF = Target(macs=0.5)


def config(**more: Any) -> BertConfig:
    return BertConfig(**{**SIZES, **DENSE, **more})


def classifier(**more: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(config(**more)).eval()


def rows(number: int, seed: int = 0, per_token: bool = False, **more: Any) -> list[dict[str, Any]]:
    """Texts of which the first token says the label."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(4, 12, (number,), generator=generator).tolist():
        ids = torch.randint(5, 100, (length,), generator=generator).tolist()
        labels = [token % 3 for token in ids]
        made.append({"input_ids": ids, "labels": labels if per_token else labels[1], **more})
    return made


def unlabelled(number: int) -> list[dict[str, Any]]:
    return [{"input_ids": row["input_ids"]} for row in rows(number)]


def arguments(folder: Path, steps: int = 8, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), max_steps=steps, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=8, **more,
    )  # fmt: skip


class TwoTowers(nn.Module):
    """Two encoders and a loss between them; only the second is pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = (BertModel(config(), add_pooling_layer=False) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        pair = [tower(input_ids, attention_mask)[0][:, 0] for tower in (self.query, self.passage)]
        return {"loss": (pair[0] - pair[1]).square().mean(), "embedding": torch.cat(pair, -1)}
