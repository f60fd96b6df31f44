"""Compaction: the narrow model that a decision leaves, with open gates folded into the weights and without
the closed parts; compensated for them, if the caller has inputs to do it on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruned_ops import ModelShape, PrunedBertForNaturalQuestions
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.heads import answering_class, natural_questions_class
from pruned_ops.models.stock import model_shape
from pruned_trainer.pruning.compensate import compensate as compensate_narrow
from pruned_trainer.pruning.compensate import text_batches
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision

_ONLY_IN_TRAINING = ("pruning_gates.", "distillation_projection.")


def compact(
    model: PreTrainedModel,
    decision: Decision,
    calibration: Sequence[str] | Sequence[dict[str, Tensor]] | None = None,
    compensate: str = "auto",
    layer_by_layer: bool = False,
) -> PreTrainedModel:
    """A new model that computes what `model` computes under the decision's gates, without the closed parts;
    with a calibration, compensated for what was removed.

    model: a stock or pruned question-answering BERT or RoBERTa, which is left as it is. A pruned model can be
    pruned again. calibration: some hundred texts like those that the model will read, or padded batches of
    inputs; no labels are needed. compensate, layer_by_layer: as for `compensate.compensate`. Errors:
    ValueError for any other model, for a decision that was made for other shapes, and for a compensation that
    lacks its calibration.
    """
    narrow = _narrow(model, decision)
    if calibration is None:
        if compensate not in ("auto", "none"):
            raise ValueError(f"compensation by {compensate} needs a calibration: texts, or batches of inputs")
    elif compensate != "none":
        texts = [text for text in calibration if isinstance(text, str)]
        batches = [batch for batch in calibration if not isinstance(batch, str)] + text_batches(model, texts)
        compensate_narrow(narrow, model, decision, batches, compensate, layer_by_layer=layer_by_layer)
    return narrow


def _narrow(model: PreTrainedModel, decision: Decision) -> PreTrainedModel:
    """The model without the closed parts."""
    if model.config.model_type not in PRUNED_CONFIGS or not hasattr(model, "qa_outputs"):
        raise ValueError(
            f"compact takes a BERT or RoBERTa for question answering; this is a {type(model).__name__} "
            f"({model.config.model_type})"
        )
    source = model_shape(model)
    _check_fits(decision, source)
    has_types = isinstance(model, PrunedBertForNaturalQuestions)
    model_class = (natural_questions_class if has_types else answering_class)(model.config.model_type)
    shape = decision.shape(source)
    fields = {
        **model.config.to_dict(),
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "layer_shapes": list(shape.layers),
    }
    fields.pop("architectures", None)
    narrow = model_class(model_class.config_class(**fields)).to(model.device, model.dtype)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith(_ONLY_IN_TRAINING)}
    for i, layer in enumerate(decision.layers):
        prefix = f"{model.base_model_prefix}.encoder.layer.{i}."
        _slice_layer(state, prefix, layer, source.head_dim)
    if decision.hidden is not None:
        _slice_hidden(state, decision.hidden)
    narrow.load_state_dict(state)
    return narrow.train(model.training)


def _check_fits(decision: Decision, source: ModelShape) -> None:
    """ValueError where the decision keeps something that a model of this shape does not have."""
    layers = source.layers
    if len(decision.layers) != len(layers):
        raise ValueError(f"the decision is for {len(decision.layers)} layers, the model has {len(layers)}")
    for i, (chosen, shape) in enumerate(zip(decision.layers, layers, strict=True)):
        _check_inside(chosen.heads, shape.num_heads, f"layer {i}: the decision keeps head")
        _check_inside(chosen.ffn, shape.ffn_width, f"layer {i}: the decision keeps FFN unit")
    if decision.hidden is not None:
        _check_inside(decision.hidden, source.hidden_size, "the decision keeps hidden dimension")
        if not decision.hidden.indices:
            raise ValueError("the decision keeps no hidden dimension at all")


def _check_inside(kept: Kept, size: int, what: str) -> None:
    if kept.indices and kept.indices[-1] >= size:
        raise ValueError(f"{what} {kept.indices[-1]}, the model has {size}")


def _slice_layer(state: dict[str, Tensor], prefix: str, layer: LayerDecision, head_dim: int) -> None:
    """Slice one layer's heads and FFN units, in place, and fold their gates into the output projections."""
    device = state[f"{prefix}output.dense.weight"].device
    heads = torch.tensor(layer.heads.indices, dtype=torch.long, device=device)
    columns = (heads[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()
    head_gates = torch.tensor(layer.heads.values, device=device).repeat_interleave(head_dim)
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            key = f"{prefix}attention.self.{name}.{kind}"
            state[key] = state[key].index_select(0, columns)
    key = f"{prefix}attention.output.dense.weight"
    state[key] = state[key].index_select(1, columns) * head_gates.to(state[key])
    units = torch.tensor(layer.ffn.indices, dtype=torch.long, device=device)
    for kind in ("weight", "bias"):
        key = f"{prefix}intermediate.dense.{kind}"
        state[key] = state[key].index_select(0, units)
    unit_gates = torch.tensor(layer.ffn.values, device=device)
    key = f"{prefix}output.dense.weight"
    state[key] = state[key].index_select(1, units) * unit_gates.to(state[key])


def _slice_hidden(state: dict[str, Tensor], hidden: Kept) -> None:
    """Slice every tensor's hidden dimension, in place; an open gate scales each LayerNorm's output."""
    for name, tensor in state.items():
        kept = torch.tensor(hidden.indices, dtype=torch.long, device=tensor.device)
        if name.endswith(("LayerNorm.weight", "LayerNorm.bias")):
            state[name] = tensor.index_select(0, kept) * torch.tensor(hidden.values).to(tensor)
        elif name.endswith(("output.dense.weight", "output.dense.bias")):
            state[name] = tensor.index_select(0, kept)  # a layer's outputs
        elif tensor.dim() == 2:
            state[name] = tensor.index_select(1, kept)  # embeddings, and layers that read the hidden states
