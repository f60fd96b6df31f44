"""Folders of sentence-transformers, trained: pooled as they say, refused where they say nothing, and kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import BertModel

from pruned_ops.checkpoints import loading
from pruned_ops.serving.folders import contents_of
from pruned_trainer import Target
from pruned_trainer.cli import main
from pruned_trainer.jobs import output
from pruned_trainer.jobs.records import digests_of
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.pruning import compensate
from pruned_trainer.pruning.decision import Decision, Kept, LayerDecision
from pruned_trainer.tasks.options import TaskOptions
from pruned_trainer.tasks.texts.embedding import pooling_of
from pruned_trainer.tasks.texts.tasks import text_task
from text_files import CUT, checkpoint, scored, write_rows


def in_library(folder: Path, **modules: dict[str, Any]) -> None:
    """Make a checkpoint's folder one of sentence-transformers: the encoder, and modules of these classes and
    configs."""
    listed = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, (kind, config) in enumerate(modules.items(), 1):
        (folder / f"{number}_{kind}").mkdir(exist_ok=True)
        (folder / f"{number}_{kind}" / "config.json").write_text(json.dumps(config))
        listed.append({"path": f"{number}_{kind}", "type": f"sentence_transformers.models.{kind}"})
    (folder / "modules.json").write_text(json.dumps(listed))


def test_pooling_is_what_sentence_transformers_wrote(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", BertModel)
    config = BertModel.from_pretrained(folder).config
    assert pooling_of(str(folder), config) == "mean"
    for written, pooling in (
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode": ["mean", "max"]}, None),
    ):
        in_library(folder, Pooling=written)
        if pooling is None:
            with pytest.raises(ValueError, match="pools by (mean, )?max; mean and cls are known"):
                pooling_of(str(folder), config)
        else:
            assert pooling_of(str(folder), config) == pooling
    config.pooling = "cls"
    assert pooling_of(str(folder), config) == "cls"
    config.pooling = "max"
    with pytest.raises(ValueError, match="pools by 'max', as its config says"):
        pooling_of(str(folder), config)


def test_compensations_of_an_embedder_are_compared_as_it_is_pooled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the narrow embedder's config says so; `prune` compares them so, too."""
    folder, out = checkpoint(tmp_path / "model", BertModel), tmp_path / "out"
    in_library(folder, Pooling={"pooling_mode_cls_token": True})
    heads, units = Kept((0, 2), (1.0,) * 2), Kept(tuple(range(20)), (1.0,) * 20)
    Decision((LayerDecision(heads, units),) * 2, 1, {}, {}).save(tmp_path / "decision.json")
    (tmp_path / "texts.txt").write_text("".join(f"w{i % 20} w{i % 7} w{i % 3}\n" for i in range(40)))
    seen = set[str]()
    compared = compensate.comparable_outputs

    def watched(outputs: Any, config: Any, mask: Any, pooling: str = "mean") -> Any:
        seen.add(pooling)
        return compared(outputs, config, mask, pooling)

    monkeypatch.setattr(compensate, "comparable_outputs", watched)
    argv = ["compact", "--model", str(folder), "--decision", str(tmp_path / "decision.json")]
    assert main([*argv, "--calibration", str(tmp_path / "texts.txt"), "--out", str(out)]) == 0
    assert seen == {"cls"} and json.loads((out / "config.json").read_text())["pooling"] == "cls"

    seen.clear()
    monkeypatch.setattr("pruned_trainer.jobs.prune._draw", lambda folder: None)  # another test's, and slow
    rows = write_rows(tmp_path / "train.jsonl", scored(80, 1))
    argv = ["prune", "--task", "embedding", "--recipe", "fast", "--model", str(folder), "--macs", "0.7", *CUT]
    assert main([*argv, "--train-file", str(rows), "--out", str(tmp_path / "pruned")]) == 0
    assert seen == {"cls"}


def test_an_embedder_of_the_hub_is_pooled_as_its_files_say_and_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder = tmp_path / "on the hub"
    files = {
        "modules.json": [
            {"path": path, "type": f"models.{path.rpartition('_')[2] or 'Transformer'}"}
            for path in ("", "1_Pooling", "inner/2_Dense")
        ],
        "config_sentence_transformers.json": {"prompts": {}},
        "sentence_roberta_config.json": {"max_seq_length": 40},  # an older name of sentence_bert_config.json
        "1_Pooling/config.json": {"pooling_mode_cls_token": True},
        "inner/2_Dense/config.json": {"in_features": 32},
        "inner/2_Dense/model.safetensors": {},
    }
    for name, content in files.items():
        (hub_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (hub_folder / name).write_text(json.dumps(content))

    def on_the_hub(name: str, file: str, **_: Any) -> str | None:
        path = hub_folder / file
        return str(path) if name == "publisher/embedder" and path.is_file() else None

    monkeypatch.setattr(loading, "cached_file", on_the_hub)
    model = BertModel.from_pretrained(checkpoint(tmp_path / "model", BertModel))
    assert pooling_of("publisher/embedder", model.config) == "cls"
    for source in ("publisher/embedder", str(hub_folder)):
        out = tmp_path / f"out of {source.rpartition('/')[2]}"
        output.save_checkpoint(model, out, source, None)
        for name in files:
            assert (out / name).read_text() == (hub_folder / name).read_text()


def test_modules_that_an_embedder_is_trained_without_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint(tmp_path / "model", BertModel)
    task: Any = text_task(TaskOptions(task="embedding"))
    for kinds, named in (
        (("Dropout", "Normalize"), ""),
        (("Dense", "LayerNorm"), f"-- {folder} has Dense, LayerNorm among its mod"),
    ):
        in_library(folder, **{kind: {} for kind in kinds})
        for load in (task.load_model, lambda source: task.start_model(source, None)):
            load(str(folder))
            remarks = [line for line in capsys.readouterr().out.splitlines() if "modules" in line]
            assert len(remarks) == bool(named) and all(line.startswith(named) for line in remarks)


def test_a_pooling_is_read_where_it_lies(tmp_path: Path) -> None:
    """Wherever that is; another file of that name says nothing. It is served as it is trained."""
    folder = checkpoint(tmp_path / "model", BertModel)
    config = BertModel.from_pretrained(folder).config
    in_library(folder, Pooling={"pooling_mode": "mean"})
    (folder / "1_Pooling").rename(folder / "inner")
    in_library(folder, Pooling={"pooling_mode": "cls"})
    listed = json.loads((folder / "modules.json").read_text())
    for path, pooling in (("inner", "mean"), ("1_Pooling", "cls")):
        listed[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(listed))
        assert pooling_of(str(folder), config) == contents_of(folder).pooling == pooling


def test_a_second_checkpoint_that_the_library_would_load_is_refused(tmp_path: Path) -> None:
    """The one that was trained would lie beside it, and nobody would load it."""
    folder = checkpoint(tmp_path / "model", BertModel)
    in_library(folder, Pooling={"pooling_mode": "mean"})
    listed = json.loads((folder / "modules.json").read_text())
    task: Any = text_task(TaskOptions(task="embedding"))
    for path in ("0_Transformer", "./0_Transformer", "", "."):
        listed[0]["path"] = path
        (folder / "modules.json").write_text(json.dumps(listed))
        for load in (task.load_model, lambda source: task.start_model(source, None)):
            if path.strip("."):
                with pytest.raises(
                    ValueError, match=f"a checkpoint, and the one of its modules.json in {path}"
                ):
                    load(str(folder))
            else:
                load(str(folder))


@pytest.mark.parametrize(
    ("listed", "fault"),
    [
        ({"path": ""}, "is no list of modules with a path and a type"),
        ([{"path": ""}], "is no list of modules with a path and a type"),
        ([], "is no list of modules with a path and a type"),
        ([{"path": "../other", "type": "models.Dense"}], "leads out of its folder: '../other'"),
    ],
)
def test_modules_that_could_not_be_kept_are_refused_before_training(
    listed: Any, fault: str, tmp_path: Path
) -> None:
    """Whether or not the config says already how states are pooled; the digests are a call's first check."""
    folder = checkpoint(tmp_path / "model", BertModel)
    (folder / "modules.json").write_text(json.dumps(listed))
    task: Any = text_task(TaskOptions(task="embedding"))
    with pytest.raises(ValueError, match=fault):
        digests_of(settings_of(folder))
    for pooling in (None, "cls"):
        config = json.loads((folder / "config.json").read_text()) | ({"pooling": pooling} if pooling else {})
        (folder / "config.json").write_text(json.dumps(config))
        for load in (task.load_model, lambda source: task.start_model(source, None)):
            with pytest.raises(ValueError, match=fault):
                load(str(folder))


def settings_of(folder: Path) -> PruneSettings:
    """Settings to prune the embedder in a folder."""
    return PruneSettings(
        model=str(folder), train_file=folder / "none", eval_file=None, out=folder / "out", task="embedding",
        targets=(Target(macs=0.5),),
    )  # fmt: skip


def test_a_run_is_not_resumed_with_another_pooling(tmp_path: Path) -> None:
    """The digest of a checkpoint has the files of its modules, one that is gone, too."""
    folder = checkpoint(tmp_path / "model", BertModel)
    in_library(folder, Pooling={"pooling_mode": "mean"})
    digests = [digests_of(settings_of(folder))]
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_text("an earlier one")
    assert digests_of(settings_of(folder)) == digests[0]
    in_library(folder, Pooling={"pooling_mode": "cls"})
    digests.append(digests_of(settings_of(folder)))
    (folder / "1_Pooling" / "config.json").unlink()
    digests.append(digests_of(settings_of(folder)))
    assert [list(each) for each in digests] == [[str(folder)]] * 3
    assert len({each[str(folder)] for each in digests}) == 3
