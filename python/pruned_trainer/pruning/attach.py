"""Hooks that put gates on a stock or pruned Hugging Face model, and their removal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.models.disentangled import relative_norm, relative_states
from pruned_ops.models.families.known import family_of
from pruned_ops.models.stock import find_encoder, hidden_norms, layers_of, model_shape, projection_of
from pruned_trainer.pruning.gates import Gates
from pruned_trainer.pruning.options import DEFAULT_PARTS

_NAME = "pruning_gates"
HOOKS = "_pruning_gate_hooks"
HALVES = (torch.bfloat16, torch.float16)


def attach(model: nn.Module, seed: int = 0, parts: Sequence[str] = DEFAULT_PARTS) -> Gates:
    """Put gates on every head's context, every FFN activation, and every hidden dimension of the encoder in
    `model`, whatever is around it; the gates become the model's submodule.

    parts: those of "heads", "ffn" and "hidden" that get gates. Head and FFN gates multiply the input of each
    attention output projection (all head_dim columns of a head by one gate) and of each FFN output
    projection. Hidden gates multiply the output of every LayerNorm, and of the projection of the embeddings
    where there is one; a closed dimension leaves the LayerNorm's statistics. The gates follow the model's
    train/eval mode. Errors: ValueError if gates are attached already, and for weights of half precision.
    """
    if hasattr(model, HOOKS):
        raise ValueError("gates are attached to this model already; detach(model) first")
    encoder = find_encoder(model)
    if encoder.dtype in HALVES:
        raise ValueError(
            f"the encoder's weights are {encoder.dtype}, and gates train in float32: call model.float() first"
        )
    if "hidden" in parts:
        refuse_hidden(encoder)
    shape = model_shape(encoder)
    gates = Gates(shape, seed, parts).to(next(encoder.parameters()).device).train(model.training)
    holder_of(model).add_module(_NAME, gates)
    # The encoder draws, and not the trainer: each forward of the encoder needs new values. It begins with the
    # embeddings; the encoder's own hooks would not run where a caller uses its `forward` itself.
    hooks = [encoder.embeddings.register_forward_pre_hook(lambda *_: gates.draw())]
    for i, layer in enumerate(layers_of(encoder)):
        if "heads" in gates.parts:
            gate = _gate_heads(gates, i, shape.head_dim)
            hooks.append(layer.attention_output.register_forward_pre_hook(gate))
        if "ffn" in gates.parts:
            hooks.append(layer.down.register_forward_pre_hook(_gate_ffn(gates, i)))
    if "hidden" in gates.parts:
        hooks += [norm.register_forward_hook(_gate_norm(gates)) for norm in hidden_norms(encoder)]
        projection = projection_of(encoder)
        if projection is not None:
            hooks.append(projection.register_forward_hook(lambda *call: call[-1] * gates.values.hidden))
    setattr(model, HOOKS, hooks)
    return gates


def refuse_hidden(encoder: Any) -> None:
    """ValueError for an encoder whose hidden dimensions cannot be pruned."""
    family = family_of(encoder.config)
    if family.kind(encoder.config).norm_first:
        raise ValueError(
            f"hidden dimensions of a {family.name} are not pruned: its LayerNorms come first, and none makes "
            "the hidden states; prune heads and ffn (parts)"
        )
    if relative_states(encoder) is not None and relative_norm(encoder) is None:
        raise ValueError(
            f"hidden dimensions of this {family.name} are not pruned: no LayerNorm makes its embeddings of "
            "distances; prune heads and ffn (parts)"
        )


def detach(model: nn.Module) -> None:
    """Undo `attach`, so that the model is as it was."""
    hooks = model.__dict__.pop(HOOKS, ())
    for hook in hooks:
        hook.remove()
    holder = holder_of(model) if hooks else model
    if _NAME in holder._modules:
        del holder._modules[_NAME]


def holder_of(model: nn.Module) -> nn.Module:
    """The module that takes what trains beside the model as its submodule: the model itself, or its encoder
    where the model calls each of its submodules (nn.Sequential, and so sentence-transformers' models)."""
    return find_encoder(model) if isinstance(model, nn.Sequential) else model


@contextmanager
def attached(model: nn.Module, seed: int = 0, parts: Sequence[str] = DEFAULT_PARTS) -> Iterator[Gates]:
    """`with attached(model) as gates:` the model is gated inside the block and as before after it."""
    gates = attach(model, seed, parts)
    try:
        yield gates
    finally:
        detach(model)


def gated_layer_norm(x: Tensor, gate: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """gate * LayerNorm(x), with statistics over the dimensions whose gate is not 0.

    x: (..., hidden). gate: (hidden,) or (..., hidden). Closed dimensions come out as 0.
    """
    x = x.float() if x.dtype in HALVES else x  # as torch's own under autocast
    is_open = (gate > 0).to(x.dtype)
    number = is_open.sum(-1, keepdim=True).clamp(min=1)
    mean = (x * is_open).sum(-1, keepdim=True) / number
    centred = (x - mean) * is_open
    variance = centred.square().sum(-1, keepdim=True) / number
    return (centred * torch.rsqrt(variance + eps) * weight + bias) * gate


PreHook = Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]


# A gate's values may also be (batch, 1, gates), with one value for each example, for per-example gradients.
def _gate_heads(gates: Gates, layer: int, head_dim: int) -> PreHook:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0] * gates.values.heads[layer].repeat_interleave(head_dim, -1),)

    return hook


def _gate_ffn(gates: Gates, layer: int) -> PreHook:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0] * gates.values.ffn[layer],)

    return hook


def _gate_norm(gates: Gates) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
    def hook(norm: Any, inputs: tuple[Any, ...], _: Tensor) -> Tensor:
        return gated_layer_norm(inputs[0], gates.values.hidden, norm.weight, norm.bias, norm.eps)

    return hook
