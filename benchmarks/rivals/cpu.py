"""The runtimes that a user would take instead of ours, each at its best honest settings, on the same weights.

A rival takes a question-answering model and returns a runner (a padded batch -> start and end logits), or
raises `Refused` with a sentence that says why it cannot. All get torch's number of threads, dynamic batch and
sequence axes, fp32 unless their name says int8, and the exact GELU. Batches are right-padded.
"""

from __future__ import annotations

import copy
import importlib
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertForQuestionAnswering, BertModel

from pruned_ops.checkpoints.export import GRAPH, export_onnx
from pruned_ops.models.stock import model_shape

Batch = dict[str, Tensor]
Logits = tuple[Tensor, ...]
Run = Callable[[Batch], Logits]
# What two fp32 runtimes may differ by, in logits, at real positions. Theirs is rounding: about 1e-5.
TOLERANCE = 1e-3
WORKER = Path(__file__).with_name("ctranslate2_worker.py")


class Refused(Exception):
    """A rival cannot run this model here; the message is the sentence that says why."""


class NotInstalled(Refused):
    """The rival's package is not there."""


@dataclass(frozen=True)
class Rival:
    """make: model, sample batches and a folder for its files -> runner."""

    make: Callable[[Any, Sequence[Batch], Path], Run]
    precision: str = "fp32"
    cuda: bool = False


def build(name: str, model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """The runner of one rival on the model's device. Errors: Refused."""
    rival = RIVALS[name]
    if model.device.type != "cpu" and not rival.cuda:
        raise Refused(f"{name} is measured on the CPU only: use --device cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return rival.make(model, samples, folder)


def compared(run: Run, reference: Run, samples: Sequence[Batch], precision: str) -> dict[str, float]:
    """How far a runner's logits are from the reference's at real positions, over the sample batches.

    Errors: ValueError where an fp32 runner is off by more than TOLERANCE: its time would be worth nothing.
    """
    found, expected = [], []
    with torch.inference_mode():
        for batch in samples:
            real = batch["attention_mask"].bool()
            # Cloned: a runner may return views of memory that its next call writes.
            found += [logits.clone()[real] for logits in run(batch)]
            expected += [logits[real] for logits in reference(batch)]
    ours, theirs = torch.cat(found).float(), torch.cat(expected).float()
    error = (ours - theirs).abs().max().item()
    if precision == "fp32" and not error <= TOLERANCE:
        raise ValueError(f"its logits differ from Hugging Face's by {error:.2e}, more than {TOLERANCE:g}")
    return {"max_error": error, "cosine": F.cosine_similarity(ours, theirs, dim=0).item()}


def package(name: str, remedy: str = 'pip install -e ".[bench]"') -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"{name} cannot be imported ({error}): {remedy}") from error


def _onnx(model: Any, folder: Path) -> str:
    package("onnx")
    return str(folder / GRAPH if (folder / GRAPH).exists() else export_onnx(model, folder, overwrite=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ONNX Runtime's warnings about every layer whose sizes differ from the first one's."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _arrays(batch: Batch, names: Iterable[str]) -> dict[str, Any]:
    zeros = torch.zeros_like(batch["input_ids"])  # token types, where the graph takes them
    return {name: batch.get(name, zeros).numpy() for name in names}


def hf(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """Hugging Face's forward as it is: eager, scaled_dot_product_attention, padded."""

    def run(batch: Batch) -> Logits:
        output = model(**batch)
        return output.start_logits, output.end_logits

    return run


def compiled(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """torch.compile by inductor; on the CPU with frozen weights, which was as fast or faster everywhere."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise Refused("torch.compile needs a C++ compiler, and found none (set CXX)") from None
    # Past the limit of recompilations dynamo would run eagerly and not say so.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    options: dict[str, Any] = {"freezing": True} if model.device.type == "cpu" else {}
    return hf(torch.compile(model, dynamic=True, options=options), samples, folder)


def _ort_session(path: str) -> Run:
    ort = package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin while it runs, and stop spinning after: 30 ms of it would slow the runner that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Its fused kernel is the slower one: 1.12 to 1.27 times the time of a MiniLM-L6, in 1.32.
    slower, provider = ["SkipLayerNormFusion"], ["CPUExecutionProvider"]
    session = ort.InferenceSession(path, options, providers=provider, disabled_optimizers=slower)
    names = [one.name for one in session.get_inputs()]

    def run(batch: Batch) -> Logits:
        return tuple(map(torch.from_numpy, session.run(None, _arrays(batch, names))))

    return run


def ort(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime with all its graph optimisations."""
    return _ort_session(_onnx(model, folder))


def ort_fused(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime after its transformer optimizer, which reads each layer's head count from the graph.

    A rival of its own: its fused attention is faster at some sizes and slower at others.
    """
    optimizer, path = package("onnxruntime.transformers.optimizer"), str(folder / "fused.onnx")
    with _quiet():
        fused = optimizer.optimize_model(_onnx(model, folder), model_type="bert", opt_level=0)
    attentions = fused.get_fused_operator_statistics()["Attention"]
    expected = sum(layer.num_heads > 0 for layer in model_shape(model).layers)
    if attentions != expected:
        raise Refused(f"its optimizer fused the attention of {attentions} of {expected} layers with heads")
    fused.save_model_to_file(path)
    return _ort_session(path)


def ort_int8(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime with int8 weights, a scale a channel, and activations quantised as they come."""
    quantization, path = package("onnxruntime.quantization"), str(folder / "int8.onnx")
    weights = quantization.QuantType.QInt8
    # reduce_range would give away a bit that only processors without VNNI need.
    with _quiet():
        quantization.quantize_dynamic(
            _onnx(model, folder), path, per_channel=True, reduce_range=False, weight_type=weights
        )
    return _ort_session(path)


def _openvino_read(model: Any, folder: Path) -> Any:
    # Not by convert_model, which reports its use to its maker: a benchmark should report to nobody.
    return package("openvino").Core().read_model(_onnx(model, folder))


def _openvino_compiled(network: Any) -> Run:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bf16 it would be taken unasked
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = package("openvino").Core().compile_model(network, "CPU", settings).create_infer_request()
    names = [port.any_name for port in network.inputs]

    def run(batch: Batch) -> Logits:
        found = request.infer(_arrays(batch, names), share_inputs=True, share_outputs=True)
        return tuple(map(torch.from_numpy, found.values()))

    return run


def openvino(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """OpenVINO's CPU plugin, for latency."""
    return _openvino_compiled(_openvino_read(model, folder))


def _nncf() -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # its switch against reporting its use
    nncf = package("nncf")
    nncf.set_log_level(logging.ERROR)
    return nncf


def openvino_int8(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """OpenVINO with int8 weights by NNCF, and activations quantised as they come: no calibration."""
    nncf, network = _nncf(), _openvino_read(model, folder)
    return _openvino_compiled(nncf.compress_weights(network, mode=nncf.CompressWeightsMode.INT8_SYM))


def openvino_int8_static(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """OpenVINO with int8 weights and activations by NNCF, calibrated on the sample batches.

    Those are random ids: the time is what it would be, the accuracy on real questions is not known.
    """
    nncf, network = _nncf(), _openvino_read(model, folder)
    names, kind = [port.any_name for port in network.inputs], nncf.ModelType.TRANSFORMER
    data = nncf.Dataset([_arrays(batch, names) for batch in samples])
    return _openvino_compiled(nncf.quantize(network, data, model_type=kind, subset_size=len(samples)))


def _ctranslate2(compute_type: str) -> Callable[[Any, Sequence[Batch], Path], Run]:
    def make(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
        """CTranslate2, in a process of its own (ctranslate2_worker.py says why); the pipe's time counts."""
        package("ctranslate2")
        saved = _ctranslate2_saved(model, folder)
        command = [sys.executable, str(WORKER), str(saved), compute_type, str(torch.get_num_threads())]
        # One thread for numpy: a second pool of threads would only be in the way of the first.
        environment, pipe = os.environ | {"OPENBLAS_NUM_THREADS": "1"}, subprocess.PIPE
        # It ends when its stdin does.
        worker: Any = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)

        def run(batch: Batch) -> Logits:
            lengths = batch["attention_mask"].sum(1)
            pickle.dump((batch["input_ids"].int().numpy(), lengths.int().numpy()), worker.stdin, protocol=5)
            worker.stdin.flush()
            return tuple(map(torch.from_numpy, pickle.load(worker.stdout)))

        return run

    return make


def _ctranslate2_saved(model: Any, folder: Path) -> Path:
    if type(model) is not BertForQuestionAnswering:
        raise Refused(
            f"CTranslate2 has one head count for all layers of an encoder, and its converter takes stock "
            f"BERT alone: a {type(model).__name__} does not load"
        )
    path = folder / "ctranslate2"
    if path.exists():
        return path
    loader = package("ctranslate2.converters.transformers").BertLoader()
    # The converter wants a pooler, which question answering has not: a random one, a product a sequence.
    config = copy.deepcopy(model.config)
    config.position_embedding_type = "absolute"  # a field that transformers 5 dropped
    encoder = BertModel(config).eval()
    lacking, _ = encoder.load_state_dict(model.base_model.state_dict(), strict=False)
    assert all(name.startswith("pooler.") for name in lacking), lacking
    spec = loader.get_model_spec(encoder)
    spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
    spec.config.unk_token, spec.config.layer_norm_epsilon = "0", model.config.layer_norm_eps
    spec.validate()
    spec.optimize(quantization=None)
    partial = folder / "ctranslate2.partial"
    partial.mkdir(exist_ok=True)
    spec.save(str(partial))
    numpy.savez(partial / "head.npz", **{n: t.numpy() for n, t in model.qa_outputs.state_dict().items()})
    return partial.rename(path)


RIVALS = {
    "hf": Rival(hf, cuda=True),
    "compile": Rival(compiled, cuda=True),
    "ort": Rival(ort),
    "ort-fused": Rival(ort_fused),
    "openvino": Rival(openvino),
    "ctranslate2": Rival(_ctranslate2("float32")),
    "ort-int8": Rival(ort_int8, "int8"),
    "openvino-int8": Rival(openvino_int8, "int8"),
    "openvino-int8-static": Rival(openvino_int8_static, "int8"),
    "ctranslate2-int8": Rival(_ctranslate2("int8"), "int8"),
}
