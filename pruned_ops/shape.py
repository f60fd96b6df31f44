"""The contract between trainer, checkpoint and runtime: how wide every layer of a pruned encoder is.

A shape is written down in config.json and never inferred from zeros or from tensor sizes. Zero is a number:
a layer may keep 0 heads or 0 FFN channels, and then passes its input on (through the remaining bias and
LayerNorm).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pruned_ops.files import shown

# A BERT-class encoder stays far below these limits. A number above them is a mistake or an attack, and is
# refused before any memory is allocated for it.
MAX_WIDTH = 1 << 20
MAX_LAYERS = 1 << 10
MAX_PARAMETERS = 10_000_000_000


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` if it is an int in [low, high], or of at least low where high is None.

    Errors: ValueError with its name otherwise; a bool is no integer here.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {shown(value)}: an integer is needed")
    if high is None:
        if value < low:
            raise ValueError(f"{name} is {shown(value)}: at least {low} is needed")
    elif not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}: it must lie between {low} and {high}")
    return value


@dataclass(frozen=True)
class LayerShape:
    """The attention heads and FFN channels that are left in one layer."""

    num_heads: int
    ffn_width: int

    def __post_init__(self) -> None:
        checked_int("num_heads", self.num_heads, 0, MAX_WIDTH)
        checked_int("ffn_width", self.ffn_width, 0, MAX_WIDTH)

    @classmethod
    def parse(cls, value: object, name: str) -> LayerShape:
        """Make a LayerShape from its JSON form, or return one that is given; else ValueError with `name`."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or set(value) != {"num_heads", "ffn_width"}:
            raise ValueError(f"{name} is {shown(value)}: it needs exactly the keys num_heads and ffn_width")
        try:
            return cls(**value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


@dataclass(frozen=True)
class ModelShape:
    """The shape of every layer, the width of the model and the width of a head.

    `num_heads * head_dim` need not equal `hidden_size`. gated: whether an FFN channel has two rows of weights
    before it. biases: whether linears and LayerNorms have biases. windows: for each layer the largest
    distance of a key from its query, and None for any; empty where no layer has a window.
    """

    layers: tuple[LayerShape, ...]
    hidden_size: int
    head_dim: int
    gated: bool = False
    biases: bool = True
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        checked_int("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        checked_int("head_dim", self.head_dim, 1, MAX_WIDTH)
        checked_int("number of layers", len(self.layers), 0, MAX_LAYERS)
        if self.windows and len(self.windows) != len(self.layers):
            raise ValueError(f"{len(self.windows)} windows are given for {len(self.layers)} layers")
        if self.parameters() > MAX_PARAMETERS:
            raise ValueError(
                f"these layer shapes hold {self.parameters():,} parameters; more than "
                f"{MAX_PARAMETERS:,} is refused"
            )

    @classmethod
    def parse(
        cls,
        layers: Sequence[object],
        hidden_size: int,
        head_dim: int,
        gated: bool = False,
        biases: bool = True,
        windows: tuple[int | None, ...] = (),
    ) -> ModelShape:
        """Make a ModelShape from the JSON form of its layers, as config.json holds it."""
        if not isinstance(layers, (list, tuple)):
            raise ValueError(f"layer_shapes is {shown(layers)}: a list with one entry a layer is needed")
        parsed = tuple(LayerShape.parse(layer, f"layer_shapes[{i}]") for i, layer in enumerate(layers))
        return cls(parsed, hidden_size, head_dim, gated, biases, windows)

    def to_json(self) -> list[dict[str, Any]]:
        """The JSON form of the layers; hidden_size and head_dim are fields of their own in config.json."""
        return [asdict(layer) for layer in self.layers]

    def parameters(self) -> int:
        """The number of parameters in the layers: matrices, biases and LayerNorms, without the embeddings."""
        hidden, bias, rows = self.hidden_size, int(self.biases), 1 + self.gated
        total = 0
        for layer in self.layers:
            width, units = layer.num_heads * self.head_dim, layer.ffn_width
            total += 3 * width * (hidden + bias) + width * hidden + hidden * bias  # q, k, v; output
            total += rows * units * (hidden + bias) + units * hidden + hidden * bias  # up; down
            total += 2 * hidden * (1 + bias)  # two LayerNorms
        return total

    def macs(self, lengths: Sequence[int]) -> int:
        """The multiply-accumulates of the layers' matrix products for sequences of these lengths (tokens),
        where each token attends to those of its sequence that lie in the layer's window."""
        lengths = [int(length) for length in lengths]  # 32 bits, as in an array, are too few for the sum
        tokens = sum(lengths)
        windows = self.windows or (None,) * len(self.layers)
        pairs = {window: sum(_pairs(length, window) for length in lengths) for window in set(windows)}
        total = 0
        for layer, window in zip(self.layers, windows, strict=True):
            width = layer.num_heads * self.head_dim
            inner = 4 * width + (2 + self.gated) * layer.ffn_width
            total += tokens * inner * self.hidden_size + 2 * pairs[window] * width
        return total


def _pairs(length: int, window: int | None) -> int:
    """The pairs of a query and a key at most `window` apart in a sequence of so many tokens."""
    reach = max(length - 1, 0) if window is None else min(window, max(length - 1, 0))
    return length + reach * (2 * length - reach - 1)
