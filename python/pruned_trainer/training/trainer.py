"""PruningTrainer: transformers.Trainer with the losses, optimiser groups, logs and checkpoints of pruning; it
has no training loop of its own."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from bisect import bisect
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import OptimizerNames

from pruned_trainer.distributed import on_any
from pruned_trainer.pruning.gate_phase import GatePhase
from pruned_trainer.tasks.windows import lengths_of
from pruned_trainer.training.allocator import keep_freed_memory
from pruned_trainer.training.attention_precision import AttentionInFp32
from pruned_trainer.training.averaging import FILE as AVERAGE
from pruned_trainer.training.averaging import WeightAverage
from pruned_trainer.training.batches import GROUP, NUMBER, LengthGroupedSampler
from pruned_trainer.training.callbacks import OneLineProgress
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.encoder_states import run_model
from pruned_trainer.training.teacher_cache import TeacherCache
from pruned_trainer.training.teaching import TaskLoss, Teaching

_SAVING = "saving"
# The optimiser of weights and gates, by transformers' names for it.
_OPTIMISERS = ("adamw_torch", "adamw_torch_fused")


def check_arguments(args: TrainingArguments) -> None:
    """ValueError for training arguments that would be without effect here."""
    if args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor is not applied to the losses here: leave it out, or give your own loss"
        )
    if args.optim not in _OPTIMISERS:
        name, known = OptimizerNames(args.optim).value, ", ".join(_OPTIMISERS)
        raise ValueError(f"optim is {name}: weights and gates are trained by AdamW ({known})")
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name, None):
            raise ValueError(f"{name} is of optimisers that are not used here: leave it out")


class PruningTrainer(Trainer):
    """Trains a student with its task loss, distillation from a teacher, and in the gate phase what open gates
    cost.

    model: a gated model, with `gate_phase`; or any model around an encoder, without, for plain distillation.
    teacher: gives the same kind of outputs, and hidden states, without gradients; None if the distillation
    needs none. cache: the teacher's start and end logits on disk; features then have a NUMBER. kept_hidden:
    the teacher's hidden dimensions that the student still has, where it has fewer. task_loss: a function of
    outputs and batch that takes the place of the outputs' own `loss`. average: collects the mean of the last
    steps' weights, which checkpoints then have too.
    Batches are dictionaries of padded tensors, with labels or without; a GROUP is the query of each row.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        distillation: Distillation,
        teacher: nn.Module | None = None,
        gate_phase: GatePhase | None = None,
        cache: TeacherCache | None = None,
        kept_hidden: Sequence[int] | None = None,
        task_loss: TaskLoss | None = None,
        average: WeightAverage | None = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: start a process each (torchrun, "
                "accelerate launch), or choose one with CUDA_VISIBLE_DEVICES"
            )
        check_arguments(args)
        if args.device.type == "cpu":
            keep_freed_memory()
        self.teaching = Teaching(model, teacher, distillation, kept_hidden, cache, task_loss)
        for parameter in model.parameters():
            if (
                not parameter.numel()
            ):  # no gradient ever comes for it, and several processes would wait for one
                parameter.requires_grad_(False)
        super().__init__(model, args, **kwargs)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(OneLineProgress)
        self.gate_phase, self.average = gate_phase, average
        if average is not None:
            self.add_callback(average)
        self.teaching.labels |= set(self.label_names)
        if teacher is not None:
            teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # compute_loss returns its minibatch's mean, not a part
        self._parts: dict[str, float] = {}
        self._counted = 0
        self._saving = False

    def train_from(self, checkpoint: Path | None) -> None:
        """Train up to the last step of the plan, from a checkpoint on if there is one.

        Errors: ValueError for a checkpoint from which training would not go on as it was."""
        if checkpoint is None:
            self.train()
            return
        self._check_whole(checkpoint)
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=str(checkpoint))
            return
        # Every step is done. transformers would train one more before it looks.
        self._load_from_checkpoint(str(checkpoint))
        self._load_average(checkpoint)
        state.is_local_process_zero = self.is_local_process_zero()
        state.is_world_process_zero = self.is_world_process_zero()
        self.state = state
        self.callback_handler.on_train_begin(self.args, state, self.control)
        self.callback_handler.on_train_end(self.args, state, self.control)

    def _check_whole(self, checkpoint: Path) -> None:
        """ValueError for a checkpoint that lacks its weights, optimiser, scheduler, random state or step
        count, or has half of one. (transformers goes on without the optimiser or the random state, and so
        comes to another end.)

        As many processes as wrote a random state are taken to have written the checkpoint: another number
        may go on from it."""
        processes = len([*checkpoint.glob("rng_state*.pth")])
        states = [f"rng_state_{k}.pth" for k in range(processes)] if processes > 1 else ["rng_state.pth"]
        needed = ["model.safetensors", "optimizer.pt", "scheduler.pt", *states]
        if self.args.fp16:
            needed.append("scaler.pt")
        if self.average is not None and _steps_of(checkpoint) > self.average.start:
            needed.append(AVERAGE)
        spoilt = [name for name in ("trainer_state.json", *needed) if not _is_whole(checkpoint / name)]
        if on_any(bool(spoilt)):
            raise ValueError(
                f"{checkpoint} cannot be resumed: {', '.join(spoilt) or 'a file'} is missing or broken; "
                "without the folder --resume trains this phase anew"
            )

    # -- data and optimiser ------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler[int] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # A batch of all processes together.
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(
            lengths_of(dataset),
            batch_size,
            self.args.seed,
            lambda: self.state.global_step,
            getattr(dataset, "kinds", None),
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with decay on matrices, and a group of their own for gates."""
        model = self.model if model is None else model
        assert model is not None
        gates = {id(p) for p in self.gate_phase.gates.parameters()} if self.gate_phase else set()
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": self.args.weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.gate_phase:
            groups.append(self.gate_phase.group(self.args.max_steps))
        self.optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
            fused=True,  # one pass over the weights: a fifth of the time on a CPU
        )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Warm-up and linear decay; those of the gates begin anew for each target."""
        if self.gate_phase is None or self.gate_phase.stages == 1:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        assert optimizer is not None
        edges = [0, *self.gate_phase.stage_ends(num_training_steps)]
        gates = {id(p) for p in self.gate_phase.gates.parameters()}

        def linear(steps: int, step: int) -> float:
            warm = max(1, steps // 20)
            return min(step / warm, max(0.0, (steps - step) / max(steps - warm, 1)))

        def weight_rate(step: int) -> float:
            return linear(num_training_steps, step)

        def gate_rate(step: int) -> float:
            stage = min(bisect(edges, step), len(edges) - 1)
            begin, end = edges[stage - 1], edges[stage]
            return linear(end - begin, step - begin)

        rates: Any = [
            gate_rate if id(group["params"][0]) in gates else weight_rate for group in optimizer.param_groups
        ]
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return self.lr_scheduler

    # -- loss --------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's step, forward and backward."""
        slow = self.args.bf16 and self.args.device.type == "cpu" and not self.args.torch_compile
        with AttentionInFp32() if slow else nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        numbers, groups = inputs.pop(NUMBER, None), inputs.pop(GROUP, None)
        teaching = self.teaching
        with_states = teaching.distillation.hidden > 0
        outputs, states = run_model(model, inputs, with_states, self.model)
        parts = {"task": teaching.task_loss(outputs, inputs)}
        parts.update(teaching.parts(outputs, states, inputs, numbers, groups))
        if self.gate_phase is not None:
            progress = self.state.global_step / max(self.state.max_steps, 1)
            parts["budget"], facts = self.gate_phase.loss(progress)
            self._count(facts)
        loss = torch.stack(list(parts.values())).sum()
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                "nothing in this batch's loss has a gradient: it has no labels, and no teacher says anything "
                "of it"
            )
        self._count({f"loss_{name}": float(part.detach()) for name, part in parts.items()})
        self._counted += 1
        if on_any(not math.isfinite(float(loss.detach()))):
            raise self._not_finite(parts)
        return (loss, outputs) if return_outputs else loss

    def _not_finite(self, parts: dict[str, Tensor]) -> FloatingPointError:
        """The error for a loss of these parts, or (without parts) a weight, that is not finite."""
        values = ", ".join(f"{name} {float(part.detach()):.4g}" for name, part in parts.items())
        fault = f"the loss is not finite ({values})" if parts else "a weight is not finite"
        last = last_checkpoint(Path(str(self.args.output_dir)))
        remedy = f"the last good checkpoint is {last}" if last else "no checkpoint was written before"
        return FloatingPointError(
            f"{fault} at step {self.state.global_step} with learning rate "
            f"{self._get_learning_rate():.3g}; {remedy}; a lower learning rate helps"
        )

    # -- logs and checkpoints ----------------------------------------------------------------------------

    def _count(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._parts[name] = self._parts.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, beside the Trainer's own entries, the means over steps and processes since the last log of
        each loss part and of the expected and wanted budget, and the number of open gates in each layer."""
        if self._counted and "loss" in logs:
            names = sorted(self._parts)
            means = torch.tensor([self._parts[name] / self._counted for name in names])
            means = self.accelerator.reduce(means.to(self.args.device), "mean").cpu()
            logs.update(dict(zip(names, means.tolist(), strict=True)))
            self._parts, self._counted = {}, 0
            if self.gate_phase is not None:
                logs.update(_open_gates(self.gate_phase))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save as the Trainer does; of a module that is no model of transformers, copies of the tensors, as
        safetensors refuses those that share memory."""
        if state_dict is None and not isinstance(self.model, PreTrainedModel):
            assert self.model is not None
            tensors = {k: v for k, v in self.model.state_dict().items() if isinstance(v, Tensor)}
            state_dict = {k: v.clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None and self.args.should_save:
            self.average.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._load_average(Path(checkpoint))

    def _load_average(self, checkpoint: Path) -> None:
        if self.average is not None:
            self.average.load(checkpoint, self.args.device)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, _SAVING) if self._saving else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Give a checkpoint its name only when it is whole, and then remove the one before.

        Errors: FloatingPointError, with nothing saved, where a weight is not finite.
        """
        run = Path(str(self.args.output_dir))
        if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
            raise self._not_finite({})
        if self.args.should_save:
            shutil.rmtree(run / _SAVING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError):
            shutil.rmtree(run / _SAVING, ignore_errors=True)  # half of it may have filled the disk
            raise
        finally:
            self._saving = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            name = f"checkpoint-{self.state.global_step}"
            shutil.rmtree(run / name, ignore_errors=True)
            (run / _SAVING / name).rename(run / name)
            for older in run.glob("checkpoint-*"):
                if older.name != name:
                    shutil.rmtree(older)
        self.accelerator.wait_for_everyone()


def _is_whole(file: Path) -> bool:
    """Whether a file of a checkpoint is there and has its end."""
    try:
        if file.suffix == ".json":
            TrainerState.load_from_json(str(file))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        else:
            return zipfile.is_zipfile(file)
    except (OSError, ValueError, TypeError, SafetensorError):
        return False
    return True


def _steps_of(checkpoint: Path) -> int:
    """The steps that were done when a checkpoint was written; 0 where its count is broken."""
    file = checkpoint / "trainer_state.json"
    return TrainerState.load_from_json(str(file)).global_step if _is_whole(file) else 0


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a phase's folder."""
    newest = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return Path(newest) if newest else None


def _open_gates(phase: GatePhase) -> dict[str, float]:
    """The expected number of open gates in each layer, and of open hidden dimensions, counted as the phase's
    penalty counts them."""
    counts = phase.gates.probabilities(phase.penalty)
    return {
        f"open_{part}/{f'layer_{i}' if part != 'hidden' else 'model'}": float(tensor.detach().sum())
        for part in phase.gates.parts
        for i, tensor in enumerate(counts.of(part))
    }
