"""What differs between families of encoders, as data.

A `Family` says where the parts of an encoder lie in the publisher's module, what the publisher calls the
fields of its config, and in which of a few known ways the parts differ. Whatever computes, prunes, saves,
imports or exports an encoder reads this, and knows no family by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from pruned_ops.layers.kinds import BERT_KIND, StackKind

# What follows "For" in the names of the publishers' classes whose heads are known here.
ANSWERS, TEXT_LABELS, TOKEN_LABELS, WORDS = (
    "QuestionAnswering",
    "SequenceClassification",
    "TokenClassification",
    "MaskedLM",
)
STOCK_HEADS = (ANSWERS, TEXT_LABELS, TOKEN_LABELS, WORDS)


@dataclass(frozen=True)
class LayerNames:
    """The names of the linears and LayerNorms in one layer, from the layer on. One linear may be query, key
    and value at once, with their rows one after the other.

    query, key, value, attention_output: the linears of the attention; attention_norm: what normalises its
    output and input. up, down: the linears of the FFN; ffn_norm: what normalises its output and input."""

    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    ffn_norm: str

    @property
    def qkv(self) -> tuple[str, ...]:
        """The linears whose outputs are the heads', in the order in which the kernels take them."""
        return tuple(dict.fromkeys((self.query, self.key, self.value)))

    def by_role(self, tensor: str) -> str:
        """The name of a tensor by what it is, from the publisher's: "attention.self.query.weight" ->
        "query.weight". Another name is returned as it is."""
        module, _, kind = tensor.rpartition(".")
        roles = (part.name for part in fields(self) if getattr(self, part.name) == module)
        return next((f"{role}.{kind}" for role in roles), tensor)

    def spelt(self, tensor: str) -> str:
        """The reverse of `by_role`."""
        role, _, kind = tensor.rpartition(".")
        return f"{getattr(self, role)}.{kind}" if role in vars(self) else tensor


@dataclass(frozen=True)
class EmbeddingNames:
    """The names of the tables and of their LayerNorm, from the encoder's `embeddings` on. positions: None
    where there is no such table."""

    words: str = "word_embeddings"
    positions: str | None = "position_embeddings"
    token_types: str = "token_type_embeddings"
    norm: str = "LayerNorm"


@dataclass(frozen=True)
class RelativeBias:
    """A table (buckets, num_attention_heads) of what is added to the scores of all layers' attention, by the
    bucket of the distance of key and query (see `models.relative_bias`).

    name: of the table, from the encoder on. reach: from which distance on all keys are in one bucket."""

    name: str
    buckets: int
    reach: int


@dataclass(frozen=True)
class RelativeEmbeddings:
    """A table of embeddings of distances, which every layer turns into keys and queries by its own linears
    (see `models.disentangled`); it is there where the stack's kind is disentangled.

    table: its name, from the encoder on. norm: that of the LayerNorm after it. normed: whether a config has
    that one."""

    table: str
    norm: str
    normed: Callable[[Any], bool]


@dataclass(frozen=True)
class TextHeadNames:
    """The head that labels a text: a linear on its first token, an activation, and a linear.

    first, last: the linears' names in the model; first is None where it is the encoder's pooler.
    activation: by the name that transformers has for it. dropout, input_dropout: the fields of the config
    that say how much dropout, in training, comes before the last linear, and before the first one; None
    where there is none."""

    first: str | None
    last: str
    activation: str = "tanh"
    dropout: str = "classifier_dropout"
    input_dropout: str | None = None


@dataclass(frozen=True)
class PredictionHeadNames:
    """What every head of a family has before its last linear.

    module: the name of the module, in the model, through which hidden states go. pooling: the field of the
    config that says whether it takes the first token of a text that is labelled ("cls") or the mean over its
    tokens ("mean")."""

    module: str
    pooling: str


@dataclass(frozen=True)
class Stock:
    """A publisher's own model of a family: with what the names of its classes begin, its config's model type,
    and the class of its tokenizer."""

    stem: str
    model_type: str
    tokenizer: str


@dataclass(frozen=True, eq=False)
class Family:
    """A family of encoders: models with the same parts under the same names.

    name: what people call it. stock: the publishers' models; several where they differ in their vocabularies
    alone. Our own classes and model type are named after the first.
    prefix: the encoder's name inside a model with a head. layers: the name of the list of layers, from the
    encoder on; layer, embeddings: what lies in them. text_head: the head that labels texts. words_head: the
    modules that score the words of the vocabulary, one after the other; words_rows: those that have a row
    for each word.
    embeddings_dropout, answers_dropout: the config's fields for dropout, in training, after the embeddings
    and before the linear that finds answers, with None where there is none. drops_context: whether there is
    dropout after the linear that ends attention.
    positions_from_padding: whether real tokens alone are counted, from the place after the padding's id.
    hands_on: whether the publisher's heads hand what they do not know on to their encoder.
    has_pooler: whether the encoder's class can make a pooler (`add_pooling_layer`).
    positions_field: the config's field that says whether there is a table of positions, where one may say so.
    may_lack_types: whether a config may have a type_vocab_size of 0.
    relative_bias: the table of what is added to the scores of attention by relative position.
    relative_embeddings: the table of what queries and keys are multiplied by for their distance.
    projection: the name of a linear between embeddings and layers, which is there where they differ in width.
    final_norm: the name of a LayerNorm after the last layer. answers_head: that of the linear that finds
    answers. prediction_head: what all heads have before their last linear, and None in most families.
    stack_kind: the ways in which the layers of a config differ from BERT's; None where they are BERT's.
    refuses: why a config is not computed, for reasons that `fixed` cannot say.
    fields: the publisher's names of the config's fields, by BERT's names, where they differ. constants: the
    fields that BERT's config has and this one lacks, with the value that they have here; type_vocab_size 0
    means that there are no token types. fixed: the only values that are computed of some fields."""

    name: str
    stock: tuple[Stock, ...]
    prefix: str
    layers: str
    layer: LayerNames
    text_head: TextHeadNames
    words_head: tuple[str, ...]
    words_rows: tuple[str, ...]
    embeddings_dropout: str = "hidden_dropout_prob"
    answers_dropout: str | None = None
    drops_context: bool = True
    embeddings: EmbeddingNames = EmbeddingNames()
    positions_from_padding: bool = False
    hands_on: bool = True
    has_pooler: bool = True
    positions_field: str | None = None
    may_lack_types: bool = False
    relative_bias: RelativeBias | None = None
    relative_embeddings: RelativeEmbeddings | None = None
    projection: str | None = None
    final_norm: str | None = None
    answers_head: str = "qa_outputs"
    prediction_head: PredictionHeadNames | None = None
    stack_kind: Callable[[Any], StackKind] | None = None
    refuses: Callable[[Any], str | None] | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """How the names of our own classes go on after "Pruned"."""
        return self.stock[0].stem

    @property
    def pruned_type(self) -> str:
        """The model type of the pruned models' configs."""
        return f"pruned_{self.stock[0].model_type.replace('-', '_')}"

    @property
    def model_types(self) -> tuple[str, ...]:
        """The model types of all configs, the pruned one last."""
        return (*(stock.model_type for stock in self.stock), self.pruned_type)

    def own_name(self, name: str) -> str:
        """The publisher's name of a config's field, from BERT's."""
        return self.fields.get(name, name)

    def value(self, config: Any, name: str, *default: Any) -> Any:
        """The value of a config's field, stock or pruned, by BERT's name for it. default: as getattr's."""
        if name in self.constants:
            return self.constants[name]
        return getattr(config, self.own_name(name), *default)

    def dropout(self, config: Any, name: str) -> Any:
        """How much dropout a config's field says, by BERT's name for it; as much as in the layers where it is
        None."""
        value = self.value(config, name, None)
        return self.value(config, "hidden_dropout_prob") if value is None else value

    @property
    def dropout_fields(self) -> tuple[str, ...]:
        """The publisher's names of all fields that say how much dropout there is."""
        names = (
            *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),
            *(self.embeddings_dropout, self.answers_dropout),
            *(self.text_head.dropout, self.text_head.input_dropout),
        )
        unique = dict.fromkeys(name for name in names if name is not None and name not in self.constants)
        return tuple(map(self.own_name, unique))

    def first_position(self, config: Any) -> int:
        """The number of the first real token's position."""
        return int(self.value(config, "pad_token_id")) + 1 if self.positions_from_padding else 0

    def embedding_size(self, config: Any) -> int:
        """The width of the embedding's tables."""
        return config.hidden_size if self.projection is None else config.embedding_size

    def has_positions(self, config: Any) -> bool:
        """Whether the embedding has a table of positions."""
        is_configured = self.positions_field is None or bool(getattr(config, self.positions_field))
        return is_configured and self.embeddings.positions is not None

    def has_token_types(self, config: Any) -> bool:
        """Whether the embedding has a table of token types."""
        return bool(self.value(config, "type_vocab_size"))

    def kind(self, config: Any) -> StackKind:
        """The ways in which the layers of a config differ from BERT's."""
        return BERT_KIND if self.stack_kind is None else self.stack_kind(config)

    def pools_mean(self, config: Any) -> bool:
        """Whether the head that labels texts reads the mean over a text's tokens, and not the first."""
        names = self.prediction_head
        return names is not None and getattr(config, names.pooling) == "mean"

    def predicted(self, model: Any, states: Any) -> Any:
        """What the last linear of a model's head takes of hidden states, stock or pruned."""
        names = self.prediction_head
        return states if names is None else model.get_submodule(names.module)(states)

    def refuse(self, config: Any) -> str | None:
        """Why the model of a config is not what this family computes; None where it is."""
        for name, value in self.fixed.items():
            if getattr(config, name, value) != value:
                return f"{name} is {getattr(config, name)!r}, only {value!r} is computed"
        return None if self.refuses is None else self.refuses(config)
