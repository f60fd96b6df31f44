"""Pruning from Python: any model around a supported encoder, with the caller's data, collator, metrics, loss
and training arguments; the engine is the command line's."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments
from transformers.utils.generic import find_labels

from pruned_ops.measure.timing import Workload
from pruned_ops.models.inputs import longest_sequence, padding_id
from pruned_ops.models.stock import encoders_of, find_encoder, running_encoder
from pruned_trainer.distributed import say, state, world_size
from pruned_trainer.jobs.call_checks import (
    check_kinds,
    checked_loss,
    checked_path,
    digest_of_weights,
    name_of,
    told_of_call,
    working_copy,
)
from pruned_trainer.jobs.examples import DatasetExamples, DatasetTask, Metrics
from pruned_trainer.jobs.job import (
    BATCH_SIZE,
    TIMED_BATCHES,
    Clock,
    Job,
    budget_for,
    check_phases,
    latency_table,
)
from pruned_trainer.jobs.plan import GATE_SHARE
from pruned_trainer.jobs.prune import PruneResult, finished, run_for_one
from pruned_trainer.jobs.row_checks import Expected, check_rows, first_batch, said
from pruned_trainer.jobs.rows import Rows, as_batch, columns_of, default_collate
from pruned_trainer.jobs.settings import OWN_TASK, PruneSettings
from pruned_trainer.jobs.settings_checks import check_temperature, has_batches
from pruned_trainer.jobs.trainers import check_callers_arguments, steps_asked
from pruned_trainer.pruning.options import DEFAULT_PARTS, Target, compensation_of, score_steps
from pruned_trainer.tasks.output_kinds import DISTRIBUTIONS, Outputs, check_comparable, comparable_outputs
from pruned_trainer.tasks.task import HELD_OUT, accepted, without_labels
from pruned_trainer.training.batches import GROUP, Collate, Share
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.encoder_states import is_of_a_library
from pruned_trainer.training.phase import InterruptedTraining, precision_of
from pruned_trainer.training.teaching import (
    TaskLoss,
    choose_encoders,
    labels_nothing,
    logits_config,
    loss_of,
    other_meaning,
)

# The examples in an evaluation batch where the caller's arguments name no other number.
_EVAL_BATCH = 32
# The settings of a run that a caller may give by name: the others come from the call's own arguments.
_OPTIONS = frozenset(
    "parts penalty lambda_attention lambda_ffn lambda_hidden max_minutes gate_epochs retrain_epochs "
    "gate_fraction gate_steps retrain_steps gate_learning_rate retrain_learning_rate distil_in dropout "
    "train_embeddings align compensate save_steps latency_table overwrite resume decision "
    "average_steps dtype threads".split()
)
# Those of them that name a file.
_PATHS = ("decision", "latency_table")
# The tokens that a tokenizer puts around a text, and behind it; unknown and masked ones are of the text.
_AROUND = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")


@dataclass(frozen=True)
class CallSettings(PruneSettings):
    """The settings of a run whose models and data come from Python."""

    def check_task(self) -> None:
        """Check nothing, because the task is the caller's."""


def prune(
    model: nn.Module,
    target: Target | None,
    train_dataset: Iterable[Any],
    eval_dataset: Iterable[Any] | None = None,
    data_collator: Callable[[Any], Mapping[str, Any]] | None = None,
    compute_metrics: Metrics | None = None,
    args: TrainingArguments | None = None,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    recipe: str = "joint",
    workload: Workload | None = None,
    out: Path | str | None = None,
    loss: TaskLoss | None = None,
    encoder: str | None = None,
    **options: Any,
) -> PruneResult:
    """Decide which heads and FFN units of a model's encoder its task does not need, and train what is left.

    model: any module around one encoder, whose forward takes input_ids and attention_mask and returns
    outputs with names; it is left as it is. The result is its pruned counterpart, or the caller's own class
    around a pruned encoder: see `compact`.
    target: how small or how fast it is to be; None where the paper's recipe lets its prices decide.
    train_dataset, eval_dataset: rows that are dictionaries, tokenised unless the collator does that; without
    the second, 5% of the first are held out to judge models on. Without labels the teacher is all that there
    is to learn from.
    data_collator: by default pads input_ids and what else there is for each token. compute_metrics: as for
    transformers' Trainer; the report has what each model reaches, and its agreement with the teacher.
    args: what is the Trainer's. Its steps, or epochs, are those of both phases together, of which the gates
    take a quarter. teacher: the model itself by default. loss: a function of outputs and batch, instead of
    the loss in the outputs. encoder: the name of the one that is pruned, where the model has several.
    workload: what a target in time is for. out: a folder for the checkpoint, the decision and the report, as
    the command line writes it; None writes nothing. options: further settings of the command line, by their
    names. Errors: ValueError and OSError, one sentence before any training, for what cannot work.
    """
    unknown = options.keys() - _OPTIONS
    if unknown:
        raise ValueError(
            f"prune has no option {', '.join(sorted(unknown))}; it has {', '.join(sorted(_OPTIONS))}"
        )
    check_kinds(target, data_collator, compute_metrics, args, distillation, loss, workload)
    # None stands for the default, as everywhere.
    options = {name: value for name, value in options.items() if value is not None}
    if distillation is not None:
        options["distillation"] = distillation
    options |= {name: checked_path(name, options[name]) for name in _PATHS if name in options}
    if workload is not None and "latency_table" in options:
        raise ValueError("a latency table is of a workload of its own: give workload or latency_table")
    dense = working_copy(model, "model")
    teacher = None if teacher is None else working_copy(teacher, "teacher")
    if encoder is not None:
        choose_encoders(dense, teacher, encoder)
    find_encoder(dense)
    if isinstance(dense, nn.Sequential):
        raise ValueError(
            f"a {type(dense).__name__} takes its inputs as one dictionary: prune it in its own trainer, by "
            "the GatingTrainerMixin, or from the command line"
        )
    call = _Call(dense, teacher, data_collator, compute_metrics, args, loss, workload)
    rows = call.rows(train_dataset, "training dataset")
    datasets = [rows]
    if eval_dataset is None:
        rows, judged = _held_out(rows, call.seed, "no evaluation dataset")
        validation = judged
    else:
        judged = validation = call.rows(eval_dataset, "evaluation dataset")
        datasets.append(judged)
        if _chooses(recipe, options):  # never on what the report is about
            rows, validation = _held_out(rows, call.seed, "the best is chosen on rows of their own")
    if out is None and options.get("resume"):
        raise ValueError("resume goes on in the folder out, and none is given")
    with tempfile.TemporaryDirectory() as scratch:
        folder = checked_path("out", out) if out is not None else Path(scratch) / "out"
        held_out = eval_dataset is None
        with _types_said():
            settings = call.settings(target, len(rows), held_out, recipe, folder, options)
        try:
            digests = {} if out is None else call.digests(datasets)
            return finished(settings, dense, digests) or run_for_one(
                settings,
                lambda settings, table: call.begin(settings, table, rows, validation, judged),
                page=out is not None,
                digests=digests,
            )
        except InterruptedTraining:
            if out is not None:
                raise
            raise InterruptedTraining(
                "stopped, and nothing is kept: with out= the same call would go on (resume=True)"
            ) from None


def _chooses(recipe: str, options: Mapping[str, Any]) -> bool:
    """Whether the run keeps what scores best of several: of ways to compensate, or of weights."""
    compensation = compensation_of(recipe, options.get("compensate"))
    return compensation == "auto" or bool(options.get("average_steps"))


def _held_out(rows: Rows, seed: int, why: str) -> tuple[Rows, Rows]:
    """The rows without HELD_OUT of them, and those. why: the reason, for the user."""
    if len(rows) < 2:
        raise ValueError(f"the {rows.name} has one row, and none can be held out to judge models on")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    number = max(1, round(HELD_OUT * len(rows)))
    say(f"{why}: {number} rows of the training dataset are held out")
    return rows.part(sorted(order[number:])), rows.part(sorted(order[:number]))


@dataclass(frozen=True)
class _Call:
    """The models and functions of one call."""

    dense: Any
    teacher: Any
    collator: Callable[[Any], Mapping[str, Any]] | None
    metrics: Metrics | None
    args: TrainingArguments | None
    loss: TaskLoss | None
    workload: Workload | None

    @property
    def seed(self) -> int:
        return self.args.seed if self.args is not None else 0

    @property
    def label_names(self) -> list[str]:
        """The entries of a batch that only the loss reads."""
        given_names = self.args.label_names if self.args is not None else None
        return list(given_names or find_labels(type(self.dense)) or ["labels"])

    @property
    def collate(self) -> Collate:
        if self.collator is not None:
            return as_batch(self.collator)
        config = find_encoder(self.dense).config
        return default_collate(padding_id(config), longest_sequence(config))

    def rows(self, data: Iterable[Any], name: str) -> Rows:
        """The data, with the columns that the model takes (all of them, where the caller said so)."""
        keeps_all = self.args is not None and not self.args.remove_unused_columns
        columns = None if keeps_all else columns_of(self.dense, self.label_names)
        return Rows(data, name, columns, renames=self.collator is None)

    def settings(
        self,
        target: Target | None,
        rows: int,
        held_out: bool,
        recipe: str,
        out: Path,
        options: dict[str, Any],
    ) -> CallSettings:
        """The run's settings: the options, and what the training arguments say. rows: the number of training
        rows. held_out: whether models are judged on rows of the training dataset."""
        args = self.args
        if args is not None:
            check_callers_arguments(args, self.dense)
            batch = args.train_batch_size * args.gradient_accumulation_steps * world_size()
            by_args = {"seed": args.seed, **_steps(args, rows, batch, recipe, options)}
            options = {**by_args, **options}
        settings = CallSettings(
            model=name_of(self.dense),
            train_file=Path("train_dataset"),
            eval_file=None if held_out else Path("eval_dataset"),
            out=out,
            targets=() if target is None else (target,),
            task=OWN_TASK,
            recipe=recipe,
            command="pruned_trainer.prune",
            **options,
        )
        if args is None:
            return settings
        seen = max(1, round(settings.gate_fraction * rows)) if settings.trains_gates else rows
        if args.dataloader_drop_last and seen < args.train_batch_size * world_size():
            raise ValueError(
                f"dataloader_drop_last leaves no batch of {args.train_batch_size} of the {seen} rows"
            )
        of_trainings: dict[str, Any] = {"batch_size": batch} if has_batches(settings) else {}
        if settings.trains_weights_with_gates:
            of_trainings["learning_rate"] = args.learning_rate
        if settings.retrains:
            of_trainings["retrain_learning_rate"] = options.get("retrain_learning_rate", args.learning_rate)
        if settings.trains_gates or settings.retrains:
            of_trainings["precision"] = precision_of(args)
            if args.save_steps >= 1:
                of_trainings["save_steps"] = options.get("save_steps", int(args.save_steps))
        return replace(settings, **of_trainings)

    def digests(self, datasets: Iterable[Rows]) -> dict[str, str]:
        """The digests of the models and the rows, and what else was given, by which a resumed call knows that
        they are the same."""
        models = {"the model": self.dense} | ({} if self.teacher is None else {"the teacher": self.teacher})
        of_rows = {f"the {data.name}": data.digest() for data in datasets}
        functions = {"loss": self.loss, "data_collator": self.collator, "compute_metrics": self.metrics}
        rest = told_of_call(self.dense, self.args, self.workload, functions)
        return {name: digest_of_weights(model) for name, model in models.items()} | of_rows | rest

    def begin(
        self, settings: PruneSettings, table_file: Path | None, rows: Rows, validation: Rows, judged: Rows
    ) -> Job:
        """Check everything, and make the job. validation: the rows that choices are made on; judged: those
        that the report is about."""
        clock, dense = Clock(), self.dense
        teacher = dense if self.teacher is None else self.teacher
        for model in (dense, teacher):
            nn.Module.to(model, state().device)
        check_phases(settings, dense, teacher)
        tokenizer = getattr(self.collator, "tokenizer", None)
        configs = {"model": find_encoder(dense).config}
        if teacher is not dense:
            configs |= _known_config("teacher", teacher)
        own_collator = self.collator is not None
        first, _ = (first_batch(data, self.collate, own_collator, configs) for data in (rows, judged))
        weights = settings.distillation
        outputs = self._outputs(dense, "model", first, weights.pooling)
        check_temperature(weights, None if outputs.kind in DISTRIBUTIONS else outputs.kind.value)
        if teacher is not dense:  # the report has the agreement with it, whether it teaches or not
            check_comparable(outputs, self._outputs(teacher, "teacher", first, weights.pooling))
            fault = other_meaning(teacher, dense)
            if fault is not None:
                raise ValueError(f"the teacher cannot teach the model: {fault}")
        ids = (getattr(tokenizer, name, None) for name in _AROUND)
        around = {number for number in ids if number is not None}
        expected = Expected(
            configs=configs,
            specials=frozenset(around or {padding_id(find_encoder(dense).config)}),
            kind=outputs.kind,
            width=next(iter(outputs.values.values())).size(-1),
            label_names=self.label_names,
            is_strict=self.loss is None and is_of_a_library(dense),
        )
        apart = validation is not judged
        for data in (rows, validation, judged) if apart else (rows, judged):
            check_rows(data, self.collate, own_collator, expected)
        has_own_loss = self._check_loss(first, weights.task)
        size = self.args.eval_batch_size if self.args is not None else _EVAL_BATCH

        def examples(data: Rows) -> DatasetExamples:
            return DatasetExamples(
                data, self.collate, self.label_names, self.metrics, size, weights.pooling, teacher, dense,
                outputs.kind,
            )  # fmt: skip

        evaluation = examples(judged)
        evaluation.check_metrics()
        lengths = evaluation.arrival_lengths()
        workload = self.workload or Workload.arrival_order(
            lengths, min(BATCH_SIZE, len(lengths)), TIMED_BATCHES
        )
        table = latency_table(settings, dense, workload, table_file) if settings.is_timed else None
        share = settings.gate_fraction
        return Job(
            settings=settings,
            clock=clock,
            dense=dense,
            teacher=teacher,
            tokenizer=tokenizer if hasattr(tokenizer, "save_pretrained") else None,
            task=DatasetTask(),  # type: ignore[arg-type]
            train=rows,
            gate_train=Share(rows, share, settings.seed) if share < 1 else rows,
            validation=examples(validation) if apart else evaluation,
            evaluation=evaluation,
            budget=budget_for(settings, dense, lengths, table),
            lengths=lengths,
            workload=workload if table is None else table.workload,
            table=table,
            collate=self.collate,
            arguments=self.args,
            task_loss=self.loss,
            has_own_loss=has_own_loss,
        )

    def _outputs(self, model: nn.Module, whose: str, batch: Mapping[str, Tensor], pooling: str) -> Outputs:
        """What a model says of a batch without labels. Errors: ValueError where it fails, or says nothing
        that can be compared with a teacher's."""
        labels = {*self.label_names, GROUP}
        asked = {k: v.to(state().device) for k, v in without_labels(batch).items() if k not in labels}
        with torch.no_grad(), said(f"the {whose} fails on the first rows, without labels"):
            outputs = model(**accepted(model, asked))
        config, mask = logits_config(model, self.dense), asked["attention_mask"]
        comparable = comparable_outputs(outputs, config, mask, pooling)
        if any(bool(values.isnan().any()) for values in comparable.values.values()):
            raise ValueError(f"the {whose} gives NaN for the first rows: it cannot be pruned, or teach")
        return comparable

    def _check_loss(self, batch: Mapping[str, Tensor], weight: float) -> bool:
        """Whether there is a loss beside the teacher's, for the first rows. weight: that of the loss. Errors:
        ValueError for a loss that is needed and is none, or has no gradient."""
        batch = {name: value.to(state().device) for name, value in batch.items() if name != GROUP}
        nothing = self.loss is None and "labels" in batch and bool(labels_nothing(batch["labels"]))
        labelled = any(name in batch for name in self.label_names) and not nothing
        name = f"the {type(self.dense).__name__}" if self.loss is None else "the function loss"
        with torch.enable_grad(), said(f"{name} fails on the first rows"):
            outputs = self.dense(**batch)
            loss = loss_of(outputs) if self.loss is None else self.loss(outputs, batch)
        if weight > 0 and (labelled or (self.loss is not None and loss is not None)):
            scalar = checked_loss(name, loss)
            trained = [parameter for parameter in self.dense.parameters() if parameter.requires_grad]
            with said(f"the gradient of the loss of {name} fails on the first rows"):
                torch.autograd.grad(scalar, trained, allow_unused=True)
        return loss is not None


@contextmanager
def _types_said() -> Iterator[None]:
    """Turn the TypeError of an option of another type inside the block into a ValueError of one sentence."""
    try:
        yield
    except TypeError as error:
        raise ValueError(f"an option is of another type than it can be ({error})") from error


def _known_config(whose: str, model: nn.Module) -> dict[str, Any]:
    """The config of a model's encoder, where it has one that is known."""
    return {whose: running_encoder(model).config} if encoders_of(model) else {}


def _steps(args: TrainingArguments, rows: int, batch: int, recipe: str, options: Mapping[str, Any]) -> Any:
    """The steps of both phases: a quarter of the arguments' to the gates, as the plan shares time out; in the
    paper's recipe each part's gates train apart, on a part of that quarter. None where minutes decide, and a
    ValueError where both are said."""
    if "max_minutes" in options:
        if args.max_steps > 0 or args.num_train_epochs != TrainingArguments.num_train_epochs:
            raise ValueError("max_minutes, and max_steps or num_train_epochs of args: say one of them")
        return {}
    total = steps_asked(args, rows, batch)
    if options.get("decision") is not None:
        return {} if "retrain_epochs" in options else {"retrain_steps": total}
    trainings = len(options.get("parts", DEFAULT_PARTS)) if recipe == "paper" else 1
    share = max(1, round(GATE_SHARE * total / trainings))
    scored = score_steps(recipe, batch)
    gates = options.get("gate_steps") or (share if scored is None else scored)
    epochs, fraction = options.get("gate_epochs"), options.get("gate_fraction", 1.0)
    if epochs is not None and math.isfinite(epochs) and math.isfinite(fraction):  # else settings refuse them
        seen = max(1, round(fraction * rows))
        gates = math.ceil(math.ceil(seen / batch) * epochs)
    used = gates * trainings if scored is None else 0
    steps = {} if "gate_epochs" in options or recipe == "random" else {"gate_steps": gates}
    option = next((name for name in ("gate_steps", "gate_epochs") if name in options), None)
    if option is not None and used >= total and not {"retrain_epochs", "retrain_steps"} & options.keys():
        raise ValueError(
            f"{option} leaves none of the {total} steps of args to the narrow model: {used} are the "
            "gates'; give retrain_steps, which may be 0"
        )
    if "retrain_epochs" not in options:
        steps["retrain_steps"] = max(0, total - used)
    return steps
