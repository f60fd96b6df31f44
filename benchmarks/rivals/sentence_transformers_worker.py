"""Runs a backend of sentence-transformers in the Python of its own environment: texts in, vectors out.

Its ONNX and OpenVINO backends need older versions of transformers than ours, and a process of their own keeps
their threads from managing torch's. What is exported and quantised stays in the folder for the next run.
Texts come in by stdin, pickled with a batch size; the vectors (texts, dimensions) go out by stdout, after a
first line of the versions that run.
Usage: PYTHON -P sentence_transformers_worker.py FOLDER BACKEND THREADS LONGEST SAMPLES TEXTS
"""

from __future__ import annotations

import pickle
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The file that each backend runs, in the format's own folder below the model's. {}: the quantisation.
FILES = {
    "onnx": "onnx/model_O3.onnx",
    "onnx-int8": "onnx/model_{}.onnx",
    "openvino": "openvino/openvino_model.xml",
    "openvino-bf16": "openvino/openvino_model.xml",
    "openvino-int8": "openvino/openvino_model_qint8_quantized.xml",
}
# The quantisation of "onnx-int8", as sentence-transformers names it: with VNNI, and without, where products
# of signed and unsigned bytes would saturate.
VNNI, AVX2 = ("qint8", "avx512_vnni"), ("quint8", "avx2")
PACKAGES = (
    "sentence-transformers",
    "transformers",
    "optimum-onnx",
    "optimum-intel",
    "onnxruntime",
    "openvino",
)


def versions() -> dict[str, str]:
    """The versions of the packages that are there."""
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            pass
    return installed


def quantisation() -> tuple[str, str]:
    """The type of the weights and the configuration that suit this processor."""
    import torch

    return VNNI if torch.cpu._is_vnni_supported() else AVX2


def file_of(backend: str) -> str:
    """The file that the backend runs, below the model's folder."""
    return FILES[backend].format("_".join(quantisation()))


def exported(folder: Path, backend: str, samples: int, calibration: Path) -> None:
    """Write the file that the backend runs, as its own documentation says, unless it is there. It comes last
    into the model's folder, when all that it needs is there.

    samples: how many texts of the folder `calibration` the static quantisation of OpenVINO looks at."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import backend as make

    if (folder / file_of(backend)).is_file():
        return
    library, file = backend.partition("-")[0], folder / file_of(backend)
    model = SentenceTransformer(str(folder), device="cpu", backend=library, model_kwargs={"export": True})
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as stage:
        if backend == "onnx":
            make.export_optimized_onnx_model(model, "O3", stage)
        elif backend == "onnx-int8":
            make.export_dynamic_quantized_onnx_model(model, quantisation()[1], stage)
        elif backend in ("openvino", "openvino-bf16"):
            model.save_pretrained(stage)
        else:
            from optimum.intel import OVQuantizationConfig

            make.export_static_quantized_openvino_model(
                model, OVQuantizationConfig(num_samples=samples), stage, dataset_name=str(calibration),
                dataset_config_name="default", dataset_split="train", column_name="text",
            )  # fmt: skip
        file.parent.mkdir(exist_ok=True)
        for part in sorted(Path(stage, library).iterdir(), key=lambda part: part.name == file.name):
            part.replace(file.parent / part.name)


def loaded(folder: Path, backend: str, threads: int, longest: int) -> Any:
    """The model on this backend, which takes at most `longest` tokens of a text."""
    from sentence_transformers import SentenceTransformer

    settings: dict[str, Any] = {"file_name": file_of(backend)}
    if backend.startswith("onnx"):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else its threads spin on, on cores that the runner that is next needs.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        settings |= {"provider": "CPUExecutionProvider", "session_options": options}
    else:
        settings["ov_config"] = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        if backend == "openvino":  # where the processor has bf16, OpenVINO computes in it unless told
            settings["ov_config"]["INFERENCE_PRECISION_HINT"] = "f32"
    library = backend.partition("-")[0]
    model = SentenceTransformer(str(folder), device="cpu", backend=library, model_kwargs=settings)
    model.max_seq_length = longest
    return model


def main(folder: Path, backend: str, threads: int, longest: int, samples: int, calibration: Path) -> None:
    """Pairs of texts and a batch size -> vectors."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # libraries print
    import torch

    torch.set_num_threads(threads)
    exported(folder, backend, samples, calibration)
    model = loaded(folder, backend, threads, longest)
    pickle.dump(versions(), out)
    out.flush()
    while True:
        try:
            texts, batch_size = pickle.load(sys.stdin.buffer)
        except EOFError:  # the benchmark is done
            return
        vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
        pickle.dump(vectors, out, protocol=5)
        out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *(int(number) for number in sys.argv[3:6]), Path(sys.argv[6]))
