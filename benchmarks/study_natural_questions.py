"""The paper's comparisons on Natural Questions with one dense model: three sizes, each trained on with
cross-entropy and with distillation; a dense control and a smaller dense model, trained on for as many steps;
and what was chosen for another task, SQuAD, or by chance.

The shares of heads and FFN units are the paper's. What stays is what the recipe fast ranks highest, each part
by itself; a narrow model is compensated before it is trained on. Scores are those on the evaluation file, at
thresholds that were chosen on the validation file.

A study that was stopped goes on with the same command: finished rows are on disk, and a training goes on from
its last checkpoint.
Usage: python benchmarks/study_natural_questions.py --model DENSE --data FOLDER --squad TEACHER \\
           --squad-file SQUAD/train.json [--timings]
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

import harness
from harness import Row
from option_types import at_least
from presentation import counted, table
from pruned_ops.files import write_json, write_whole
from pruned_ops.models.stock import model_shape
from pruned_trainer.jobs.choice import compensated, score_batches
from pruned_trainer.jobs.evaluation import judge, model_facts, time_models
from pruned_trainer.jobs.job import Job, start, timed_part
from pruned_trainer.jobs.prune import retrain
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning import importance, surgeon
from pruned_trainer.pruning.compact import compact
from pruned_trainer.pruning.decision import Decision
from pruned_trainer.pruning.gates import Scores
from pruned_trainer.pruning.options import DEFAULT_PARTS, Target
from pruned_trainer.tasks.natural_questions.metrics import AnswerStats
from pruned_trainer.tasks.natural_questions.task import NqResult
from study.records import Records, save_arrays
from study.rows import RETRAININGS, at_shares, every_second_layer, everything, half, removed

# The shares of heads and of FFN units that the paper's rows remove.
SHARES = {"b": (0.42, 0.40), "c": (0.53, 0.55), "d": (0.68, 0.75)}
# Minibatches of windows that `fast` scores by.
SCORED = 8
# Tokens of a window, and those that two neighbours share.
CUT = {"max_length": 384, "stride": 128}
FILES = ("train.jsonl.gz", "validation.jsonl.gz", "eval.jsonl.gz")
KINDS = ("long", "short")
# What the page calls the sizes and the ways to choose.
NAMES = {"dense": "control", "half": "every second layer", **{size: f"row {size}" for size in SHARES}}
CHOSEN = {"fast": "its own task", "squad": "SQuAD", "random": "chance"}
# Long and short F1 of the paper's dense model.
DENSE_OF_PAPER = (70.3, 58.8)
SCORE_KEYS = ("long_f1", "short_f1", "long_best_f1", "short_best_f1")


@dataclass(frozen=True)
class Model:
    """A row: its size is a letter of SHARES, "dense", or "half" (every second layer of the dense model).
    chosen: what its parts were ranked by. retraining: one of RETRAININGS. paper: long and short F1 of the
    paper's row."""

    size: str
    retraining: str
    chosen: str = "fast"
    paper: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        return "-".join([self.size, *([self.chosen] if self.chosen != "fast" else []), self.retraining])


# In the order in which they are made: the control first, because all others are compared with it.
MODELS = (
    Model("dense", "distilled"),
    Model("c", "distilled", paper=(69.3, 58.4)),
    Model("c", "distilled", "squad"),
    Model("d", "distilled", paper=(67.6, 55.4)),
    Model("b", "distilled", paper=(69.8, 58.4)),
    Model("half", "distilled", paper=(67.3, 55.9)),
    Model("c", "distilled", "random"),
    Model("dense", "cross-entropy"),
    Model("c", "cross-entropy", paper=(67.8, 55.5)),
    Model("d", "cross-entropy", paper=(65.2, 52.2)),
    Model("b", "cross-entropy", paper=(68.3, 57.7)),
)


@dataclass
class NqStudy(Records):
    """A study under way. steps: of each retraining. squad: the SQuAD model by which the rows "squad" choose,
    and the file that it was trained on."""

    job: Job
    steps: int
    squad: tuple[str, Path]

    def decision(self, size: str, chosen: str) -> Decision:
        """What stays of the dense model at a size, by one way to choose."""
        if size not in SHARES:
            return everything(self.job)
        ranked = self.scores(f"scores-{chosen}", partial(self._scores, chosen))
        return at_shares(
            self.job,
            dict.fromkeys(DEFAULT_PARTS, ranked),
            dict(zip(DEFAULT_PARTS, SHARES[size], strict=True)),
        )

    def _scores(self, chosen: str) -> Scores:
        if chosen == "random":
            return importance.score("random", self.job.dense, [], self.job.budget, DEFAULT_PARTS)
        job = self.job if chosen == "fast" else squad_job(*self.squad, self.work / "training")
        return surgeon.score(
            job.dense, score_batches(job, SCORED), job.budget, DEFAULT_PARTS, job.settings.seed
        )

    def judge_dense(self) -> Row:
        """Judge the dense model as it came, once. Returns its record."""
        judged: Any = partial(judge, self.job, self.job.dense)
        return self.once("dense", lambda: saved(judged().result))

    def result(self, name: str) -> NqResult:
        """The result of a model that was judged, without its predictions; KeyError where it was not."""
        record = self.finished(name)
        if record is None:
            raise KeyError(name)
        return loaded(record)

    def make(self, model: Model) -> Row:
        """Choose, compensate, train on and judge a row's model. Returns its record."""
        changes: dict[str, Any] = dict(RETRAININGS[model.retraining])
        if model.size == "half" and model.retraining == "distilled":
            changes["distillation"] = every_second_layer(self.job.dense)
        job = replace(self.job, settings=replace(self.job.settings, **changes))
        narrow, decision = self.narrow(model.size, model.chosen)
        folder = self.work / "training" / model.name
        retrain(job, narrow, folder, self.steps, decision)
        result: Any = judge(job, narrow).result
        shutil.rmtree(folder, ignore_errors=True)
        return {**saved(result), "compensation": dict(decision.compensation)}

    def narrow(self, size: str, chosen: str, compensate: bool = True) -> tuple[PreTrainedModel, Decision]:
        """A row's model before it is trained on, and the decision that made it."""
        decision, job = self.decision(size, chosen), self.job
        narrow: PreTrainedModel = half(job.dense) if size == "half" else compact(job.dense, decision)
        if compensate and size in SHARES:
            narrow, decision = compensated(job, job.dense, decision)
        nn.Module.to(narrow, job.device)
        return narrow, decision

    def row(self, model: Model) -> Row:
        """The fields of a finished row."""
        record = self.once(model.name, partial(self.make, model))
        result, dense = loaded(record), self.result("dense")
        row: Row = {"model": model.size, "chosen": model.chosen, "retraining": model.retraining}
        row |= {key: result.scores()[key] for key in SCORE_KEYS} | points(dense.losses(result))
        control = f"dense-{model.retraining}"
        if model.name != control and self.finished(control):
            row |= points(self.result(control).losses(result), "_control")
        narrowed, _ = self.narrow(model.size, model.chosen, compensate=False)
        ways = ", ".join(f"{part} {way}" for part, way in record["compensation"].items())
        return row | self.facts(narrowed) | {"compensation": ways} | self.about(record, self.steps)

    def dense_row(self) -> Row:
        """The fields of the dense model as it came."""
        record, scores = self.judge_dense(), self.result("dense").scores()
        row: Row = {"model": "as it came", "chosen": "-", "retraining": "none"}
        row |= {key: scores[key] for key in SCORE_KEYS} | self.facts(self.job.dense) | {"speedup": 1.0}
        return row | self.about(record, 0)

    def about(self, record: Row, steps: int) -> Row:
        """The fields of a row that say how much was trained and judged, when and where."""
        size = self.job.settings.train_batch
        about = {"retrain_steps": steps, "retrain_windows": steps * size}
        about |= {"documents": len(self.job.evaluation), "date": record["date"]}
        return about | {k: v for k, v in record.items() if k.startswith(("machine_", "version_"))}

    def facts(self, left: PreTrainedModel) -> Row:
        """The shares that a model lacks, and how many times fewer multiply-accumulates it has."""
        lengths = self.job.validation.arrival_lengths()
        dense_macs, narrow_macs = (model_facts(model, lengths)["macs"] for model in (self.job.dense, left))
        shares = removed(self.job, model_shape(left))
        return {
            **{f"{part}_removed": shares[part] for part in DEFAULT_PARTS},
            "macs_cut": dense_macs / narrow_macs if narrow_macs else None,  # None: nothing is left
        }

    def speedups(self, sizes: Sequence[str]) -> dict[str, float]:
        """How many times as fast as the dense model each size is, all in turn; any weights take as long."""
        models = {size: timed_part(self.narrow(size, "fast", compensate=False)[0]) for size in sizes}
        first = {"as it came": timed_part(self.job.dense)}
        timings, _ = time_models({**first, **models}, self.job.workload)
        return {size: timings[size].speedup_over(timings["as it came"]) for size in sizes}

    @property
    def timed_file(self) -> Path:
        """Where the last speedups are kept, for the pages of later runs."""
        return self.work / "speedups.json"

    def timed(self) -> dict[str, float]:
        """The speedups of the sizes that were timed."""
        path = self.timed_file
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def arrays(self) -> dict[str, Any]:
        """For every document under every model that was judged: (documents, 3) of right, predicted and gold
        answers, long and short, at the model's thresholds."""
        arrays = {}
        for name in ("dense", *(model.name for model in MODELS)):
            if self.finished(name):
                result = self.result(name)
                for kind, threshold in zip(KINDS, result.thresholds, strict=True):
                    arrays[f"{name}/{kind}"] = getattr(result, kind).counts_at(threshold).astype(np.int8)
        return arrays


def saved(result: NqResult) -> Row:
    """A result as JSON, without the predictions."""
    stats = {kind: {k: v.tolist() for k, v in vars(getattr(result, kind)).items()} for kind in KINDS}
    return {**stats, "thresholds": list(result.thresholds)}


def loaded(record: Mapping[str, Any]) -> NqResult:
    """The result of which `saved` made this."""
    long, short = (AnswerStats(**{k: np.array(v) for k, v in record[kind].items()}) for kind in KINDS)
    return NqResult({}, long, short, tuple(record["thresholds"]))


def points(losses: Mapping[str, Any], when: str = "") -> Row:
    """Losses as columns, with the ends of their intervals. when: ends the columns' names."""
    row: Row = {}
    for key, value in losses.items():
        if key.endswith("_interval"):
            loss = key.removesuffix("_interval") + when
            row[f"{loss}_low"], row[f"{loss}_high"] = value
        else:
            row[key + when] = value
    return row


def squad_job(model: str, train_file: Path, folder: Path) -> Job:
    """A job on SQuAD, whose windows score the parts of a SQuAD model."""
    settings = PruneSettings(model, train_file, folder / "squad", (Target(macs=0.5),), recipe="fast", **CUT)
    return start(settings)


def open_study(
    model: str, data: Path, squad: tuple[str, Path], work: Path, steps: int, every: int
) -> NqStudy:  # fmt: skip
    """Load the models and the data; a study whose earlier run was stopped goes on in `work`. every: one in so
    many documents is judged.

    Errors: ValueError where `work` holds another study, FileNotFoundError where data are missing.
    """
    about = {"model": model, "data": str(data), "squad": list(map(str, squad))}
    about |= {"steps": steps, "every": every}
    path = work / "study.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != about:
        raise ValueError(f"{work} holds a study of another model, data or size; give another --work")
    if not path.is_file():  # what is there is of a run that could not begin, perhaps on other data
        shutil.rmtree(work / "data", ignore_errors=True)
    for folder in ("records", "scores", "training", "data"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    judged = [every_nth(data / name, every, work / "data") for name in FILES[1:]]
    settings = PruneSettings(
        model=model, train_file=data / FILES[0], validation_file=judged[0], eval_file=judged[1],
        out=work / "training", targets=(Target(macs=0.5),), task="natural_questions", recipe="fast",
        skip_bad=True, null_rate=0.05, precision="fp32", retrain_steps=steps, save_steps=25, **CUT,
    )  # fmt: skip
    job = start(settings)
    write_json(path, about)
    return NqStudy(work, job, steps, squad)


def every_nth(source: Path, every: int, folder: Path) -> Path:
    """A file in `folder` of every n-th line of a compressed file; the source itself where n is 1."""
    if every == 1:
        return source
    path = folder / source.name
    if not path.is_file():
        with gzip.open(source, "rb") as lines:
            write_whole(path, gzip.compress(b"".join(line for n, line in enumerate(lines) if n % every == 0)))
    return path


# -- what is written -------------------------------------------------------------------------------------


def page(rows: Sequence[Row]) -> str:
    """The page: a line for each model, in points of F1; then the machine and the command."""
    last = rows[-1]
    threads = counted(last["machine_threads"], "thread")
    foot = f"{last['machine_processor']}, {threads}; torch {last['version_torch']}; {last['date']}. "
    return "\n".join([*_lines(rows), f"{foot}`{last['command']}`"]) + "\n"


def _lines(rows: Sequence[Row]) -> list[str]:
    dense, last = rows[0], rows[-1]
    header = ["model", "chosen by", "trained on with", "MACs cut", "speed", "long F1", "short F1"]
    header += [f"{kind} F1 against {what}" for what in ("dense", "control") for kind in KINDS]
    header += ["paper: long, short F1 against dense"]
    shares = ", ".join(f"{size} {heads:.0%}/{ffn:.0%}" for size, (heads, ffn) in SHARES.items())
    words = (
        f"The dense model as it came has {dense['long_f1']:.2f} long F1 and {dense['short_f1']:.2f} short "
        f"F1, on {dense['documents']} documents. Every other model was trained on for "
        f"{last['retrain_steps']} steps, with {last['retrain_windows']:,} windows in all. The "
        "control is the dense model, trained on so with the same loss. Brackets hold 95% intervals over the "
        f"documents, of one training. The rows remove the paper's shares of heads and FFN units ({shares}). "
        "The paper's numbers are of RoBERTa-large, trained on for longer; its small model is RoBERTa-base. "
        "There BERT-large lost 1.9 long and 5.1 short F1 by what SQuAD's gates had chosen (53%/65%)."
    )
    return [words, "", *table(header, [_cells(row) for row in rows[1:]])]


def _cells(row: Row) -> list[str]:
    """A model's line of the page."""
    paper = next(model.paper for model in MODELS if _is(model, row))
    cells = [NAMES[row["model"]], CHOSEN[row["chosen"]] if row["model"] in SHARES else "-", row["retraining"]]
    cells += [f"{row[key]:.2f}x" if row.get(key) else "-" for key in ("macs_cut", "speedup")]
    cells += [f"{row[f'{kind}_f1']:.2f}" for kind in KINDS]
    cells += [_change(row, f"{kind}_f1_loss{when}") for when in ("", "_control") for kind in KINDS]
    both = zip(paper, DENSE_OF_PAPER, strict=True) if paper else ()
    return [*cells, ", ".join(f"{paper_f1 - dense_f1:+.1f}" for paper_f1, dense_f1 in both) or "-"]


def _change(row: Row, loss: str) -> str:
    if loss not in row:
        return "-"
    low, high = (row[f"{loss}_{end}"] for end in ("low", "high"))
    return f"{-row[loss]:+z.2f} ({-high:+z.2f} to {-low:+z.2f})"


def _is(model: Model, row: Row) -> bool:
    return (model.size, model.chosen, model.retraining) == (row["model"], row["chosen"], row["retraining"])


def write(study: NqStudy, out: Path, command: str) -> None:
    """The CSV of all finished rows, the page beside it, and the documents' counts as an npz."""
    speedups = study.timed()
    rows = [study.row(model) for model in MODELS if study.finished(model.name)]
    for row in rows:
        row |= {"speedup": speedups[row["model"]]} if row["model"] in speedups else {}
    rows = [{**row, "command": command} for row in (study.dense_row(), *rows)]
    harness.write_rows(out, rows)
    write_whole(out.with_suffix(".md"), page(rows))
    save_arrays(out.with_suffix(".npz"), study.arrays())


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="the dense Natural Questions checkpoint")
    parser.add_argument("--data", type=Path, required=True, help=f"folder with {', '.join(FILES)}")
    parser.add_argument("--squad", required=True, help="a SQuAD checkpoint of the dense model's sizes")
    parser.add_argument("--squad-file", type=Path, required=True, help="SQuAD JSON that it was trained on")
    parser.add_argument(
        "--steps", type=at_least(1), default=100, help="of each retraining (default: %(default)s)"
    )
    parser.add_argument(
        "--every", type=at_least(1), default=2,
        help="one in so many documents is judged (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--only", nargs="*", choices=[model.name for model in MODELS], help="models to make (default: all)"
    )
    parser.add_argument("--timings", action="store_true", help="then time all sizes beside the dense model")
    parser.add_argument("--work", type=Path, default=Path("build/study-natural-questions"), help="its state")
    parser.add_argument("--out", type=Path, help="CSV to write (default: in benchmarks/results/)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parsed(argv)
    logging.set_verbosity_error()
    out = harness.out_path(arguments.out, "paper-natural-questions", "cpu")
    # Without this machine's paths, so that it can be repeated elsewhere.
    command = "python benchmarks/study_natural_questions.py --model DENSE --data NQ --squad TEACHER "
    command += f"--squad-file SQUAD/train.json --steps {arguments.steps} --every {arguments.every}"
    study = open_study(
        arguments.model, arguments.data, (arguments.squad, arguments.squad_file), arguments.work,
        arguments.steps, arguments.every,
    )  # fmt: skip
    study.judge_dense()
    write(study, out, command)
    for model in MODELS:
        if arguments.only is None or model.name in arguments.only:
            study.row(model)
            write(study, out, command)
            print(f"written: {out}", flush=True)
    if arguments.timings:
        sizes = dict.fromkeys(model.size for model in MODELS if study.finished(model.name))
        write_json(study.timed_file, study.speedups(list(sizes)))
        write(study, out, command)


if __name__ == "__main__":
    harness.run(main)
