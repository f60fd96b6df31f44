"""Prune a model inside your own Trainer: python python/examples/prune_with_your_trainer.py"""

import copy
import tempfile

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from pruned_trainer import GatingTrainerMixin, Target, compact

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
config.intermediate_size = 64
model = BertForSequenceClassification(config)  # your fine-tuned model
ids = torch.randint(1, 50, (256, 12))
data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": int(row[1] > 25)} for row in ids]


class MyTrainer(Trainer):
    """A Trainer with a loss of your own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):  # type: ignore
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, inputs["labels"], label_smoothing=0.1)
        return (loss, outputs) if return_outputs else loss


class Pruner(GatingTrainerMixin, MyTrainer):
    """The same, with gates."""


options = {"target": Target(macs=0.5), "teacher": copy.deepcopy(model), "lengths": [12]}
args = TrainingArguments(tempfile.mkdtemp(), max_steps=40, report_to=[], use_cpu=True, disable_tqdm=True)
trainer = Pruner(model, args, train_dataset=data, gating=options)
trainer.train()
narrow = compact(trainer.model, trainer.decision)  # train it on with MyTrainer, then save_pretrained
print(type(narrow).__name__, "keeps", trainer.decision.reached["macs"], "of the multiply-accumulates")
