"""What a rival is: another runtime on the same weights, which gives a runner or says why it cannot run."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pruned_ops.checkpoints.export import GRAPH, export_onnx
from pruned_ops.files import new_folder

# Right-padded input_ids and attention_mask (batch, seqlen) -> start and end logits (batch, seqlen).
Batch = dict[str, Tensor]
Logits = tuple[Tensor, ...]
Run = Callable[[Batch], Logits]
# A model, sample batches and a folder for the rival's files -> its runner. Errors: Refused.
Make = Callable[[Any, Sequence[Batch], Path], Run]
# What two fp32 runtimes may differ by, in logits, at real positions. Their rounding is about 1e-5.
TOLERANCE = 1e-3


class Refused(Exception):
    """A rival cannot run this model here; the message is the sentence that says why."""


class NotInstalled(Refused):
    """The rival's package is not installed."""


@dataclass(frozen=True)
class Rival:
    """How a rival's runner is made, and the precision that it computes in."""

    make: Make
    precision: str = "fp32"


def forward(model: Any) -> Run:
    """The model's own forward as a runner."""

    def run(batch: Batch) -> Logits:
        output = model(**batch)
        return output.start_logits, output.end_logits

    return run


def hugging_face(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """Hugging Face's forward as it is: eager PyTorch on padded batches, scaled_dot_product_attention."""
    return forward(model)


def hugging_face_eager(model: Any, samples: Sequence[Batch], folder: Path) -> Run:
    """Hugging Face's forward with attention in plain products and a softmax, which hold all scores."""
    if not model._can_set_attn_implementation():
        raise Refused(f"a {type(model).__name__} has one attention, that of hf")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return forward(eager)


def compare_logits(run: Run, reference: Run, samples: Sequence[Batch], precision: str) -> dict[str, float]:
    """How far a runner's logits are from the reference's at real positions, over the sample batches.

    Errors: ValueError where an fp32 runner is off by more than TOLERANCE: its time would be worth nothing.
    """
    computed, expected = [], []
    with torch.inference_mode():
        for batch in samples:
            real = batch["attention_mask"].bool()
            # Cloned: a runner may return views of memory that its next call writes.
            computed += [logits.clone()[real] for logits in run(batch)]
            expected += [logits[real] for logits in reference(batch)]
    logits, exact = torch.cat(computed).float(), torch.cat(expected).float()
    error = (logits - exact).abs().max().item()
    if precision == "fp32" and not error <= TOLERANCE:
        raise ValueError(f"its logits differ from Hugging Face's by {error:.2e}, more than {TOLERANCE:g}")
    return {"max_error": error, "cosine": F.cosine_similarity(logits, exact, dim=0).item()}


def package(name: str, remedy: str = 'pip install -e ".[bench]"') -> Any:
    """The rival's package. Errors: NotInstalled, with the remedy."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalled(f"{name} cannot be imported ({error}): {remedy}") from error


def onnx_graph(model: Any, folder: Path) -> str:
    """The path of the model's exported graph in the folder, where it is made once."""
    if (folder / GRAPH).exists():
        return str(folder / GRAPH)
    try:
        return str(export_onnx(model, folder, overwrite=True))
    except ValueError as reason:
        raise Refused(str(reason)) from None


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which `make` fills if it is not there. Nothing is left of one that was made in part."""
    if not folder.exists():
        with new_folder(folder) as stage:
            make(stage)
    return folder
