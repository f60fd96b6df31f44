"""The hidden states of the encoder inside a model, whatever the model around it returns."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pruned_ops.models.stock import config_of, running_encoder


class States(NamedTuple):
    """One call of an encoder: its hidden states (batch, seqlen, hidden), the embeddings' first, and the mask
    (batch, seqlen) that it was given."""

    hidden: tuple[Tensor, ...]
    mask: Tensor


@contextmanager
def capturing(model: nn.Module, wanted: bool = True) -> Iterator[list[States]]:
    """Collect the hidden states of each call of the model's encoder inside the block, in a list that may be
    cleared. The list stays empty where they are not wanted."""
    encoder, calls = running_encoder(model), list[States]()
    if not wanted:
        yield calls
        return
    before = encoder.__dict__.get("forward")
    forward = encoder.forward

    # Not a hook, which would not run where a caller uses the encoder's `forward` itself.
    @functools.wraps(forward)
    def asking(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **{**kwargs, "output_hidden_states": True})
        hidden = getattr(output, "hidden_states", None)
        if hidden is None:  # a tuple, where the caller wanted one
            hidden = next(part for part in output if isinstance(part, tuple))
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is None:
            mask = torch.ones(hidden[0].shape[:2], dtype=torch.long, device=hidden[0].device)
        calls.append(States(tuple(hidden), mask))
        return output

    encoder.forward = asking
    try:
        yield calls
    finally:
        del encoder.forward
        if before is not None:
            encoder.forward = before


class Call(NamedTuple):
    """One call of a model: its inputs by name, its outputs, and its encoder's states (where they are
    collected). as_one: whether the inputs were one argument, a dictionary."""

    inputs: dict[str, Any]
    outputs: Any
    states: list[States]
    as_one: bool


@contextmanager
def recording(model: nn.Module, with_states: bool) -> Iterator[list[Call]]:
    """Collect inside the block every call of the model in which gradients are recorded."""
    calls, forward = list[Call](), model.forward
    before = model.__dict__.get("forward")
    with capturing(model, with_states) as states:

        @functools.wraps(forward)
        def recorded(*args: Any, **kwargs: Any) -> Any:
            as_one = bool(args) and isinstance(args[0], Mapping)
            # A copy, because sentence-transformers' models write their outputs into their inputs.
            inputs = dict(args[0]) if as_one else _named(forward, args, kwargs)
            states.clear()
            outputs = forward(*args, **kwargs)
            if torch.is_grad_enabled():
                calls.append(Call(inputs, outputs, list(states), as_one))
            return outputs

        model.forward = recorded
        try:
            yield calls
        finally:
            del model.forward
            if before is not None:
                model.forward = before


def _named(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a call by their arguments' names."""
    names = list(inspect.signature(forward).parameters)
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    return {name: value for name, value in arguments.items() if isinstance(value, Tensor) and value.dim()}


def run_model(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    with_states: bool,
    inner: nn.Module | None = None,
    as_one: bool = False,
) -> tuple[Any, list[States]]:
    """The model's outputs for these inputs, with its encoder's hidden states where they are wanted.

    inner: the model itself where `model` wraps it to train on several processes. as_one: whether the model
    takes its inputs as one dictionary. Models of transformers and of pruned_ops are asked for their states;
    in others they are collected at the encoder.
    """
    unwrapped = model if inner is None else inner
    if as_one:
        with capturing(unwrapped, with_states) as states:
            return model(dict(inputs)), states
    if not with_states:
        return model(**inputs), []
    if is_of_a_library(unwrapped):
        outputs = model(**inputs, output_hidden_states=True)
        return outputs, [States(outputs.hidden_states, inputs["attention_mask"])]
    with capturing(unwrapped) as states:
        return model(**inputs), states


def sizes_of(model: nn.Module) -> Any:
    """The config that has the sizes of the encoder in a model: the encoder's, whatever the model itself calls
    its config; the model's where no encoder in it is known."""
    try:
        return running_encoder(model).config
    except ValueError:
        return config_of(model)


def is_of_a_library(model: nn.Module) -> bool:
    """Whether the model's class is one of transformers or of pruned_ops, and no subclass of the caller's."""
    return type(model).__module__.partition(".")[0] in ("transformers", "pruned_ops")
