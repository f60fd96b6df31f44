"""Runs fastembed in the Python of its own environment: texts in, vectors out.

fastembed takes all-MiniLM-L6-v2 from a folder where one is named, as ONNX with the tokenizer's files; the
graph is the one that the worker of sentence-transformers exported. See there for what is said over the pipes.
Usage: PYTHON -P benchmarks/rivals/fastembed_worker.py FOLDER THREADS
"""

from __future__ import annotations

import pickle
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from fastembed import TextEmbedding

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


def main(folder: Path, threads: int) -> None:
    """Pairs of texts and a batch size -> vectors."""
    model = TextEmbedding(MODEL, threads=threads, specific_model_path=str(folder))
    out = sys.stdout.buffer
    pickle.dump({name: version(name) for name in ("fastembed", "onnxruntime")}, out)
    out.flush()
    while True:
        try:
            texts, batch_size = pickle.load(sys.stdin.buffer)
        except EOFError:  # the benchmark is done
            return
        pickle.dump(np.stack(list(model.embed(texts, batch_size=batch_size))), out, protocol=5)
        out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
