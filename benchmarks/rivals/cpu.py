"""The runtimes that a user of a CPU could take instead of ours, each at its best honest settings.

All get torch's number of threads, dynamic batch and sequence axes, the exact GELU, and fp32 unless their name
says bfloat16 or int8.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import BertForQuestionAnswering, BertModel

from pruned_ops.checkpoints.export import GRAPH
from pruned_ops.models.stock import model_shape
from rivals.rival import (
    Batch,
    Logits,
    Make,
    Refused,
    Rival,
    Run,
    forward,
    hugging_face,
    hugging_face_eager,
    made_once,
    onnx_graph,
    package,
)

WORKER = Path(__file__).with_name("ctranslate2_worker.py")


def build_cpu_rival(name: str, model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """The runner of one of CPU_RIVALS. Errors: Refused."""
    if model.device.type != "cpu":
        raise Refused(f"{name} is measured on the CPU only: use --device cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return CPU_RIVALS[name].make(model, samples, folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence ONNX Runtime's warnings about every layer whose sizes differ from the first one's."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _arrays(batch: Batch, names: Iterable[str]) -> dict[str, Any]:
    zeros = torch.zeros_like(batch["input_ids"])  # token types, where the graph takes them
    return {name: batch.get(name, zeros).numpy() for name in names}


def hugging_face_bfloat16(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """Hugging Face's forward of the model cast to bfloat16, all of it, whose products are oneDNN's."""
    return forward(copy.deepcopy(model).bfloat16())


def compiled(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """torch.compile by inductor with frozen weights, with which it was as fast or faster everywhere."""
    return _by_inductor(model)


def _by_inductor(model: Any, **options: Any) -> Run:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise Refused("torch.compile needs a C++ compiler, and found none (set CXX)") from None
    # Past the limit of recompilations dynamo would run eagerly and not say so.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return forward(torch.compile(model, dynamic=True, options={"freezing": True, **options}))


def torchao_int8(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """torchao's int8 weights, a scale a channel, and activations quantised as they come, a scale a token; by
    inductor with frozen weights and its own products, of which it takes the fastest (max-autotune).

    Its package is no part of the extra, because transformers imports it wherever it finds it."""
    quantization = package("torchao.quantization", "pip install --no-deps torchao")
    quantised = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of fields that its next versions rename
        quantization.quantize_(quantised, quantization.Int8DynamicActivationInt8WeightConfig(), _has_weights)
    return _by_inductor(quantised, max_autotune=True)


def _has_weights(module: torch.nn.Module, name: str) -> bool:
    """Whether a module is a linear with a weight, which those of a layer without heads have not."""
    return isinstance(module, torch.nn.Linear) and module.weight.numel() > 0


def zentorch(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """AMD's plugin of torch.compile. It is written for AMD's processors, and runs on others."""
    release = torch.__version__.partition("+")[0]
    package("zentorch", f"pip install --no-deps 'zentorch=={release}.*' deprecated wrapt")
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return forward(torch.compile(model, dynamic=True, backend="zentorch"))


def _ort_session(path: str) -> Run:
    ort = package("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads spin while it runs, and stop spinning after: 30 ms of it would slow the runner that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # This fusion makes it slower: a MiniLM-L6 took 1.12 to 1.27 times as long with it, in version 1.32.
    slower, provider = ["SkipLayerNormFusion"], ["CPUExecutionProvider"]
    session = ort.InferenceSession(path, options, providers=provider, disabled_optimizers=slower)
    names = [node.name for node in session.get_inputs()]

    def run(batch: Batch) -> Logits:
        return tuple(map(torch.from_numpy, session.run(None, _arrays(batch, names))))

    return run


def ort(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime with all its graph optimisations."""
    return _ort_session(onnx_graph(model, folder))


def ort_fused(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime after its transformer optimizer, which reads each layer's head count from the graph.

    It is a rival of its own, because its fused attention is faster at some sizes and slower at others.
    """
    optimizer, path = package("onnxruntime.transformers.optimizer"), str(folder / "fused.onnx")
    with _quiet():
        fused = optimizer.optimize_model(onnx_graph(model, folder), model_type="bert", opt_level=0)
    attentions = fused.get_fused_operator_statistics()["Attention"]
    expected = sum(layer.num_heads > 0 for layer in model_shape(model).layers)
    if attentions != expected:
        raise Refused(f"its optimizer fused the attention of {attentions} of {expected} layers with heads")
    fused.save_model_to_file(path)
    return _ort_session(path)


def ort_int8(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """ONNX Runtime with int8 weights, a scale a channel, and activations quantised as they come."""
    quantization, version = package("onnxruntime.quantization"), package("onnxruntime").__version__

    def quantise(partial: Path) -> None:
        # reduce_range would give away a bit that only processors without VNNI need.
        quantization.quantize_dynamic(
            onnx_graph(model, folder), str(partial / GRAPH), per_channel=True, reduce_range=False,
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip

    with _quiet():
        return _ort_session(str(made_once(folder / f"ort-int8-{version}", quantise) / GRAPH))


def _openvino_read(model: Any, folder: Path) -> Any:
    # Not by convert_model, which reports its use to its maker: a benchmark should report to nobody.
    return package("openvino").Core().read_model(onnx_graph(model, folder))


def _openvino_compiled(network: Any) -> Run:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # where the processor has bf16 it would be taken unasked
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = package("openvino").Core().compile_model(network, "CPU", settings).create_infer_request()
    names = [port.any_name for port in network.inputs]

    def run(batch: Batch) -> Logits:
        outputs = request.infer(_arrays(batch, names), share_inputs=True, share_outputs=True)
        return tuple(map(torch.from_numpy, outputs.values()))

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

    These are random ids: the time is that of real questions, the accuracy on them is not known.
    """
    nncf, core = _nncf(), package("openvino")

    def calibrate(partial: Path) -> None:
        network = _openvino_read(model, folder)
        names, kind = [port.any_name for port in network.inputs], nncf.ModelType.TRANSFORMER
        data = nncf.Dataset([_arrays(batch, names) for batch in samples])
        quantised = nncf.quantize(network, data, model_type=kind, subset_size=len(samples))
        core.save_model(quantised, partial / "model.xml", compress_to_fp16=False)

    calibrated = made_once(folder / f"openvino-int8-static-nncf-{nncf.__version__}", calibrate)
    return _openvino_compiled(core.Core().read_model(calibrated / "model.xml"))


def _ctranslate2(compute_type: str) -> Make:
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
    # The converter needs a pooler, which a question-answering model lacks: it gets a random one, which costs
    # one product a sequence.
    loader = package("ctranslate2.converters.transformers").BertLoader()

    def convert(partial: Path) -> None:
        config = copy.deepcopy(model.config)
        config.position_embedding_type = "absolute"  # a field that transformers 5 dropped
        encoder = BertModel(config).eval()
        missing, _ = encoder.load_state_dict(model.base_model.state_dict(), strict=False)
        assert all(name.startswith("pooler.") for name in missing), missing
        spec = loader.get_model_spec(encoder)
        spec.register_vocabulary([str(number) for number in range(model.config.vocab_size)])
        spec.config.unk_token, spec.config.layer_norm_epsilon = "0", model.config.layer_norm_eps
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(str(partial))
        numpy.savez(partial / "head.npz", **{n: t.numpy() for n, t in model.qa_outputs.state_dict().items()})

    return made_once(folder / "ctranslate2", convert)


CPU_RIVALS = {
    "hf": Rival(hugging_face),
    "hf-eager": Rival(hugging_face_eager),
    "hf-bfloat16": Rival(hugging_face_bfloat16, "bfloat16"),
    "compile": Rival(compiled),
    "zentorch": Rival(zentorch),
    "ort": Rival(ort),
    "ort-fused": Rival(ort_fused),
    "openvino": Rival(openvino),
    "ctranslate2": Rival(_ctranslate2("float32")),
    "torchao-int8": Rival(torchao_int8, "int8"),
    "ort-int8": Rival(ort_int8, "int8"),
    "openvino-int8": Rival(openvino_int8, "int8"),
    "openvino-int8-static": Rival(openvino_int8_static, "int8"),
    "ctranslate2-int8": Rival(_ctranslate2("int8"), "int8"),
}
