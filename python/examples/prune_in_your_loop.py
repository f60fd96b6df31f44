"""Prune a classifier inside your own training loop: python python/examples/prune_in_your_loop.py"""

import copy

import torch
from transformers import BertConfig, BertForSequenceClassification

from pruned_trainer import Target, compact, gating

STEPS = 60
torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
config.intermediate_size = 64
model = BertForSequenceClassification(config).train()  # your fine-tuned model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (16, 12))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 1] > 25).long()}


teacher = copy.deepcopy(model)
with gating(model, Target(params=0.5), STEPS, teacher=teacher) as gates:
    optimizer = torch.optim.AdamW(gates.parameters(), lr=1e-3)
    for _ in range(STEPS):
        inputs = batch()
        outputs = model(**inputs)
        loss = outputs.loss + gates.loss(outputs, inputs)  # without labels: gates.loss alone
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        gates.step()
    decision = gates.decide()
narrow = compact(model, decision)  # a PrunedBertForSequenceClassification: train it on, then save_pretrained
print("kept of the parameters:", decision.reached["params"])
print("heads and FFN widths:", [(d.shape.num_heads, d.shape.ffn_width) for d in decision.layers])
