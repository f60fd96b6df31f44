"""The paper's comparison on SQuAD 2.0 data with one teacher: four ways to choose, the rows of its table,
gates on hidden dimensions, the joint recipe beside the paper's. Its results are in benchmarks/README.md.

Gates are held to the paper's own shares of heads and of FFN units. The rows of its table are retrained with
cross-entropy, as in the paper, and with distillation, beside a dense control of as many steps and a model of
half the layers. The scores of every question lie in an npz beside the CSV.

A study that was stopped (Ctrl-C, SIGTERM, --max-minutes) goes on with the same command: finished pieces are
on disk, and a training goes on from its last checkpoint. On another machine it goes on from the results: what
they have is not done again.
Usage: python benchmarks/study_squad.py --profile cpu --data SQUAD_FOLDER --model TEACHER
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transformers.utils import logging

import harness
from harness import Row, read_rows
from option_types import above
from study.records import Profile, Study, open_study, save_arrays
from study.rows import HIDDEN_ROW, OTHERS, RETRAININGS, TABLE, curve_point, joint_row, row_name, table_row
from study.timings import timings

PARTS = ("curves", "rows", "recipes", "hidden", "timings")
# The batch sizes that are timed: the default workload's and the paper's.
TIMED = (8, 1)
PROFILES = {
    # A seed takes some four hours of one core. Windows of gates and of retraining are a percent of the
    # paper's, and fewer to a step (its 24 would take six times as long); the rate of the gates, and what they
    # pay, are its own.
    "cpu": Profile(
        name="cpu", seeds=(0, 1, 2), train_every=4, judged_every=3, curve_every=2,
        fractions=(0.25, 0.5, 0.7, 0.85), held=(0.5, 0.85), hidden_fractions=(0.1, 0.25),
        gate_steps=300, gate_batch=4, gate_learning_rate=0.1, retrain_steps=120, retrain_batch=16,
        score_steps={"gain": 64, "leave-one-out": 2},
    ),
    # A fifth of an epoch of gates, a quarter of one of retraining, at the paper's own batch and rate; it has
    # not run yet. In parts: --max-minutes 8, and again.
    "gpu": Profile(
        name="gpu", seeds=(0, 1, 2), train_every=1, judged_every=1, curve_every=4,
        fractions=(0.25, 0.5, 0.7, 0.85), held=(0.5, 0.85), hidden_fractions=(0.1, 0.25),
        gate_steps=300, gate_batch=24, gate_learning_rate=0.1, retrain_steps=600, retrain_batch=16,
        score_steps={"gain": 128, "leave-one-out": 8}, save_steps=300,
    ),
}  # fmt: skip

Unit = tuple[str, str, Callable[[], Row]]


def units(study: Study) -> Iterator[Unit]:
    """The part, name and work of every piece that makes rows, in the order in which they are done."""
    profile = study.profile
    for seed in profile.seeds:
        for part in ("heads", "ffn"):
            for fraction in profile.fractions:
                work: Callable[[], Row] = partial(curve_point, study, seed, part, fraction)
                yield "curves", f"curve-{part}-{fraction:g}-seed{seed}", work
        for letter in ("a", *OTHERS, *TABLE):
            for retraining in RETRAININGS if letter != "a" else ("none",):
                work = partial(table_row, study, seed, letter, retraining)
                yield "rows", row_name(letter, retraining, seed), work
            if letter == "e":
                yield "recipes", f"joint-seed{seed}", partial(_beside_e, study, seed)
        for fraction in profile.hidden_fractions:
            work = partial(curve_point, study, seed, "hidden", fraction)
            yield "hidden", f"curve-hidden-{fraction:g}-seed{seed}", work
        work = partial(table_row, study, seed, HIDDEN_ROW, "distilled")
        yield "hidden", row_name(HIDDEN_ROW, "distilled", seed), work


def _beside_e(study: Study, seed: int) -> Row:
    """The joint recipe at the size of row e."""
    name, work = row_name("e", "distilled", seed), partial(table_row, study, seed, "e", "distilled")
    return joint_row(study, seed, study.once(name, work)["rows"][0])


def run(
    study: Study,
    results: Path,
    parts: tuple[str, ...] = PARTS,
    command: str = "",
    until: float = float("inf"),
) -> list[Path]:
    """Do the unfinished pieces of these parts, and write the CSV after each. Returns the CSVs' paths. until:
    no piece begins after this time (of time.monotonic)."""
    if set(parts) == {"timings"}:
        return [_time(study, results, command)]
    adopted = study.adopt(_path(results, study))
    if adopted:
        print(f"{adopted} finished pieces are those of {results}", flush=True)
    written = [_write(study, results, command)]
    for part, name, work in units(study):
        if part not in parts or study.finished(name):
            continue
        if time.monotonic() > until:
            print("the time is up; the same command goes on", flush=True)
            return written
        study.once(name, work)
        _write(study, results, command)
    if "timings" in parts:
        written.append(_time(study, results, command))
    return written


def _write(study: Study, results: Path, command: str) -> Path:
    """Write all finished rows, and a line for each unfinished piece."""
    rows: list[Row] = []
    for part, name, _ in units(study):
        record = study.finished(name)
        about = {"part": part, "unit": name, "finished": record is not None, **study.profile.seen()}
        rows += [{**about, **row, **_stamp(record)} for row in record["rows"]] if record else [about]
    path = _path(results, study)
    harness.write_rows(
        path, [{**row, "command": command, "model": Path(study.job.settings.model).name} for row in rows]
    )
    save_arrays(path.with_suffix(".npz"), study.scored())
    return path


def _stamp(record: Row) -> Row:
    return {key: value for key, value in record.items() if key != "rows"}


def _path(results: Path, study: Study) -> Path:
    """One file for all machines, because what a training loses does not depend on where it ran."""
    return results / f"study-{study.profile.name}.csv"


def _time(study: Study, results: Path, command: str) -> Path:
    """Time the models of all finished rows anew, of which only the shapes are needed. ValueError where there
    are none."""
    source = _path(results, study)
    rows = [row for row in read_rows(source) if "layers" in row] if source.is_file() else []
    if not rows:
        raise ValueError(f"{source} has no model to time yet")
    origin = {"study": source.name, **harness.stamp(), "note": study.note, "command": command}
    path = results / harness.result_path(f"study-timings-{study.profile.name}").name
    harness.write_rows(path, [{**row, **origin} for size in TIMED for row in timings(study, rows, size)])
    return path


def _parser() -> argparse.ArgumentParser:
    root = os.environ.get("PRUNED_OPS_DATA")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", choices=PROFILES, required=True, help="how much is done: for a CPU or for a GPU"
    )
    parser.add_argument(
        "--data", type=Path, default=Path(root, "data/squad2") if root else None,
        help="folder with train.json, validation.json, eval.json (default: PRUNED_OPS_DATA/data/squad2)",
    )  # fmt: skip
    parser.add_argument(
        "--model", default=str(Path(root, "models/minilm-l6-squad2")) if root else None,
        help="the teacher, which is pruned (default: PRUNED_OPS_DATA/models/minilm-l6-squad2)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to do (default: all)")
    parser.add_argument("--work", type=Path, help="folder of its state (default: build/study-PROFILE)")
    parser.add_argument(
        "--results", type=Path, default=harness.RESULTS,
        help="folder of the CSVs (default: benchmarks/results/)",
    )  # fmt: skip
    parser.add_argument(
        "--max-minutes", type=above(0), help="begin no piece of work after that (default: no limit)"
    )
    parser.add_argument("--note", default="", help="the circumstances, written beside every number")
    return parser


def main() -> None:
    begun = time.monotonic()
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.data is None or arguments.model is None:
        parser.error("--data and --model are needed where PRUNED_OPS_DATA does not say where they are")
    logging.set_verbosity_error()
    work = arguments.work or Path("build", f"study-{arguments.profile}")
    until = float("inf") if arguments.max_minutes is None else begun + 60 * arguments.max_minutes
    # Without this machine's paths, so that it can be repeated elsewhere.
    command = f"python benchmarks/study_squad.py --profile {arguments.profile} --data SQUAD --model TEACHER"
    try:
        study = open_study(PROFILES[arguments.profile], arguments.model, arguments.data, work, arguments.note)
        for path in run(study, arguments.results, tuple(arguments.only), command, until):
            print(f"written: {path}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"study_squad: {error}")
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
