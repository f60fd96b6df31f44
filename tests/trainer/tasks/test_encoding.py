"""What is read of a model's outputs, window by window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertForSequenceClassification

from pruned_trainer.tasks.texts.encoding import Encoded, model_outputs
from text_files import checkpoint


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """The largest of them would be the first class, and rank first among the passages of a query."""
    folder = checkpoint(tmp_path / "model", BertForSequenceClassification, num_labels=3)
    model: Any = BertForSequenceClassification.from_pretrained(folder)
    texts = [[2, 5, 3], [2, 6, 7, 3]]
    windows = [Encoded(np.array(ids, np.int32), np.zeros(len(ids), np.int32)) for ids in texts]

    def logits(outputs: Any, mask: Any) -> Any:
        return outputs.logits

    assert [values.shape for values in model_outputs(model, windows, logits)] == [(3,), (3,)]
    model.classifier.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="the model's outputs for window 0 are not finite"):
        model_outputs(model, windows, logits)
