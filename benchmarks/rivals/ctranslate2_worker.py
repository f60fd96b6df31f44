"""Runs CTranslate2's encoder in a process without torch: batches come in by stdin, logits go out by stdout.

In one process CTranslate2 and torch would share torch's OpenMP library, which then manages more threads than
there are cores and stops spinning between regions: Hugging Face's model took 1.5 times as long there once
CTranslate2 had run.
Usage: python benchmarks/rivals/ctranslate2_worker.py FOLDER COMPUTE_TYPE THREADS
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import ctranslate2
import numpy


def main(folder: Path, compute_type: str, threads: int) -> None:
    """Pairs of ids (batch, seqlen) and lengths (batch,), int32 -> start and end logits (batch, seqlen)."""
    encoder = ctranslate2.Encoder(
        str(folder), device="cpu", compute_type=compute_type, intra_threads=threads, inter_threads=1
    )
    # CTranslate2 has no question-answering head: its one product is numpy's.
    head = numpy.load(folder / "head.npz")
    view = ctranslate2.StorageView.from_array
    while True:
        try:
            ids, lengths = pickle.load(sys.stdin.buffer)
        except EOFError:  # the benchmark is done
            return
        hidden = numpy.asarray(encoder.forward_batch(view(ids), view(lengths)).last_hidden_state)
        logits = hidden @ head["weight"].T + head["bias"]
        pickle.dump((logits[..., 0].copy(), logits[..., 1].copy()), sys.stdout.buffer, protocol=5)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
