"""Runs llama.cpp in the Python of its own environment: texts in, vectors out.

The checkpoint of a BERT embedder is written as GGUF first, unless it is there: with the package gguf's own
tables of tensor names, all matrices in the type that is asked for, and vectors in fp32. Batches are of texts
of like lengths; llama.cpp computes each sequence's attention over its whole batch, and so it is fastest with
small ones. See the worker of sentence-transformers for what is said over the pipes.
Usage: PYTHON -P benchmarks/rivals/llama_cpp_worker.py FOLDER TYPE THREADS LONGEST
"""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "q8_0": gguf.GGMLQuantizationType.Q8_0,
}
# A batch of more tokens is cut, whatever the number of its texts.
MOST_TOKENS = 4096


def written(folder: Path, kind: str) -> Path:
    """The checkpoint in a folder as a GGUF file of this type, beside it. It has its name when it is whole."""
    path = folder / f"model-{kind}.gguf"
    if path.is_file():
        return path
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(str(partial), "bert")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    _add_vocabulary(writer, folder, config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in _tensors(folder):
        target = names.get_name(name.removeprefix("bert."), try_suffixes=(".weight", ".bias"))
        if target is None:  # the pooler's, which embeddings do not need
            continue
        # llama.cpp adds positions and token types, and takes both in fp32 alone.
        is_rounded = tensor.ndim == 2 and not target.startswith(("position_embd", "token_types"))
        stored = TYPES[kind] if is_rounded else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.astype(np.float32), stored)
        writer.add_tensor(target, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)
    return path


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """The checkpoint's tensors by name. Its format is little: 8 bytes of length, a JSON head, the data."""
    with (folder / "model.safetensors").open("rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    for name, entry in head.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            first, last = entry["data_offsets"]
            yield name, np.frombuffer(data[first:last], np.float32).reshape(entry["shape"])


def _add_vocabulary(writer: Any, folder: Path, config: dict[str, Any]) -> None:
    """WordPiece as llama.cpp has it: a piece that begins a word has a mark, one that goes on has none."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([
        piece if piece in special else piece[2:] if piece.startswith("##") else f"\u2581{piece}"
        for piece in pieces
    ])  # fmt: skip
    kinds = gguf.TokenType
    writer.add_token_types([kinds.CONTROL if piece in special else kinds.NORMAL for piece in pieces])
    writer.add_bos_token_id(vocabulary["[CLS]"])
    writer.add_sep_token_id(vocabulary["[SEP]"])
    writer.add_eos_token_id(vocabulary["[SEP]"])
    writer.add_pad_token_id(vocabulary["[PAD]"])
    writer.add_unk_token_id(vocabulary["[UNK]"])
    writer.add_mask_token_id(vocabulary["[MASK]"])


class Embedder:
    """A model of llama.cpp: texts -> vectors of length 1."""

    def __init__(self, path: Path, threads: int, longest: int) -> None:
        self._longest = longest
        self._model = llama_cpp.Llama(
            str(path), embedding=True, n_ctx=MOST_TOKENS, n_batch=MOST_TOKENS, n_ubatch=MOST_TOKENS,
            n_threads=threads, n_threads_batch=threads, flash_attn=True, verbose=False,
        )  # fmt: skip
        self._context = self._model.ctx
        self._batch = llama_cpp.llama_batch_init(MOST_TOKENS, 0, 1)
        self._dimension = self._model.n_embd()

    def encode(self, texts: Sequence[str], batch_size: int) -> Any:
        """The vectors (texts, dimensions)."""
        tokens = [self._tokens(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda place: -len(tokens[place]))
        vectors = np.empty((len(texts), self._dimension), dtype=np.float32)
        for places in _cut(order, tokens, batch_size):
            vectors[places] = self._computed([tokens[place] for place in places])
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def _tokens(self, text: str) -> list[int]:
        """A text's tokens; of one that is too long the first ones, and the last, which ends it."""
        tokens = self._model.tokenize(text.encode(), add_bos=True, special=False)
        return tokens if len(tokens) <= self._longest else [*tokens[: self._longest - 1], tokens[-1]]

    def _computed(self, sequences: Sequence[Sequence[int]]) -> Any:
        batch, place = self._batch, 0
        for number, tokens in enumerate(sequences):
            for position, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, number
                batch.logits[place] = 1
                place += 1
        batch.n_tokens = place
        if llama_cpp.llama_encode(self._context, batch):
            raise RuntimeError("llama.cpp did not compute a batch")
        rows = [llama_cpp.llama_get_embeddings_seq(self._context, i) for i in range(len(sequences))]
        return np.stack([np.ctypeslib.as_array(row, (self._dimension,)) for row in rows])


def _cut(order: Sequence[int], tokens: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """The places in batches of so many texts, and of MOST_TOKENS tokens."""
    places: list[int] = []
    total = 0
    for place in order:
        if places and (len(places) == batch_size or total + len(tokens[place]) > MOST_TOKENS):
            yield places
            places, total = [], 0
        places.append(place)
        total += len(tokens[place])
    if places:
        yield places


def versions() -> dict[str, str]:
    """The versions of what runs; a llama-cpp-python that was built by hand has only its own."""
    try:
        return {"llama-cpp-python": version("llama-cpp-python")}
    except PackageNotFoundError:
        return {"llama-cpp-python": llama_cpp.__version__}


def main(folder: Path, kind: str, threads: int, longest: int) -> None:
    """Pairs of texts and a batch size -> vectors."""
    out, sys.stdout = sys.stdout.buffer, sys.stderr  # the library prints
    model = Embedder(written(folder, kind), threads, longest)
    pickle.dump(versions(), out)
    out.flush()
    while True:
        try:
            texts, batch_size = pickle.load(sys.stdin.buffer)
        except EOFError:  # the benchmark is done
            return
        pickle.dump(model.encode(texts, batch_size), out, protocol=5)
        out.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
