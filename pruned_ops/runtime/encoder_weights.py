"""The weights of an encoder, laid out for the kernels; and which of the encoder's own these are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.layers.int8 import SCALE, Int8Linear
from pruned_ops.layers.modules import PrunedEncoder
from pruned_ops.layers.released import Rows
from pruned_ops.models.disentangled import relative_states
from pruned_ops.models.families.known import family_of
from pruned_ops.models.relative_bias import bias_by_distance, heads_of_layers
from pruned_ops.models.stock import LayerParts, encoder_shape, layers_of
from pruned_ops.runtime.refusals import DISTANCES_ON_GPU


def laid_out(
    original: Any, int8: Sequence[str] | None, bfloat16: bool = False, keep_fp32: bool = True
) -> PrunedEncoder:
    """The layers of an encoder, with its weights in the layout of their device. The encoder keeps its own.

    int8: the names of the linears that run in int8; None for all of them. bfloat16, keep_fp32: see
    `PrunedEncoder.pack`."""
    with torch.device("meta"):
        family, config = family_of(original.config), original.config
        eps, activation = (family.value(config, name) for name in ("layer_norm_eps", "hidden_act"))
        stack = PrunedEncoder(encoder_shape(original), eps, activation, family.kind(config))
    seen: dict[tuple[int, ...], nn.Parameter] = {}
    modules = [pair for packed, stock in _layers(stack, original) for pair in _sources(packed, stock)]
    if stack.final_norm is not None:
        modules.append((stack.final_norm, [original.get_submodule(family.final_norm)]))
    for module, sources in modules:
        for name in _parameter_names(sources):
            parameters = [source.get_parameter(name) for source in sources]
            key = tuple(map(id, parameters))
            if key not in seen:  # layers may share weights
                rows = [parameter.detach() for parameter in parameters]
                values = torch.cat(rows) if len(rows) > 1 else rows[0]
                seen[key] = nn.Parameter(values, requires_grad=False)
            setattr(module, name, seen[key])
    _set_biases(stack, original)
    _set_relative(stack, original)
    for layer in stack.layers:
        layer.attention.place_rotary()
    stack.pack(False, stack.linear_names if int8 is None else int8, bfloat16, keep_fp32)
    return stack.eval()


def _layers(stack: PrunedEncoder, original: Any) -> Iterator[tuple[Any, LayerParts]]:
    """Each packed layer, and the parts of the encoder's own."""
    yield from zip(stack.layers, layers_of(original), strict=True)


def _set_biases(stack: PrunedEncoder, original: Any) -> None:
    """Give the attention of every layer its heads' biases by position, where the encoder has such biases."""
    by_distance = bias_by_distance(original)
    if by_distance is None:
        return
    for layer, heads in zip(stack.layers, heads_of_layers(original.config), strict=True):
        rows = by_distance.detach()[heads].contiguous()
        layer.attention.position_bias = nn.Parameter(rows, requires_grad=False)


def _set_relative(stack: PrunedEncoder, original: Any) -> None:
    """Give a stack the states of distances of which `PrunedEncoder.pack` makes keys and queries, where the
    encoder has such embeddings. Errors: ValueError on a GPU."""
    with torch.no_grad():
        relative = relative_states(original)
    if relative is None:
        return
    if relative.device.type == "cuda":
        raise ValueError(DISTANCES_ON_GPU)
    stack.relative = nn.Parameter(relative.detach(), requires_grad=False)


def _sources(packed: Any, stock: LayerParts) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Each linear and LayerNorm of a packed layer, and the stock modules whose rows are its rows."""
    yield packed.attention.qkv, [*stock.qkv]
    yield packed.attention.output, [stock.attention_output]
    if packed.attention.norm is not None:
        yield packed.attention.norm, [stock.attention_norm]
    yield packed.ffn.up, [stock.up]
    yield packed.ffn.down, [stock.down]
    yield packed.ffn.norm, [stock.ffn_norm]


def _parameter_names(sources: Sequence[nn.Module]) -> tuple[str, ...]:
    names = ("weight", "bias", SCALE) if isinstance(sources[0], Int8Linear) else ("weight", "bias")
    return tuple(name for name in names if getattr(sources[0], name) is not None)


def is_stored_in_int8(encoder: nn.Module) -> bool:
    """Whether some of an encoder's own weights are int8, as a checkpoint of them is loaded."""
    return any(isinstance(module, Int8Linear) for module in encoder.modules())


def int8_sources(encoder: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """What an optimised encoder runs in int8: the name of each linear of its own, with the int8 weight
    (out, in) and the scales (out,) that the kernels read."""
    names = {module: name for name, module in encoder.named_modules()}
    stack = encoder.packed.encoder
    for i, (packed, stock) in enumerate(zip(stack.layers, layers_of(encoder), strict=True)):
        sources = dict(_sources(packed, stock))
        for part in (2 * i, 2 * i + 1):
            for linear, module in enumerate(stack.parts[part].linears):
                scales = stack.laid_out.scales_of(part, linear) if stack.runs_in_one_call else None
                if scales is None:
                    continue
                sizes = [source.out_features for source in sources[module]]
                weights = stack.laid_out.weight_of(part, linear).split(sizes)
                for source, *tensors in zip(sources[module], weights, scales.split(sizes), strict=True):
                    weight, scale = (tensor.clone() for tensor in tensors)
                    yield names[source], weight, scale


def taken_weights(original: Any, stack: PrunedEncoder) -> Iterator[tuple[nn.Parameter, Rows]]:
    """The encoder's own parameters that the kernels do not read, and where the stack has their values."""
    for i, (packed, stock) in enumerate(zip(stack.layers, layers_of(original), strict=True)):
        sources = dict(_sources(packed, stock))
        linears = [(part, linear) for part in (0, 1) for linear in (0, 1)]
        for part, linear in linears:
            module = stack.parts[2 * i + part].linears[linear]
            for name in _parameter_names(sources[module]):
                first = 0
                for source in sources[module]:
                    parameter, held = source.get_parameter(name), module.get_parameter(name)
                    last = first + parameter.size(0)
                    address = parameter.data_ptr()
                    if type(parameter) is nn.Parameter and not (
                        address == held.data_ptr() == stack.read(2 * i + part, linear, name).data_ptr()
                    ):
                        yield parameter, Rows(stack, 2 * i + part, linear, name, first, last)
                    first = last
