"""Fine-tuning an embedder on pairs of texts: by their scores, or by which text belongs to which.

A pair travels as one window, the second text's tokens behind the first's, so that it is padded and shuffled
as any other; `PairTraining` takes it apart again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from pruned_ops.models.inputs import pool_tokens
from pruned_trainer.tasks.texts.encoding import Encoded

# What cosines are multiplied with before the softmax over a batch's texts, as sentence-transformers has it.
SCALE = 20.0


def pair_features(
    pairs: Sequence[tuple[Encoded, Encoded]], scores: Sequence[float] | None
) -> list[dict[str, Any]]:
    """A window for each pair. scores: how alike the texts are; None for pairs that belong together. Scores
    are moved to 0 to 1, from the lowest one (0 where none is below it) to the highest."""
    features = []
    for first, second in pairs:
        ids = np.concatenate([first.input_ids, second.input_ids])
        features.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "first": len(first)})
        if first.token_type_ids is not None and second.token_type_ids is not None:
            features[-1]["token_type_ids"] = np.concatenate([first.token_type_ids, second.token_type_ids])
    if scores is not None:
        low, high = min(0.0, *scores), max(scores)
        for feature, score in zip(features, scores, strict=True):
            feature["labels"] = (score - low) / max(high - low, 1e-9)
    return features


class PairTraining(nn.Module):
    """An encoder with the loss of a batch of pairs, each a window of `pair_features`.

    With scores it is the squared difference of the cosine and the score. Without, it is the cross-entropy of
    finding each first text's second text among all of the batch (van den Oord et al. 2018)."""

    def __init__(self, encoder: PreTrainedModel, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.config = encoder.config
        if getattr(encoder, "pooler", None) is not None:  # which no loss reads: processes would wait for it
            encoder.pooler.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        first: Tensor,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **others: Any,
    ) -> ModelOutput:
        """input_ids, attention_mask, token_type_ids: (batch, seqlen). first: (batch,) tokens of the first
        text. labels: (batch,) scores from 0 to 1."""
        lengths = attention_mask.sum(1)
        starts = torch.cat([torch.zeros_like(first), first])
        sizes = torch.cat([first, lengths - first])
        places = torch.arange(int(sizes.max()), device=input_ids.device)
        real = places < sizes[:, None]
        columns = torch.where(real, starts[:, None] + places, 0)

        def taken_apart(rows: Tensor, fill: int) -> Tensor:
            return torch.cat([rows, rows]).gather(1, columns).masked_fill(~real, fill)

        inputs = {"input_ids": taken_apart(input_ids, self.config.pad_token_id or 0)}
        if token_type_ids is not None:
            inputs["token_type_ids"] = taken_apart(token_type_ids, 0)
        mask = real.long()
        states = self.encoder(**inputs, attention_mask=mask).last_hidden_state
        vectors = F.normalize(pool_tokens(states, mask, self.pooling), dim=-1)
        left, right = vectors.chunk(2)
        if labels is not None:
            return ModelOutput(loss=F.mse_loss((left * right).sum(-1), labels.to(vectors)))
        if len(left) < 2:
            raise ValueError("a batch of one pair has no other text to tell its second from: --batch-size 2")
        targets = torch.arange(len(left), device=left.device)
        return ModelOutput(loss=F.cross_entropy(SCALE * left @ right.T, targets))
