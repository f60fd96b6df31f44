"""What a run writes down, and what of it is spoilt: one line names the file and the place, and shows nothing
of the content."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn
from transformers import BertModel

from calls import config
from pruned_trainer import Target
from pruned_trainer.jobs.choice import _recorded
from pruned_trainer.jobs.output import LOCK, RUN, OutputFolder, _take_lock, save_checkpoint
from pruned_trainer.jobs.prune import finished
from pruned_trainer.jobs.records import recorded_plan
from pruned_trainer.jobs.settings import PruneSettings
from pruned_trainer.report.fields import Fields
from pruned_trainer.training.teacher_cache import METADATA, TeacherCache

SETTINGS = PruneSettings("model", Path("train.json"), Path("out"), targets=(Target(macs=0.5),))
STEPS = {"gate_steps": 1, "retrain_steps": 1}
NO_JSON = [
    (b'{"secret": ', "Expecting value: line 1 column 12"),
    (b'{"secret":\n NaN}', "'NaN' is no finite number: line 2 column 2"),
    (b'{"secret": "\xff"}', "can't decode byte 0xff in position 12"),
    (b"[" * 100_000, "nested more than 64 deep"),
]


def test_a_target_of_numpys_numbers_is_recorded() -> None:
    targets = (Target(macs=np.float32(0.5)), Target(speedup=np.int64(2)))  # type: ignore[arg-type]
    assert json.loads(json.dumps([asdict(target) for target in targets])) == [
        asdict(Target(macs=0.5)),
        asdict(Target(speedup=2.0)),
    ]


def refused(read: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read()
    assert "secret" not in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("content", "place"), NO_JSON)
def test_a_file_that_is_no_json(content: bytes, place: str, tmp_path: Path) -> None:
    record, choice, report = tmp_path / RUN, tmp_path / "choice.json", tmp_path / "report.json"
    metadata = tmp_path / "cache" / METADATA
    metadata.parent.mkdir()
    for path in (record, choice, report, metadata):
        path.write_bytes(content)
    refused(
        lambda: recorded_plan(tmp_path, SETTINGS), f"resumed .*{RUN} is no record of a run: .*{place}.*overw"
    )
    refused(lambda: _recorded(choice), f"choice.json is no record of a choice: .*{place}")
    refused(lambda: Fields.read(report), f"report.json is no JSON: .*{place}")
    refused(
        lambda: TeacherCache(metadata.parent, [3], "abc"),
        f"{METADATA} is no description of a cache: .*{place}",
    )


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "run.json is no record of a run"),
        ({}, "run.json has no 'plan'"),
        ({"plan": STEPS}, "run.json has no 'settings'"),
        ({"plan": [1]}, "run.json is no record of a run"),
        ({"plan": {**STEPS, "secret": 1}, "settings": {}}, "run.json is no record of a run"),
        (
            {"plan": {**STEPS, "gate_steps": 1.5}, "settings": {}},
            r"run.json: plan.gate_steps is 1\.5: an integer",
        ),
        ({"plan": {**STEPS, "retrain_steps": -1}, "settings": {}}, "plan.retrain_steps is -1: at least 0"),
        ({"plan": STEPS, "settings": {"secret": 1}}, "run.json has no 'targets'"),
    ],
)
def test_a_record_of_something_else(record: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / RUN).write_text(json.dumps(record))
    refused(lambda: recorded_plan(tmp_path, SETTINGS), f"{message}.*--overwrite starts anew")


def test_a_right_record_is_read(tmp_path: Path) -> None:
    settings = {**SETTINGS.to_json(), "resumable": False}
    assert "resumable" not in SETTINGS.to_json()
    del settings["resumable"]
    (tmp_path / RUN).write_text(json.dumps({"plan": STEPS, "settings": settings}))
    assert recorded_plan(tmp_path, replace(SETTINGS, resumable=False)).gate_steps == 1


@pytest.mark.parametrize(
    "record", [[], {}, {"log": [], "seconds": "1"}, {"log": [1], "seconds": 1.0}, {"log": {}}]
)
def test_a_choice_of_something_else(record: Any, tmp_path: Path) -> None:
    file = tmp_path / "choice.json"
    file.write_text(json.dumps(record))
    refused(lambda: _recorded(file), "choice.json is no record of a choice; --overwrite starts anew")
    file.write_text(json.dumps({"log": [{"loss": None}], "seconds": 2}))
    assert _recorded(file) == ([{"loss": None}], 2)


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"raw\\udcff' is no name in UTF-8; give another folder"):
        OutputFolder.check(tmp_path / "raw\udcff", False)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=f"cannot be made: nothing may be written into {tmp_path}"):
        OutputFolder.check(tmp_path / "new" / "out", False)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_symlink_stays_and_its_folder_is_made(is_there: bool, tmp_path: Path) -> None:
    """Whoever links --out to another disk wants the result, and what is written until then, on that disk."""
    target, link = tmp_path / "disk" / "target", tmp_path / "out"
    target.mkdir(parents=True)
    if is_there:
        (target / "earlier").touch()
    link.symlink_to(target)
    with OutputFolder(link, overwrite=is_there) as folder:
        assert folder.partial == target.with_name("target.partial")
        (folder.partial / "whole").touch()
        folder.publish()
    assert link.is_symlink() and os.listdir(target) == ["whole"]
    assert os.listdir(target.parent) == ["target"] and sorted(os.listdir(tmp_path)) == ["disk", "out"]


def test_a_lock_that_a_killed_process_left_in_its_output_goes(tmp_path: Path) -> None:
    """It was killed between the renaming of its folder and the removal of its lock."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").touch()
    held = _take_lock(out)
    with pytest.raises(FileExistsError, match="is not empty"):
        OutputFolder.check(out, overwrite=False)
    assert (out / LOCK).exists()  # somebody lives
    os.close(held)
    with pytest.raises(FileExistsError, match="is not empty"):
        OutputFolder.check(out, overwrite=False)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    (out / LOCK).touch()
    (out / RUN).touch()  # a run that has to be finished holds it meanwhile
    OutputFolder.end_publishing(out)
    assert (out / LOCK).exists()


def test_what_a_call_published_is_not_what_other_rows_make(tmp_path: Path) -> None:
    out, rows = tmp_path / "out", "the training dataset"
    out.mkdir()
    resumed = replace(SETTINGS, out=out, resume=True)
    record = {"settings": resumed.to_json(), "plan": STEPS, "inputs": {rows: "a" * 64}}
    (out / RUN).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"{rows} changed since .*out was started"):
        finished(resumed, None, {rows: "b" * 64})


class OwnModel(nn.Module):
    """A model around an encoder, with a method that has nothing to do with folders."""

    def __init__(self) -> None:
        super().__init__()
        self.body = BertModel(config(), add_pooling_layer=False)

    def save(self) -> None:
        raise AssertionError("nobody asked for this")


@pytest.mark.parametrize("kind", [OwnModel, lambda: BertModel(config())])
def test_a_trained_model_is_saved_whatever_it_is_called_and_wherever_it_came_from(
    kind: Any, tmp_path: Path
) -> None:
    """By its weights, also where the place that it was loaded from is gone."""
    save_checkpoint(kind(), tmp_path, "/gone/since/then", None)
    assert (tmp_path / "model.safetensors").is_file()
