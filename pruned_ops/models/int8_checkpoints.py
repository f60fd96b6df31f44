"""Checkpoints whose linears are stored in int8: what their config.json says, and how transformers loads them.

Importing this registers the format with transformers, so that `from_pretrained` makes an `Int8Linear` for
every linear that the config names, and reads its int8 weight and scales from the file. The fp32 weights are
never made.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pruned_ops.files import shown
from pruned_ops.layers.int8 import DEQUANTIZE, Int8Linear
from pruned_ops.models.stock import OPTIMISED

METHOD = "pruned_ops_int8"


@register_quantization_config(METHOD)
class Int8Config(QuantizationConfigMixin):
    """`quantization_config` in the config.json of such a checkpoint.

    linears: the names of the linears that are stored in int8, from the encoder on. measured: what
    `pruned-ops quantize` measured before it wrote the checkpoint; it is for readers, and nothing uses it.
    Errors: ValueError for anything but a list of names."""

    def __init__(
        self, linears: Sequence[str] = (), measured: Mapping[str, Any] | None = None, **unknown: Any
    ) -> None:
        if isinstance(linears, str) or not all(isinstance(name, str) for name in linears):
            raise ValueError(f"quantization_config.linears is {shown(linears)}; a list of names is needed")
        self.quant_method: Any = METHOD
        self.linears = list(linears)
        if measured is not None:
            self.measured = dict(measured)


@register_quantizer(METHOD)
class Int8Quantizer(HfQuantizer):
    """What transformers asks while it loads and saves such a checkpoint."""

    requires_calibration = (
        True  # so that a model in fp32 is refused: `optimize` or `quantize` makes int8 of it
    )

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *arguments: Any, **settings: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        """Put an empty `Int8Linear` in the place of every linear that the config names.

        Errors: ValueError for a name that is no linear of this model."""
        encoder = getattr(model, model.base_model_prefix, model) if model.base_model_prefix else model
        for name in self.quantization_config.linears:  # type: ignore[attr-defined]
            try:
                linear = encoder.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"config.json says that {shown(name)} is stored in int8, and {type(model).__name__} has "
                    "no such linear"
                )
            with torch.device(linear.weight.device):
                has_bias = linear.bias is not None
                encoder.set_submodule(name, Int8Linear(linear.in_features, linear.out_features, has_bias))
        return model

    def _process_model_after_weight_loading(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        return model

    def _dequantize(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        """Put a plain linear in the place of every `Int8Linear`; `model.dequantize()` calls it.

        Errors: RuntimeError for an optimised model, which would go on with the int8 weights."""
        if any(getattr(type(module), OPTIMISED, False) for module in model.modules()):
            raise RuntimeError(f"an optimised model would go on with its int8 weights: {DEQUANTIZE}")
        for name, module in [*model.named_modules()]:
            if isinstance(module, Int8Linear):
                model.set_submodule(name, module.to_linear())
        return model

    def get_state_dict_and_metadata(self, model: Any, *arguments: Any, **settings: Any) -> Any:
        """What `save_pretrained` writes of a model that was loaded from such a checkpoint."""
        return halved(model.state_dict()), {}


def dequantised(model: Any) -> Any:
    """A copy, with plain fp32 linears, of a model that was loaded from int8 weights: it computes what the
    file says, without rounding activations. Any other model is returned as it is."""
    return copy.deepcopy(model).dequantize() if getattr(model, "is_quantized", False) else model


def halved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in half the bytes: fp32 matrices that fp16 holds exactly, in fp16. Loading makes them
    fp32 again. Names that share one matrix, as a masked language model's embeddings and decoder, share the
    new one, so that it is stored once."""
    halves: dict[Any, Tensor] = {}
    for tensor in state.values():
        place = _place(tensor)
        if place not in halves:
            halves[place] = _exactly_half(tensor)
    return {name: halves[_place(tensor)] for name, tensor in state.items()}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same elements in memory, and for no others of one state."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _exactly_half(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.float32 or tensor.dim() != 2:
        return tensor
    half = tensor.half()
    return half if torch.equal(half.float(), tensor) else tensor
