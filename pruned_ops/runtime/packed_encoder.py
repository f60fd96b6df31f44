"""PackedEncoder computes an encoder on packed tokens, and takes its place in the model.

The encoder stays the object that it is, so that whatever holds it runs packed: `install` changes its class to
one of OptimisedEncoder, which calls its PackedEncoder, and `remove` changes it back. In between the weights
of its linears are laid out for the kernels, and its own parameters are `ReleasedParameter`s.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

from pruned_ops import ops
from pruned_ops.layers.int8 import DEQUANTIZE
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.layers.released import ReleasedParameter, free, freed_values, placeholder, seal, unseal
from pruned_ops.models.families.known import family_of
from pruned_ops.models.inputs import (
    apply_pooler,
    begins_padded,
    longest_sequence,
    packed_inputs,
    returned,
    without_size,
)
from pruned_ops.models.stock import encoder_class, projection_of, tuple_keeps_pooler
from pruned_ops.runtime.encoder_weights import is_stored_in_int8, laid_out, taken_weights
from pruned_ops.runtime.engine import Engine
from pruned_ops.runtime.int8_losses import Int8Watch, int8_losses
from pruned_ops.runtime.packed_heads import HeadRun, Outputs, PackedHead
from pruned_ops.runtime.replaced import forwards_of, give_back, raise_on_change, replace, replaced_parameters

# Held while an encoder is optimised, moved or restored, in any thread. Forwards do not take it.
CHANGING = RLock()
# A child process begins with no change half done, and with a lock that nobody holds.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=CHANGING.acquire, after_in_parent=CHANGING.release, after_in_child=CHANGING.release
    )


class PackedEncoder(nn.Module):
    """Computes an encoder inside its model: padded in, padded out, packed between.

    It is for inference only. (`layers.modules.PrunedEncoder` are its layers, on packed tokens;
    `models.encoder.PrunedStack` is the padded stack of a pruned model, which can be trained.)
    A forward under way keeps the PackedEncoder that it began with, and its stack is never changed in place,
    whatever other threads do with the model.
    """

    config: Any
    words: Any
    positions: Any
    types: Any
    norm: Any
    pooler: Any

    def __init__(self, original: Any, linear_dtype: str | None = None, keep_fp32: bool = True) -> None:
        """linear_dtype, keep_fp32: `dtype` and `keep_fp32` of `optimize`."""
        super().__init__()
        # `optimize` sets these three: the engine, the heads around this encoder that can run on packed rows,
        # and the class names of all models around it.
        self.engine: Engine | None = None
        self.heads: list[PackedHead] = []
        self.around: list[str] = []
        self.config = original.config
        self.stored_int8 = is_stored_in_int8(original)
        self.linear_dtype = "int8" if self.stored_int8 else linear_dtype
        self.int8, self.keeps_fp32 = self.linear_dtype == "int8", keep_fp32
        self.watch = Int8Watch() if self.int8 else None
        names = family_of(self.config).embeddings
        self.words, self.norm = map(original.embeddings.get_submodule, (names.words, names.norm))
        tables = original.embeddings._modules
        self.positions = tables.get(names.positions) if names.positions is not None else None
        self.types = tables.get(names.token_types)
        self.projection = projection_of(original)
        self.pooler = getattr(original, "pooler", None)
        self._keeps_pooler = tuple_keeps_pooler(original)
        self._set_zeros()
        chosen = None if self.int8 and not self.stored_int8 else ()
        self.encoder = laid_out(original, chosen, self.linear_dtype == "bfloat16", keep_fp32)
        self._reads_positions = self.encoder.kind.by_position is not None
        self._forwards = forwards_of(original)
        self._waiting: list[tuple[nn.Parameter, Tensor]] = []

    def _set_zeros(self) -> None:
        """Make a row of zeros, where the words lie: the table of positions or of token types, or the
        LayerNorm's bias, of a family without them."""
        self.zeros = nn.Parameter(torch.zeros_like(self.words.weight[:1]), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.words.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.words.weight.device

    def lay_out_again(self, original: Any) -> None:
        """Make a new stack, of the weights that the encoder has now."""
        stack = self.encoder
        self._set_zeros()
        self.encoder = laid_out(original, sorted(stack.int8_linears), stack.runs_in_bfloat16, self.keeps_fp32)

    def release(self, original: Any) -> None:
        """Give up the memory of the encoder's own weights that lie in the stack, and refuse writes to all
        that it does not read any more. An error leaves them all as they are."""
        weights = taken_weights(original, self.encoder)
        taken = {parameter: (rows, placeholder(parameter)) for parameter, rows in weights}
        kept = [p for p in replaced_parameters(original) if type(p) is nn.Parameter and p not in taken]
        held = [(parameter, parameter.data) for parameter in (*taken, *kept)]
        try:
            for parameter in kept:
                seal(parameter, None)
            for parameter, (rows, nothing) in taken.items():
                seal(parameter, rows)
                if nothing is not None and not free(parameter, nothing):
                    self._waiting.append((parameter, nothing))
            replace(original)
        except BaseException:
            self._waiting = []
            for parameter, values in held:
                if isinstance(parameter, ReleasedParameter):
                    unseal(parameter, values)
            give_back(original)
            raise

    def release_rest(self) -> None:
        """Give up the memory that ops of other threads, or an autograd graph, still read at `release`."""
        if not CHANGING.acquire(blocking=False):
            return
        try:
            self._waiting = [pair for pair in self._waiting if not free(*pair)]
        finally:
            CHANGING.release()

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
        head_run: HeadRun | None = None,
        packed_batch: PackedBatch | None = None,
        **unsupported: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple[Any, ...]:
        """The encoder's own forward, with 0 at padded positions. ValueError for unsupported arguments.

        head_run: receives the outputs of its head; last_hidden_state and pooler_output then have no rows.
        packed_batch: where the real tokens are, from a caller that knows it; the mask is then not looked at.
        """
        self._check_arguments(without_size(unsupported, input_ids), output_attentions, inputs_embeds)
        self._check_autocast()
        if not torch.compiler.is_compiling():
            for kind, forward in self._forwards:
                if kind.forward is not forward:
                    raise_on_change(kind, "another forward for the class")
        if self._waiting:
            self.release_rest()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        collect: list[Tensor] | None = [] if output_hidden_states else None
        batch, inputs = packed_inputs(
            self.config, self.device, input_ids, attention_mask, token_type_ids, position_ids, packed_batch
        )
        # A caller's own batch is padded on the right, and a head pools by itself.
        is_pooled = self.pooler is not None and head_run is None and packed_batch is None
        mask = None
        if is_pooled and batch.index is not None and begins_padded(attention_mask):
            mask = attention_mask
        with torch.no_grad():
            last = self._last_states(inputs, batch, head_run, collect)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=last,
            pooler_output=apply_pooler(self.pooler, last, mask) if self.pooler is not None else None,
            hidden_states=tuple(batch.unpack(state) for state in collect) if collect else None,
        )
        return returned(output, self.config, return_dict, self._keeps_pooler)

    def _last_states(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head_run: HeadRun | None,
        collect: list[Tensor] | None,
    ) -> Tensor:
        """Run a batch: the padded hidden states, (batch, seqlen, hidden_size). Where a head is to run on the
        rows, `head_run` receives its outputs, and the states have no rows."""
        outputs = self._run(inputs, batch, None if head_run is None else head_run.head, collect)
        if head_run is None:
            assert outputs.rows is not None
            return batch.unpack(outputs.rows)
        head_run.outputs, head_run.batch = outputs, batch
        return torch.empty((0, 1, self.config.hidden_size), dtype=self.dtype, device=self.device)

    def _check_arguments(
        self, unsupported: dict[str, Any], output_attentions: bool | None, inputs_embeds: Tensor | None
    ) -> None:
        """Refuse by name the arguments that are set and that an optimised encoder does not take."""
        names = {name for name, value in unsupported.items() if value is not None and value is not False}
        names -= {"use_cache"}  # which an encoder does without, optimised or not
        if output_attentions or (
            output_attentions is None and getattr(self.config, "output_attentions", False)
        ):
            names.add("output_attentions")
        if names:
            raise ValueError(f"an optimised encoder does not take {', '.join(sorted(names))}")
        if inputs_embeds is not None:
            raise ValueError("an optimised encoder does not take inputs_embeds: it looks up real tokens only")

    def _check_autocast(self) -> None:
        """Refuse autocast to another dtype: the weights were laid out in their own dtype, so that only the
        head would obey it."""
        kind = self.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.dtype:
            dtype = torch.get_autocast_dtype(kind)
            raise ValueError(
                f"autocast asks for {dtype}, and an optimised model computes in its weights' dtype, "
                f"{self.dtype}: call model.to({dtype}) instead"
            )

    def _run(
        self,
        inputs: Sequence[Tensor],
        batch: PackedBatch,
        head: PackedHead | None,
        collect: list[Tensor] | None,
    ) -> Outputs:
        """`compute` by the engine's graphs, where there may be any: on a GPU."""
        if (engine := self.engine) is not None and (engine.recorder or self.device.type == "cuda"):
            if self.encoder.kind.reads_places and len(inputs) == 3:  # a graph reads them in any case
                inputs = (*inputs, torch.arange(batch.tokens, device=self.device) % max(batch.seqlen, 1))
            if head is None or head.in_graph:
                return engine.run(inputs, batch, head, collect)
            rows = engine.run(inputs, batch, None, collect).rows
            assert rows is not None
            return head(rows, batch.cu_seqlens)
        return self.compute(inputs, batch.cu_seqlens, batch.max_seqlen, head, collect)

    def compute(
        self,
        inputs: Sequence[Tensor],
        cu_seqlens: Tensor,
        max_seqlen: int,
        head: PackedHead | None = None,
        collect: list[Tensor] | None = None,
    ) -> Outputs:
        """Packed ids, positions and types, (tokens,) each, and for a bias by position the places in the
        padded batch -> the head's outputs, or without a head the hidden states (tokens, hidden_size). It
        works on the device alone, so that it can be recorded.

        collect: the embedding and each layer's output are appended to it."""
        ids, places = inputs[:3], inputs[3:]
        embedded = self._embed(ids)
        if collect is not None:
            collect.append(embedded)
        positions = None
        if places or self._reads_positions:
            positions = (places[0] if places else inputs[1]).int()
        x = self.encoder.run(embedded, cu_seqlens, max_seqlen, collect, positions)
        if self.watch is not None:
            self.watch.look(self.encoder, embedded, cu_seqlens)
        return Outputs(x, None) if head is None else head(x, cu_seqlens)

    def _embed(self, inputs: Sequence[Tensor]) -> Tensor:
        """Packed ids, positions and types, (tokens,) each -> their embedding (tokens, hidden_size)."""
        ids, places, types = inputs
        embedded = ops.embed_layer_norm(
            ids,
            torch.zeros_like(ids) if self.positions is None else places,  # the one row of a table of zeros
            types,
            self.words.weight,
            self.zeros if self.positions is None else self.positions.weight,
            self.zeros if self.types is None else self.types.weight,
            self.norm.weight,
            self.zeros[0] if self.norm.bias is None else self.norm.bias,
            self.norm.eps,
        )
        if self.projection is None:
            return embedded
        return F.linear(embedded, self.projection.weight, self.projection.bias)

    def losses_on_random_tokens(self) -> dict[str, float]:
        """What int8 takes from each linear that runs in it, by its name (see `int8_losses`). The channels
        that are large in every text are large on random tokens too."""
        shape, stack = (2, min(32, longest_sequence(self.config))), self.encoder
        generator = torch.Generator("cpu").manual_seed(0)
        ids = torch.randint(self.config.vocab_size, shape, generator=generator, device="cpu")
        batch, inputs = packed_inputs(self.config, self.device, ids)
        return int8_losses(stack, self._embed(inputs[:3]), batch.lengths, stack.int8_linears, weights=True)


class OptimisedEncoder(nn.Module):
    """The part of an optimised encoder's class that comes before its own class.

    packed: what computes it. It is no child of the encoder, which keeps its own modules and their names."""

    is_optimised = True  # see stock.OPTIMISED
    packed: PackedEncoder
    required_grad: list[nn.Parameter]
    modes: list[tuple[nn.Module, bool]]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("config", "pooler", *self._modules) and getattr(self, name, None) is not value:
            raise RuntimeError(
                f"an optimised encoder would go on with the {name} that it was optimised with: call "
                "pruned_ops.restore(model) before setting another"
            )
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> Any:
        """Stay in evaluation mode. Errors: RuntimeError for `train(True)`."""
        if mode:
            raise RuntimeError(
                "an optimised model is inference-only: call pruned_ops.restore(model) before training"
            )
        return super().train(False)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "an optimised model holds its weights in another layout: call pruned_ops.restore(model) before "
            "loading weights into it"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move or cast the weights, and lay them out again. An error leaves the plain encoder behind."""
        with CHANGING:
            packed = self.packed
            if packed.linear_dtype is not None and not _stays(fn(packed.zeros[:0])):
                restoring = "call pruned_ops.restore(model) before moving or casting it"
                way_out = DEQUANTIZE if packed.stored_int8 else restoring
                raise RuntimeError(
                    f"this model runs in {packed.linear_dtype}, on a CPU, beside float32 weights: {way_out}"
                )
            if packed.engine is not None:
                packed.engine.invalidate()  # its graphs read the weights at their old place, and hold memory
            _give_back(self)
            try:
                super()._apply(fn, *args, **kwargs)
                with torch.inference_mode(False):
                    packed.lay_out_again(self)
                    packed.release(self)
            except BaseException:
                remove(self)
                raise
        return self


def _stays(moved: Tensor) -> bool:
    return moved.dtype == torch.float32 and moved.device.type == "cpu"


_OPTIMISED: dict[type[Any], type[Any]] = {}


def _optimised_class(encoder: type[Any]) -> type[Any]:
    """The class of an optimised encoder. It bears the encoder's own name, which saved configs hold."""
    if encoder not in _OPTIMISED:
        qualified = f"Optimised{encoder.__name__}"
        members = {"__module__": __name__, "__qualname__": qualified, "forward": _forward_of(encoder)}
        _OPTIMISED[encoder] = type(encoder.__name__, (OptimisedEncoder, encoder), members)
        globals()[qualified] = _OPTIMISED[encoder]  # where pickle looks for it
    return _OPTIMISED[encoder]


def _forward_of(encoder: type[Any]) -> Callable[..., Any]:
    """The forward of an optimised encoder. It takes positional arguments in the order of the encoder's own,
    and shows that one's signature, by which callers choose what they give."""
    signature = inspect.signature(encoder.forward)
    names = tuple(signature.parameters)[1:]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """See `PackedEncoder.forward`."""
        packed = self.__dict__.get("packed")
        if packed is None:  # another thread has restored it since this was called
            return type(self).forward(self, *args, **kwargs)
        return packed(**dict(zip(names, args, strict=False)), **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward


def __getattr__(name: str) -> Any:
    """The class of an optimised encoder, where a pickle names it before such a model was optimised here."""
    encoder = encoder_class(name.removeprefix("Optimised")) if name.startswith("Optimised") else None
    if encoder is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _optimised_class(encoder)


def optimised_encoders(model: nn.Module) -> list[Any]:
    """The encoders inside `model`, or `model` itself, that run packed."""
    return [module for module in model.modules() if isinstance(module, OptimisedEncoder)]


def packed_encoders(model: nn.Module) -> list[PackedEncoder]:
    """What computes the encoders inside `model` that run packed."""
    return [encoder.packed for encoder in optimised_encoders(model)]


def install(encoder: Any, packed: PackedEncoder) -> None:
    """Let `packed` compute the encoder from now on. Its weights stay where they are: see `release`."""
    encoder.__dict__["required_grad"] = [
        parameter
        for parameter in encoder.parameters()
        if parameter.requires_grad and not parameter.is_inference()
    ]
    encoder.__dict__["modes"] = [(module, module.training) for module in encoder.modules()]
    encoder.__dict__["packed"] = packed
    encoder.__class__ = _optimised_class(type(encoder))
    for parameter in encoder.required_grad:
        parameter.requires_grad_(False)
    encoder.eval()


def remove(encoder: Any) -> None:
    """Undo `install` and `release`: give the encoder its own weights again, on the device and in the dtype
    used last. An error leaves it optimised."""
    if encoder.packed.engine is not None:
        encoder.packed.engine.invalidate()
    _give_back(encoder)
    encoder.__class__ = type(encoder).__bases__[1]  # after OptimisedEncoder
    for parameter in encoder.__dict__.pop("required_grad"):
        parameter.requires_grad_(True)
    for module, training in encoder.__dict__.pop("modes"):
        module.training = training
    encoder.__dict__.pop("packed").engine = None  # each holds the other, and with it what is laid out


def _give_back(encoder: Any) -> None:
    """Give an optimised encoder's parameters their values again. All of them are made before the first is."""
    waiting = {parameter for parameter, _ in encoder.packed._waiting}
    released = [parameter for parameter in encoder.parameters() if isinstance(parameter, ReleasedParameter)]
    values = [None if parameter in waiting else freed_values(parameter) for parameter in released]
    for parameter, value in zip(released, values, strict=True):
        unseal(parameter, value)
    give_back(encoder)
    encoder.packed._waiting = []
