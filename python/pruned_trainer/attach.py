"""Attach gates to a stock or pruned Hugging Face model with hooks, and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from pruned_ops.packed_encoder import ENCODERS, model_shape
from pruned_trainer.gates import Gates

_NAME = "pruning_gates"
_HOOKS = "_pruning_gate_hooks"


def find_encoder(model: nn.Module) -> Any:
    """The one BERT or RoBERTa encoder inside `model`; ValueError where there is none, or more than one."""
    found = [module for module in model.modules() if type(module) in ENCODERS]
    if len(found) != 1:
        known = ", ".join(encoder.__name__ for encoder in ENCODERS)
        raise ValueError(
            f"{type(model).__name__} contains {len(found)} encoders of {known}; exactly one is needed"
        )
    return found[0]


def attach(model: nn.Module, seed: int = 0) -> Gates:
    """Put a gate on every head's context and every FFN activation of `model`; the gates become its submodule.

    The gates multiply the input of each attention output projection (a head's head_dim columns alike) and of
    each FFN output projection. They follow the model's train/eval mode. Errors: ValueError if gates are
    attached already.
    """
    if hasattr(model, _HOOKS):
        raise ValueError("gates are attached to this model already; detach(model) first")
    encoder = find_encoder(model)
    shape = model_shape(encoder)
    gates = Gates(shape, seed).to(next(model.parameters()).device).train(model.training)
    model.add_module(_NAME, gates)
    # No draw in the trainer or in the caller: a forward of the encoder is what needs new values.
    hooks = [encoder.register_forward_pre_hook(lambda *_: gates.draw())]
    for i, layer in enumerate(encoder.encoder.layer):
        parts = dict(layer.named_modules())
        hooks.append(
            parts["attention.output.dense"].register_forward_pre_hook(_gate_heads(gates, i, shape.head_dim))
        )
        hooks.append(parts["output.dense"].register_forward_pre_hook(_gate_ffn(gates, i)))
    setattr(model, _HOOKS, hooks)
    return gates


def detach(model: nn.Module) -> None:
    """Undo `attach`: the model is as it was."""
    for hook in model.__dict__.pop(_HOOKS, ()):
        hook.remove()
    if _NAME in model._modules:
        del model._modules[_NAME]


@contextmanager
def attached(model: nn.Module, seed: int = 0) -> Iterator[Gates]:
    """`with attached(model) as gates:` the model is gated inside the block and as before after it."""
    gates = attach(model, seed)
    try:
        yield gates
    finally:
        detach(model)


Hook = Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]


def _gate_heads(gates: Gates, layer: int, head_dim: int) -> Hook:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0] * gates.head_values[layer].repeat_interleave(head_dim),)

    return hook


def _gate_ffn(gates: Gates, layer: int) -> Hook:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        return (inputs[0] * gates.ffn_values[layer],)

    return hook
