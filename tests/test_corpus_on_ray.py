"""The example for Ray: its workers give one process's answers, once each, even if one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from inputs import stock_model
from matching import save_checkpoint
from processes import with_sources
from pruned_ops import QuestionAnswerer
from tiny_tokenizers import words

pytest.importorskip("ray.data", reason='Ray is not installed: pip install "ray[data]"')
ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "python" / "examples" / "corpus_on_ray.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(stock_model(), tmp_path_factory.mktemp("ray") / "model")


def corpus(count: int, length: int) -> list[dict[str, Any]]:
    return [
        {"id": f"q{i}", "question": f"w{i % 20} w{i % 7}", "context": words(length + i % 11)}
        for i in range(count)
    ]


def written(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def command(*argv: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLE), *map(str, argv)], text=True, env=with_sources(),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def run(*argv: object) -> str:
    process = command(*argv)
    output, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    return output


def answers(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.iterdir())
    return [json.loads(line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def check(rows: list[dict[str, Any]], records: Sequence[dict[str, Any]], folder: Path) -> None:
    """Every record once, with the answer that one process gives."""
    expected = QuestionAnswerer(str(folder)).answer(
        [record["question"] for record in records], [record["context"] for record in records]
    )
    assert sorted(row["id"] for row in rows) == sorted(record["id"] for record in records)
    by_id = {row["id"]: row for row in rows}
    for record, answer in zip(records, expected, strict=True):
        row = by_id[record["id"]]
        assert (row["answer"], row["start"], row["end"]) == (answer.answer, answer.start, answer.end)
        assert row["score"] == pytest.approx(answer.score, abs=1e-4)


def test_two_workers_answer_as_one_process_and_go_on_where_they_stopped(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow.parquet import write_table

    records = corpus(50, 20)
    lines = written(tmp_path / "a.jsonl", [*records[:30], "no record"])
    with lines.open("a") as file:
        file.write("{broken\n")
    write_table(pa.Table.from_pylist(records[30:]), tmp_path / "b.parquet", row_group_size=8)
    out = tmp_path / "out"
    arguments = (folder, lines, tmp_path / "b.parquet", "--out", out, "--block", 8, "--workers", 2)
    assert "7 blocks, 7 of them to be answered" in run(*arguments)
    found = answers(out)
    refused = {row["id"]: row["refused"] for row in found if "refused" in row}
    assert set(refused) == {"a.jsonl-000003:6", "a.jsonl-000003:7"}
    assert "is a str" in refused["a.jsonl-000003:6"] and "no JSON" in refused["a.jsonl-000003:7"]
    check([row for row in found if "refused" not in row], records, folder)
    (out / "a.jsonl-000001.jsonl").unlink()
    assert "7 blocks, 1 of them to be answered" in run(*arguments)
    assert answers(out) == found
    assert "0 of them" in run(*arguments)


def test_a_worker_that_is_killed_loses_and_doubles_nothing(folder: Path, tmp_path: Path) -> None:
    import psutil  # comes with Ray

    records = corpus(1500, 150)
    out = tmp_path / "out"
    process = command(
        folder, written(tmp_path / "a.jsonl", records), "--out", out, "--block", 25, "--workers", 2
    )
    killed = None
    while process.poll() is None and killed is None:
        parts = list(out.glob("*.part")) if out.is_dir() and len(list(out.glob("*.jsonl"))) > 4 else []
        if parts:
            killed = int(parts[0].name.split(".")[-2])
            if psutil.pid_exists(killed):
                os.kill(killed, signal.SIGKILL)
            else:
                killed = None
        time.sleep(0.01)
    _, error = process.communicate()
    assert process.returncode == 0, error[-3000:]
    assert killed is not None, "all was answered before a worker could be killed"
    found = [
        json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()
    ]
    assert len(list(out.glob("*.jsonl"))) == 60
    check(found, records, folder)
