"""Pruning inside a training loop of the caller's own: `gating` around it, or a mixin for a Trainer's
subclass."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pruned_ops.measure.layer_times import measure_table
from pruned_ops.measure.timing import Workload
from pruned_ops.models.stock import config_of, find_encoder, model_shape
from pruned_ops.shape import checked_int
from pruned_trainer.distributed import once
from pruned_trainer.pruning.attach import attached
from pruned_trainer.pruning.budget import Budget, make_budget
from pruned_trainer.pruning.compact import check_prunable, unmade_hidden
from pruned_trainer.pruning.decision import Decision, decide
from pruned_trainer.pruning.gate_phase import SETTLING_STEPS, HoldTarget
from pruned_trainer.pruning.options import DEFAULT_PARTS, Target
from pruned_trainer.training.batches import GROUP
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.distillation_losses import HiddenProjection
from pruned_trainer.training.encoder_states import Call, States, capturing, recording
from pruned_trainer.training.phase import precision_of
from pruned_trainer.training.teaching import Teaching, choose_encoders

# FFN widths are rounded up to a multiple of this, where no latency table says another.
_ALIGN = 8
# The gates' file in a Trainer's checkpoint.
_CHECKPOINT = "gating.pt"
# The batches that a target in time is for, where the caller names no others: 16 of 8 texts of 128 tokens.
_LENGTH, _BATCH, _BATCHES = 128, 8, 16


class Gating:
    """Gates on a model while the caller trains it. `gating` makes it."""

    def __init__(
        self,
        model: nn.Module,
        budget: Budget,
        target: Target,
        phase: HoldTarget,
        teaching: Teaching,
        states: list[States] | None,
        steps: int,
        align: int,
    ) -> None:
        self.model, self.budget, self.target, self.phase = model, budget, target, phase
        self.teaching, self.steps, self.align = teaching, steps, align
        self.done, self._drawn = 0, 0
        self._states, self._is_priced = states, False
        self._optimizer = torch.optim.AdamW([phase.group(steps)])
        warm = max(1, steps // 20)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(steps - warm, 1))),
        )
        self._own = {id(parameter) for parameter in phase.gates.parameters()}
        self.facts: dict[str, float] = {}

    def parameters(self) -> list[nn.Parameter]:
        """The model's parameters that the caller's optimiser is to train: all that train but the gates, which
        `step` moves."""
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in self._own]

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """What is to be added to the caller's own loss of these outputs: what open gates cost, and how far
        the outputs are from the teacher's. `facts` then has the numbers.

        batch: what the model was called with, labels or not; its attention_mask is needed where there is a
        teacher.
        """
        states = list(self._states or ())
        groups = batch.get(GROUP)
        inputs = {name: value for name, value in batch.items() if name != GROUP}
        return self.price() + self.taught(Call(inputs, outputs, states, False), groups)

    def price(self) -> Tensor:
        """What open gates cost in this step; 0 while the model is in evaluation mode.

        Errors: ValueError where gradient checkpointing would compute one call with the gates of another."""
        self.facts = {}
        if self._states is not None:
            self._states.clear()
        if not self.model.training:
            return torch.zeros((), device=self._device)
        self._check_calls()
        price, self.facts = self.phase.loss(self.done / self.steps)
        self._is_priced = True
        return price

    def _check_calls(self) -> None:
        drawn = int(self.phase.gates.draws)
        calls, self._drawn = drawn - self._drawn, drawn
        modules = find_encoder(self.model).modules()
        if calls > 1 and any(getattr(module, "gradient_checkpointing", False) for module in modules):
            raise ValueError(
                "gradient checkpointing computes the layers anew in the backward pass, and those of the "
                f"{calls} calls of the model in this step all with the gates of the last: leave it out "
                "(model.gradient_checkpointing_disable())"
            )

    def taught(self, call: Call, groups: Tensor | None = None) -> Tensor:
        """How far one call of the model is from its teacher."""
        parts = self.teaching.parts(call.outputs, call.states, call.inputs, groups=groups, as_one=call.as_one)
        self.facts |= {f"loss_{name}": float(part.detach()) for name, part in parts.items()}
        return torch.stack([*parts.values()]).sum() if parts else torch.zeros((), device=self._device)

    @property
    def _device(self) -> torch.device:
        return self.phase.gates.draws.device

    def step(self) -> None:
        """Move the gates by the gradients that the caller's backward pass left; once for every step of the
        caller's optimiser.

        Errors: ValueError where it left none, because gates would stay open as they are.
        """
        if not self._is_priced:
            raise ValueError(
                "gates have no price in this step: gates.loss(outputs, batch) was not computed, or the model "
                "is in evaluation mode (model.train())"
            )
        if all(gate.grad is None for gate in self.phase.gates.locations()):
            raise ValueError(
                "no gradient reached the gates: add gates.loss(outputs, batch) to the loss, give the "
                "optimiser gates.parameters(), and clear gradients by optimizer.zero_grad()"
            )
        self._is_priced = False
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs of the gates, for `load_state_dict`."""
        return {
            "gates": self.phase.gates.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "done": self.done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.phase.gates.load_state_dict(state["gates"])
        self.phase.followed, self._drawn = None, int(self.phase.gates.draws)
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.done = state["done"]

    def decide(self) -> Decision:
        """What stays, for `compact(model, decision)`. It may be called after the block, too."""
        return decide(self.phase.gates.scores(), self.budget, self.target, self.align)


@contextmanager
def gating(
    model: nn.Module,
    target: Target,
    steps: int = SETTLING_STEPS,
    teacher: nn.Module | None = None,
    distillation: Distillation | None = None,
    lengths: Sequence[int] = (_LENGTH,),
    workload: Workload | None = None,
    parts: Sequence[str] = DEFAULT_PARTS,
    seed: int = 0,
    gate_learning_rate: float = 0.1,
    align: int | None = None,
    encoder: str | None = None,
) -> Iterator[Gating]:
    """`with gating(model, target, steps, teacher=teacher) as gates:` the model is gated inside the block, and
    trains in the caller's own loop: add `gates.loss(outputs, batch)` to the loss, call `gates.step()` after
    the step of the optimiser (which is given `gates.parameters()`), and after `steps` of them
    `gates.decide()`.

    model: any module around one supported encoder; weights and gates train together. steps: in which the
    gates come to the target and settle. teacher: a frozen model with the same kind of outputs, such as a copy
    of the model. distillation: the weights of what it teaches; by default its outputs and no hidden states.
    lengths: the texts' lengths in tokens, for a target in MACs. workload: the batches that a target in time
    is for; how long each part of a layer takes with them is measured first. encoder: the name of the one that
    is pruned, where the model has several. Errors: ValueError for a target out of reach, a teacher that has
    the model's own weights, and as for `attach`.
    """
    if not isinstance(target, Target):
        raise ValueError(f"target is a {type(target).__name__}, and a Target is needed: Target(speedup=2.0)")
    checked_int("steps", steps, 1)
    if align is not None:
        checked_int("align", align, 1)
    if workload is not None and not target.is_time:
        raise ValueError(f"a workload is for a target in time, and this one is {target}: leave it out")
    if teacher is not None and {*map(id, teacher.parameters())} & {*map(id, model.parameters())}:
        raise ValueError(
            "the teacher has the model's own weights, which the gates will change: give copy.deepcopy(model)"
        )
    weights = distillation or (Distillation.none() if teacher is None else Distillation(task=1.0, hidden=0.0))
    if teacher is None and weights.needs_teacher:
        raise ValueError("the distillation losses need a teacher")
    if teacher is not None and not weights.needs_teacher:
        raise ValueError("a teacher is given, and no loss of the distillation asks it: leave the teacher out")
    if encoder is not None:
        choose_encoders(model, teacher, encoder)
    check_prunable(model, parts)
    budget, table_align = _budget(model, target, lengths, workload)
    budget.unmade_hidden = unmade_hidden(find_encoder(model))
    align = align or table_align
    budget.check_reachable(target, parts, align)
    with ExitStack() as stack:
        gates = stack.enter_context(attached(model, seed, parts))
        phase = HoldTarget(gates, budget, [budget.allowed_fraction(target)], gate_learning_rate)
        gates.requires_grad_(True)
        if teacher is not None:
            teacher.eval()
        teaching = Teaching(model, teacher, weights)
        stack.callback(HiddenProjection.detach, model)
        states = stack.enter_context(capturing(model)) if weights.hidden > 0 else None
        yield Gating(model, budget, target, phase, teaching, states, steps, align)


def _budget(
    model: nn.Module, target: Target, lengths: Sequence[int], workload: Workload | None
) -> tuple[Budget, int]:
    """The budget in the target's unit, and the number that widths are rounded up to."""
    if not target.is_time:
        return make_budget(target, model_shape(model), lengths, None), _ALIGN
    work = workload or Workload.fixed(_LENGTH, _BATCH, _BATCHES)
    encoder = find_encoder(model)
    # Once, because processes that decide by tables of their own would cut different models out.
    table = once(lambda: measure_table(config_of(encoder), work, device=encoder.device.type))
    return make_budget(target, model_shape(model), lengths, table), table.align


# What `gating` takes, but for what a Trainer knows itself.
_OPTIONS = frozenset(inspect.signature(gating).parameters) - {"model", "steps"}


class GatingTrainerMixin:
    """Prunes inside a Trainer: `class MyTrainer(GatingTrainerMixin, Trainer)`.

    Its constructor takes what `gating` takes, but for the model and the steps, as the dictionary `gating`,
    and everything else as the Trainer does. When `train` has ended, `decision` is what stays, and the model
    is without gates: `compact(trainer.model, trainer.decision)` makes it narrow. The Trainer's own loss, data
    and optimiser stay as they are. A checkpoint has the gates' own state, too, so that
    `train(resume_from_checkpoint=...)` comes to the same end. The teacher is asked whatever the loss asks the
    model, so that sentence-transformers' trainers work as well.
    """

    def __init__(self, *args: Any, gating: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.model_init is not None:  # type: ignore[attr-defined]
            raise ValueError("model_init makes another model when training begins, without gates: give model")
        if self.args.n_gpu > 1:  # type: ignore[attr-defined]
            raise ValueError("several GPUs in one process are not supported: start a process each (torchrun)")
        if precision_of(self.args) == "fp16":  # type: ignore[attr-defined]
            raise ValueError("gates do not train in fp16, whose gradients are scaled: bf16 and fp32 work")
        if self.args.load_best_model_at_end:  # type: ignore[attr-defined]
            raise ValueError(
                "load_best_model_at_end would take a step before the gates came to the target: leave it out"
            )
        unknown = sorted({*gating} - _OPTIONS)
        if unknown or "target" not in gating:
            fault = f"has no option {', '.join(unknown)}" if unknown else "needs a target"
            raise ValueError(f"gating {fault}; its options are {', '.join(sorted(_OPTIONS))}")
        self._gating_options = dict(gating)
        self._gating: Gating | None = None
        self.decision: Decision | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train with gates, and decide at the end."""
        teacher = self._gating_options.get("teacher")
        if teacher is not None:  # the Trainer itself moves only the model
            teacher.to(self.args.device)  # type: ignore[attr-defined]
        try:
            with gating(self.model, steps=self._planned_steps(), **self._gating_options) as self._gating:  # type: ignore[attr-defined]
                result = super().train(*args, **kwargs)  # type: ignore[misc]
                self.decision = self._gating.decide()
        finally:
            self._gating = None
        return result

    def _planned_steps(self) -> int:
        """The optimiser's steps that the training arguments ask for."""
        arguments = self.args  # type: ignore[attr-defined]
        if arguments.max_steps > 0:
            return int(arguments.max_steps)
        batches = len(self.get_train_dataloader())  # type: ignore[attr-defined]
        epoch_steps = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
        return max(1, math.ceil(epoch_steps * arguments.num_train_epochs))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self._gating is not None and self.args.should_save:  # type: ignore[attr-defined]
            torch.save(self._gating.state_dict(), Path(output_dir) / _CHECKPOINT)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None or self._gating is None:
            return
        file = Path(checkpoint) / _CHECKPOINT
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} has no {_CHECKPOINT}, the state of the gates: train without resuming"
            )
        self._gating.load_state_dict(torch.load(file, weights_only=True))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's optimiser for everything but the gates."""
        optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._gating is not None:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in self._gating._own]
        return optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The Trainer's loss, with what `Gating.loss` adds while gates train."""
        kwargs["num_items_in_batch"] = num_items_in_batch
        if self._gating is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        gating, groups = self._gating, inputs.pop(GROUP, None)
        gating.done = self.state.global_step  # type: ignore[attr-defined]
        with recording(gating.model, gating.teaching.distillation.hidden > 0) as calls:
            result = super().compute_loss(model, inputs, return_outputs, **kwargs)  # type: ignore[misc]
        loss = result[0] if return_outputs else result
        added = gating.price()
        for call in calls:
            added = added + gating.taught(call, groups) / len(calls)
        if self._adds_minibatches_up(num_items_in_batch):
            added = added / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        loss = loss + added.to(loss.device)
        return (loss, result[1]) if return_outputs else loss

    def _adds_minibatches_up(self, number: Any) -> bool:
        """Whether the Trainer takes the losses of a step's minibatches as parts of a sum, by its own rule,
        and does not average them. number: of the labels in all of them, where it has counted these."""
        known = getattr(self, "loss_is_scaled_for_ga", None)
        if known is not None:
            return bool(known)
        counted = self.model_accepts_loss_kwargs and number is not None  # type: ignore[attr-defined]
        return bool(counted) or self.compute_loss_func is not None  # type: ignore[attr-defined]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's step, and the gates' after every step of the optimiser."""
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self._gating is not None and self.accelerator.sync_gradients:  # type: ignore[attr-defined]
            self._gating.step()
        return loss
