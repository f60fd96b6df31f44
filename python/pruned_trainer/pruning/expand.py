"""The way back from a narrow model: its weights at their places in the model that it was cut out of, so that
gates on that model can close more."""

from __future__ import annotations

import copy
from typing import Any

import torch

from pruned_ops.models.families.known import family_of
from pruned_ops.models.stock import find_encoder, model_shape
from pruned_trainer.pruning.compact import repeated
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.gates import Gates

# Gates here are closed whatever the noise, and their gradients vanish.
CLOSED = -50.0


def expanded(model: Any, narrow: Any, decision: Decision) -> Any:
    """A copy of `model` that computes what `narrow` computes once the gates of what the decision removed are
    closed (`close`).

    narrow: the decision's model, trained on. What was removed has the weights of `model`. Errors: ValueError
    for a decision on hidden dimensions, which no closed gate removes from what stays.
    """
    if decision.hidden is not None:
        raise ValueError("a model without some hidden dimensions cannot be expanded: prune heads and ffn")
    wide = copy.deepcopy(model)
    into, state = wide.state_dict(), narrow.state_dict()
    encoder = find_encoder(wide)
    prefix = next(f"{name}." if name else "" for name, module in wide.named_modules() if module is encoder)
    shape, family = model_shape(wide), family_of(encoder.config)
    head_dim = shape.head_dim
    with torch.no_grad():
        for name, tensor in state.items():
            place = name.removeprefix(f"{prefix}{family.layers}.")
            if place == name:
                into[name].copy_(tensor)
                continue
            number, _, name_in_layer = place.partition(".")
            layer = decision.layers[int(number)]
            heads = torch.tensor(layer.heads.indices, dtype=torch.long)
            columns = (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
            units = torch.tensor(layer.ffn.indices, dtype=torch.long)
            role = family.layer.by_role(name_in_layer)
            if role.startswith(("query.", "key.", "value.")):
                rows = repeated(columns, 3 // len(family.layer.qkv), into[name].size(0))
                into[name][rows] = tensor.to(into[name])
            elif role == "attention_output.weight":
                into[name][:, columns] = tensor.to(into[name])
            elif role.startswith("up."):
                into[name][repeated(units, 1 + shape.gated, into[name].size(0))] = tensor.to(into[name])
            elif role == "down.weight":
                into[name][:, units] = tensor.to(into[name])
            else:
                into[name].copy_(tensor)
    return wide


@torch.no_grad()
def close(gates: Gates, decision: Decision) -> None:
    """Close the gates of what the decision removed, for good."""
    for part in set(gates.parts) - {"hidden"}:
        for log_alpha, layer in zip(gates.log_alphas(part), decision.layers, strict=True):
            removed = torch.ones(log_alpha.shape, dtype=torch.bool)
            removed[list(getattr(layer, part).indices)] = False
            log_alpha[removed.to(log_alpha.device)] = CLOSED
