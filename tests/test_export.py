"""ONNX out: the graph is fused by ONNX Runtime, and gives the model's logits there and in OpenVINO; torch's own
ways out (torch.export, torch.compile)."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from inputs import MODELS, ODD_SHAPES, logits, padded_batch, pruned_model, stock_model
from matching import save_checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertModel

import pruned_ops
from pruned_ops.cli import main
from pruned_ops.natural_questions import with_answer_types

onnx = pytest.importorskip("onnx", reason='needs the extra "onnx"')
ort = pytest.importorskip("onnxruntime", reason='needs the extra "onnx"')

Batch = dict[str, Tensor]
Run = Callable[[Batch], dict[str, Tensor]]


def batches(model: Any) -> list[Batch]:
    """Several sizes and lengths, padded right, left and with holes; token types where the model has them."""
    pad = model.config.pad_token_id
    made = [padded_batch((20, 3, 11, 1), pad), padded_batch((9,), pad), padded_batch((40, 77), pad, seed=1)]
    left = {name: tensor.flip(1) for name, tensor in made[0].items()}
    holes = {**padded_batch((20, 20), pad), "attention_mask": (torch.arange(40) % 7 != 3).long().view(2, 20)}
    made += [left, holes]
    if model.config.type_vocab_size > 1:
        for batch in made:
            batch["token_type_ids"] = (torch.arange(batch["input_ids"].size(1)) > 4).long().expand_as(
                batch["input_ids"]
            ).contiguous()  # fmt: skip
    return made


def ort_run(path: Path | str) -> Run:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]

    def run(batch: Batch) -> dict[str, Tensor]:
        found = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        return {name: torch.from_numpy(one) for name, one in zip(names, found, strict=True)}

    return run


def openvino_run(path: Path) -> Run:
    openvino = pytest.importorskip("openvino", reason='needs the extra "bench"')
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(batch: Batch) -> dict[str, Tensor]:
        found = compiled({name: tensor.numpy() for name, tensor in batch.items()})
        return {port.any_name: torch.from_numpy(one.copy()) for port, one in found.items()}

    return run


def check_logits(run: Run, model: Any, some: list[Batch]) -> None:
    """Start and end logits at the real positions, within fp32 rounding."""
    for batch in some:
        found, real = run(batch), batch["attention_mask"].bool()
        ours = torch.stack([found["start_logits"], found["end_logits"]], -1)
        torch.testing.assert_close(ours[real], logits(model, batch)[real], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("runtime", [ort_run, openvino_run])
def test_logits_are_the_models(model: Any, runtime: Callable[[Path], Run], tmp_path: Path) -> None:
    path = pruned_ops.export_onnx(model, tmp_path / "out")
    onnx.checker.check_model(path, full_check=True)
    check_logits(runtime(path), model, batches(model))
