"""`attn_implementation="pruned_ops"` puts our attention alone into a model of transformers.

The model itself stays as it is, and padded. Each attention packs its queries, keys and values, computes no
padding, and puts the context back, with 0 at padded positions. `optimize` is faster: with it nothing else is
padded either.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from pruned_ops import ops
from pruned_ops.layers.packing import PackedBatch

NAME = "pruned_ops"


def padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """The mask for `attention`: the ones and zeros (batch, seqlen) themselves, not a matrix for each head."""
    return attention_mask


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """query, key, value (batch, heads, seqlen, head_dim) -> context (batch, seqlen, heads, head_dim).

    Errors: ValueError that names what `ops.attention` does not compute: causal or cross attention, fewer key
    heads, another scaling, dropout, a position bias.
    """
    batch_size, heads, seqlen, head_dim = query.shape
    reason = _refusal(module, query, key, scaling, dropout, others)
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        reason = f"the attention_mask is {shape}, ones and zeros (batch, seqlen) are taken"
    if reason is not None:
        raise ValueError(f"attn_implementation={NAME!r} is encoders' self-attention, for inference: {reason}")
    rows = torch.stack([query, key, value], 2).permute(0, 3, 2, 1, 4)  # (batch, seqlen, 3, heads, head_dim)
    batch = PackedBatch.from_mask(attention_mask, batch_size, seqlen, query.device)
    qkv = batch.pack(rows.reshape(batch_size, seqlen, 3 * heads * head_dim))
    context = ops.attention(qkv.contiguous(), batch.cu_seqlens, batch.max_seqlen, head_dim)
    return batch.unpack(context).view(batch_size, seqlen, heads, head_dim), None


def _refusal(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    scaling: float | None,
    dropout: float,
    others: dict[str, Any],
) -> str | None:
    """Why `ops.attention` does not compute this attention; None if it does."""
    if getattr(module, "is_causal", False) or others.get("is_causal"):
        return "this one is causal"
    if key.shape != query.shape:
        return f"query is {tuple(query.shape)} and key {tuple(key.shape)}"
    if scaling is not None and abs(scaling * query.size(-1) ** 0.5 - 1) > 1e-6:
        return f"scaling is {scaling}, not 1 / sqrt(head_dim)"
    if dropout:
        return f"dropout is {dropout}; call model.eval()"
    for name in ("sliding_window", "softcap", "position_bias", "s_aux"):
        if others.get(name) is not None:
            return f"it has a {name}"
    return None


def refuse_class(kind: type[PreTrainedModel]) -> str | None:
    """Why a model of this class would ignore the name, and run its own attention; None if it asks the
    interface.

    transformers looks at the class's source for this, and only logs a warning."""
    if not REGISTERED:
        return f"it is for transformers 5, and this is transformers {transformers.__version__}"
    if not kind._can_set_attn_implementation():
        return f"{kind.__name__} does not ask for its attention by name, and would run its own"
    return None


def _check(kind: type[PreTrainedModel]) -> None:
    refusal = refuse_class(kind)
    if refusal is not None:
        raise ValueError(
            f"attn_implementation={NAME!r} cannot be used here: {refusal}; for the known encoders, stock or "
            "pruned, there is pruned_ops.optimize(model)"
        )


def _asked_for(model: PreTrainedModel, requested: Any) -> Iterator[PreTrainedModel]:
    """The models in `model`, itself among them, that `set_attn_implementation(requested)` gives our name."""
    inner = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    if requested == NAME:
        yield from inner
    elif isinstance(requested, dict):
        named = [
            getattr(model.config, key) if key else model.config for key in requested if requested[key] == NAME
        ]
        yield from (module for module in inner if any(module.config is config for config in named))


def _refuse_in_silence() -> None:
    """Let transformers ask `_check` wherever it is given our name: as a model is made, and later."""
    transformers_model: Any = PreTrainedModel
    get_correct = transformers_model.get_correct_attn_implementation
    set_implementation = transformers_model.set_attn_implementation

    @functools.wraps(get_correct)
    def get_correct_attn_implementation(
        self: Any, requested_attention: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if requested_attention == NAME:
            _check(type(self))
        return get_correct(self, requested_attention, *args, **kwargs)

    @functools.wraps(set_implementation)
    def set_attn_implementation(self: Any, attn_implementation: Any, *args: Any, **kwargs: Any) -> Any:
        for model in _asked_for(self, attn_implementation):
            _check(type(model))
        return set_implementation(self, attn_implementation, *args, **kwargs)

    transformers_model.get_correct_attn_implementation = get_correct_attn_implementation
    transformers_model.set_attn_implementation = set_attn_implementation


# transformers 4 would accept the name for BERT, but run its own attention. So it is not registered there.
REGISTERED = int(transformers.__version__.split(".")[0]) >= 5
if REGISTERED:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
_refuse_in_silence()
