"""The contract between trainer, checkpoint and runtime: how wide every layer of a pruned encoder is.

A shape is written down in config.json and never inferred from zeros or from tensor sizes. Zero is a number:
a layer may keep 0 heads, or 0 FFN channels, and then passes its input on (through the remaining bias and
LayerNorm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

# A BERT-class encoder is far below these; a number above them is a mistake or an attack, and is refused
# before any memory is taken for it.
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 10
MAX_PARAMETERS = 10_000_000_000


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], or of at least low; ValueError that names it otherwise (a bool or a
    float is no width)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}: an integer is needed")
    if high is None:
        if value < low:
            raise ValueError(f"{name} is {value}: at least {low} is needed")
    elif not low <= value <= high:
        raise ValueError(f"{name} is {value}: it must lie between {low} and {high}")
    return value


@dataclass(frozen=True)
class LayerShape:
    """What is left in one layer: attention heads and FFN channels."""

    num_heads: int
    ffn_width: int

    def __post_init__(self) -> None:
        checked_int("num_heads", self.num_heads, 0, MAX_WIDTH)
        checked_int("ffn_width", self.ffn_width, 0, MAX_WIDTH)

    @classmethod
    def parse(cls, value: object, name: str) -> LayerShape:
        """A LayerShape from itself or from its JSON form; ValueError that names the place otherwise."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or set(value) != {"num_heads", "ffn_width"}:
            raise ValueError(f"{name} is {value!r}: it needs exactly the keys num_heads and ffn_width")
        try:
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclass(frozen=True)
class ModelShape:
    """Every layer's shape, the model's width and a head's width. `num_heads * head_dim` need not be
    `hidden_size`."""

    layers: tuple[LayerShape, ...]
    hidden_size: int
    head_dim: int

    def __post_init__(self) -> None:
        checked_int("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        checked_int("head_dim", self.head_dim, 1, MAX_WIDTH)
        checked_int("number of layers", len(self.layers), 0, MAX_LAYERS)
        if self.parameters() > MAX_PARAMETERS:
            raise ValueError(
                f"these layer shapes hold {self.parameters():,} parameters; more than "
                f"{MAX_PARAMETERS:,} is refused"
            )

    @classmethod
    def parse(cls, layers: Sequence[object], hidden_size: int, head_dim: int) -> ModelShape:
        """A ModelShape from the JSON form of its layers, as it stands in config.json."""
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"layer_shapes is {layers!r}: a list with one entry a layer is needed")
        parsed = tuple(LayerShape.parse(layer, f"layer_shapes[{i}]") for i, layer in enumerate(layers))
        return cls(parsed, hidden_size, head_dim)

    @classmethod
    def dense(
        cls, num_layers: int, num_heads: int, ffn_width: int, hidden_size: int, head_dim: int
    ) -> ModelShape:
        """The shape before pruning: every layer alike."""
        checked_int("num_hidden_layers", num_layers, 0, MAX_LAYERS)
        return cls((LayerShape(num_heads, ffn_width),) * num_layers, hidden_size, head_dim)

    def to_json(self) -> list[dict[str, Any]]:
        """The layers as config.json holds them (hidden_size and head_dim are fields of their own there)."""
        return [asdict(layer) for layer in self.layers]

    def parameters(self) -> int:
        """Parameters of the encoder's layers: matrices, biases and LayerNorms, without the embeddings."""
        hidden = self.hidden_size
        total = 0
        for layer in self.layers:
            width = layer.num_heads * self.head_dim
            total += 3 * width * (hidden + 1) + width * hidden + hidden  # q, k, v; output
            total += layer.ffn_width * (hidden + 1) + layer.ffn_width * hidden + hidden  # up; down
            total += 4 * hidden  # two LayerNorms
        return total

    def macs(self, lengths: Sequence[int]) -> int:
        """Multiply-accumulates of the encoder's matrix products over sequences of these lengths (tokens)."""
        tokens = sum(lengths)
        pairs = sum(length * length for length in lengths)
        total = 0
        for layer in self.layers:
            width = layer.num_heads * self.head_dim
            total += tokens * (4 * width + 2 * layer.ffn_width) * self.hidden_size + 2 * pairs * width
        return total
