"""The padded, trainable layers of the pruned models: plain torch modules with BERT's own parameter names."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pruned_ops.layers.modules import PrunedLinear
from pruned_ops.layers.packing import check_mask
from pruned_ops.models.configuration import PrunedBertConfig, PrunedConfig, PrunedRobertaConfig
from pruned_ops.models.inputs import check_inputs, default_position_ids, is_roberta, returned
from pruned_ops.models.model_card import write_model_card
from pruned_ops.shape import LayerShape


class PrunedEmbeddings(nn.Module):
    """Word, position and token type embeddings, summed and normalised, (batch, seqlen, hidden_size)."""

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.position_embeddings = nn.Embedding(
            config.max_position_embeddings,
            config.hidden_size,
            padding_idx=config.pad_token_id if is_roberta(config) else None,
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

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
        if position_ids is None:
            position_ids = default_position_ids(self.config, input_ids, batch_size, seqlen, source.device)
        if token_type_ids is None:
            token_type_ids = torch.zeros((batch_size, seqlen), dtype=torch.long, device=source.device)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        total = inputs_embeds + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(total + self.position_embeddings(position_ids)))


class PrunedSelfAttention(nn.Module):
    """Multi-head attention with this layer's own number of heads: (batch, seqlen, hidden) -> (.., width)."""

    def __init__(self, config: PrunedConfig, shape: LayerShape) -> None:
        super().__init__()
        self.num_heads, self.head_dim = shape.num_heads, config.head_dim
        width = shape.num_heads * config.head_dim
        self.query = PrunedLinear(config.hidden_size, width)
        self.key = PrunedLinear(config.hidden_size, width)
        self.value = PrunedLinear(config.hidden_size, width)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        if self.num_heads == 0:
            return x.new_zeros(*x.shape[:2], 0)
        heads = (*x.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (
            part(x).view(heads).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout.p if self.training else 0.0
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=additive_mask, dropout_p=dropout
        )
        return context.transpose(1, 2).flatten(2)


class PrunedOutput(nn.Module):
    """LayerNorm(dense(x) + residual), which ends both the attention and the FFN."""

    def __init__(self, config: PrunedConfig, width: int) -> None:
        super().__init__()
        self.dense = PrunedLinear(width, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class PrunedLayerModule(GradientCheckpointingLayer):
    """One layer with BERT's parameter names (attention.self, attention.output, intermediate, output).

    Under gradient checkpointing it keeps its input alone, and is computed again in the backward pass."""

    def __init__(self, config: PrunedConfig, shape: LayerShape) -> None:
        super().__init__()
        width = shape.num_heads * config.head_dim
        self.attention = nn.ModuleDict(
            {"self": PrunedSelfAttention(config, shape), "output": PrunedOutput(config, width)}
        )
        self.intermediate = nn.ModuleDict({"dense": PrunedLinear(config.hidden_size, shape.ffn_width)})
        self.output = PrunedOutput(config, shape.ffn_width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor, additive_mask: Tensor | None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, additive_mask), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class PrunedEncoderModule(nn.Module):
    """The padded, trainable stack of layers; its layers are named `layer.N` as BERT's.

    (`layers.modules.PrunedEncoder` is the stack on packed tokens, for inference.)"""

    def __init__(self, config: PrunedConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(PrunedLayerModule(config, shape) for shape in config.shape.layers)

    def forward(self, x: Tensor, additive_mask: Tensor | None, collect: list[Tensor] | None) -> Tensor:
        for layer in self.layer:
            x = layer(x, additive_mask)
            if collect is not None:
                collect.append(x)
        return x


class PrunedPooler(nn.Module):
    """BERT's pooler, which reads the first position: (batch, seqlen, hidden_size) -> (batch, width)."""

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
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
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
            name_or_path, *args, output_loading_info=True, **kwargs
        )
        faults = cls._loading_faults(model, info)
        if faults and all(cls._is_of_the_head(name) for name in faults):
            saved = _saved_config(name_or_path, kwargs)
            if cls._wants_a_new_head(model, saved):
                cls._renew_head(model, saved, name_or_path, info["missing_keys"])
                faults = {}
        if faults:
            shown = "; ".join([*faults.values()][:8])
            more = f"; and {len(faults) - 8} more" if len(faults) > 8 else ""
            raise ValueError(
                f"the tensors in {name_or_path} are not what its config.json describes: {shown}{more}"
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _loading_faults(cls, model: Any, info: dict[str, Any]) -> dict[str, str]:
        """What is wrong with each tensor, by its name."""
        unexpected = set(info["unexpected_keys"])
        if not cls._has_head(model):  # a bare encoder leaves a head's tensors
            own = f"{cls.base_model_prefix}."
            unexpected = {key for key in unexpected if key.startswith(own) and "pooler." not in key}
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
    def _is_of_the_head(cls, tensor: str) -> bool:
        """Whether a tensor belongs to a head, as the pooler does: question answering has none."""
        return not tensor.startswith(f"{cls.base_model_prefix}.") or "pooler." in tensor

    @classmethod
    def _wants_a_new_head(cls, model: Any, saved: Any) -> bool:
        """Whether a model is asked for whose head the checkpoint of this config cannot have."""
        if not cls._has_head(model) or saved is None or not saved.architectures:
            return False
        if _head_name(saved.architectures[0]) != _head_name(cls.__name__):
            return True
        return saved.num_labels != model.config.num_labels

    @classmethod
    def _renew_head(cls, model: Any, saved: Any, name_or_path: Any, missing: Iterable[str]) -> None:
        """Make everything on top of the encoder new, also what another head has under the same name, and
        take back what was fitted to the old head. (transformers has made new what was missing.)"""
        new = {name.rpartition(".")[0] for name in missing}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{cls.base_model_prefix}."):
                nn.init.normal_(module.weight, std=model.config.initializer_range)
                nn.init.zeros_(module.bias)
                new.add(name)
        model.config.null_score_threshold, model.config.score_calibration = 0.0, None
        warnings.warn(
            f"{name_or_path} is a {saved.architectures[0]} with {saved.num_labels} labels: this "
            f"{cls.__name__} with {model.config.num_labels} has its encoder, and a new, random head to be "
            f"trained: {', '.join(sorted(new))}",
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
    key, found, expected = mismatched
    return key, f"{key} has shape {tuple(found)}, config.json says {tuple(expected)}"


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

    add_pooling_layer: add BERT's pooler, which checkpoints of question-answering models do not have.
    """

    def __init__(self, config: PrunedConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config)
        self.embeddings = PrunedEmbeddings(config)
        self.encoder = PrunedEncoderModule(config)
        self.pooler = PrunedPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.embeddings.word_embeddings = value

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
        """Compute what stock BERT computes. head_run, packed_batch: arguments of an optimised encoder, which
        are not read here; another thread may restore the encoder between its head's forward and this one.
        of_decoders: arguments of decoders, such as encoder_hidden_states, which stock heads pass as None.
        Errors: TypeError where one of them is set."""
        given = [name for name, value in of_decoders.items() if value is not None and value is not False]
        if given:
            raise TypeError(f"a {type(self).__name__} takes no {', '.join(given)}")
        check_inputs(self.config, input_ids, inputs_embeds, position_ids, token_type_ids)
        if output_attentions or (output_attentions is None and self.config.output_attentions):
            raise ValueError(
                "output_attentions is not supported: the attention never stores its probabilities"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        x = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        additive_mask = None
        if attention_mask is not None:
            check_mask(attention_mask, x.size(0), x.size(1))
            # The lowest finite number rather than -inf, with which a row of padding only would become NaN.
            additive_mask = (attention_mask == 0).to(x.dtype)[:, None, None, :] * torch.finfo(x.dtype).min
        collect = [x] if output_hidden_states else None
        x = self.encoder(x, additive_mask, collect)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=self.pooler(x) if self.pooler is not None else None,
            hidden_states=tuple(collect) if collect else None,
        )
        return returned(output, self.config, return_dict)


class PrunedRobertaModel(PrunedBertModel):
    """The bare RoBERTa encoder: BERT's, with positions counted from the padding index."""

    config_class = PrunedRobertaConfig
    base_model_prefix = "roberta"
