"""What pruning to a measured speed loses on tasks other than question answering, beside a dense control.

One encoder is fine-tuned for each task (an embedder is taken as it is), pruned to the asked speed, and
trained on for so many minutes, distilled from the dense model. The control is the dense model, trained on for
the same minutes with the same teacher. Both, and the pruned model in int8, are scored on the evaluation file,
which nothing was chosen on. Speeds are those of the batches that the model was pruned for.

Every training is a command, which is printed. A study that was stopped goes on with the same command:
finished steps are folders, and a pruning run resumes.
Usage: python benchmarks/study_tasks.py --data FOLDER --model ENCODER --minutes 30
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils import logging

import harness
from embedding_tasks import records
from harness import Row, read_rows
from option_types import above
from presentation import table
from pruned_ops import optimize
from pruned_ops.checkpoints.loading import load_tokenizer
from pruned_ops.files import digest, write_whole
from pruned_ops.measure.comparison import compare
from pruned_ops.measure.latency import LatencyTable
from pruned_trainer.cli import parse
from pruned_trainer.jobs.settings import make_task
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.task import Task
from pruned_trainer.tasks.texts.retrieval import Retrieval
from study.records import one_in

# Of the timing, on evenly spread ones of the batches that a model was pruned for.
ROUNDS, BATCHES = 9, 4
CUT = ("--max-length", "256")
# The columns of which texts without labels are made, those of one text together.
TEXTS = (("text_a",), ("text_b",), ("title", "text"))
CORPUS = "corpus.jsonl.gz"


@dataclass(frozen=True)
class Case:
    """A task on its data. folder, suffix: of its files train, validation and eval. options: what every
    command takes. score: the key of its score. epochs: of the fine-tuning; None for a model that is pruned as
    it comes, on texts without labels. speedups: what is asked for, a row each. models: the folder of the case
    whose models are scored here, where this one trains none. every: one in so many questions of a SQuAD file
    is scored. documents: how many of a corpus are searched, those that answer a question among them."""

    name: str
    folder: str
    suffix: str
    options: tuple[str, ...]
    score: str
    epochs: float | None = None
    speedups: tuple[float, ...] = (2.0,)
    models: str | None = None
    every: int = 1
    documents: int | None = None

    @property
    def trained_in(self) -> str:
        return self.models or self.folder


CASES = (
    Case("sentiment (SST-2)", "sst2", "jsonl.gz", ("--task", "text-classification"), "accuracy", 1.0),
    Case("inference (SNLI)", "snli", "jsonl.gz", ("--task", "pair-classification"), "accuracy", 4.0),
    Case(
        "entities (WNUT 2017)", "wnut17", "jsonl.gz",
        ("--task", "token-classification", "--label-column", "tags"), "entity_f1", 8.0,
    ),
    Case("reranking (SQuAD)", "squad2", "json", ("--task", "reranking"), "mrr", 0.03, every=10),
    Case(
        "similarity (STS-B), no labels", "stsb", "jsonl.gz", ("--task", "embedding"), "spearman",
        speedups=(2.0, 3.0),
    ),
    Case(
        "retrieval (SciFact, 1,500 abstracts), no labels", "scifact", "jsonl.gz",
        ("--task", "embedding", "--corpus", CORPUS), "ndcg", speedups=(2.0, 3.0), documents=1500,
    ),
    Case(
        "retrieval (SciFact) by the model of STS-B", "scifact", "jsonl.gz",
        ("--task", "embedding", "--corpus", CORPUS), "ndcg", speedups=(2.0, 3.0), models="stsb",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Study:
    """Where a study's data and folders are. minutes: of each training. speedups: what is asked for, in place
    of what the cases say."""

    data: Path
    model: str
    work: Path
    minutes: float
    speedups: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """What the encoder is called in the results."""
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    @cached_property
    def encoder(self) -> str:
        """The files of the encoder's folder, as the first digits of their hash, by which it is told from
        another of its name; "" for one of the hub, whose name says it."""
        folder = Path(self.model)
        return f"sha256:{digest(folder, '*.*')[:12]}" if folder.is_dir() else ""

    def asked(self, case: Case) -> tuple[float, ...]:
        return self.speedups or case.speedups

    def file(self, case: Case, split: str) -> Path:
        """A file of a case, or its part that is scored; FileNotFoundError where it is missing."""
        path = self.data / case.folder / f"{split}.{case.suffix}"
        if not path.is_file():
            raise FileNotFoundError(f"{case.name} needs {path}")
        if case.every == 1 or split == "train":
            return path
        part = self.work / case.folder / path.name
        if not part.is_file():
            part.parent.mkdir(parents=True, exist_ok=True)
            write_whole(part, json.dumps(one_in(case.every, json.loads(path.read_text(encoding="utf-8")))))
        return part

    def options(self, case: Case) -> tuple[str, ...]:
        """The case's options, with the file beside its data that they name."""
        beside = self.data / case.folder
        files = {word: beside / word for word in case.options if (beside / word).is_file()}
        if case.documents is not None:
            files[CORPUS] = self.fewer_documents(case, case.documents)
        return (*(str(files.get(word, word)) for word in case.options), *CUT)

    def fewer_documents(self, case: Case, most: int) -> Path:
        """A corpus of so many of the case's documents: those that answer a question that is scored, and
        evenly spread others."""
        path = self.work / case.folder / CORPUS
        if not path.is_file():
            rows = list(records(self.data / case.folder / CORPUS))
            judged = [row for split in ("validation", "eval") for row in records(self.file(case, split))]
            answers = {name for row in judged for name in row["relevant"]}
            number = {row["id"]: place for place, row in enumerate(rows)}
            relevant = dict.fromkeys((number[name] for name in answers), 1.0)
            search = Retrieval("", (), (relevant,), tuple(map(json.dumps, rows)))
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, gzip.compress("\n".join(search.on_fewer(most).documents).encode()))
        return path

    def claim(self, case: Case) -> None:
        """Write down whose models a case's folder has. ValueError where they are those of another encoder, of
        other minutes or of other data, because what is there is not trained again."""
        path = self.work / case.trained_in / "study.json"
        record = {"model": self.name, "minutes": self.minutes, "data": str(self.data.resolve())}
        record["encoder"] = self.encoder
        # What an earlier version wrote names no data, and no encoder but by its folder's name.
        has = record | (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})
        if has != record:
            raise ValueError(
                f"{path.parent} has models of {_named(has['model'], has['encoder'])}, trained for "
                f"{has['minutes']:g} minutes on {has['data']}: name another --work"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record))

    def folder(self, case: Case, step: str) -> Path:
        return self.work / case.trained_in / step

    def dense(self, case: Case) -> str:
        """The folder or name of the model that is pruned."""
        return self.model if case.epochs is None else str(self.folder(case, "dense"))


def run(command: str, *options: str) -> None:
    """Run a command of pruned-trainer, the last option of which is its output folder, unless that is there;
    an interrupted one goes on."""
    out = Path(options[-1])
    if out.is_dir():
        return
    partial, again = out.with_name(f"{out.name}.partial"), []
    if partial.is_dir():
        again = ["--resume" if (partial / "run.json").is_file() else "--overwrite"]
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"-- pruned-trainer {shlex.join([command, *options, *again])}", flush=True)
    subprocess.run([sys.executable, "-m", "pruned_trainer.cli", command, *options, *again], check=True)


def train(study: Study, case: Case) -> None:
    """The models of a case: dense, pruned to each speed, and (with labels) the control."""
    if case.models is not None:
        return
    judged = ("--validation-file", str(study.file(case, "validation")))
    judged += ("--eval-file", str(study.file(case, "eval")))
    minutes = ("--max-minutes", f"{study.minutes:g}")
    if case.epochs is None:
        data = ("--texts", str(texts_of(study, case)))
    else:
        data = ("--train-file", str(study.file(case, "train")))
        start = ("--model", study.model, "--epochs", f"{case.epochs:g}", *data)
        run("finetune", *study.options(case), *start, "--out", study.dense(case))
    common = ("--model", study.dense(case), *study.options(case), *data, *judged, *minutes)
    for speedup in study.asked(case):
        target = ("--recipe", "fast", "--speedup", f"{speedup:g}")
        run("prune", *common, *target, "--out", str(study.folder(case, f"pruned-{speedup:g}")))
    if case.epochs is not None:
        target = ("--recipe", "random", "--macs", "0.999")
        run("prune", *common, *target, "--out", str(study.folder(case, "control")))


def texts_of(study: Study, case: Case) -> Path:
    """A file of distinct texts like those that the case's model will see, a line each: what is searched and
    what it is searched for, or the texts in the training pairs of all cases."""
    path = study.work / case.trained_in / "texts.txt"
    if not path.is_file():
        searched = study.data / case.folder / CORPUS
        files = [searched, study.file(case, "train")] if searched.is_file() else []
        texts: dict[str, None] = {}
        for file in files or sorted(study.data.glob("*/train.jsonl.gz")):
            for row in records(file):
                parts = [[row[name] for name in names if name in row] for names in TEXTS]
                texts |= {" ".join(" ".join(part).split()): None for part in parts}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, "\n".join(text for text in texts if text) + "\n")
    return path


def score(study: Study, case: Case) -> list[Row]:
    """A row for each speed: the scores on the evaluation file, what was lost of the dense model's, and the
    speeds."""
    task = task_of(study, case)
    examples = task.read(study.file(case, "eval"), "validation")

    def result_of(name: str, dtype: str | None = None) -> Any:
        model = task.load_model(name)
        prepared = task.prepare(examples, load_tokenizer(name), model)
        if dtype is not None:
            optimize(model, dtype=dtype)
        return prepared.evaluate(model, {})

    dense, rows = result_of(study.dense(case)), []

    def losses(name: str, result: Any) -> Row:
        lost, key = dense.losses(result), f"{case.score}_loss"
        low, high = lost.get(f"{key}_interval") or (None, None)
        return {f"{name}_loss": lost[key], f"{name}_loss_low": low, f"{name}_loss_high": high}

    about = {
        "model": study.name,
        "encoder": study.encoder,
        "case": case.name,
        "score": case.score,
        "dense": dense.scores()[case.score],
    }
    about |= {"examples": len(examples), "minutes": study.minutes}
    if case.epochs is not None:
        about |= losses("control", result_of(str(study.folder(case, "control"))))
    for speedup in study.asked(case):
        folder = study.folder(case, f"pruned-{speedup:g}")
        row = {**about, "asked": speedup, **losses("pruned", result_of(str(folder)))}
        row |= {**losses("int8", result_of(str(folder), "int8")), **speeds(study, case, folder)}
        rows.append({**row, **harness.stamp()})
    return rows


def speeds(study: Study, case: Case, folder: Path) -> Row:
    """How many times as fast as Hugging Face's dense model the pruned one is, and as our dense one, on the
    workload that it was pruned for."""
    table, task = LatencyTable.load(folder / "latency.json"), task_of(study, case)
    workload = table.workload.spread(BATCHES)
    models = {"pruned": task.load_model(str(folder)), "dense": task.load_model(study.dense(case))}
    row: Row = {"workload": workload.name}
    for dtype in ("fp32", "int8"):
        benchmark = compare(models, workload, ROUNDS, dtype)
        row[f"{dtype}_against_hugging_face"] = benchmark.against_their_dense
        if dtype == "fp32":
            row["against_our_dense"] = benchmark.against_dense
    return row


def task_of(study: Study, case: Case) -> Task:
    """The case's task, as its commands have it."""
    argv = ["evaluate", *study.options(case), "--eval-file", "eval", "--model", study.dense(case)]
    return make_task(TaskOptions.of(parse(argv)))


def _named(model: str, encoder: str | None) -> str:
    """An encoder's name, with what it is told from others of the name by."""
    return f"{model} ({encoder})" if encoder else model


# -- what is written -------------------------------------------------------------------------------------


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The table, in points lost with intervals."""

    def lost(row: Row, name: str) -> str:
        if row.get(f"{name}_loss") is None:
            return "-"
        interval = f" ({row[f'{name}_loss_low']:+z.1f} to {row[f'{name}_loss_high']:+z.1f})"
        return f"{row[f'{name}_loss']:+z.2f}" + (interval if row.get(f"{name}_loss_low") is not None else "")

    encoders = {(row["model"], row["encoder"]) for row in rows if row.get("encoder")}
    ambiguous = [name for name, number in Counter(name for name, _ in encoders).items() if number > 1]
    cells = [
        [
            _named(row["model"], row.get("encoder") if row["model"] in ambiguous else None),
            f"{row['case']}: {row['score']}", f"{row['dense']:.1f}",
            f"{row['against_our_dense']:.2f}x",
            lost(row, "pruned"), lost(row, "control"), f"{row['fp32_against_hugging_face']:.1f}x",
            lost(row, "int8"), f"{row['int8_against_hugging_face']:.1f}x",
        ]
        for row in rows
    ]  # fmt: skip
    header = ["model", "task: score", "dense", "faster than our dense", "lost", "lost by the dense control"]
    header += ["faster than Hugging Face", "lost in int8", "faster than Hugging Face in int8"]
    return table(header, cells)


def write(rows: Sequence[Row], path: Path, command: str) -> None:
    """Write the CSV, and the page beside it. What the file has of other cases, models and speeds stays; a row
    of an earlier version is of the encoder that has its name."""

    def place(row: Row) -> tuple[str, str, float]:
        return row["model"], row["case"], row["asked"]

    measured_now = {(*place(row), encoder) for row in rows for encoder in (row.get("encoder"), None)}
    earlier = read_rows(path) if path.is_file() else []
    kept = [row for row in earlier if (*place(row), row.get("encoder")) not in measured_now]
    order = [case.name for case in CASES]
    new_rows = [{**row, "command": command} for row in rows]
    rows = sorted([*kept, *new_rows], key=lambda row: order.index(row["case"]))
    harness.write_rows(path, rows)
    words = (
        "Points of the score that pruning lost, with 95% intervals over the examples, of one training. The "
        "control is the dense model, trained on for the same minutes with the same teacher; a model without "
        "labels is its own teacher and has none."
    )
    commands = {f"- {row['case']}: `{row['command']}`": None for row in rows}
    page = ["# What pruning loses on other tasks", "", words, "", *lines_of(rows), *commands]
    write_whole(path.with_suffix(".md"), "\n".join(page) + "\n")


def command_of(arguments: argparse.Namespace) -> str:
    """The command, without this machine's paths, so that it can be repeated elsewhere."""
    words = ["python", "benchmarks/study_tasks.py", "--data", "DATA", "--model", "ENCODER"]
    words += ["--minutes", f"{arguments.minutes:g}"]
    speedups = [f"{speedup:g}" for speedup in arguments.speedups]
    for option, values in (("--speedups", speedups), ("--only", arguments.only)):
        words += [option, *values] if values else []
    return shlex.join(words)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each case")
    parser.add_argument("--model", required=True, help="the encoder that is fine-tuned: a folder or hub name")
    parser.add_argument("--minutes", type=above(0), default=30.0, help="of each training")
    parser.add_argument(
        "--speedups", type=above(1), nargs="+", default=(), metavar="N",
        help="asked for (default: the case's)",
    )  # fmt: skip
    folders = list(dict.fromkeys(case.folder for case in CASES))
    parser.add_argument(
        "--only", nargs="+", choices=folders, default=(), help="folders of cases to do (default: all)"
    )
    parser.add_argument("--work", type=Path, default=Path("build/study-tasks"), help="folder of its state")
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the CSV")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    logging.set_verbosity_error()
    speedups = tuple(arguments.speedups)
    study = Study(arguments.data, arguments.model, arguments.work, arguments.minutes, speedups)
    path = harness.out_path(arguments.results / harness.result_path("tasks", "cpu").name, "tasks")
    chosen = [case for case in CASES if not arguments.only or case.folder in arguments.only]
    for case in chosen:  # before the first of them is trained
        for split in ("train", "validation", "eval"):
            study.file(case, split)
        study.claim(case)
    rows: list[Row] = []
    for case in chosen:
        train(study, case)
        rows += score(study, case)
        write(rows, path, command_of(arguments))
        print(f"written: {path}", flush=True)


if __name__ == "__main__":
    harness.run(main)
