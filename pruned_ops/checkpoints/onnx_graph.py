"""The graph for other runtimes: an encoder, under a known head or none, in ONNX's plain operators.

It is written operator by operator, because runtimes fuse a traced graph worse: reshapes that read sizes from
shapes hide from ONNX Runtime which sizes are equal, the mask becomes a maze of Where and Expand that no
attention fusion matches, and layers with 0 heads become products of width 0, which OpenVINO computes wrongly.
Here the mask is one subtraction, every layer's own head count is a constant, and nothing is left of the parts
that were pruned away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pruned_ops.models.disentangled import by_distance, relative_states
from pruned_ops.models.families.known import family_of
from pruned_ops.models.relative_bias import bias_by_distance, heads_of_layers
from pruned_ops.models.stock import layers_of, model_shape, projection_of
from pruned_ops.runtime.packed_heads import SpanAndTypeHead, SpanHead, TextHead, packed_head, reads_place_0
from pruned_ops.version import __version__

# The fusions of ONNX Runtime and OpenVINO know the operators of set 17 best, the first with
# LayerNormalization. IR 8 is as old, so that runtimes of that time read the file.
OPSET, IR = 17, 8


class _Nodes:
    """The nodes and constants of a graph in the making. Every value has a name, which methods take and
    return."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, called: str | None = None, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        name = called or f"{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=name, **attributes))
        return name

    def _keep(self, name: str, array: Any) -> str:
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def constant(self, value: float) -> str:
        """Add one number, as int64 or fp32."""
        dtype = np.int64 if isinstance(value, int) else np.float32
        return self._keep(f"constant_{value}", np.array(value, dtype))

    def vector(self, *values: int) -> str:
        """Add axes or sizes, as int64."""
        return self._keep(f"vector_{'_'.join(map(str, values))}", np.array(values, np.int64))

    def weight(self, name: str, tensor: Tensor) -> str:
        """Add a tensor, under its own name."""
        return self._keep(name, np.ascontiguousarray(tensor.detach().cpu().numpy()))

    def linear(self, x: str, name: str, module: Any, called: str | None = None) -> str:
        """Add a Linear with its weights."""
        product = self.add("MatMul", x, self.weight(f"{name}.weight", module.weight.T))
        return self.add("Add", product, self.weight(f"{name}.bias", module.bias), called=called)

    def norm(self, x: str, name: str, module: Any) -> str:
        """Add a LayerNorm with its weights."""
        weights = (self.weight(f"{name}.{part}", getattr(module, part)) for part in ("weight", "bias"))
        return self.add("LayerNormalization", x, *weights, axis=-1, epsilon=module.eps)


def plain_graph(model: Any, token_types: bool) -> Any:
    """The model (an encoder, stock or pruned, under a head that `packed_heads.packed_head` finds or without
    one, in fp32) as an ONNX ModelProto.

    Inputs, int64 (batch, seqlen): input_ids; attention_mask, of ones and zeros, padded on any side; with
    token_types also token_type_ids, which are all 0 otherwise. Outputs are named as the model's own. For
    answers: start_logits and end_logits (batch, seqlen), and answer_type_logits (batch, types) of a Natural
    Questions model. For labels: logits (batch, labels) of texts or (batch, seqlen, labels) of tokens. Without
    a head: last_hidden_state (batch, seqlen, hidden_size), and pooler_output (batch, width) with a pooler.
    """
    nodes = _Nodes()
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


def _outputs(nodes: _Nodes, x: str, model: Any) -> list[Any]:
    """The outputs of a model's head, of the last hidden state x."""
    head, real = packed_head(model), TensorProto.FLOAT
    if head is None:
        return _bare_outputs(nodes, x, model)
    names = {module: name for name, module in model.named_modules()}
    linears = [(names[linear], linear) for linear in head.linears]
    width = linears[-1][1].out_features
    if isinstance(head, TextHead):
        # The stock classifiers read place 0, ours the first real token.
        first = _place_0(nodes, x) if reads_place_0(model) else _first(nodes, x)
        inner = _ACTIVATIONS[head.names.activation](nodes, nodes.linear(first, *linears[0]))
        nodes.linear(inner, *linears[1], called="logits")
        return [_value("logits", "batch", width, kind=real)]
    if not isinstance(head, SpanHead):
        nodes.linear(x, *linears[0], called="logits")
        return [_value("logits", "batch", "seqlen", width, kind=real)]
    both, spans = nodes.linear(x, *linears[0]), ("start_logits", "end_logits")
    for index, name in enumerate(spans):
        nodes.add("Gather", both, nodes.constant(index), called=name, axis=2)
    outputs = [_value(name, "batch", "seqlen", kind=real) for name in spans]
    if isinstance(head, SpanAndTypeHead):
        nodes.linear(_first(nodes, x), *linears[1], called="answer_type_logits")
        outputs.append(_value("answer_type_logits", "batch", width, kind=real))
    return outputs


def _bare_outputs(nodes: _Nodes, x: str, encoder: Any) -> list[Any]:
    """The outputs of an encoder without a head."""
    hidden, real = encoder.config.hidden_size, TensorProto.FLOAT
    nodes.add("Identity", x, called="last_hidden_state")
    outputs = [_value("last_hidden_state", "batch", "seqlen", hidden, kind=real)]
    if getattr(encoder, "pooler", None) is not None:
        dense = encoder.pooler.dense
        nodes.add("Tanh", nodes.linear(_place_0(nodes, x), "pooler.dense", dense), called="pooler_output")
        outputs.append(_value("pooler_output", "batch", dense.out_features, kind=real))
    return outputs


def _value(name: str, *sizes: str | int, kind: int) -> Any:
    return helper.make_tensor_value_info(name, kind, sizes)


def _encode(nodes: _Nodes, encoder: Any, typed: bool) -> str:
    """The last hidden state, (batch, seqlen, hidden_size)."""
    x, shape = _embed(nodes, encoder, typed), model_shape(encoder)
    row = nodes.add("Unsqueeze", "attention_mask", nodes.vector(1))
    mask = nodes.add("Cast", nodes.add("Unsqueeze", row, nodes.vector(2)), to=TensorProto.FLOAT)
    # -10000 closes a key as surely as the lowest float does: exp(-10000) is 0.
    closed = nodes.add("Mul", nodes.add("Sub", nodes.constant(1.0), mask), nodes.constant(-10000.0))
    activation = family_of(encoder.config).value(encoder.config, "hidden_act")
    names = {module: name for name, module in encoder.named_modules()}
    biases = _biases(nodes, encoder, closed)
    relative = _relative(nodes, encoder, shape.head_dim)
    for number, (layer, sizes) in enumerate(zip(layers_of(encoder), shape.layers, strict=True)):
        named = {part: (names[module], module) for part, module in vars(layer).items()}
        products = None if relative is None else relative[number]
        x = _attention(nodes, x, biases[number], named, sizes.num_heads, shape.head_dim, products)
        x = _ffn(nodes, x, named, sizes.ffn_width, activation)
    return x


def _biases(nodes: _Nodes, encoder: Any, closed: str) -> list[str]:
    """What each layer adds to its scores, (batch, heads or 1, seqlen or 1, seqlen): `closed`, and a bias by
    relative position where the encoder has one."""
    heads, table = heads_of_layers(encoder.config), bias_by_distance(encoder)
    if table is None:
        return [closed] * len(heads)
    column = _distances(nodes, table.size(1) // 2)
    added = []
    for number, kept in enumerate(heads):
        rows = nodes.weight(f"layer.{number}.position_bias", table[kept])
        bias = nodes.add("Transpose", nodes.add("Gather", rows, column, axis=1), perm=[1, 0, 2, 3])
        added.append(nodes.add("Add", bias, closed) if kept else closed)
    return added


def _distances(nodes: _Nodes, reach: int) -> str:
    """The place of a key less that of its query, at most `reach` either way, plus reach: int64 (batch,
    seqlen, seqlen)."""
    place = _places(nodes)
    keys, queries = (nodes.add("Unsqueeze", place, nodes.vector(axis)) for axis in (1, 2))
    limits = nodes.constant(-reach), nodes.constant(reach)
    away = nodes.add("Clip", nodes.add("Sub", keys, queries), *limits)
    return nodes.add("Add", away, nodes.constant(reach))


@dataclass(frozen=True)
class _Relative:
    """What a layer's queries and keys are multiplied by for their distance: the values that hold the keys
    (heads, head_dim, rows) and the queries (heads, rows, head_dim), "" for none, and the row of each query
    and key, (batch, 1, seqlen, seqlen)."""

    keys: str
    queries: str
    rows: str

    def products(self, nodes: _Nodes, query: str, key: str, num_heads: int) -> list[str]:
        """The products of query (batch, heads, seqlen, head_dim) and key (batch, heads, head_dim, seqlen),
        (batch, heads, seqlen, seqlen) each."""
        rows, found = nodes.add("Expand", self.rows, nodes.vector(1, num_heads, 1, 1)), []
        if self.keys:
            found.append(nodes.add("GatherElements", nodes.add("MatMul", query, self.keys), rows, axis=3))
        if self.queries:
            found.append(nodes.add("GatherElements", nodes.add("MatMul", self.queries, key), rows, axis=2))
        return found


def _relative(nodes: _Nodes, encoder: Any, head_dim: int) -> list[_Relative] | None:
    """The products by distance of each layer; None for an encoder without them."""
    states, kind = relative_states(encoder), family_of(encoder.config).kind(encoder.config).disentangled
    if states is None or kind is None:
        return None
    table = nodes.weight("distance_rows", kind.distance_rows.long())
    rows = nodes.add("Gather", table, _distances(nodes, kind.farthest))
    rows, layers = nodes.add("Unsqueeze", rows, nodes.vector(1)), []
    for number, layer in enumerate(layers_of(encoder)):
        if layer.query.out_features == 0:
            layers.append(_Relative("", "", rows))
            continue
        keys, queries = by_distance(kind, states, layer.query, layer.key, head_dim)
        named = f"layer.{number}.position"
        layers.append(
            _Relative(
                "" if keys is None else nodes.weight(f"{named}_key", keys.transpose(1, 2)),
                "" if queries is None else nodes.weight(f"{named}_query", queries),
                rows,
            )
        )
    return layers


def _places(nodes: _Nodes) -> str:
    """0, 1, 2, ... in each row (batch, seqlen), by counting ids: runtimes would not know that a range has the
    shape of the ids."""
    ones = nodes.add("Cast", nodes.add("Equal", "input_ids", "input_ids"), to=TensorProto.INT64)
    return nodes.add("CumSum", ones, nodes.constant(1), exclusive=1)


def _embed(nodes: _Nodes, encoder: Any, typed: bool) -> str:
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


def _position_ids(nodes: _Nodes, config: Any) -> str:
    """The positions of all ids, (batch, seqlen)."""
    family = family_of(config)
    if not family.positions_from_padding:
        return _places(nodes)
    # The real tokens are counted, from the place after that of padding.
    padding = nodes.constant(family.first_position(config) - 1)
    real = nodes.add("Not", nodes.add("Equal", "input_ids", padding))
    real = nodes.add("Cast", real, to=TensorProto.INT64)
    counted = nodes.add("CumSum", real, nodes.constant(1))
    return nodes.add("Add", nodes.add("Mul", counted, real), padding)


def _attention(
    nodes: _Nodes,
    x: str,
    closed: str,
    named: dict[str, Any],
    num_heads: int,
    head_dim: int,
    relative: _Relative | None = None,
) -> str:
    """A layer's attention, added to x and normalised. With 0 heads only the output's bias is added."""
    output, norm = named["attention_output"], named["attention_norm"]
    if num_heads == 0:
        return _joined(nodes, x, nodes.weight(f"{output[0]}.bias", output[1].bias), norm)
    # In a Reshape, 0 keeps the input's size.
    split = nodes.vector(0, 0, num_heads, head_dim)

    def heads(part: str, order: list[int]) -> str:
        linear = nodes.linear(x, *named[part])
        return nodes.add("Transpose", nodes.add("Reshape", linear, split), perm=order)

    query, key, value = heads("query", [0, 2, 1, 3]), heads("key", [0, 2, 3, 1]), heads("value", [0, 2, 1, 3])
    scores, products = nodes.add("MatMul", query, key), 1
    for product in [] if relative is None else relative.products(nodes, query, key, num_heads):
        scores, products = nodes.add("Add", scores, product), products + 1
    scores = nodes.add("Div", scores, nodes.constant(math.sqrt(head_dim * products)))
    weights = nodes.add("Softmax", nodes.add("Add", scores, closed), axis=-1)
    context = nodes.add("Transpose", nodes.add("MatMul", weights, value), perm=[0, 2, 1, 3])
    context = nodes.add("Reshape", context, nodes.vector(0, 0, num_heads * head_dim))
    return _joined(nodes, x, nodes.linear(context, *output), norm)


def _ffn(nodes: _Nodes, x: str, named: dict[str, Any], ffn_width: int, activation: str) -> str:
    """A layer's FFN, added to x and normalised. With width 0 only the output's bias is added."""
    output, norm = named["down"], named["ffn_norm"]
    if ffn_width == 0:
        return _joined(nodes, x, nodes.weight(f"{output[0]}.bias", output[1].bias), norm)
    inner = _ACTIVATIONS[activation](nodes, nodes.linear(x, *named["up"]))
    return _joined(nodes, x, nodes.linear(inner, *output), norm)


def _joined(nodes: _Nodes, x: str, added: str, norm: tuple[str, Any]) -> str:
    return nodes.norm(nodes.add("Add", added, x), *norm)


def _gelu(nodes: _Nodes, x: str) -> str:
    erf = nodes.add("Erf", nodes.add("Div", x, nodes.constant(math.sqrt(2.0))))
    return nodes.add(
        "Mul", nodes.add("Mul", x, nodes.add("Add", erf, nodes.constant(1.0))), nodes.constant(0.5)
    )


def _gelu_new(nodes: _Nodes, x: str) -> str:
    cubed = nodes.add("Mul", nodes.add("Pow", x, nodes.constant(3.0)), nodes.constant(0.044715))
    inner = nodes.add("Mul", nodes.add("Add", x, cubed), nodes.constant(math.sqrt(2.0 / math.pi)))
    tanh = nodes.add("Add", nodes.add("Tanh", inner), nodes.constant(1.0))
    return nodes.add("Mul", nodes.add("Mul", x, nodes.constant(0.5)), tanh)


# The activations that `optimize` takes, and those of heads, by the config's names.
_ACTIVATIONS: dict[str, Callable[[_Nodes, str], str]] = {
    "gelu": _gelu,
    "gelu_new": _gelu_new,
    "relu": lambda nodes, x: nodes.add("Relu", x),
    "silu": lambda nodes, x: nodes.add("Mul", x, nodes.add("Sigmoid", x)),
    "tanh": lambda nodes, x: nodes.add("Tanh", x),
}


def _first(nodes: _Nodes, x: str) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first real token; zeros where it has none.

    This is a product with a row of zeros and a one, because runtimes differ in how they index, not in how
    they multiply."""
    first = nodes.add("Equal", nodes.add("CumSum", "attention_mask", nodes.constant(1)), nodes.constant(1))
    first = nodes.add("Mul", nodes.add("Cast", first, to=TensorProto.INT64), "attention_mask")
    row = nodes.add("Unsqueeze", nodes.add("Cast", first, to=TensorProto.FLOAT), nodes.vector(1))
    return nodes.add("Squeeze", nodes.add("MatMul", row, x), nodes.vector(1))


def _place_0(nodes: _Nodes, x: str) -> str:
    """(batch, seqlen, hidden) -> (batch, hidden): each row's first place, padding or not."""
    return nodes.add("Gather", x, nodes.constant(0), axis=1)
