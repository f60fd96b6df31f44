"""`save_pretrained` of a model that runs in int8: it writes the int8 weights and their scales.

`state_dict` stays what it is on any model, its own weights. `restore` gives the model its own
`save_pretrained` back.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from pruned_ops.layers.int8 import SCALE
from pruned_ops.models.int8_checkpoints import Int8Config, halved
from pruned_ops.runtime.encoder_weights import int8_sources
from pruned_ops.runtime.packed_encoder import CHANGING, OptimisedEncoder

_SAVE = "save_pretrained"


def hook_saving(model: nn.Module) -> None:
    """Let every model of transformers in `model` that runs in int8 save what it runs. A model that was loaded
    from int8 weights saves them by itself."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _SAVE not in vars(module):
            packed = [encoder.packed for encoder in _encoders(module).values()]
            if any(encoder.int8 for encoder in packed) and not any(encoder.stored_int8 for encoder in packed):
                module.__dict__[_SAVE] = partial(_save_int8, module)


def unhook_saving(model: nn.Module) -> None:
    """Undo `hook_saving`."""
    for module in model.modules():
        saving = vars(module).get(_SAVE)
        if isinstance(saving, partial) and saving.func is _save_int8:
            del module.__dict__[_SAVE]


def _encoders(model: nn.Module) -> dict[str, Any]:
    """The optimised encoders in a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OptimisedEncoder)}


def _save_int8(model: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
    """The model's own `save_pretrained`, with int8 weights. Where the caller gives the `state_dict` to be
    saved, that is saved as it is."""
    own_save = getattr(type(model), _SAVE)
    # transformers' second argument after the folder is the state_dict.
    by_position = args[1] if len(args) > 1 else None
    if by_position is not None or kwargs.get("state_dict") is not None:
        return own_save(model, save_directory, *args, **kwargs)
    with CHANGING:
        state, linears = int8_state(model)
        model.config.quantization_config = Int8Config(linears).to_dict()
        if len(args) > 1:
            args = (args[0], state, *args[2:])
        else:
            kwargs["state_dict"] = state
        try:
            return own_save(model, save_directory, *args, **kwargs)
        finally:
            del model.config.quantization_config


def int8_state(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The state of a model whose one encoder runs in int8, with the int8 weights and scales in the place of
    their fp32 weights, and the names of these linears from the encoder on.

    Errors: ValueError for a model with several encoders, whose config could not say which is meant."""
    encoders = _encoders(model)
    if len(encoders) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(encoders)} optimised encoders, and int8 weights are saved of a "
            "model with one: save the inner models, or call pruned_ops.restore(model) first"
        )
    ((prefix, encoder),) = encoders.items()
    state: dict[str, Tensor] = dict(model.state_dict())
    linears = []
    for name, weight, scale in int8_sources(encoder):
        place = f"{prefix}.{name}".removeprefix(".")
        state[f"{place}.weight"], state[f"{place}.{SCALE}"] = weight, scale
        linears.append(name)
    return halved(state), linears
