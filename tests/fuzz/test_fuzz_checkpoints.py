"""Configs and checkpoints under attack: fields, tensors' headers and pickles that are almost right. A
checkpoint loads as what its config says, or is refused in one line that names its folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import assume
from hypothesis import strategies as st

from fuzzing import CASES, assert_refusal, fuzzed, json_bytes, mutated_bytes, mutated_json
from inputs import pruned_model, stock_model
from matching import save_checkpoint
from pruned_ops import LayerShape, PrunedBertConfig, PrunedBertForQuestionAnswering, import_checkpoint
from pruned_ops.checkpoints.loading import load_config, load_model, load_tokenizer, only_errors

SHAPES = [LayerShape(2, 24), LayerShape(0, 5)]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    only_errors()


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = pruned_model("bert", SHAPES)
    return save_checkpoint(model, tmp_path_factory.mktemp("attacked") / "pruned")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock checkpoint, pickled, in two shards with an index, and a mask beside it."""
    folder = tmp_path_factory.mktemp("attacked") / "foreign"
    model = stock_model("bert", num_hidden_layers=2)
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    state = list(model.state_dict().items())
    for number, part in enumerate((state[::2], state[1::2])):
        torch.save(dict(part), folder / f"pytorch_model-{number}.bin")
    index = {name: f"pytorch_model-{i % 2}.bin" for i, (name, _) in enumerate(state)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    torch.save(torch.ones(2, 4), folder / "head_mask.pt")
    return folder


def attacked(folder: Path, name: str, content: bytes) -> Path:
    """A copy of the folder in which this file holds something else; the same path each time."""
    copy = folder.with_name("copy")
    if not copy.is_dir() or not (copy / name).exists():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
    for path in folder.iterdir():
        if (copy / path.name).stat().st_mtime_ns != path.stat().st_mtime_ns:
            shutil.copy2(path, copy / path.name)
    (copy / name).write_bytes(content)
    return copy


def loads_or_is_refused(load: Callable[[], Any], folder: Path) -> Any:
    try:
        return load()
    except (ValueError, OSError) as error:
        assert_refusal(error, folder.name)
        return None


# A config as its file has it, and those of its fields that this project checks itself.
CONFIG = pruned_model("bert", SHAPES).config.to_dict()
FIELDS = {
    name: CONFIG[name]
    for name in (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings", "type_vocab_size", "pad_token_id", "layer_norm_eps", "hidden_act",
        "head_dim", "layer_shapes", "null_score_threshold", "score_calibration",
    )
}  # fmt: skip


@fuzzed(80, fields=mutated_json([FIELDS]))
def test_pruned_configs(fields: Any) -> None:
    """What is taken is a model's config, and its JSON form makes the same again."""
    assume(isinstance(fields, dict))
    try:
        config = PrunedBertConfig(**fields)
    except (ValueError, TypeError, StrictDataclassError):  # the last is that of stock configs
        return
    assert PrunedBertConfig(**config.to_dict()).to_dict() == config.to_dict()
    if config.shape.parameters() < 10_000_000 and config.vocab_size < 10_000:
        with torch.device("meta"):
            model = PrunedBertForQuestionAnswering(config)
        assert sum(p.numel() for p in model.bert.encoder.parameters()) == config.shape.parameters()


@fuzzed(40, cases="config", fields=mutated_json([CONFIG, {**CONFIG, "num_labels": 2, "auto_map": {}}]))
def test_config_files(pruned: Path, fields: Any) -> None:
    read_config(pruned, json_bytes(fields))


def read_config(pruned: Path, content: bytes) -> None:
    folder = attacked(pruned, "config.json", content)
    config = loads_or_is_refused(lambda: load_config(folder), folder)
    if config is not None and config != load_config(pruned):
        loads_or_is_refused(lambda: load_model(str(folder)), folder)


@pytest.mark.parametrize("path", sorted(CASES.glob("config/*")), ids=lambda path: path.name)
def test_configs_that_failed_once(pruned: Path, path: Path) -> None:
    read_config(pruned, path.read_bytes())


@fuzzed(15, data=st.data())
def test_safetensors_bytes(pruned: Path, data: st.DataObject) -> None:
    content = (pruned / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    header = data.draw(mutated_bytes([content[:size]]))
    folder = attacked(pruned, "model.safetensors", header + content[size:])
    model = loads_or_is_refused(lambda: load_model(str(folder)), folder)
    if model is not None:
        assert not any(parameter.is_meta for parameter in model.parameters())


@fuzzed(15, data=st.data())
def test_tokenizer_files(pruned: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    value = data.draw(mutated_json([json.loads((pruned / name).read_text())]))
    folder = attacked(pruned, name, json_bytes(value))
    loads_or_is_refused(lambda: load_tokenizer(str(folder)), folder)


@fuzzed(30, data=st.data())
def test_foreign_json(foreign: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["config.json", "pytorch_model.bin.index.json"]))
    value = data.draw(mutated_json([json.loads((foreign / name).read_text())]))
    folder = attacked(foreign, name, json_bytes(value))
    loads_or_is_refused(lambda: import_checkpoint(folder), folder)


@fuzzed(25, data=st.data())
def test_foreign_pickles(foreign: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["head_mask.pt", "pytorch_model-0.bin"]))
    content = data.draw(mutated_bytes([(foreign / name).read_bytes()]))
    folder = attacked(foreign, name, content)
    loads_or_is_refused(lambda: import_checkpoint(folder), folder)


def test_the_attacked_checkpoints_are_right(pruned: Path, foreign: Path) -> None:
    assert load_model(str(pruned)).config.shape.layers == tuple(SHAPES)
    assert load_tokenizer(str(pruned)).is_fast
    assert import_checkpoint(foreign).config.num_hidden_layers == 2
