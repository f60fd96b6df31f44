"""What a caller of `pruned_trainer.prune` gives: its arguments, models and losses, checked beforehand."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from pruned_ops.measure.timing import Workload
from pruned_ops.models.stock import OPTIMISED, find_encoder
from pruned_trainer.distributed import say
from pruned_trainer.jobs.row_checks import said
from pruned_trainer.pruning.attach import HALVES, HOOKS
from pruned_trainer.pruning.options import Target
from pruned_trainer.training.distillation import Distillation
from pruned_trainer.training.teacher_cache import weights_content

# The training arguments that decide what a training comes to and that no setting of the run holds.
_DECISIVE = (
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "lr_scheduler_type",
    "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "neftune_noise_alpha", "data_seed",
    "dataloader_drop_last", "train_sampling_strategy", "label_names",
)  # fmt: skip


def check_kinds(
    target: Any, collator: Any, metrics: Any, args: Any, distillation: Any, loss: Any, workload: Any
) -> None:
    """Errors: ValueError for an argument that is something else than what it stands for."""
    for name, value, kind in (
        ("target", target, Target), ("args", args, TrainingArguments),
        ("distillation", distillation, Distillation), ("workload", workload, Workload),
    ):  # fmt: skip
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} is a {type(value).__name__}, and a {kind.__name__} is needed")
    for name, value in (("data_collator", collator), ("compute_metrics", metrics), ("loss", loss)):
        if value is not None and not callable(value):
            raise ValueError(f"{name} is a {type(value).__name__}, and a function is needed")


def checked_path(name: str, value: Any) -> Path:
    """The path that an option holds. Errors: ValueError where it holds none."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise ValueError(f"{name} is {value!r}, and a path is needed")
    return Path(value)


def working_copy(model: Any, whose: str) -> Any:
    """A copy of the caller's model to work on, in evaluation mode and at least in float32. Errors: ValueError
    where it is no model that can be copied and run."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(f"the {whose} is {kind}: a model is needed, loaded (of a pipeline its .model)")
    inner = getattr(model, "_orig_mod", model.module if isinstance(model, nn.DataParallel) else None)
    if inner is not None:  # what torch.compile, or DataParallel, put around it
        kind, plain = type(model).__name__, type(inner).__name__
        raise ValueError(f"the {whose} is a {kind}: give the {plain} inside it")
    if whose == "model" and isinstance(getattr(model, "config", None), Mapping):
        raise ValueError(
            "the model's config is a dictionary, and transformers' Trainer sets attributes of what models "
            "call so: call it otherwise"
        )
    if hasattr(model, HOOKS):
        raise ValueError(f"gates are attached to the {whose} already: detach(model) first")
    if not any(getattr(type(module), OPTIMISED, False) for module in model.modules()):
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_meta:
                raise ValueError(f"the {whose}'s {name} is on the meta device, without values: load them")
    with said(f"the {whose} cannot be copied"):
        copied = copy.deepcopy(model).eval()
    halves = {p.dtype for p in copied.parameters()} & {*HALVES}
    if halves:
        say(f"the {whose}'s weights are {', '.join(map(str, halves))}: float32 is what it is used in here")
        nn.Module.float(copied)
    return copied


def digest_of_weights(model: nn.Module) -> str:
    """The SHA-256 of the tensors in a model's state dict."""
    digest = hashlib.sha256()
    for content in weights_content(model):
        digest.update(content)
    return digest.hexdigest()


def name_of(model: Any) -> str:
    """Where the model came from, or its class's name."""
    return str(getattr(model, "name_or_path", "") or type(model).__name__)


def told_of_call(
    dense: nn.Module, args: TrainingArguments | None, workload: Workload | None, functions: Mapping[str, Any]
) -> dict[str, str]:
    """What a call was given beside models, rows and settings, in words, by its name in messages: by these a
    resumed call knows that it is the same. functions: by the names of the arguments; of what one holds inside
    nothing is known."""
    encoder = find_encoder(dense)
    values = {
        **{name: _qualified(function) for name, function in functions.items()},
        "encoder": next(name or "the model" for name, module in dense.named_modules() if module is encoder),
        "workload": "none"
        if workload is None
        else f"{workload.name} {hashlib.sha256(repr(workload).encode()).hexdigest()[:8]}",
    }
    decisive = {f"args.{name}": getattr(args, name, "none") for name in _DECISIVE}
    return values | {name: str(getattr(value, "value", value)) for name, value in decisive.items()}


def _qualified(function: Any) -> str:
    """The qualified name of a function, of the class of an object that is called, or of what is bound or
    partial."""
    if function is None:
        return "none"
    named = getattr(function, "func", function)  # what functools.partial holds
    named = named if hasattr(named, "__qualname__") else type(named)
    return f"{named.__module__}.{named.__qualname__}"


def checked_loss(name: str, loss: Any) -> Tensor:
    """The loss of the first rows. name: whose it is. Errors: ValueError where it is nothing to train on."""
    if loss is None:
        raise ValueError(
            f"{name} returns no loss for a batch with labels: give loss=, a function of outputs and "
            "batch, or leave the labels out"
        )
    if not isinstance(loss, Tensor) or loss.dim():
        raise ValueError(f"the loss of {name} is no scalar tensor")
    if not loss.requires_grad:
        raise ValueError(f"the loss of {name} has no gradient: it was computed without one, or detached")
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"the loss of {name} is {float(loss.detach())} on the first rows")
    return loss
