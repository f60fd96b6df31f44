"""Run structurally pruned transformer encoders fast.

Each layer may have its own number of heads and FFN width, and no padding is computed.

import pruned_ops
from transformers import AutoModelForQuestionAnswering

model = pruned_ops.optimize(AutoModelForQuestionAnswering.from_pretrained("a/pruned/or/stock/checkpoint"))
"""

from pruned_ops import ops as ops
from pruned_ops.checkpoints.export import export_onnx
from pruned_ops.checkpoints.importing import import_checkpoint
from pruned_ops.checkpoints.trimming import trim_vocabulary
from pruned_ops.layers.modules import PrunedEncoder, PrunedLayer
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.parts import PrunedAttention, PrunedFFN
from pruned_ops.models import int8_checkpoints as int8_checkpoints
from pruned_ops.models.configuration import PrunedBertConfig, PrunedRobertaConfig
from pruned_ops.models.encoder import PrunedBertModel, PrunedRobertaModel
from pruned_ops.models.heads import (
    PrunedBertForNaturalQuestions,
    PrunedBertForQuestionAnswering,
    PrunedBertForSequenceClassification,
    PrunedBertForTokenClassification,
    PrunedRobertaForNaturalQuestions,
    PrunedRobertaForQuestionAnswering,
    PrunedRobertaForSequenceClassification,
    PrunedRobertaForTokenClassification,
)
from pruned_ops.ops import backends as backends
from pruned_ops.ops.registry import BackendError, debug, record, use_backend
from pruned_ops.qa.answerer import QuestionAnswerer
from pruned_ops.qa.decoding import Answer
from pruned_ops.qa.pipeline import pipeline
from pruned_ops.runtime import attention_interface as attention_interface
from pruned_ops.runtime.optimize import optimize, restore
from pruned_ops.runtime.tune import tune
from pruned_ops.shape import LayerShape, ModelShape
from pruned_ops.version import __version__

__all__ = [
    "Answer",
    "BackendError",
    "LayerShape",
    "ModelShape",
    "PackedBatch",
    "PrunedAttention",
    "PrunedBertConfig",
    "PrunedBertForNaturalQuestions",
    "PrunedBertForQuestionAnswering",
    "PrunedBertForSequenceClassification",
    "PrunedBertForTokenClassification",
    "PrunedBertModel",
    "PrunedEncoder",
    "PrunedFFN",
    "PrunedLayer",
    "PrunedRobertaConfig",
    "PrunedRobertaForNaturalQuestions",
    "PrunedRobertaForQuestionAnswering",
    "PrunedRobertaForSequenceClassification",
    "PrunedRobertaForTokenClassification",
    "PrunedRobertaModel",
    "QuestionAnswerer",
    "__version__",
    "export_onnx",
    "import_checkpoint",
    "optimize",
    "ops",
    "debug",
    "pipeline",
    "record",
    "restore",
    "trim_vocabulary",
    "tune",
    "use_backend",
]
