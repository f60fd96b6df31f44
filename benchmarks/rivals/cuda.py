"""The runtimes that a user of a GPU could take instead of ours, on the same fp16 weights, with the exact
GELU.

A rival that can be recorded as a CUDA graph is recorded: one graph for each size of a batch, captured before
it is timed, without a mask where nothing is padded. Every runner knows the lengths of a batch on the host.
None of this has run on a GPU yet.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.checkpoints.export import GRAPH
from pruned_ops.layers.packing import PackedBatch
from pruned_ops.models.heads import PrunedBertForQuestionAnswering
from pruned_ops.models.inputs import default_position_ids
from pruned_ops.models.stock import layers_of, model_shape
from pruned_ops.runtime.cuda_graphs import CudaGraphs, Recorder
from rivals.rival import (
    Batch,
    Logits,
    Make,
    Refused,
    Rival,
    Run,
    hugging_face,
    made_once,
    onnx_graph,
    package,
)
from torch_ways import compile_each_size, packed_flash_attention

# qkv (tokens, 3, heads, head_dim), cu_seqlens, the longest sequence -> context (tokens, heads, head_dim).
Attention = Callable[[Tensor, Tensor, int], Tensor]


class SizedBatch(dict[str, Tensor]):
    """A model's inputs, padded on the right. lengths: the tokens of each sequence, known on the host."""

    def __init__(self, inputs: Batch, lengths: Sequence[int]) -> None:
        super().__init__(inputs)
        self.lengths = tuple(lengths)


def packed_batch(batch: Batch) -> PackedBatch:
    """The places of the real tokens; the GPU is waited for only where the host does not know the lengths."""
    mask = batch["attention_mask"]
    batch_size, seqlen = mask.shape
    return PackedBatch.from_mask(mask, batch_size, seqlen, mask.device, getattr(batch, "lengths", None))


class Graphed:
    """Runs a function of tensors on the GPU as a CUDA graph for each size, captured when that size first
    comes. Inputs are copied in, and outputs are valid until the next call.

    recorder: what captures and replays; tests give one that needs no GPU."""

    def __init__(self, device: torch.device, recorder: Recorder | None = None) -> None:
        self._recorder = CudaGraphs(device) if recorder is None else recorder
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], Any]]] = {}

    def __call__(self, work: Callable[..., Any], inputs: Sequence[Tensor], key: Any = None) -> Any:
        key = (key, *(tuple(tensor.shape) for tensor in inputs))
        if key not in self._graphs:
            with torch.inference_mode(False), torch.no_grad():
                held = [tensor.clone() for tensor in inputs]
                self._graphs[key] = held, self._recorder.record(lambda: work(*held))
        held, replay = self._graphs[key]
        with self._recorder.ordered():
            for buffer, tensor in zip(held, inputs, strict=True):
                buffer.copy_(tensor)
            return replay()


def _is_padded(batch: Batch) -> bool:
    """Whether the batch has padding, by the lengths that the host knows; if it knows none, it has."""
    lengths = getattr(batch, "lengths", None)
    return lengths is None or any(length < batch["input_ids"].size(1) for length in lengths)


def padded_logits(model: Any, ids: Tensor, mask: Tensor | None) -> Logits:
    """The padded model's logits, without a look at the mask's values, which would wait for the GPU, and
    without a mask for attention where nothing is padded. (A model's own forward makes one of ones under
    capture and in torch.compile, and then flash attention does not take it.)"""
    base: Any = model.base_model
    if mask is None:
        if isinstance(model, PrunedBertForQuestionAnswering):
            x = base.encoder(base.embeddings(ids, None, None, None), None, None)
        else:
            x = base.encoder(base.embeddings(input_ids=ids), attention_mask=None).last_hidden_state
    elif isinstance(model, PrunedBertForQuestionAnswering):
        x = base.embeddings(ids, None, None, None)
        x = base.encoder(x, (mask == 0).to(x.dtype)[:, None, None, :] * torch.finfo(x.dtype).min, None)
    else:
        output = model(input_ids=ids, attention_mask=mask)
        return output.start_logits, output.end_logits
    return tuple(model.qa_outputs(x).unbind(-1))


def hf_graphed(model: Any, samples: Sequence[Batch], folder: Path, recorder: Recorder | None = None) -> Run:
    """Hugging Face's padded forward, scaled_dot_product_attention, as a CUDA graph a size."""
    graphs = Graphed(model.device, recorder)

    def run(batch: Batch) -> Logits:
        padded = _is_padded(batch)
        inputs = [batch["input_ids"], *([batch["attention_mask"]] if padded else [])]
        return graphs(lambda ids, mask=None: padded_logits(model, ids, mask), inputs)

    return run


def compiled(mode: str) -> Make:
    def make(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
        """torch.compile with its own CUDA graphs, each size compiled for itself: its best."""
        traced = compile_each_size(lambda ids, mask: padded_logits(model, ids, mask), mode)

        def run(batch: Batch) -> Logits:
            torch.compiler.cudagraph_mark_step_begin()
            return traced(batch["input_ids"], batch["attention_mask"] if _is_padded(batch) else None)

        return run

    return make


class PackedTorch:
    """The packed forward by hand in torch's own ops (cuBLAS's GEMMs, its GELU and LayerNorm), around
    somebody's attention for packed sequences."""

    def __init__(self, model: Any, attention: Attention) -> None:
        base = model.base_model
        self.attention, self.shape = attention, model_shape(base)
        tables, self.head, self.eps = base.embeddings, model.qa_outputs, model.config.layer_norm_eps
        self.tables = [tables.word_embeddings, tables.position_embeddings]
        self.type, self.norm = tables.token_type_embeddings.weight[0], tables.LayerNorm
        self.layers = []
        for layer in layers_of(base):
            qkv = [
                torch.cat([getattr(part, name).detach() for part in layer.qkv]) for name in ("weight", "bias")
            ]
            others = (layer.attention_output, layer.attention_norm, layer.up, layer.down, layer.ffn_norm)
            self.layers.append((qkv, *others))

    def __call__(self, ids: Tensor, positions: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Packed ids and positions (tokens,) -> logits (tokens, 2)."""
        word, position = self.tables
        x = self.norm(word(ids) + position(positions) + self.type)
        for qkv, output, first_norm, up, down, second_norm in self.layers:
            heads = F.linear(x, *qkv).view(x.size(0), 3, -1, self.shape.head_dim)
            context = self.attention(heads, cu_seqlens, longest) if heads.numel() else heads[:, 0]
            x = first_norm(output(context.reshape(x.size(0), output.in_features)) + x)
            x = second_norm(down(F.gelu(up(x))) + x)
        return self.head(x)


def packed(attention: Attention, model: Any, recorder: Recorder | None = None) -> Run:
    """PackedTorch as a CUDA graph a size: padding is removed before it, and added again after it."""
    if model.config.model_type not in ("bert", "pruned_bert"):
        raise Refused(f"its packed forward was written for BERT; this is a {model.config.model_type}")
    forward, graphs = PackedTorch(model, attention), Graphed(model.device, recorder)

    def run(batch: Batch) -> Logits:
        ids, rows = batch["input_ids"], packed_batch(batch)
        positions = default_position_ids(model.config, ids, *ids.shape, ids.device)
        inputs = [rows.pack(ids), rows.pack(positions), rows.cu_seqlens]
        longest = rows.max_seqlen
        logits = graphs(lambda *held: forward(*held, longest), inputs, longest)
        return tuple(rows.unpack(part.contiguous()) for part in logits.unbind(-1))

    return run


def torch_varlen(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """torch's own flash attention for packed sequences (`torch.nn.attention.varlen`) and cuBLAS."""

    def attention(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return packed_flash_attention(*qkv.unbind(1), cu_seqlens, longest)

    return packed(attention, model)


def flash_attn(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """flash-attn's own kernel for packed sequences, and cuBLAS."""
    flash = package("flash_attn", "pip install flash-attn")

    def attention(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return flash.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, longest)

    return packed(attention, model)


def tensorrt(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """TensorRT through torch_tensorrt, each size built for itself, in CUDA graphs."""
    tensorrt = package("torch_tensorrt", "pip install torch-tensorrt")
    tensorrt.runtime.set_cudagraphs_mode(True)
    options = {"use_explicit_typing": True, "min_block_size": 1}
    traced = torch.compile(
        lambda ids, mask: padded_logits(model, ids, mask),
        backend="torch_tensorrt", dynamic=False, options=options,
    )  # fmt: skip
    return lambda batch: traced(batch["input_ids"], batch["attention_mask"] if _is_padded(batch) else None)


def ort_cuda(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime's CUDA provider in fp16 after its transformer optimizer, with inputs and outputs on the
    GPU, and a CUDA graph a size."""
    ort = package("onnxruntime", "pip install onnxruntime-gpu")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Refused("this onnxruntime has no CUDAExecutionProvider: pip install onnxruntime-gpu")
    provider = ("CUDAExecutionProvider", {"enable_cuda_graph": "1"})
    session = ort.InferenceSession(_half_graph(model, folder), providers=[provider])
    return OrtGraphs(ort, session, model.device)


def _half_graph(model: Any, folder: Path) -> str:
    """The exported graph, its attentions fused, in fp16. Errors: Refused where they were not all fused."""

    def fuse(partial: Path) -> None:
        single = copy.deepcopy(model).cpu().float()
        exported = onnx_graph(single, folder)
        optimizer = package("onnxruntime.transformers.optimizer", "pip install onnxruntime-gpu onnx")
        fused = optimizer.optimize_model(exported, model_type="bert", opt_level=0, use_gpu=True)
        attentions = fused.get_fused_operator_statistics()["Attention"]
        expected = sum(layer.num_heads > 0 for layer in model_shape(model).layers)
        if attentions != expected:
            raise Refused(
                f"its optimizer fused the attention of {attentions} of {expected} layers with heads"
            )
        fused.convert_float_to_float16(keep_io_types=False)
        fused.save_model_to_file(str(partial / GRAPH))

    return str(made_once(folder / "fused-fp16", fuse) / GRAPH)


class OrtGraphs:
    """Runs an ONNX Runtime session, with buffers for each size that the CUDA graph of this size reads."""

    def __init__(self, ort: Any, session: Any, device: torch.device) -> None:
        self._ort, self._session, self._device = ort, session, device
        self._inputs = [node.name for node in session.get_inputs()]
        self._outputs = [node.name for node in session.get_outputs()]
        self._bound: dict[tuple[int, ...], tuple[Any, Any, dict[str, Tensor], list[Tensor]]] = {}

    def __call__(self, batch: Batch) -> Logits:
        shape = tuple(batch["input_ids"].shape)
        if shape not in self._bound:
            self._bound[shape] = self._bind(shape)
        binding, options, inputs, outputs = self._bound[shape]
        for name in self._inputs:
            if name in batch:
                inputs[name].copy_(batch[name])
        torch.cuda.current_stream(self._device).synchronize()  # ONNX Runtime has a stream of its own
        self._session.run_with_iobinding(binding, options)
        binding.synchronize_outputs()
        return tuple(outputs)

    def _bind(self, shape: tuple[int, ...]) -> tuple[Any, Any, dict[str, Tensor], list[Tensor]]:
        binding, options, place = self._session.io_binding(), self._ort.RunOptions(), self._device.index or 0
        options.add_run_config_entry("gpu_graph_id", str(len(self._bound) + 1))
        inputs = {name: torch.zeros(shape, dtype=torch.int64, device=self._device) for name in self._inputs}
        outputs = [torch.zeros(shape, dtype=torch.float16, device=self._device) for _ in self._outputs]
        for name, buffer in inputs.items():
            binding.bind_input(name, "cuda", place, "int64", shape, buffer.data_ptr())
        for name, buffer in zip(self._outputs, outputs, strict=True):
            binding.bind_output(name, "cuda", place, "float16", shape, buffer.data_ptr())
        return binding, options, inputs, outputs


CUDA_RIVALS = {
    "hf": Rival(hugging_face, "fp16"),
    "hf-graphed": Rival(hf_graphed, "fp16"),
    "varlen": Rival(torch_varlen, "fp16"),
    "flash-attn": Rival(flash_attn, "fp16"),
    "ort-cuda": Rival(ort_cuda, "fp16"),
    "compile-max-autotune": Rival(compiled("max-autotune"), "fp16"),
    "tensorrt": Rival(tensorrt, "fp16"),
}


def build_cuda_rival(name: str, model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """The runner of one of CUDA_RIVALS. Errors: Refused; all but hf need a model on a GPU."""
    rival = CUDA_RIVALS[name]
    if name != "hf" and model.device.type != "cuda":
        raise Refused(f"{name} is measured on a GPU only: use --device cuda")
    folder.mkdir(parents=True, exist_ok=True)
    return rival.make(model, samples, folder)
