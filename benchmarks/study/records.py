"""The study's profiles, and what it keeps on disk: a record of each finished piece of work, so that none is
done twice."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import harness
from harness import Row, read_rows
from pruned_ops.files import write_json, write_whole
from pruned_trainer.jobs.job import Job, start
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning.gates import INITIAL_LOG_ALPHA, Scores
from pruned_trainer.tasks.squad.examples import load_squad
from pruned_trainer.tasks.squad.metrics import EvaluationResult, FloatArray
from pruned_trainer.tasks.squad.task import Questions

FILES = ("train.json", "validation.json", "eval.json")
# What the fields of a record begin with that say when, where and beside what it was made.
STAMP = ("date", "machine_", "version_", "note")


@dataclass(frozen=True)
class Profile:
    """How much work a study does.

    train_every: every n-th training question is used. judged_every: every n-th validation and evaluation
    question is used, and of these the curves use every curve_every-th. fractions, hidden_fractions: shares
    that are removed without retraining. held: the shares that gates are held to for the curves; at each
    fraction the nearest of them ranks. gate_steps: of each training of gates. gate_batch, retrain_batch:
    windows a step. score_steps: minibatches of retrain_batch windows that each method takes for its scores.
    """

    name: str
    seeds: tuple[int, ...]
    train_every: int
    judged_every: int
    curve_every: int
    fractions: tuple[float, ...]
    hidden_fractions: tuple[float, ...]
    held: tuple[float, ...]
    gate_steps: int
    gate_batch: int
    gate_learning_rate: float
    retrain_steps: int
    retrain_batch: int
    score_steps: Mapping[str, int]
    max_length: int = 384
    stride: int = 128
    save_steps: int = 50

    def seen(self) -> Row:
        """Fields of every row: the profile, the numbers of windows that training and scores take, and how
        gates are trained."""
        methods = {f"windows_{name}": steps * self.retrain_batch for name, steps in self.score_steps.items()}
        gates: Row = {"windows_l0": self.gate_steps * self.gate_batch, "gate_batch": self.gate_batch}
        gates |= {"gate_learning_rate": self.gate_learning_rate, "gate_start": INITIAL_LOG_ALPHA}
        gates["penalty"] = "one"
        retrained = {"windows_retrained": self.retrain_steps * self.retrain_batch}
        return {"profile": self.name, **gates, **methods, **retrained}


@dataclass
class Records:
    """The finished pieces of a study in its folder. note: the circumstances, written into every record that
    is made now."""

    work: Path
    note: str = field(default="", kw_only=True)

    def once(self, name: str, work: Callable[[], Row]) -> Row:
        """The record of this name: from disk, or made by `work` now, with the stamp of a row and the note."""
        path = self.work / "records" / f"{name}.json"
        if not path.is_file():
            print(f"== {name}", flush=True)
            write_json(path, {**work(), **harness.stamp(), "note": self.note})
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def finished(self, name: str) -> Row | None:
        """The record of this name, if there is one."""
        path = self.work / "records" / f"{name}.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def scores(self, name: str, work: Callable[[], Scores]) -> Scores:
        """The gates' or importance scores of this name: from disk, or computed by `work` now."""
        path = self.work / "scores" / f"{name}.pt"
        if not path.is_file():
            print(f"== {name}", flush=True)
            work().save(path)
        return Scores.load(path)


@dataclass
class Study(Records):
    """A study of SQuAD 2.0 under way. questions, held: the curves are scored on these, and their thresholds
    chosen on those; the rows use the job's."""

    profile: Profile
    job: Job
    questions: Questions
    held: Questions

    def job_for(self, seed: int, **changes: Any) -> Job:
        """The job with this seed and these settings."""
        return replace(self.job, settings=replace(self.job.settings, seed=seed, **changes))

    def adopt(self, path: Path) -> int:
        """Take over the pieces that a CSV of this study has and this folder lacks, with the scores of the
        questions beside it, whichever machine made them. Returns their number; 0 where there is no such file.

        Errors: ValueError where the CSV is of another profile or teacher.
        """
        if not path.is_file():
            return 0
        pieces: dict[str, list[Row]] = {}
        for row in read_rows(path):
            if row["finished"] == "True":
                pieces.setdefault(row["unit"], []).append(row)
        about = {**self.profile.seen(), "model": Path(self.job.settings.model).name}
        for row in (row for rows in pieces.values() for row in rows):
            key = next((name for name, value in about.items() if row.get(name) != value), None)
            if key is not None:
                raise ValueError(
                    f"{path} is of another study: {key} is {row.get(key)} there and {about[key]} here; "
                    "give other --results"
                )
        lacking = {unit: rows for unit, rows in pieces.items() if self.finished(unit) is None}
        beside = {"part", "unit", "finished", "command", *about}
        for unit, rows in lacking.items():
            stamp = {key: value for key, value in rows[0].items() if key.startswith(STAMP)}
            own_rows = [{k: v for k, v in row.items() if k not in beside and k not in stamp} for row in rows]
            write_json(self.work / "records" / f"{unit}.json", {"rows": own_rows, **stamp})
        self._adopt_scores(path.with_suffix(".npz"))
        return len(lacking)

    def _adopt_scores(self, path: Path) -> None:
        """Take over the questions' scores of models that were not judged here."""
        arrays = dict(np.load(path)) if path.is_file() else {}
        for name in {key.rpartition("/")[0] for key in arrays}:
            target = self.work / "scored" / f"{name}.json"
            if target.is_file():
                continue
            f1, span = (arrays[f"{name}/{score}"].astype(np.float64) for score in ("f1", "f1_span"))
            result = {"metrics": {"f1": f1.mean()}, "f1_span": span.mean() if len(span) else None}
            write_json(target, {**result, "question_f1": f1.tolist(), "question_span_f1": span.tolist()})

    def result(self, name: str, work: Callable[[], EvaluationResult]) -> EvaluationResult:
        """A model's scores, question by question, without answers: from disk, or computed by `work` now."""
        path = self.work / "scored" / f"{name}.json"
        if not path.is_file():
            scored = work()
            write_json(path, {k: _plain(v) for k, v in vars(scored).items() if k != "predictions"})
        loaded = json.loads(path.read_text(encoding="utf-8"))
        arrays = {k: np.array(v) for k, v in loaded.items() if k.startswith("question_")}
        return EvaluationResult(**{**loaded, **arrays, "predictions": {}})

    def scored(self) -> dict[str, FloatArray]:
        """The score of every question under every model that was judged, in percent: arrays of fp32 by
        MODEL/f1, (questions,), and MODEL/f1_span, (answerable questions,)."""
        arrays = {}
        for path in sorted((self.work / "scored").glob("*.json")):
            result = self.result(path.stem, partial(missing, path.stem))
            arrays[f"{path.stem}/f1"] = result.question_f1.astype(np.float32)
            arrays[f"{path.stem}/f1_span"] = result.question_span_f1.astype(np.float32)
        return arrays


def save_arrays(path: Path, arrays: Mapping[str, FloatArray]) -> None:
    """Write an npz of these arrays; the file is there whole, or as it was before."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(path, content.getvalue())


def missing(name: str) -> EvaluationResult:
    """Raise FileNotFoundError: a model was judged, and its scores are gone."""
    raise FileNotFoundError(f"the scores of {name} are gone, but not its record; give another --work")


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def open_study(profile: Profile, model: str, data: Path, work: Path, note: str = "") -> Study:
    """Load models and data; a study whose earlier run was stopped goes on in `work`.

    Errors: ValueError where `work` holds another study, FileNotFoundError where data or model are missing.
    """
    arguments = json.loads(json.dumps({**asdict(profile), "model": model, "data": str(data)}))
    path = work / "study.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != arguments:
        raise ValueError(f"{work} holds a study of another profile, model or data; give another --work")
    for folder in ("records", "scores", "scored", "training", "data"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    parts = (profile.train_every, profile.judged_every, profile.judged_every)
    train, validation, judged = (
        every_nth(data / name, every, work / "data") for name, every in zip(FILES, parts, strict=True)
    )
    settings = PruneSettings(
        model=model, train_file=train, validation_file=validation, eval_file=judged, out=work / "training",
        recipe="paper", max_length=profile.max_length, stride=profile.stride,
        save_steps=profile.save_steps, batch_size=profile.retrain_batch,
    )  # fmt: skip
    job = start(settings)
    write_json(path, arguments)

    def fewer(source: Any) -> Any:
        return job.task.prepare(source.examples[:: profile.curve_every], job.tokenizer, job.dense)

    return Study(work, profile, job, fewer(job.evaluation), fewer(job.validation), note=note)


def every_nth(source: Path, every: int, folder: Path) -> Path:
    """A SQuAD file in `folder` of every n-th question of `source`; the source itself where n is 1."""
    if every == 1:
        return source
    parsed = one_in(every, load_squad(source).parsed)
    for article in parsed["data"]:
        article["paragraphs"] = [paragraph for paragraph in article["paragraphs"] if paragraph["qas"]]
    parsed["data"] = [article for article in parsed["data"] if article["paragraphs"]]
    path = folder / source.name
    path.write_text(json.dumps(parsed), encoding="utf-8")
    return path


def one_in(every: int, squad: dict[str, Any]) -> dict[str, Any]:
    """A SQuAD file with one in so many of its questions, and all of its paragraphs."""
    number = 0
    for article in squad["data"]:
        for paragraph in article["paragraphs"]:
            questions = paragraph["qas"]
            paragraph["qas"] = [qa for place, qa in enumerate(questions, start=number) if place % every == 0]
            number += len(questions)
    return squad


def over_seeds(rows: Sequence[Row], value: str) -> tuple[float, float, float] | None:
    """The mean of a number over the rows of several seeds, and the outermost ends (low, high) of its
    intervals; None where no row has it."""
    having = [row for row in rows if value in row]
    if not having:
        return None
    lows = [row.get(f"{value}_low", row[value]) for row in having]
    highs = [row.get(f"{value}_high", row[value]) for row in having]
    return sum(row[value] for row in having) / len(having), min(lows), max(highs)
