"""Compaction: the narrow model that a decision leaves, with open gates folded into the weights and without
the closed parts; compensated for them, if the caller has inputs to do it on."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pruned_ops import ModelShape
from pruned_ops.layers.int8 import Int8Linear
from pruned_ops.models.configuration import PRUNED_CONFIGS
from pruned_ops.models.encoder import PRUNED_ENCODERS
from pruned_ops.models.families.description import Family, LayerNames
from pruned_ops.models.families.known import family_of
from pruned_ops.models.heads import pruned_counterpart
from pruned_ops.models.relative_bias import heads_of_layers
from pruned_ops.models.stock import choose_encoder, config_of, encoder_shape, find_encoder, projection_of
from pruned_ops.runtime.refusals import refuse_modules, refuse_parameters
from pruned_trainer.pruning.attach import HOOKS, refuse_hidden
from pruned_trainer.pruning.compensate import calibration_batches
from pruned_trainer.pruning.compensate import compensate as compensate_narrow
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision

# The submodules that go with the training of a model.
_ONLY_IN_TRAINING = {"pruning_gates", "distillation_projection"}
# Where Accelerate keeps the forward that it wraps to train a model under autocast.
_FORWARD_BEFORE = "_original_forward"


def compact(
    model: Any,
    decision: Decision,
    calibration: Sequence[str] | Sequence[dict[str, Tensor]] | None = None,
    compensate: str = "auto",
    layer_by_layer: bool = False,
    encoder: str | None = None,
) -> Any:
    """A new model that computes what `model` computes under the decision's gates, without the closed parts;
    with a calibration, compensated for what was removed.

    model: any module around one stock or pruned encoder, or such an encoder; it is left as it is. A
    model of transformers whose head is known (answers, labels of texts or of tokens) becomes its pruned
    counterpart, which the Auto classes load. Any other model is copied, with a pruned encoder in the place of
    its own. A pruned model can be pruned again. calibration: some hundred texts like those that the model
    will read, or padded batches of inputs; no labels are needed. compensate, layer_by_layer: as for
    `compensate.compensate`. encoder: the name of the one that the decision is for, where the model has
    several. Errors: ValueError for a model without such an encoder, for a decision that was made for other
    shapes or for hidden dimensions that the head cannot lose, for a compensation that lacks its calibration,
    and for a calibration of an nn.Sequential.
    """
    if encoder is not None:
        choose_encoder(model, encoder)
    if isinstance(calibration, (str, PathLike, Mapping)):
        kind = type(calibration).__name__
        raise ValueError(f"calibration is a {kind}: a list of texts, or of batches of inputs, is needed")
    if calibration is None and compensate not in ("auto", "none"):
        raise ValueError(f"compensation by {compensate} needs a calibration: texts, or batches of inputs")
    if layer_by_layer and (calibration is None or compensate == "none"):
        raise ValueError("layer by layer is a way to compensate: give a calibration, and a compensation")
    if isinstance(model, nn.Sequential) and calibration is not None and compensate != "none":
        raise ValueError(
            f"a {type(model).__name__} takes its inputs as one dictionary, and is not compensated: leave the "
            "calibration out, or compact the model of transformers inside it"
        )
    narrow = _narrow(model, decision)
    if calibration is not None and compensate != "none":
        texts = [text for text in calibration if isinstance(text, str)]
        batches = [batch for batch in calibration if not isinstance(batch, str)]
        batches += calibration_batches(model, texts)
        pooling = getattr(config_of(model), "pooling", None) or "mean"  # an embedder's, where it says it
        compensate_narrow(
            narrow, model, decision, batches, compensate, layer_by_layer=layer_by_layer, pooling=pooling
        )
    return narrow


def _narrow(model: Any, decision: Decision) -> Any:
    """The model without the closed parts."""
    check_decision(model, decision)
    encoder = find_encoder(model)
    around = _known_around(model, encoder)
    known = encoder if around is None else around
    narrow = _narrow_known(known, encoder, decision)
    return narrow if known is model else _copied_around(model, known, narrow)


def check_decision(model: nn.Module, decision: Decision) -> None:
    """ValueError for a decision that was made for another shape than the encoder's in `model`, or for hidden
    dimensions that its head cannot lose."""
    encoder = find_encoder(model)
    _check_described(encoder)
    _check_fits(decision, encoder_shape(encoder))
    if decision.hidden is not None:
        refuse_hidden(encoder)
        _check_hidden(model, encoder, _known_around(model, encoder))


def check_prunable(model: nn.Module, parts: Sequence[str]) -> None:
    """ValueError where the encoder in `model` is not what its config describes, or cannot be trained; and
    where hidden dimensions are to be pruned under a head that cannot lose its own."""
    encoder = find_encoder(model)
    _check_described(encoder)
    refusal = refuse_parameters(encoder)
    if refusal is not None:
        raise ValueError(f"the {type(encoder).__name__} cannot be pruned, because {refusal}")
    if "hidden" in parts:
        refuse_hidden(encoder)
        _check_hidden(model, encoder, _known_around(model, encoder))


def unmade_hidden(encoder: Any) -> int | None:
    """The hidden size that no narrow model of this encoder can have: that of its embeddings, where there is a
    projection between the two, which a pruned class makes for unequal ones alone."""
    config = encoder.config
    return None if projection_of(encoder) is None else family_of(config).embedding_size(config)


def _check_described(encoder: Any) -> None:
    """ValueError for an encoder with modules that its config does not describe, which its pruned class would
    be without, and for one of int8 weights."""
    if any(isinstance(module, Int8Linear) for module in encoder.modules()):
        raise ValueError(
            "the encoder's weights are stored in int8, and are neither trained nor cut: call "
            "model.dequantize() first"
        )
    refusal = refuse_modules(encoder, _ONLY_IN_TRAINING)
    if refusal is not None:
        raise ValueError(f"the {type(encoder).__name__} cannot be pruned, because {refusal}")


def _known_around(model: nn.Module, encoder: Any) -> Any:
    """The module inside `model` (or itself) with this encoder and a head that a pruned class has; None where
    there is none, or where something in it was replaced."""
    for module in model.modules():
        if pruned_counterpart(type(module)) is not None and module.base_model is encoder:
            is_replaced = "_loss_function" in vars(module) or _has_own_forward(module)
            return module if not is_replaced and _has_own_tensors(module) else None
    return None


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a module has a forward in the place of its class's, which is not Accelerate's: that one goes
    with the training."""
    attributes = vars(module)
    forward = attributes.get(_FORWARD_BEFORE, attributes.get("forward"))
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def without_autocast(module: nn.Module) -> None:
    """Take off the forward that Accelerate put on the module to train it under autocast, so that it runs in
    its own dtype afterwards; by the forward that was there before."""
    attributes = vars(module)
    if _FORWARD_BEFORE not in attributes:
        return
    is_own, before = _has_own_forward(module), attributes.pop(_FORWARD_BEFORE)
    attributes.pop("forward", None)
    if is_own:
        module.forward = before


def _has_own_tensors(module: Any) -> bool:
    """Whether the tensors of a model are those that its class makes for its config."""
    with torch.device("meta"):
        described = type(module)(copy.deepcopy(module.config)).state_dict()
    state = _trained_state(module)
    return state.keys() == described.keys() and all(
        state[name].shape == tensor.shape for name, tensor in described.items()
    )


def _trained_state(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, without those that only its training needs."""
    return {
        name: tensor
        for name, tensor in module.state_dict().items()
        if not _ONLY_IN_TRAINING.intersection(name.split("."))
    }


def _check_hidden(model: nn.Module, encoder: Any, around: Any) -> None:
    """ValueError unless everything around the encoder reads its hidden states by matrices that can lose
    their columns."""
    if around is not model and (encoder is not model or getattr(encoder, "pooler", None) is not None):
        raise ValueError(
            f"hidden dimensions cannot be pruned under the head of this {type(model).__name__}, which would "
            "need them all: prune heads and ffn (parts)"
        )


def _narrow_known(old: Any, encoder: Any, decision: Decision) -> Any:
    """The pruned counterpart of a known model or of a bare encoder, without the closed parts."""
    source, config, family = encoder_shape(encoder), old.config, family_of(old.config)
    shape = decision.shape(source)
    fields = {
        **config.to_dict(),
        "hidden_size": shape.hidden_size,
        "head_dim": shape.head_dim,
        "layer_shapes": list(shape.layers),
    }
    if family.projection is not None and projection_of(encoder) is None:
        fields["embedding_size"] = shape.hidden_size
    elif shape.hidden_size == unmade_hidden(encoder):
        raise ValueError(
            f"the decision keeps {shape.hidden_size} hidden dimensions, as many as the embeddings have: such "
            f"a {family.name} has no {family.projection}, which this one needs; keep more or fewer"
        )
    if family.relative_bias is not None:
        fields["head_indices"] = [
            [heads[i] for i in layer.heads.indices]
            for heads, layer in zip(heads_of_layers(config), decision.layers, strict=True)
        ]
    if _pools(old):  # whose pooler stays as wide as it was
        fields["pooler_size"] = getattr(config, "pooler_size", None) or source.hidden_size
    fields.pop("architectures", None)
    new_config = PRUNED_CONFIGS[config.model_type](**fields)
    if old is encoder:
        pooler = {"add_pooling_layer": True} if getattr(encoder, "pooler", None) is not None else {}
        narrow, prefix = PRUNED_ENCODERS[family](new_config, **pooler), ""
    else:
        counterpart: Any = pruned_counterpart(type(old))
        narrow, prefix = counterpart(new_config), f"{old.base_model_prefix}."
    state = _trained_state(old)
    for i, layer in enumerate(decision.layers):
        _slice_layer(state, f"{prefix}{family.layers}.{i}.", family.layer, layer, source)
    if decision.hidden is not None:
        others = {family.text_head.last} if _pools(old) else set[str]()
        if family.relative_bias is not None:
            others.add(f"{prefix}{family.relative_bias.name}")
        if projection_of(encoder) is not None:  # which the tables and their norm come before
            others |= {f"{prefix}embeddings.{name}" for name in vars(family.embeddings).values()}
        _slice_hidden(state, decision.hidden, family, others)
    narrow.load_state_dict(state)
    trains = {name: parameter.requires_grad for name, parameter in old.named_parameters()}
    for name, parameter in narrow.named_parameters():
        parameter.requires_grad_(trains.get(name, True))
    return narrow.to(encoder.device, encoder.dtype).train(old.training)


def _copied_around(model: nn.Module, replaced: Any, replacement: Any) -> Any:
    """A copy of `model` with `replacement` where `replaced` stands, and without what only its training needs.

    What the model shares with the replaced part (a config, an output matrix that is the word embeddings) its
    copy shares with the replacement."""
    new_parameters = dict(replacement.named_parameters())
    memo: dict[int, Any] = {id(replaced): replacement, id(replaced.config): replacement.config}
    for name, parameter in replaced.named_parameters():
        if name in new_parameters and new_parameters[name].shape == parameter.shape:
            memo[id(parameter)] = new_parameters[name]
    for module in model.modules():
        for name in _ONLY_IN_TRAINING & module._modules.keys():
            memo[id(module._modules[name])] = nn.Identity()
    hooks = model.__dict__.get(HOOKS)
    if hooks is not None:
        memo[id(hooks)] = []
    copied = copy.deepcopy(model, memo)
    copied.__dict__.pop(HOOKS, None)
    for module in copied.modules():
        for name in _ONLY_IN_TRAINING & module._modules.keys():
            del module._modules[name]
        without_autocast(module)
    if isinstance(copied, PreTrainedModel):
        # A forward that hands its keywords on to the encoder would give it the Trainer's, which it refuses.
        copied.accepts_loss_kwargs = False  # type: ignore[assignment]
    return copied


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


def repeated(kept: Tensor, times: int, rows: int) -> Tensor:
    """The rows that stay of a matrix of so many, which is `times` matrices one after the other, of each of
    which the rows `kept` stay: query, key and value, or both products of a gated FFN."""
    return torch.cat([kept + i * (rows // times) for i in range(times)])


def _slice_layer(
    state: dict[str, Tensor], prefix: str, names: LayerNames, layer: LayerDecision, source: ModelShape
) -> None:
    """Slice one layer's heads and FFN units, in place, and fold their gates into the output projections."""
    head_dim = source.head_dim
    device = state[f"{prefix}{names.down}.weight"].device
    heads = torch.tensor(layer.heads.indices, dtype=torch.long, device=device)
    columns = (heads[:, None] * head_dim + torch.arange(head_dim, device=device)).flatten()
    head_gates = torch.tensor(layer.heads.values, device=device).repeat_interleave(head_dim)
    units = torch.tensor(layer.ffn.indices, dtype=torch.long, device=device)
    unit_gates = torch.tensor(layer.ffn.values, device=device)
    for name, kept, times in (
        *((name, columns, 3 // len(names.qkv)) for name in names.qkv),
        (names.up, units, 1 + source.gated),
    ):
        for key in {f"{prefix}{name}.weight", f"{prefix}{name}.bias"} & state.keys():
            state[key] = state[key].index_select(0, repeated(kept, times, state[key].size(0)))
    key = f"{prefix}{names.attention_output}.weight"
    state[key] = state[key].index_select(1, columns) * head_gates.to(state[key])
    key = f"{prefix}{names.down}.weight"
    state[key] = state[key].index_select(1, units) * unit_gates.to(state[key])


def _pools(model: Any) -> bool:
    """Whether a model's head reads one pooled state for each text, and not the hidden states themselves."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _slice_hidden(state: dict[str, Tensor], hidden: Kept, family: Family, others: Collection[str]) -> None:
    """Slice every tensor's hidden dimension, in place; an open gate scales the output of each LayerNorm, and
    of the projection of the embeddings. others: modules without a hidden dimension."""
    names = family.layer
    scaled: tuple[str, ...] = (f"embeddings.{family.embeddings.norm}", names.attention_norm, names.ffn_norm)
    if family.relative_embeddings is not None:
        scaled = (*scaled, family.relative_embeddings.norm)
    for name, tensor in state.items():
        module = name.rpartition(".")[0]
        if module in others:
            continue
        kept = torch.tensor(hidden.indices, dtype=torch.long, device=tensor.device)
        if module.endswith(scaled):
            state[name] = tensor.index_select(0, kept) * torch.tensor(hidden.values).to(tensor)
        elif family.projection is not None and module.endswith(family.projection):
            gates = torch.tensor(hidden.values).to(tensor)
            state[name] = tensor.index_select(0, kept) * (gates[:, None] if tensor.dim() == 2 else gates)
        elif f"{family.layers}." in name and module.endswith((names.attention_output, names.down)):
            state[name] = tensor.index_select(0, kept)  # a layer's outputs
        elif tensor.dim() == 2:
            state[name] = tensor.index_select(1, kept)  # embeddings, and layers that read the hidden states
