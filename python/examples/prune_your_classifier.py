"""Prune a classifier with its data in one call: python python/examples/prune_your_classifier.py"""

import tempfile

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    TrainingArguments,
)

import pruned_trainer

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
config.intermediate_size = 64
model = BertForSequenceClassification(config)  # your fine-tuned model
ids = torch.randint(1, 50, (320, 12))
data = [{"input_ids": row.tolist(), "labels": int(row[1] > 25)} for row in ids]


def accuracy(predicted):  # type: ignore
    return {"accuracy": (predicted.predictions.argmax(-1) == predicted.label_ids).mean()}


out = tempfile.mkdtemp() + "/pruned"
args = TrainingArguments(out, max_steps=40, learning_rate=1e-3, report_to=[], use_cpu=True, disable_tqdm=True)
result = pruned_trainer.prune(
    model, pruned_trainer.Target(macs=0.5), data[64:], data[:64], compute_metrics=accuracy, args=args, out=out
)
print({name: result.report[name]["accuracy"] for name in ("dense", "pruned")})
print("lost:", result.report["accuracy_loss"], "between", result.report["accuracy_loss_interval"])
print("speed-up:", result.report["speedup"]["reached"])
narrow = AutoModelForSequenceClassification.from_pretrained(out)  # after import pruned_ops, or pruned_trainer
print(
    type(narrow).__name__, "agrees with the dense model in", result.report["pruned"]["agreement"], "percent"
)
