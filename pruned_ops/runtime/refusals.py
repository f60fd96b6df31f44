"""Which encoders `optimize` cannot compute as they are, and why: each module is held against the config's."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from pruned_ops import ops
from pruned_ops.layers.int8 import Int8Linear
from pruned_ops.layers.parts import PrunedLinear, refuse_activation
from pruned_ops.models.configuration import PrunedConfig
from pruned_ops.models.families.known import family_of
from pruned_ops.models.stock import (
    ENCODER_NAMES,
    is_encoder,
    layer_list,
    layers_of,
    refuse_subclass,
    words_of,
)

# The number of a layer and, after it, the name of a module in it.
_IN_A_LAYER = re.compile(r"(?:\w+\.)*layers?\.(\d+)(?:\.(.+))?")
DISTANCES_ON_GPU = (
    "its attention multiplies by embeddings of distances, which no kernel for a GPU does: keep it on the CPU"
)
_CAPTURING = "transformers.utils.output_capturing"
# Attributes of modules that change nothing in inference, or that are looked at elsewhere.
WITHOUT_EFFECT = frozenset(
    "dropout_prob gradient_checkpointing inplace layer_idx p scale_grad_by_freq sparse training".split()
)


def refuse_encoder(
    encoder: Any, int8: bool = False, bfloat16: bool = False, in_place: bool = False
) -> str | None:
    """Why the packed encoder cannot compute this one; None if it can. in_place: the encoder stays the object
    that it is, so that hooks of itself and of its pooler run."""
    config = encoder.config
    return (
        _refuse_config(config)
        or _refuse_changed_forward(encoder, in_place)
        or refuse_modules(encoder)
        or refuse_parameters(encoder)
        or _refuse_mixture(encoder)
        or _refuse_disentangled(encoder)
        or (_refuse_int8(encoder) if int8 else None)
        or (_refuse_bfloat16(encoder) if bfloat16 else None)
    )


def _refuse_int8(encoder: Any) -> str | None:
    return _refuse_panels(torch.int8) or _refuse_narrow(encoder, "int8")


def _refuse_bfloat16(encoder: Any) -> str | None:
    if any(isinstance(module, Int8Linear) for module in encoder.modules()):
        return "its weights are stored in int8: load the fp32 checkpoint that they were made from"
    return _refuse_panels(torch.bfloat16) or _refuse_narrow(encoder, "bfloat16")


def _refuse_panels(dtype: torch.dtype) -> str | None:
    """Why nothing here runs panels of this dtype; None if something does."""
    panels = torch.empty(0, 0, 0, dtype=dtype, device="cpu")
    reasons = [kernel.backend.missing or kernel.refuse(panels) for kernel in ops.encoder.kernels.values()]
    return "; ".join(reason for reason in reasons if reason) if all(reasons) else None


def _refuse_narrow(encoder: Any, dtype: str) -> str | None:
    activation = family_of(encoder.config).value(encoder.config, "hidden_act")
    if (encoder.dtype, encoder.device.type, activation) != (torch.float32, "cpu", "gelu"):
        return (
            f"{dtype} takes a float32 model on the CPU whose activation is gelu; this is {encoder.dtype} on "
            f"{encoder.device} with {activation}"
        )
    return None


def _refuse_mixture(encoder: Any) -> str | None:
    """Refuse query, key and value of which only some are stored in int8: they run as one linear."""
    for number, layer in enumerate(layers_of(encoder)):
        if len({isinstance(part, Int8Linear) for part in layer.qkv}) > 1:
            return f"of layer {number}'s query, key and value some are stored in int8 and some are not"
    return None


def _refuse_disentangled(encoder: Any) -> str | None:
    has_terms = family_of(encoder.config).kind(encoder.config).disentangled is not None
    return DISTANCES_ON_GPU if has_terms and encoder.device.type == "cuda" else None


def _refuse_config(config: Any) -> str | None:
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        return "it is a decoder, or has cross-attention"
    if getattr(config, "position_embedding_type", None) not in (None, "absolute"):
        kind = config.position_embedding_type
        return f"position_embedding_type is {kind!r}, only absolute positions are computed"
    family = family_of(config)
    return family.refuse(config) or refuse_activation(family.value(config, "hidden_act"))


def _refuse_changed_forward(encoder: nn.Module, in_place: bool) -> str | None:
    """Refuse replaced methods and hooks inside the encoder: they would not run any more."""
    for name, module in encoder.named_modules():
        hooks_run = in_place and name.partition(".")[0] in ("", "pooler")
        name = name or "encoder"
        method = next((method for method in module.__dict__ if is_method(type(module), method)), None)
        if method is not None:
            return f"the {method} of its {name} was replaced, and would not run"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if not hooks_run and not all(is_harmless(hook) for hook in hooks):
            return f"its {name} has forward hooks, which would not run (gates still attached?)"
        method = None if name.partition(".")[0] == "pooler" else _patched_method(type(module))
        if method is not None:
            return f"the {method} of {type(module).__name__}, the class of its {name}, was replaced"
    return None


def is_harmless(hook: Any) -> bool:
    """Whether this hook of transformers changes nothing in inference: it collects hidden states for its own
    forward, which does not run here, or asks for gradients (gradient checkpointing)."""
    asks_for_gradients = getattr(hook, "__name__", "") == "make_inputs_require_grads"
    return getattr(hook, "__module__", None) == _CAPTURING or asks_for_gradients


def is_method(kind: type[Any], name: str) -> bool:
    """Whether the class has a method of this name."""
    return inspect.isfunction(inspect.getattr_static(kind, name, None))


def _patched_method(kind: type[Any]) -> str | None:
    """The name of a method of this class, or of one that it comes from, that a function from elsewhere was
    set as. The classes that every model of transformers comes from are not looked at, and no `__init__`: it
    has run, and the library `kernels` sets one of its own where transformers names a function for it."""
    homes = {base.__module__ for base in kind.__mro__}
    for base in kind.__mro__:
        methods = {} if issubclass(PreTrainedModel, base) else vars(base)
        for name, method in methods.items():
            if name != "__init__" and inspect.isfunction(method) and method.__module__ not in homes:
                return name
    return None


def refuse_modules(encoder: Any, beside: Collection[str] = ()) -> str | None:
    """Refuse modules that are not those which the encoder's class makes for its config. beside: names of
    modules of the encoder that are not looked at."""
    family = family_of(encoder.config)
    pooler = {"add_pooling_layer": False} if family.has_pooler else {}
    config = copy.deepcopy(encoder.config)
    try:
        if isinstance(config, PrunedConfig):
            kind: Any = type(config)
            kind.from_dict(config.to_dict())  # whose fields were changed since it checked them
        with torch.device("meta"):
            described: Any = type(encoder)(config, **pooler)
    except Exception as error:
        return f"{type(encoder).__name__} cannot be made from its config ({error})"
    layers, configured = len(layer_list(encoder)), len(layer_list(described))
    if layers != configured:
        fields = f"config.{family.own_name('num_hidden_layers')} = {layers}"
        if isinstance(config, PrunedConfig):
            lists = ["layer_shapes", *(["head_indices"] if family.relative_bias is not None else [])]
            fields += f", and config.{' and config.'.join(lists)} to their entries of those that are left,"
        return (
            f"it has {layers} layers and its config says {configured}: set {fields} if layers were dropped "
            "on purpose"
        )
    known = dict(_computed(described))
    for name, module in _computed(encoder):
        if name.partition(".")[0] in beside:
            continue
        if name not in known:
            return f"{_place(name)} is a {type(module).__name__} that the config does not describe"
        refusal = _refuse_module(name, module, known.pop(name))
        if refusal is not None:
            return refusal
    if known:
        return f"{_place(next(iter(known)))} is missing"
    return None


def _computed(encoder: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the packed encoder stands for, shared ones each time; the pooler runs as it is."""
    for name, module in encoder.named_modules(remove_duplicate=False):
        if name and name.partition(".")[0] != "pooler":
            yield name, module


def _place(name: str) -> str:
    """A module's name in words: "encoder.layer.1.output.dense" -> "layer 1's output.dense"."""
    match = _IN_A_LAYER.fullmatch(name)
    if match is None:
        return f"its {name}"
    return f"layer {match[1]}'s {match[2]}" if match[2] else f"layer {match[1]}"


def _refuse_module(name: str, module: nn.Module, known: nn.Module) -> str | None:
    place, kind = _place(name), type(module)
    linears = (nn.Linear, PrunedLinear, Int8Linear)
    if kind is not type(known) and not (kind in linears and type(known) in linears):
        label = kind.__name__
        if label == type(known).__name__:
            label = f"{kind.__module__}.{label}"
        return f"{place} is a {label}, not the {type(known).__name__} of the config{_way_out(module)}"
    for attribute, value in vars(known).items():
        if attribute.startswith("_") or attribute in WITHOUT_EFFECT:
            continue
        if attribute == "padding_idx" and kind is nn.Embedding:
            continue  # it matters for gradients alone
        actual = getattr(module, attribute, None)
        if isinstance(value, (bool, int, float, str, type(None))) and actual != value:
            return f"{place} has {attribute} {actual!r}, and the config says {value!r}"
    for parameter, described in known._parameters.items():
        refusal = _refuse_parameter(module._parameters.get(parameter), described)
        if refusal is not None:
            return f"{place} {refusal}".replace("PARAMETER", parameter)
    return None


def _refuse_parameter(parameter: Tensor | None, described: Tensor | None) -> str | None:
    if described is None or parameter is None:
        return None if parameter is described else "has no PARAMETER, and the config describes one"
    if type(parameter) is not nn.Parameter:
        return f"has a PARAMETER that is a {type(parameter).__name__}; a plain one is needed"
    if parameter.shape != described.shape:
        return (
            f"has a PARAMETER of shape {tuple(parameter.shape)}, and the config describes "
            f"{tuple(described.shape)}"
        )
    return None


def _way_out(module: nn.Module) -> str:
    """What to do about a module of a known library."""
    library = type(module).__module__
    if is_parametrized(module):
        return ": torch.nn.utils.parametrize.remove_parametrizations makes it plain again"
    if library.startswith("peft."):
        return ": merge the adapter first, model = model.merge_and_unload()"
    if "quant" in library or library.startswith(("bitsandbytes.", "torchao.")):
        return ": it is quantised; load the model without it (optimize(model, dtype='int8') has its own)"
    return ": what it computes is not known here"


def refuse_parameters(encoder: Any) -> str | None:
    """Refuse parameters that are not all of one kind, in one place."""
    first = words_of(encoder).weight
    for name, module in _computed(encoder):
        for parameter_name, parameter in module._parameters.items():
            if parameter is None:
                continue
            place = f"{_place(name)}.{parameter_name}"
            if (
                isinstance(module, Int8Linear)
                and parameter_name == "weight"
                and parameter.dtype == torch.int8
            ):
                continue
            if parameter.is_meta:
                return f"{place} is on the meta device, without values: load the weights first"
            if parameter.dtype != first.dtype or parameter.device != first.device:
                return (
                    f"{place} is {parameter.dtype} on {parameter.device}, and its word embeddings are "
                    f"{first.dtype} on {first.device}"
                )
    if not first.is_floating_point():
        return f"its weights are {first.dtype}"
    return None


def refuse_model(model: Any) -> str | None:
    """Why `optimize` finds no encoder in this, and what to do; None where it is a module that has one."""
    if not isinstance(model, nn.Module):
        return _refuse_other(model)
    modules = list(model.modules())
    if any(map(is_encoder, modules)):
        return None
    name, known = type(model).__name__, ", ".join(ENCODER_NAMES)
    return refuse_subclass(model) or (
        f"no encoder that is known here found in {name}; optimize takes models that contain one of {known}"
    )


def _refuse_other(model: Any) -> str:
    if isinstance(model, str):
        return (
            f"optimize takes a model, and {model!r} is a string: load it first, for example "
            f"AutoModelForQuestionAnswering.from_pretrained({model!r})"
        )
    inner = getattr(model, "model", None)
    if isinstance(inner, nn.Module):
        return (
            f"optimize takes a model, and this is a {type(model).__name__} around one: call "
            "optimize on its .model, which is changed in place"
        )
    kind = model.__name__ if isinstance(model, type) else type(model).__name__
    if isinstance(model, type):
        return f"optimize takes a model, and this is the class {kind}: make or load a model of it first"
    return f"optimize takes a model, a torch.nn.Module, and this is a {kind}"
