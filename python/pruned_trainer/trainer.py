"""PruningTrainer: transformers.Trainer with the losses, optimiser groups and logs of pruning, and no loop of
its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainingArguments

from pruned_trainer.attach import find_encoder
from pruned_trainer.budget import Budget, Target
from pruned_trainer.callbacks import OneLineProgress, stop_on_interrupt
from pruned_trainer.distillation import Distillation, hidden_loss, logits_loss
from pruned_trainer.gates import Gates, Lagrangian

# The target falls from the dense cost to what was asked for over this part of the steps; the rest settles
# there.
RAMP = 0.6
# The multipliers must grow to where the price of an open gate outweighs what it adds to the loss, about 10
# to 30 here.
MULTIPLIER_RATE = 1.0
# Steps in which gates at the paper's learning rate (0.1) travel from open to closed with time to settle; a
# shorter run gets proportionally larger rates.
SETTLING_STEPS = 300


class GatePhase:
    """What the gate phase adds to training: gates, the budget they cost, the target, and who holds them
    there."""

    def __init__(self, gates: Gates, budget: Budget, target: Target, gate_learning_rate: float) -> None:
        self.gates, self.budget, self.target = gates, budget, target
        self.gate_learning_rate = gate_learning_rate
        gates.add_module("lagrangian", Lagrangian().to(next(gates.parameters()).device))

    @property
    def lagrangian(self) -> Lagrangian:
        return self.gates.get_submodule("lagrangian")  # type: ignore[return-value]

    def target_at(self, progress: float) -> float:
        """The fraction to hold at this part of the training (0 to 1)."""
        return 1.0 + (self.target.fraction - 1.0) * min(progress / RAMP, 1.0)

    def groups(self, steps: int) -> list[dict[str, Any]]:
        """Optimiser groups of a training of `steps` steps: the gates (descent), the multipliers (ascent)."""
        pace = max(1.0, SETTLING_STEPS / steps) if steps > 0 else 1.0
        gates: list[Any] = [*self.gates.heads, *self.gates.ffn]
        multipliers = list(self.lagrangian.parameters())
        return [
            {"params": gates, "lr": self.gate_learning_rate * pace, "weight_decay": 0.0},
            {"params": multipliers, "lr": MULTIPLIER_RATE * pace, "weight_decay": 0.0, "maximize": True},
        ]


class PruningTrainer(Trainer):
    """Trains a student with its task loss, distillation from a teacher, and in the gate phase the Lagrangian.

    model: a gated stock model (with `gate_phase`) or any question-answering model (without: plain
    distillation).
    teacher: gives start and end logits and hidden states without gradients; None if the distillation needs
    none.
    Batches are dictionaries of padded tensors with start_positions and end_positions.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        distillation: Distillation,
        teacher: nn.Module | None = None,
        gate_phase: GatePhase | None = None,
        **kwargs: Any,
    ) -> None:
        if distillation.needs_teacher and teacher is None:
            raise ValueError("the distillation losses need a teacher")
        if args.n_gpu > 1:
            raise ValueError(
                "several GPUs in one process are not supported: start a process each (torchrun, "
                "accelerate launch), or choose one with CUDA_VISIBLE_DEVICES"
            )
        super().__init__(model, args, **kwargs)
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(OneLineProgress)
        self.distillation, self.gate_phase = distillation, gate_phase
        self.teacher = teacher.to(self.args.device) if teacher is not None else None
        self.loss_is_scaled_for_ga = False  # compute_loss returns a mean over its minibatch
        self._parts: dict[str, float] = {}
        self._counted = 0

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with decay on matrices, and groups of their own for gates and multipliers."""
        model = self.model if model is None else model
        assert model is not None
        gates = {id(p) for p in self.gate_phase.gates.parameters()} if self.gate_phase else set()
        weights = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
        groups = [
            {"params": [p for p in weights if p.dim() > 1], "weight_decay": self.args.weight_decay},
            {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
        ]
        if self.gate_phase:
            groups += self.gate_phase.groups(self.args.max_steps)
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.args.learning_rate,
            betas=(self.args.adam_beta1, self.args.adam_beta2),
            eps=self.args.adam_epsilon,
        )
        return self.optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        weights = self.distillation
        outputs = model(**inputs, output_hidden_states=weights.hidden > 0)
        parts = {"task": outputs.loss * weights.task}
        if self.teacher is not None and weights.needs_teacher:
            parts.update(self._distil(outputs, inputs))
        if self.gate_phase is not None:
            parts["budget"], expected, wanted = self._hold_budget()
            self._count({"expected": expected, "wanted": wanted})
        loss = torch.stack(list(parts.values())).sum()
        self._count({f"loss_{name}": float(part.detach()) for name, part in parts.items()})
        self._counted += 1
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step} (learning rate "
                f"{self._get_learning_rate():.3g}, parts "
                f"{{{', '.join(f'{k}: {float(v.detach()):.4g}' for k, v in parts.items())}}}); "
                "a lower --learning-rate helps"
            )
        return (loss, outputs) if return_outputs else loss

    def _distil(self, outputs: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.teacher is not None
        weights = self.distillation
        questions = {key: value for key, value in inputs.items() if not key.endswith("_positions")}
        with torch.no_grad():
            taught = self.teacher(**questions, output_hidden_states=weights.hidden > 0)
        real = inputs["attention_mask"].bool()
        parts = {}
        if weights.logits > 0:
            parts["logits"] = logits_loss(outputs, taught, real, weights.temperature) * weights.logits
        if weights.hidden > 0:
            parts["hidden"] = hidden_loss(outputs, taught, real) * weights.hidden
        return parts

    def _hold_budget(self) -> tuple[Tensor, float, float]:
        phase = self.gate_phase
        assert phase is not None
        wanted = phase.target_at(self.state.global_step / max(self.state.max_steps, 1))
        expected = phase.budget.expected(*phase.gates.open_probabilities())
        return phase.lagrangian(expected, wanted), float(expected.detach()), wanted

    def _count(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._parts[name] = self._parts.get(name, 0.0) + value

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's logs with the mean of each loss part, and of the expected and wanted budget, since the
        last ones."""
        if self._counted and "loss" in logs:
            logs.update({name: value / self._counted for name, value in self._parts.items()})
            self._parts, self._counted = {}, 0
        super().log(logs, start_time)


class InterruptedTraining(KeyboardInterrupt):
    """Training was stopped by the user; the text says where the checkpoint is."""


def run(trainer: PruningTrainer, name: str) -> list[dict[str, Any]]:
    """Train, and return the trainer's log. After a Ctrl-C: InterruptedTraining, with a checkpoint written."""
    with stop_on_interrupt() as stopper:
        trainer.add_callback(stopper)
        trainer.train()
    if stopper.requested:
        step = trainer.state.global_step
        where = Path(str(trainer.args.output_dir)) / f"checkpoint-{step}"
        if not where.exists():  # the request came after the last step's end
            trainer._save_checkpoint(trainer.model_wrapped, trial=None)
        raise InterruptedTraining(f"stopped in the {name} phase after step {step}; its checkpoint is {where}")
    return trainer.state.log_history


def training_arguments(
    folder: Path, steps: int, batch_size: int, learning_rate: float, seed: int
) -> TrainingArguments:
    """What every training here has in common: warm-up and linear decay, batches of like lengths, progress
    bars."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        seed=seed,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to=[],
        disable_tqdm=False,  # said, because the default follows transformers' log level
        remove_unused_columns=False,
        train_sampling_strategy="group_by_length",
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def pad_batch(features: Sequence[dict[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Collate features of unequal length: id lists right-padded to the longest (batch, seqlen), positions
    (batch,)."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch = {}
    for name, first in features[0].items():
        if not hasattr(first, "__len__"):
            batch[name] = torch.tensor([feature[name] for feature in features])
            continue
        fill = pad_token_id if name == "input_ids" else 0
        padded = torch.full((len(features), longest), fill, dtype=torch.long)
        for row, feature in enumerate(features):
            padded[row, : len(feature[name])] = torch.as_tensor(feature[name])
        batch[name] = padded
    return batch


def prepare_student(model: nn.Module, dropout: float, train_embeddings: bool) -> None:
    """Set every dropout of `model`, and freeze its word embeddings unless they are to be trained.

    Dropout is off by default: the teacher's soft targets regularise, and on CPU it costs the fused attention
    (3x).
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    find_encoder(model).embeddings.word_embeddings.weight.requires_grad_(train_embeddings)
