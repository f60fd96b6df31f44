"""The configs of the pruned models: a stock config plus layer shapes, checked before memory is taken."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar

import transformers
from transformers import BertConfig, RobertaConfig

from pruned_ops.files import shown
from pruned_ops.layers.parts import refuse_activation
from pruned_ops.models.families.description import Family
from pruned_ops.models.families.known import BY_TYPE, FAMILIES
from pruned_ops.shape import MAX_LAYERS, MAX_PARAMETERS, MAX_WIDTH, LayerShape, ModelShape, checked_int

MAX_FLOAT = sys.float_info.max
# The number of best spans that share a question's probability; `decode` keeps as many for each question.
SCORED = 20


@dataclass(frozen=True)
class ScoreCalibration:
    """Turns a question's scores in logits into probabilities that an answer is right.

    They are the softmax at this temperature over the best spans, no answer, and "something else", which
    weighs `other` times as much as the likeliest of them. So the likeliest is right with a probability of at
    most 1 / (1 + other), however sure the model is. The defaults (1, 0) are the plain softmax; a checkpoint
    may hold values that were fitted on validation questions.
    Errors: ValueError for numbers that make no probabilities.
    """

    temperature: float = 1.0
    other: float = 0.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_FLOAT:
                raise ValueError(
                    f"score_calibration: {name} is {shown(value)}; a number of at least 0 is needed"
                )
        if self.temperature == 0:
            raise ValueError("score_calibration: temperature is 0; a number above 0 is needed")

    @classmethod
    def parse(cls, value: object) -> ScoreCalibration:
        """Read the object that config.json holds. Errors: ValueError for anything else."""
        if not isinstance(value, dict) or value.keys() != {"temperature", "other"}:
            raise ValueError(f"score_calibration is {shown(value)}; temperature and other are needed")
        return cls(**value)

    def to_json(self) -> dict[str, float]:
        """The object for config.json."""
        return asdict(self)

    def probabilities(self, spans: Sequence[float], null: float) -> list[float]:
        """The probabilities, in [0, 1], of these spans and then of no answer, from their scores in logits.

        spans: the scores of the spans, best first. However many they are, the softmax is over the SCORED best
        ones, so that a probability does not depend on how many were asked for. Those and no answer sum to at
        most 1."""
        highest = max(spans[0], null)
        *weights, last = [math.exp((score - highest) / self.temperature) for score in (*spans, null)]
        total = sum(weights[:SCORED]) + last + self.other
        return [weight / total for weight in (*weights, last)]


def check_labels(fields: Mapping[str, Any]) -> None:
    """ValueError where a config's fields ask for a name for each of more labels than a head can have:
    transformers makes all the names at once."""
    if fields.get("num_labels") is not None:
        checked_int("num_labels", fields["num_labels"], 0, MAX_WIDTH)
    for name in ("id2label", "label2id"):
        if not isinstance(fields.get(name), (Mapping, NoneType)):
            raise ValueError(f"{name} is {shown(fields[name])}: an object is needed")


def _dense_fields(
    family: Family, layers: list[LayerShape] | None, fields: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields for the stock config, by the publisher's names, from BERT's names or the publisher's. Sizes
    of the dense model that are missing are the widest layer's."""
    fields = {family.own_name(name): value for name, value in fields.items()}
    kind = fields.pop("model_type", None)  # a stock config's to_dict() brings its own
    tokenizer = next((stock.tokenizer for stock in family.stock if stock.model_type == kind), None)
    if tokenizer is not None and not fields.get("tokenizer_class"):
        fields["tokenizer_class"] = tokenizer
    if layers is not None:
        for name, size in (
            ("num_hidden_layers", len(layers)),
            ("num_attention_heads", max([1, *(layer.num_heads for layer in layers)])),
            ("intermediate_size", max([1, *(layer.ffn_width for layer in layers)])),
        ):
            fields.setdefault(family.own_name(name), size)
    return fields


def _parse_layers(layer_shapes: object) -> list[LayerShape] | None:
    if layer_shapes is None:
        return None
    if not isinstance(layer_shapes, (list, tuple)):
        raise ValueError(f"layer_shapes is {shown(layer_shapes)}: a list with one entry a layer is needed")
    return [LayerShape.parse(layer, f"layer_shapes[{i}]") for i, layer in enumerate(layer_shapes)]


class PrunedConfig:
    """The fields and checks that a pruned config adds to a stock config, whose fields it takes by the
    publisher's names and by BERT's.

    layer_shapes: a LayerShape, or its JSON form, for each layer; by default all layers are dense.
    head_dim: by default hidden_size // num_attention_heads.
    null_score_threshold: SQuAD 2.0's, in logits.
    score_calibration: a `ScoreCalibration` as JSON; None where none was fitted.
    pooler_size: the width of the first linear on top of the encoder in sequence classification (BERT's
    pooler); None where it is hidden_size.
    head_indices: for each layer, which heads of the dense model it has, where heads have a bias by relative
    position; by default all of them.
    `num_attention_heads` and `intermediate_size` stay the dense model's numbers. Of a stock config's fields
    the model type becomes a `tokenizer_class`: a tokenizer's files may leave it to the model type which
    tokenizer they are for. Errors: ValueError for sizes that are negative, huge, or contradict each other.
    """

    if TYPE_CHECKING:  # fields of the stock configs
        model_type: ClassVar[str]
        to_dict: Callable[[], dict[str, Any]]
        hidden_size: int
        hidden_act: str
        num_hidden_layers: int
        num_attention_heads: int
        intermediate_size: int
        vocab_size: int
        max_position_embeddings: int
        type_vocab_size: int
        pad_token_id: int | None

    def __init__(
        self,
        head_dim: int | None = None,
        layer_shapes: list[Any] | None = None,
        null_score_threshold: float = 0.0,
        score_calibration: dict[str, float] | None = None,
        pooler_size: int | None = None,
        head_indices: list[list[int]] | None = None,
        **fields: Any,
    ) -> None:
        layers = _parse_layers(layer_shapes)
        check_labels(fields)
        super().__init__(**_dense_fields(self.family, layers, fields))
        self._set_shapes(layers, head_dim)
        self._set_heads(head_indices)
        self._set_answering(null_score_threshold, score_calibration)
        self.pooler_size = (
            None if pooler_size is None else checked_int("pooler_size", pooler_size, 1, MAX_WIDTH)
        )

    @property
    def family(self) -> Family:
        """The description of the encoder."""
        return BY_TYPE[self.model_type]

    def _set_shapes(self, layers: list[LayerShape] | None, head_dim: int | None) -> None:
        self._check_sizes()
        self.head_dim = self.hidden_size // self.num_attention_heads if head_dim is None else head_dim
        if layers is None:
            layers = [LayerShape(self.num_attention_heads, self.intermediate_size)] * self.num_hidden_layers
        self._check_layers(layers)
        kind = self.family.kind(self)
        self.layer_shapes = ModelShape(
            tuple(layers), self.hidden_size, self.head_dim, kind.gated, kind.has_biases
        ).to_json()

    def _set_heads(self, head_indices: list[list[int]] | None) -> None:
        if self.family.relative_bias is None:
            if head_indices is not None:
                raise ValueError(f"head_indices are for heads with a bias: {self.family.name} has none")
            return
        dense, numbers = self.num_attention_heads, [layer.num_heads for layer in self.shape.layers]
        if head_indices is None:
            if not set(numbers) <= {0, dense}:
                raise ValueError(
                    f"head_indices are needed: which of the dense model's {dense} heads each layer has"
                )
            head_indices = [list(range(number)) for number in numbers]
        if not isinstance(head_indices, list) or len(head_indices) != len(numbers):
            raise ValueError(f"head_indices is {shown(head_indices)}: a list for each layer is needed")
        for i, (kept, number) in enumerate(zip(head_indices, numbers, strict=True)):
            if not isinstance(kept, list) or len(kept) != number:
                raise ValueError(f"head_indices[{i}] is {shown(kept)}: {number} numbers of heads are needed")
            for index in kept:
                checked_int(f"head_indices[{i}]", index, 0, dense - 1)
            if kept != sorted(set(kept)):
                raise ValueError(f"head_indices[{i}] is {shown(kept)}: the numbers have to rise")
        self.head_indices = head_indices

    def _set_answering(self, null_score_threshold: float, score_calibration: dict[str, float] | None) -> None:
        if isinstance(null_score_threshold, bool) or not isinstance(null_score_threshold, (int, float)):
            raise ValueError(f"null_score_threshold is {shown(null_score_threshold)}: a number is needed")
        size = abs(null_score_threshold)
        if not (size <= MAX_FLOAT or size == math.inf):  # NaN, or an integer beyond every float
            raise ValueError(f"null_score_threshold is {shown(null_score_threshold)}: a number is needed")
        self.null_score_threshold = float(null_score_threshold)
        if score_calibration is not None:
            score_calibration = ScoreCalibration.parse(score_calibration).to_json()
        self.score_calibration = score_calibration

    def _check_sizes(self) -> None:
        family = self.family
        for name, low, high in (
            ("hidden_size", 1, MAX_WIDTH),
            ("num_hidden_layers", 0, MAX_LAYERS),
            ("num_attention_heads", 1, MAX_WIDTH),
            ("intermediate_size", 1, MAX_WIDTH),
            ("vocab_size", 1, 1 << 24),
            ("max_position_embeddings", 1, 1 << 24),
            ("type_vocab_size", 0 if family.may_lack_types else 1, MAX_WIDTH),
        ):
            if name not in family.constants:
                checked_int(family.own_name(name), family.value(self, name), low, high)
        if family.projection is not None:
            checked_int("embedding_size", family.embedding_size(self), 1, MAX_WIDTH)
        if self.pad_token_id is not None or family.positions_from_padding:
            checked_int("pad_token_id", self.pad_token_id, 0, self.vocab_size - 1)
        for name in ("layer_norm_eps", "initializer_range"):
            value = family.value(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} is {shown(value)}: it must lie in [0, 1)")
        rows = self.vocab_size + self.max_position_embeddings + family.value(self, "type_vocab_size")
        numbers = rows * family.embedding_size(self)
        if numbers > MAX_PARAMETERS:
            raise ValueError(f"the embeddings hold {numbers:,} numbers; {MAX_PARAMETERS:,} is the limit")
        if getattr(self, "is_decoder", False) or getattr(self, "add_cross_attention", False):
            raise ValueError("is_decoder and add_cross_attention are not supported: pruned_ops runs encoders")
        refusal = refuse_activation(family.value(self, "hidden_act")) or family.refuse(self)
        if refusal is not None:
            raise ValueError(refusal)

    def _check_layers(self, layers: list[LayerShape]) -> None:
        if len(layers) != self.num_hidden_layers:
            raise ValueError(
                f"layer_shapes has {len(layers)} entries, num_hidden_layers is {self.num_hidden_layers}"
            )
        for i, layer in enumerate(layers):
            if layer.num_heads > self.num_attention_heads:
                raise ValueError(
                    f"layer_shapes[{i}]: num_heads is {layer.num_heads}, but the dense model's "
                    f"num_attention_heads is {self.num_attention_heads}"
                )
            if layer.ffn_width > self.intermediate_size:
                raise ValueError(
                    f"layer_shapes[{i}]: ffn_width is {layer.ffn_width}, but the dense model's "
                    f"intermediate_size is {self.intermediate_size}"
                )

    @property
    def pooled_width(self) -> int:
        """How wide BERT's pooler is, and RoBERTa's linear in its place."""
        return self.hidden_size if self.pooler_size is None else self.pooler_size

    @property
    def shape(self) -> ModelShape:
        """The shapes of the layers, as the runtime takes them."""
        kind = self.family.kind(self)
        sizes = self.hidden_size, self.head_dim, kind.gated, kind.has_biases, kind.windows
        return ModelShape.parse(self.layer_shapes, *sizes)


class PrunedBertConfig(PrunedConfig, BertConfig):
    """BertConfig with the fields of a pruned model: see `PrunedConfig`."""

    model_type = "pruned_bert"
    __init__ = PrunedConfig.__init__  # transformers would generate one for a class that has none of its own


class PrunedRobertaConfig(PrunedConfig, RobertaConfig):
    """RobertaConfig with the fields of a pruned model: see `PrunedConfig`."""

    model_type = "pruned_roberta"
    __init__ = PrunedConfig.__init__


def _config_class(family: Family) -> type[PrunedConfig]:
    """The pruned config of a family: one of the classes above, or one like them."""
    name = f"Pruned{family.stem}Config"
    if name not in globals():
        stock = getattr(transformers, f"{family.stem}Config")
        members = {
            "__doc__": f"{stock.__name__} with the fields of a pruned model: see `PrunedConfig`.",
            "__init__": PrunedConfig.__init__,
            "__module__": __name__,
            "model_type": family.pruned_type,
            "attribute_map": {**stock.attribute_map, **family.fields},
        }
        globals()[name] = type(name, (PrunedConfig, stock), members)
    return globals()[name]


# The config of the pruned counterpart of every model type that can be pruned.
PRUNED_CONFIGS: dict[str, type[PrunedConfig]] = {
    kind: _config_class(family) for family in FAMILIES for kind in family.model_types
}
