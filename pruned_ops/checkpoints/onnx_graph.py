"""The graph for other runtimes: an encoder, under a known head or none, in ONNX's plain operators.

It is written operator by operator, because runtimes fuse a traced graph worse: reshapes that read sizes from
shapes hide from ONNX Runtime which sizes are equal, the mask becomes a maze of Where and Expand that no
attention fusion matches, and layers with 0 heads become products of width 0, which OpenVINO computes wrongly.
Here the mask is one subtraction, every layer's own head count is a constant, and nothing is left of the parts
that were pruned away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from onnx import TensorProto, helper
from torch import nn

from pruned_ops.checkpoints.onnx_nodes import Nodes
from pruned_ops.checkpoints.onnx_positions import (
    Relative,
    Rotation,
    added_to_scores,
    places,
    relative_products,
    rotations,
)
from pruned_ops.layers.kinds import StackKind
from pruned_ops.models.encoder import PrunedPreTrainedModel
from pruned_ops.models.families.known import family_of
from pruned_ops.models.stock import layers_of, model_shape, projection_of
from pruned_ops.runtime.known_heads import packed_head, reads_place_0
from pruned_ops.runtime.packed_heads import SpanAndTypeHead, SpanHead, TextHead
from pruned_ops.shape import LayerShape
from pruned_ops.version import __version__

# The fusions of ONNX Runtime and OpenVINO know the operators of set 17 best, the first with
# LayerNormalization. IR 8 is as old, so that runtimes of that time read the file.
OPSET, IR = 17, 8


def plain_graph(model: Any, token_types: bool) -> Any:
    """The model (an encoder, stock or pruned, under a head that `known_heads.packed_head` finds or without
    one, in fp32) as an ONNX ModelProto.

    Inputs, int64 (batch, seqlen): input_ids; attention_mask, of ones and zeros, padded on any side; with
    token_types also token_type_ids, which are all 0 otherwise. Outputs are named as the model's own. For
    answers: start_logits and end_logits (batch, seqlen), and answer_type_logits (batch, types) of a Natural
    Questions model. For labels: logits (batch, labels) of texts or (batch, seqlen, labels) of tokens. Without
    a head: last_hidden_state (batch, seqlen, hidden_size), and pooler_output (batch, width) with a pooler.
    """
    nodes = Nodes()
    inputs = [
        _value(name, "batch", "seqlen", kind=TensorProto.INT64)
        for name in ("input_ids", "attention_mask", *(["token_type_ids"] if token_types else []))
    ]
    outputs = _outputs(nodes, _encode(nodes, model.base_model, token_types), model)
    weights = list(nodes.constants.values())
    return helper.make_model(
        helper.make_graph(nodes.nodes, type(model).__name__, inputs, outputs, weights),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR,
        producer_name="pruned_ops",
        producer_version=__version__,
    )


def _outputs(nodes: Nodes, x: str, model: Any) -> list[Any]:
    """The outputs of a model's head, of the last hidden state x."""
    head, real = packed_head(model), TensorProto.FLOAT
    if head is None:
        return _bare_outputs(nodes, x, model)
    names = {module: name for name, module in model.named_modules()}
    linears = [(names[linear], linear) for linear in head.linears]
    width = linears[-1][1].out_features
    if isinstance(head, TextHead):
        pooled = _pooled(nodes, x, model)
        if family_of(model.config).prediction_head is None:
            inner = nodes.activation(head.names.activation, nodes.linear(pooled, *linears[0]))
        else:
            inner = _predicted(nodes, pooled, model)
        nodes.linear(inner, *linears[1], called="logits")
        return [_value("logits", "batch", width, kind=real)]
    if not isinstance(head, SpanHead):
        nodes.linear(_predicted(nodes, x, model), *linears[0], called="logits")
        return [_value("logits", "batch", "seqlen", width, kind=real)]
    both, spans = nodes.linear(_predicted(nodes, x, model), *linears[0]), ("start_logits", "end_logits")
    for index, name in enumerate(spans):
        nodes.add("Gather", both, nodes.constant(index), called=name, axis=2)
    outputs = [_value(name, "batch", "seqlen", kind=real) for name in spans]
    if isinstance(head, SpanAndTypeHead):
        nodes.linear(_first(nodes, x), *linears[1], called="answer_type_logits")
        outputs.append(_value("answer_type_logits", "batch", width, kind=real))
    return outputs


def _predicted(nodes: Nodes, x: str, model: Any) -> str:
    """What the last linear of a head takes of hidden states: what `Family.predicted` computes."""
    names = family_of(model.config).prediction_head
    if names is None:
        return x
    head = model.get_submodule(names.module)
    inner = nodes.linear(x, f"{names.module}.dense", head.dense)
    inner = nodes.activation(model.config.classifier_activation, inner)
    return nodes.norm(inner, f"{names.module}.norm", head.norm)


def _pooled(nodes: Nodes, x: str, model: Any) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): what a text's label is read from."""
    if family_of(model.config).pools_mean(model.config):
        return _mean(nodes, x)
    # The stock classifiers read place 0, ours the first real token.
    return _place_0(nodes, x) if reads_place_0(model) else _first(nodes, x)


def _bare_outputs(nodes: Nodes, x: str, encoder: Any) -> list[Any]:
    """The outputs of an encoder without a head."""
    hidden, real = encoder.config.hidden_size, TensorProto.FLOAT
    nodes.add("Identity", x, called="last_hidden_state")
    outputs = [_value("last_hidden_state", "batch", "seqlen", hidden, kind=real)]
    if getattr(encoder, "pooler", None) is not None:
        dense, is_ours = encoder.pooler.dense, isinstance(encoder, PrunedPreTrainedModel)
        first = _first(nodes, x) if is_ours else _place_0(nodes, x)  # as `apply_pooler` has it, or the stock
        nodes.add("Tanh", nodes.linear(first, "pooler.dense", dense), called="pooler_output")
        outputs.append(_value("pooler_output", "batch", dense.out_features, kind=real))
    return outputs


def _value(name: str, *sizes: str | int, kind: int) -> Any:
    return helper.make_tensor_value_info(name, kind, sizes)


def _encode(nodes: Nodes, encoder: Any, typed: bool) -> str:
    """The last hidden state, (batch, seqlen, hidden_size)."""
    x, shape, config = _embed(nodes, encoder, typed), model_shape(encoder), encoder.config
    family, layers = family_of(config), layers_of(encoder)
    kind, activation = family.kind(config), family.value(config, "hidden_act")
    names = {module: name for name, module in encoder.named_modules()}
    added = added_to_scores(nodes, encoder)
    relative = relative_products(nodes, encoder, shape.head_dim)
    rotated = rotations(nodes, kind, len(layers), shape.head_dim)
    for number, (parts, sizes) in enumerate(zip(layers, shape.layers, strict=True)):
        named = {part: (names[module], module) for part, module in vars(parts).items()}
        products = None if relative is None else relative[number]
        positions = added[number], products, rotated[number]
        x = _layer(nodes, x, _Layer(named, sizes, shape.head_dim, kind, activation, *positions))
    if family.final_norm is None:
        return x
    return nodes.norm(x, family.final_norm, encoder.get_submodule(family.final_norm))


def _embed(nodes: Nodes, encoder: Any, typed: bool) -> str:
    """The normalised sum of the embeddings, and what a projection makes of it: (batch, seqlen, hidden)."""
    tables, config, family = encoder.embeddings, encoder.config, family_of(encoder.config)

    def table(name: str) -> str:
        return nodes.weight(f"embeddings.{name}", tables.get_submodule(name).weight)

    names = family.embeddings
    x = nodes.add("Gather", table(names.words), "input_ids")
    if family.has_token_types(config):
        kind = nodes.add("Gather", table(names.token_types), "token_type_ids" if typed else nodes.constant(0))
        x = nodes.add("Add", x, kind)
    if names.positions is not None and family.has_positions(config):
        positions = nodes.add("Gather", table(names.positions), _position_ids(nodes, config))
        x = nodes.add("Add", x, positions)
    x = nodes.norm(x, f"embeddings.{names.norm}", tables.get_submodule(names.norm))
    projection = projection_of(encoder)
    return x if projection is None else nodes.linear(x, str(family.projection), projection)


def _position_ids(nodes: Nodes, config: Any) -> str:
    """The positions of all ids, (batch, seqlen)."""
    family = family_of(config)
    if not family.positions_from_padding:
        return places(nodes)
    # The real tokens are counted, from the place after that of padding.
    padding = nodes.constant(family.first_position(config) - 1)
    real = nodes.whole(nodes.add("Not", nodes.add("Equal", "input_ids", padding)))
    counted = nodes.add("CumSum", real, nodes.constant(1))
    return nodes.add("Add", nodes.add("Mul", counted, real), padding)


@dataclass(frozen=True)
class _Layer:
    """One layer: the name and the module of each part by its role, its sizes, and the values that its
    attention takes: what is added to its scores, its products by distance, and its rotation."""

    parts: dict[str, tuple[str, Any]]
    sizes: LayerShape
    head_dim: int
    kind: StackKind
    activation: str
    added: str
    relative: Relative | None
    rotation: Rotation | None


def _layer(nodes: Nodes, x: str, layer: _Layer) -> str:
    """A layer's attention and FFN, added to what they took, with their LayerNorms before or after."""
    x = _joined(nodes, x, layer, "attention")
    return _joined(nodes, x, layer, "ffn")


def _joined(nodes: Nodes, x: str, layer: _Layer, which: str) -> str:
    """x and what the attention or the FFN of a layer makes of it, normalised before or after. Without heads
    or units that is the bias of its output, if it has one."""
    is_attention = which == "attention"
    output, norm = layer.parts["attention_output" if is_attention else "down"], layer.parts[f"{which}_norm"]
    size, part = (layer.sizes.num_heads, _attention) if is_attention else (layer.sizes.ffn_width, _ffn)
    normed = x
    if size and layer.kind.norm_first and not isinstance(norm[1], nn.Identity):
        normed = nodes.norm(x, *norm)
    if size:
        x = nodes.add("Add", nodes.linear(part(nodes, normed, layer), *output), x)
    elif output[1].bias is not None:
        x = nodes.add("Add", nodes.weight(f"{output[0]}.bias", output[1].bias), x)
    return x if layer.kind.norm_first else nodes.norm(x, *norm)


def _attention(nodes: Nodes, x: str, layer: _Layer) -> str:
    """The context of a layer's heads, (batch, seqlen, num_heads * head_dim)."""
    num_heads, head_dim, rotation = layer.sizes.num_heads, layer.head_dim, layer.rotation
    # In a Reshape, 0 keeps the input's size.
    split = nodes.vector(0, 0, num_heads, head_dim)

    def heads(part: str, order: list[int]) -> str:
        projected = nodes.add("Reshape", _projected(nodes, x, layer, part), split)
        if rotation is not None and part != "value":
            projected = rotation.turned(nodes, projected)
        return nodes.add("Transpose", projected, perm=order)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores, products = nodes.add("MatMul", query, key), 1
    for product in [] if layer.relative is None else layer.relative.products(nodes, query, key, num_heads):
        scores, products = nodes.add("Add", scores, product), products + 1
    scores = nodes.add("Div", scores, nodes.constant(math.sqrt(head_dim * products)))
    weights = nodes.add("Softmax", nodes.add("Add", scores, layer.added), axis=-1)
    context = nodes.add("Transpose", nodes.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    return nodes.add("Reshape", context, nodes.vector(0, 0, num_heads * head_dim))


def _projected(nodes: Nodes, x: str, layer: _Layer, part: str) -> str:
    """The query, key or value of all heads."""
    name, linear = layer.parts[part]
    roles = [role for role in ("query", "key", "value") if layer.parts[role][1] is linear]
    return nodes.linear(x, name, linear) if len(roles) == 1 else _one_of(nodes, x, name, linear, roles, part)


def _one_of(nodes: Nodes, x: str, name: str, linear: Any, roles: list[str], role: str) -> str:
    """One of the products that a linear makes at once, whose rows lie one after the other."""
    number, at = len(roles), roles.index(role)
    bias = None if linear.bias is None else linear.bias.chunk(number)[at]
    return nodes.product(x, f"{name}.{role}", linear.weight.chunk(number)[at], bias)


def _ffn(nodes: Nodes, x: str, layer: _Layer) -> str:
    """The activations of a layer's FFN, (batch, seqlen, ffn_width)."""
    name, linear = layer.parts["up"]
    if not layer.kind.gated:
        return nodes.activation(layer.activation, nodes.linear(x, name, linear))
    roles = ["gate", "up"]
    gate, up = (_one_of(nodes, x, name, linear, roles, role) for role in roles)
    return nodes.add("Mul", nodes.activation(layer.activation, gate), up)


def _first(nodes: Nodes, x: str) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first real token; zeros where it has none.

    This is a product with a row of zeros and a one, because runtimes differ in how they index, not in how
    they multiply."""
    first = nodes.add("Equal", nodes.add("CumSum", "attention_mask", nodes.constant(1)), nodes.constant(1))
    first = nodes.add("Mul", nodes.whole(first), "attention_mask")
    row = nodes.add("Unsqueeze", nodes.real(first), nodes.vector(1))
    return nodes.add("Squeeze", nodes.add("MatMul", row, x), nodes.vector(1))


def _mean(nodes: Nodes, x: str) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): the mean over each row's real tokens; zeros where it has
    none."""
    real = nodes.real("attention_mask")
    sums = nodes.add("MatMul", nodes.add("Unsqueeze", real, nodes.vector(1)), x)
    number = nodes.add("ReduceSum", real, nodes.vector(1), keepdims=1)
    number = nodes.add("Max", number, nodes.constant(1.0))
    return nodes.add("Div", nodes.add("Squeeze", sums, nodes.vector(1)), number)


def _place_0(nodes: Nodes, x: str) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first place, padding or not."""
    return nodes.add("Gather", x, nodes.constant(0), axis=1)
