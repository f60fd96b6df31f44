"""Checkpoints as other libraries wrote them, made for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor


def stored(folder: Path, model: Any, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """The model as a stock checkpoint whose config and tensors `change` has been at."""
    model.save_pretrained(folder)
    config, tensors = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "model.safetensors"),
    )
    change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder
