"""The padded, trainable layers of the pruned models: plain torch modules under their publisher's own
parameter names, which `models.families` describes."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pruned_ops.layers.packing import check_mask
from pruned_ops.models.configuration import (
    PRUNED_CONFIGS,
    PrunedBertConfig,
    PrunedConfig,
    PrunedRobertaConfig,
)
from pruned_ops.models.disentangled import DisentangledLayer, add_relative_embeddings, relative_states
from pruned_ops.models.families.description import STOCK_HEADS, Family
from pruned_ops.models.families.known import FAMILIES
from pruned_ops.models.inputs import (
    apply_pooler,
    check_inputs,
    check_positions,
    default_position_ids,
    returned,
)
from pruned_ops.models.model_card import write_model_card
from pruned_ops.models.modules import dropout_of, put
from pruned_ops.models.norm_first import NormFirstLayer
from pruned_ops.models.norm_last import NormLastLayer
from pruned_ops.models.relative_bias import scores_of_layers


class PrunedEmbeddings(nn.Module):
    """Word embeddings, and those of positions and token types where the family has them, summed and
    normalised: (batch, seqlen, width), with the width of the tables."""

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__()
        self.config = config
        family, names, padding = config.family, config.family.embeddings, config.pad_token_id
        width = family.embedding_size(config)
        position_padding = padding if family.positions_from_padding else None
        put(self, names.words, nn.Embedding(config.vocab_size, width, padding_idx=padding))
        if names.positions is not None and family.has_positions(config):
            rows = config.max_position_embeddings
            put(self, names.positions, nn.Embedding(rows, width, padding_idx=position_padding))
        if family.has_token_types(config):
            put(self, names.token_types, nn.Embedding(config.type_vocab_size, width))
        bias = family.kind(config).norm_bias
        put(self, names.norm, nn.LayerNorm(width, family.value(config, "layer_norm_eps"), bias=bias))
        self.dropout = dropout_of(config, family.embeddings_dropout)

    def forward(
        self,
        input_ids: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> Tensor:
        source = input_ids if input_ids is not None else inputs_embeds
        assert source is not None  # check_inputs refuses that
        batch_size, seqlen = source.shape[:2]
        names = self.config.family.embeddings
        if position_ids is None:
            position_ids = default_position_ids(self.config, input_ids, batch_size, seqlen, source.device)
        total = self.get_submodule(names.words)(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.family.has_token_types(self.config):
            if token_type_ids is None:
                token_type_ids = torch.zeros((batch_size, seqlen), dtype=torch.long, device=source.device)
            total = total + self.get_submodule(names.token_types)(token_type_ids)
        if names.positions is not None and self.config.family.has_positions(self.config):
            total = total + self.get_submodule(names.positions)(position_ids)
        return self.dropout(self.get_submodule(names.norm)(total))


class PrunedStack(nn.Module):
    """The padded, trainable stack of layers.

    (`layers.modules.PrunedEncoder` is the stack on packed tokens, for inference.)"""

    def __init__(self, config: PrunedConfig, list_name: str) -> None:
        super().__init__()
        self._list_name = list_name
        self.add_module(list_name, pruned_layers(config))

    def forward(
        self,
        x: Tensor,
        additive_mask: Tensor | None,
        collect: list[Tensor] | None,
        biases: Iterable[Tensor | None] = repeat(None),
        relative: Tensor | None = None,
    ) -> Tensor:
        return run_layers(self.get_submodule(self._list_name), x, additive_mask, collect, biases, relative)


def pruned_layers(config: PrunedConfig) -> nn.ModuleList:
    """The padded, trainable layers that a config describes."""
    shapes, kind = config.shape.layers, config.family.kind(config)
    if kind.norm_first:
        return nn.ModuleList(NormFirstLayer(config, shape, i) for i, shape in enumerate(shapes))
    layer = NormLastLayer if kind.disentangled is None else DisentangledLayer
    return nn.ModuleList(layer(config, shape) for shape in shapes)


def run_layers(
    layers: Any,
    x: Tensor,
    additive_mask: Tensor | None,
    collect: list[Tensor] | None,
    biases: Iterable[Tensor | None] = repeat(None),
    relative: Tensor | None = None,
) -> Tensor:
    """Run padded layers one after the other; each one's output is appended to `collect` if it is given.
    biases: what each layer adds to its scores besides the mask, (1, heads, seqlen, seqlen). relative: the
    states of distances, which disentangled layers take besides."""
    for layer, bias in zip(layers, biases, strict=False):
        added = additive_mask
        if bias is not None:
            added = bias if additive_mask is None else bias + additive_mask
        x = layer(x, added) if relative is None else layer(x, added, relative)
        if collect is not None:
            collect.append(x)
    return x


class PrunedPooler(nn.Module):
    """The pooler of BERT's kind, which reads position 0 of what `apply_pooler` gives it: (batch, seqlen,
    hidden_size) -> (batch, width)."""

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.pooled_width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class NewHeadWarning(UserWarning):
    """The head of a model that was loaded is new: only its encoder was in the checkpoint."""


class PrunedPreTrainedModel(PreTrainedModel):
    """The base of all pruned models. They load strictly, and from safetensors only."""

    config_class: type[Any] = PrunedBertConfig
    base_model_prefix = "bert"
    # The padded attention is torch's scaled_dot_product_attention. An optimised model uses the packed op.
    _supports_sdpa = True
    supports_gradient_checkpointing = True
    # Every loss is the mean over its minibatch. transformers' Trainer would otherwise take the forwards'
    # keywords for a sign that they divide by `num_items_in_batch`, the labels of all accumulated minibatches.
    accepts_loss_kwargs = False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """The padded attention is its own: transformers, which guesses from the source, would take a name."""
        return False

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load as any Hugging Face model, but refuse a checkpoint whose tensors are not exactly the config's.

        A bare encoder may be read from a checkpoint that has a head on top. A checkpoint of another head, of
        a bare encoder, or of another number of labels than is asked for gives its encoder: then the head is
        new, random and to be trained, and a `NewHeadWarning` says so.
        Errors: ValueError that names missing, unexpected and misshapen tensors; OSError where there is no
        safetensors file.
        """
        kwargs["use_safetensors"] = True
        kwargs["ignore_mismatched_sizes"] = True  # wrong shapes are reported below, by name and all together
        model: Any
        info: dict[str, Any]
        model, info = super().from_pretrained(  # type: ignore[misc]
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        faults = cls._loading_faults(model, info)
        # Heads of some families have tensors of the same names and shapes: then there may be no fault.
        may_be_new = faults or model.config.family.prediction_head is not None
        if may_be_new and all(cls._is_of_the_head(model, name) for name in faults):
            saved = _saved_config(pretrained_model_name_or_path, kwargs)
            if cls._wants_a_new_head(model, saved, bool(faults)):
                cls._renew_head(model, saved, pretrained_model_name_or_path, info["missing_keys"])
                faults = {}
        if faults:
            shown = "; ".join([*faults.values()][:8])
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise ValueError(
                f"the tensors in {pretrained_model_name_or_path} are not what its config.json describes: "
                f"{shown}{more}"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _loading_faults(cls, model: Any, info: dict[str, Any]) -> dict[str, str]:
        """What is wrong with each tensor, by its name."""
        unexpected = set(info["unexpected_keys"])
        if not cls._has_head(model):  # a bare encoder leaves a head's tensors
            unexpected = {key for key in unexpected if not cls._is_of_the_head(model, key)}
        mismatched = sorted(info["mismatched_keys"])
        return {
            **{key: f"missing {key}" for key in sorted(info["missing_keys"])},
            **{key: f"unexpected {key}" for key in sorted(unexpected)},
            **dict(_misshapen(mismatch, model) for mismatch in mismatched),
        }

    @staticmethod
    def _has_head(model: Any) -> bool:
        return model.base_model is not model

    @classmethod
    def _is_of_the_head(cls, model: Any, tensor: str) -> bool:
        """Whether a tensor belongs to a head, as the pooler does: question answering has none. Those of the
        encoder have its prefix, but for a checkpoint of a bare encoder."""
        inside = {cls.base_model_prefix, *model.base_model._modules}
        return tensor.partition(".")[0] not in inside or "pooler." in tensor

    @classmethod
    def _wants_a_new_head(cls, model: Any, saved: Any, lacks: bool) -> bool:
        """Whether a model is asked for whose head the checkpoint of this config cannot have. lacks: whether
        tensors of the head are missing or others; otherwise only a head that is known is another one."""
        if not cls._has_head(model) or saved is None or not saved.architectures:
            return False
        names = {_head_name(saved.architectures[0]), _head_name(cls.__name__)}
        if len(names) > 1:
            return lacks or names <= set(STOCK_HEADS)
        return lacks and saved.num_labels != model.config.num_labels

    @classmethod
    def _renew_head(cls, model: Any, saved: Any, name_or_path: Any, missing: Iterable[str]) -> None:
        """Make everything on top of the encoder new, also what another head has under the same name, and
        take back what was fitted to the old head. (transformers has made new what was missing.)"""
        renewed = {name.rpartition(".")[0] for name in missing}
        for name, module in model.named_modules():
            if name.startswith(f"{cls.base_model_prefix}."):
                continue
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                renewed.add(name)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
                renewed.add(name)
        model.config.null_score_threshold, model.config.score_calibration = 0.0, None
        warnings.warn(
            f"{name_or_path} is a {saved.architectures[0]} with {saved.num_labels} labels: this "
            f"{cls.__name__} with {model.config.num_labels} has its encoder, and a new, random head to be "
            f"trained: {', '.join(sorted(renewed))}",
            NewHeadWarning,
            stacklevel=4,
        )

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save as any Hugging Face model, and write a model card beside it; see `write_model_card`."""
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_model_card(save_directory, self)

    def _upload_modified_files(self, working_dir: Any, *args: Any, **kwargs: Any) -> Any:
        """Write the card again before `push_to_hub` uploads: transformers put its placeholder there."""
        write_model_card(working_dir, self)
        return super()._upload_modified_files(working_dir, *args, **kwargs)


def _misshapen(mismatched: Any, model: nn.Module) -> tuple[str, str]:
    """The name and the fault of a tensor whose shape is wrong. transformers 5 reports its name, its shape and
    the expected shape; transformers 4 reports the name alone."""
    if isinstance(mismatched, str):
        expected = tuple(model.state_dict()[mismatched].shape)
        return mismatched, f"{mismatched} has another shape than config.json says, {expected}"
    key, actual, expected = mismatched
    return key, f"{key} has shape {tuple(actual)}, config.json says {tuple(expected)}"


def _saved_config(name_or_path: Any, arguments: dict[str, Any]) -> Any:
    """The config as a checkpoint holds it, without what a caller changes in it; None where the tensors come
    from elsewhere."""
    if name_or_path is None:
        return None
    where = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    hub = {name: value for name, value in arguments.items() if name in where}
    return AutoConfig.from_pretrained(name_or_path, trust_remote_code=False, **hub)


def _head_name(architecture: str) -> str:
    """What follows "For" in the name of a model's class. Natural Questions counts as question answering,
    which it extends: neither takes the other's checkpoint (`with_answer_types` does)."""
    return architecture.partition("For")[2].replace("NaturalQuestions", "QuestionAnswering")


class PrunedBertModel(PrunedPreTrainedModel):
    """The bare encoder: ids (batch, seqlen) -> last_hidden_state (batch, seqlen, hidden_size).

    Its parts lie where the config's family says. add_pooling_layer: add a pooler, which checkpoints of
    question-answering models do not have. Errors: ValueError for a pooler in a family without one.
    """

    def __init__(self, config: PrunedConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)  # type: ignore[arg-type]
        family = config.family
        self.embeddings = PrunedEmbeddings(config)
        if family.embedding_size(config) != config.hidden_size:
            assert family.projection is not None
            put(self, family.projection, nn.Linear(family.embedding_size(config), config.hidden_size))
        stack, _, list_name = family.layers.rpartition(".")
        if stack:
            put(self, stack, PrunedStack(config, list_name))
        else:
            self.add_module(list_name, pruned_layers(config))
        if family.final_norm is not None:
            eps = family.value(config, "layer_norm_eps")
            norm = nn.LayerNorm(config.hidden_size, eps, bias=family.kind(config).norm_bias)
            put(self, family.final_norm, norm)
        if family.relative_bias is not None:
            table = nn.Embedding(family.relative_bias.buckets, config.num_attention_heads)
            put(self, family.relative_bias.name, table)
        add_relative_embeddings(self, config)
        if add_pooling_layer and not family.has_pooler:
            raise ValueError(f"{family.name} has no pooler: add_pooling_layer is for families with one")
        self.pooler = PrunedPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.get_submodule(self.config.family.embeddings.words)

    def set_input_embeddings(self, value: Any) -> None:
        put(self.embeddings, self.config.family.embeddings.words, value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        head_run: Any = None,
        packed_batch: Any = None,
        **of_decoders: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Compute what the publisher's encoder computes. head_run, packed_batch: arguments of an optimised
        encoder, which are not read here; another thread may restore the encoder between its head's forward
        and this one. of_decoders: arguments of decoders, such as encoder_hidden_states, which stock heads
        pass as None. Errors: TypeError where one of them is set."""
        present_names = [
            name for name, value in of_decoders.items() if value is not None and value is not False
        ]
        if present_names:
            raise TypeError(f"a {type(self).__name__} takes no {', '.join(present_names)}")
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, token_type_ids)
        check_positions(self.config, position_ids)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: the attention never stores its probabilities"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        family = self.config.family
        if family.embedding_size(self.config) != self.config.hidden_size:
            x = self.get_submodule(family.projection)(x)
        additive_mask = None
        if attention_mask is not None:
            check_mask(attention_mask, x.size(0), x.size(1))
            # The lowest finite number rather than -inf, with which a row of padding only would become NaN.
            additive_mask = (attention_mask == 0).to(x.dtype)[:, None, None, :] * torch.finfo(x.dtype).min
        collect = [x] if output_hidden_states else None
        stack, _, list_name = family.layers.rpartition(".")
        by_position = scores_of_layers(self, x.size(1)), relative_states(self)
        if stack:
            x = self.get_submodule(stack)(x, additive_mask, collect, *by_position)
        else:
            x = run_layers(self.get_submodule(list_name), x, additive_mask, collect, *by_position)
        if family.final_norm is not None:
            x = self.get_submodule(family.final_norm)(x)
            if collect is not None:  # as in transformers 5, the last of them is the model's output
                collect[-1] = x
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=apply_pooler(self.pooler, x, attention_mask) if self.pooler is not None else None,
            hidden_states=tuple(collect) if collect else None,
        )
        return returned(output, self.config, return_dict)


class PrunedRobertaModel(PrunedBertModel):
    """The bare RoBERTa encoder: BERT's, with positions counted from the padding index."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"


def family_class(base: type[Any], family: Family, names: dict[str, Any], **members: Any) -> type[Any]:
    """The class of a family that does what BERT's class `base` does; the one in `names` (the globals of the
    module of `base`) where it is there, and otherwise one that is made and put there."""
    name = base.__name__.replace("Bert", family.stem, 1)
    if name not in names:
        members = {
            "__doc__": f"{family.name}'s counterpart of {base.__name__}.",
            "__module__": base.__module__,
            "config_class": PRUNED_CONFIGS[family.pruned_type],
            "base_model_prefix": family.prefix,
            **members,
        }
        names[name] = type(name, (base,), members)
    return names[name]


# The bare encoder of every family.
PRUNED_ENCODERS: dict[Family, type[Any]] = {
    family: family_class(PrunedBertModel, family, globals()) for family in FAMILIES
}
