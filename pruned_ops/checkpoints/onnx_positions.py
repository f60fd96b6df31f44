"""What attention does with positions, in ONNX's plain operators: masks, windows, biases by relative position,
products by distance, and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pruned_ops.checkpoints.onnx_nodes import Nodes
from pruned_ops.layers.kinds import StackKind
from pruned_ops.models.disentangled import relative_states
from pruned_ops.models.families.known import family_of
from pruned_ops.models.relative_bias import bias_by_distance, heads_of_layers
from pruned_ops.models.stock import layers_of

# What closes a key, as surely as the lowest float does: exp(-10000) is 0.
CLOSED = -10000.0


def places(nodes: Nodes, ids: str = "input_ids") -> str:
    """0, 1, 2, ... in each row (..., seqlen), by counting ids: runtimes would not know that a range has the
    shape of the ids."""
    return nodes.add("CumSum", nodes.whole(nodes.add("Equal", ids, ids)), nodes.constant(-1), exclusive=1)


def _one_row(nodes: Nodes) -> str:
    """The places of a padded sequence, (seqlen,), which are the same in every row."""
    return places(nodes, nodes.add("Gather", "input_ids", nodes.constant(0), axis=0))


def _away(nodes: Nodes, place: str) -> str:
    """The place of a key less that of its query: (..., seqlen) -> int64 (..., seqlen, seqlen)."""
    keys, queries = (nodes.add("Unsqueeze", place, nodes.vector(axis)) for axis in (-2, -1))
    return nodes.add("Sub", keys, queries)


def _column(nodes: Nodes, away: str, reach: int) -> str:
    """Distances, at most `reach` either way, plus reach."""
    limits = nodes.constant(-reach), nodes.constant(reach)
    return nodes.add("Add", nodes.add("Clip", away, *limits), nodes.constant(reach))


def added_to_scores(nodes: Nodes, encoder: Any) -> list[str]:
    """What each layer adds to its scores, (batch, heads or 1, seqlen or 1, seqlen): what closes padding, and
    keys outside a window, and a bias by relative position where the encoder has one."""
    row = nodes.add("Unsqueeze", "attention_mask", nodes.vector(1))
    mask = nodes.real(nodes.add("Unsqueeze", row, nodes.vector(2)))
    closed = nodes.add("Mul", nodes.add("Sub", nodes.constant(1.0), mask), nodes.constant(CLOSED))
    if bias_by_distance(encoder) is not None:
        return _biases(nodes, encoder, closed)
    kind = family_of(encoder.config).kind(encoder.config)
    windows = [kind.of_layer(number).window for number in range(len(layers_of(encoder)))]
    by_window: dict[int | None, str] = {None: closed}
    for window in {window: None for window in windows if window is not None}:
        distance = nodes.add("Abs", _away(nodes, _one_row(nodes)))
        outside = nodes.real(nodes.add("Greater", distance, nodes.constant(window)))
        outside = nodes.add("Mul", outside, nodes.constant(CLOSED))
        by_window[window] = nodes.add("Add", closed, outside)
    return [by_window[window] for window in windows]


def _biases(nodes: Nodes, encoder: Any, closed: str) -> list[str]:
    heads, table = heads_of_layers(encoder.config), bias_by_distance(encoder)
    assert table is not None
    column = _column(nodes, _away(nodes, _one_row(nodes)), table.size(1) // 2)
    added = []
    for number, kept in enumerate(heads):
        rows = nodes.weight(f"layer.{number}.position_bias", table[kept])
        bias = nodes.add("Unsqueeze", nodes.add("Gather", rows, column, axis=1), nodes.vector(0))
        added.append(nodes.add("Add", bias, closed) if kept else closed)
    return added


@dataclass(frozen=True)
class Relative:
    """What a layer's queries and keys are multiplied by for their distance: the values that hold the keys
    (heads, head_dim, rows) and the queries (heads, rows, head_dim), "" for none, and the row of each query
    and key, (batch, 1, seqlen, seqlen)."""

    keys: str
    queries: str
    rows: str

    def products(self, nodes: Nodes, query: str, key: str, num_heads: int) -> list[str]:
        """The products of query (batch, heads, seqlen, head_dim) and key (batch, heads, head_dim, seqlen),
        (batch, heads, seqlen, seqlen) each."""
        rows, products = nodes.add("Expand", self.rows, nodes.vector(1, num_heads, 1, 1)), []
        if self.keys:
            products.append(nodes.add("GatherElements", nodes.add("MatMul", query, self.keys), rows, axis=3))
        if self.queries:
            products.append(nodes.add("GatherElements", nodes.add("MatMul", self.queries, key), rows, axis=2))
        return products


def relative_products(nodes: Nodes, encoder: Any, head_dim: int) -> list[Relative] | None:
    """The products by distance of each layer; None for an encoder without them."""
    states, kind = relative_states(encoder), family_of(encoder.config).kind(encoder.config).disentangled
    if states is None or kind is None:
        return None
    table = nodes.weight("distance_rows", kind.distance_rows.long())
    # Not of one row alone: GatherElements takes as many indices as it gives elements.
    rows = nodes.add("Gather", table, _column(nodes, _away(nodes, places(nodes)), kind.farthest))
    rows, layers = nodes.add("Unsqueeze", rows, nodes.vector(1)), []
    for number, layer in enumerate(layers_of(encoder)):
        if layer.query.out_features == 0:
            layers.append(Relative("", "", rows))
            continue
        keys, queries = kind.by_distance(states, layer.query, layer.key, head_dim)
        named = f"layer.{number}.position"
        layers.append(
            Relative(
                "" if keys is None else nodes.weight(f"{named}_key", keys.transpose(1, 2)),
                "" if queries is None else nodes.weight(f"{named}_query", queries),
                rows,
            )
        )
    return layers


@dataclass(frozen=True)
class Rotation:
    """The values that hold cosine and sine of each place's angles, (seqlen, 1, head_dim) each."""

    cosine: str
    sine: str

    def turned(self, nodes: Nodes, x: str) -> str:
        """Heads (batch, seqlen, heads, head_dim), each pair of channels rotated by its place's angle."""
        first, second = nodes.halves(x)
        swapped = nodes.add("Concat", nodes.add("Neg", second), first, axis=-1)
        return nodes.add("Add", nodes.add("Mul", x, self.cosine), nodes.add("Mul", swapped, self.sine))


def rotations(nodes: Nodes, kind: StackKind, layers: int, head_dim: int) -> list[Rotation | None]:
    """By what each layer rotates its queries and keys; None for one that does not."""
    of_layers = [kind.of_layer(number) for number in range(layers)]
    by_base: dict[float | None, Rotation | None] = {None: None}
    for of_layer in of_layers:
        frequencies = of_layer.frequencies(head_dim)
        if frequencies is None or of_layer.rotary_base in by_base:
            continue
        both = nodes.weight(f"frequencies_{of_layer.rotary_base}", torch.cat([frequencies, frequencies]))
        place = nodes.add("Unsqueeze", nodes.real(_one_row(nodes)), nodes.vector(1, 2))
        angles = nodes.add("Mul", place, both)
        by_base[of_layer.rotary_base] = Rotation(nodes.add("Cos", angles), nodes.add("Sin", angles))
    return [by_base[of_layer.rotary_base] for of_layer in of_layers]
