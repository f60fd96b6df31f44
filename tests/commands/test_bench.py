"""`pruned-ops bench` as users meet it, and what it says of launch-bound sizes. No time is asserted."""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import family_models
import pruned_ops
from head_models import pruned, stock
from inputs import MODELS, READY, pruned_model, stock_model
from matching import save_checkpoint, squad_file
from pruned_ops.cli import main
from pruned_ops.commands.bench import make_workload
from pruned_ops.measure import comparison
from pruned_ops.measure.comparison import Benchmark, compare
from pruned_ops.measure.launch_bound import LaunchBound, half_lengths, half_of, tiny_twin
from pruned_ops.measure.timing import Timing, Workload, interleave
from pruned_ops.models.stock import model_shape
from pruned_ops.ops.registry import record
from pruned_ops.runtime.refusals import refuse_encoder
from tiny_tokenizers import words


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned checkpoint and a dense one."""
    folder = tmp_path_factory.mktemp("bench")
    return save_checkpoint(pruned_model(), folder / "p"), save_checkpoint(stock_model(), folder / "d<i>")


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = main(["bench", *map(str, argv), "--device", "cpu"])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


class Page(HTMLParser):
    """Tags that open, and what they point to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_sequences_are_as_long_as_the_model_takes() -> None:
    """Any length where it has no table of positions, whatever its config says."""
    lengths = Workload("long", ((100, 3),))
    free = family_models.stock("DebertaV2", "")
    (batch,) = comparison._inputs([free], lengths, False)
    assert batch["input_ids"].shape == (2, 100)
    with pytest.raises(ValueError, match="have 100 tokens; the model's position table allows 80"):
        comparison._inputs([free, family_models.stock("Bert", "")], lengths, False)


def test_dense_against_pruned(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pruned, dense = folders
    page = tmp_path / "bench.html"
    common = ("--lengths", 5, 20, 9, "--batch-size", 2, "--batches", 3, "--rounds", 2)
    threads = torch.get_num_threads()
    status, screen, error = run(
        capsys, pruned, "--dense", dense, *common, "--threads", threads + 1, "--html", page
    )
    assert (status, error) == (0, "") and f"drawn in {page}" in screen
    assert f"threads: {threads + 1}," in screen and torch.get_num_threads() == threads
    rows = [line for line in screen.splitlines() if re.match("│ (pruned|dense) ", line)]
    assert [row.split("│")[2].strip() for row in rows] == ["pruned_ops", "Hugging Face"] * 2
    for row in rows:
        p50, p90, rate = (float(cell.replace(",", "")) for cell in row.split("│")[4:7])
        assert 0 < p50 <= p90 and rate > 0
    macs = model_shape(pruned_model()).macs([5, 20, 9] * 2) / 3e6
    assert f"{macs:,.1f}" in rows[0]
    assert re.search(r"the pruned model is [\d.]+ times as fast as the dense one", screen)
    assert "launch-bound at this size: half of each batch" in screen
    assert f"pruned ran embed_layer_norm: {'cpu' if 'cpu' in READY else 'reference'}" in screen
    drawn = Page(page.read_text("utf-8"))
    assert {"svg", "table", "h1"} <= set(drawn.tags)
    assert all(link.startswith("#") for link in drawn.links) and "script" not in drawn.tags
    assert "d&lt;i&gt;" in page.read_text("utf-8")  # the command, with a folder's odd name
    status, _, error = run(capsys, pruned, *common, "--html", page)
    assert status == 2 and "--overwrite replaces it" in error
    status, screen, _ = run(capsys, pruned, *common, "--html", page, "--overwrite")
    assert status == 0 and "│ model │" in screen and "the dense one" not in screen


def test_every_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--length", 6, "--batch-size", 2, "--batches", 1, "--rounds", 1)
    for number, model in enumerate((stock("bert", "sequence"), pruned("roberta", "token").roberta)):
        folder = save_checkpoint(model, tmp_path / str(number))
        status, screen, error = run(capsys, folder, *small)
        assert (status, error) == (0, "") and "│ model │ pruned_ops " in screen
        assert tiny_twin(model).base_model_prefix == model.base_model_prefix
        assert hasattr(tiny_twin(model), "classifier") is hasattr(model, "classifier")


@pytest.mark.parametrize("fixed", [False, True])
def test_what_is_run(fixed: bool) -> None:
    """All runners get the same batches; padding is what was asked for; the model is as before."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    models = {"pruned": pruned_model(), "dense": stock_model()}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.setdefault(name, []).append(
                tuple(kwargs["input_ids"].shape)
            ),
            with_kwargs=True,
        )
    workload = Workload("two", ((3, 9), (5, 2)))
    found = compare(models, workload, 1, fixed=fixed)
    shapes = [(2, 9), (2, 9 if fixed else 5)]
    for name in models:  # in Hugging Face's runtime: twice to warm up, once timed; copied and run in ours
        assert [shape for shape in seen[name] if shape[0] == 2].count(shapes[0]) >= 3
        assert set(seen[name]) <= {*shapes, (1, shapes[0][1]), (1, shapes[1][1])}
    assert f"19 tokens, {36 if fixed else 28} with padding" in found.title
    assert isinstance(found, Benchmark) and found.against_dense is not None
    assert [(row.model, row.dtype) for row in found.rows] == [
        (name, "fp32") for name in ("pruned", "pruned", "dense", "dense")
    ]
    assert found.rows[1].speedup == 1.0


@pytest.mark.skipif(
    refuse_encoder(stock_model().base_model, int8=True) is not None, reason="no int8 kernels here"
)
def test_int8() -> None:
    found = compare({"model": stock_model()}, Workload.fixed(6, 2, 1), 1, "int8")
    assert [row.dtype for row in found.rows] == ["int8", "fp32"] and found.against_dense is None
    assert found.rows[0].backends["encoder"] == "cpu"


def test_ratios_are_medians_over_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole rounds, not of the batch in the middle."""
    seconds = {
        "pruned_ops pruned": (1.0, 1.0, 2.0),
        "pruned_ops dense": (2.0, 3.0, 4.0),
        "Hugging Face dense": (9.0, 4.0, 4.0),
    }
    others = (1.0, 1.0, 1.0)

    def timed(runners: Any, workload: Workload, *_: Any, **__: Any) -> dict[str, Timing]:
        return {name: Timing(workload, seconds.get(name, others), others) for name in runners}

    monkeypatch.setattr(comparison, "interleave", timed)
    benchmark = compare({"pruned": pruned_model(), "dense": stock_model()}, Workload.fixed(6, 2, 1), 3)
    assert (benchmark.against_dense, benchmark.against_their_dense) == (2.0, 4.0)


def arguments(**given: Any) -> argparse.Namespace:
    common = {"data": None, "lengths": [7], "batch_size": 4, "batches": 3, "skip_bad": False}
    return argparse.Namespace(**{**common, **given})


def test_workloads(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert make_workload(arguments(), 384) == Workload.fixed(7, 4, 3)
    mixed = make_workload(arguments(lengths=[2, 4, 30]), 384)
    assert sorted(sum(map(list, mixed.batches), [])) == [2] * 4 + [4] * 4 + [30] * 4
    assert len(mixed.batches) == 3 and len(set(mixed.batches)) > 1
    path = squad_file(tmp_path / "squad.json", 20, 1)
    real = make_workload(arguments(data=path, folder=folders[0]), 384)
    assert real.name == "arrival-b4" and {n for batch in real.batches for n in batch} == {14}


def test_no_length_is_left_out(folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """As the last one of five would be, of four batches of one sequence."""
    status, screen, error = run(capsys, folders[0], "--lengths", 2, 4, 6, 8, 30, "--batch-size", 1)
    assert (status, screen) == (2, "") and error == (
        "pruned-ops bench: 5 lengths are more than the 4 sequences that are timed: give a larger "
        "--batch-size, or more --batches\n"
    )
    small = ("--batch-size", 1, "--batches", 3, "--rounds", 1)
    status, screen, _ = run(capsys, folders[0], "--lengths", 2, 4, 6, *small)
    assert status == 0 and "mixed-b1: 3 batches, 12 tokens" in screen


def test_windows_of_a_file_are_no_longer_than_the_model_takes(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"question": "w1", "context": words(200)}))
    small = ("--batch-size", 2, "--batches", 1, "--rounds", 1)
    status, screen, error = run(capsys, folders[1], "--data", path, *small)
    assert (status, error) == (0, "") and "1 batches, 160 tokens" in screen


def test_bad_questions_are_skipped_where_that_is_asked(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Others take their place, as far as there are any."""
    path = tmp_path / "asked.jsonl"
    good = {"question": "w1", "context": words(11)}
    long = {"question": words(400), "context": words(500)}
    path.write_text("\n".join(map(json.dumps, [good] * 5 + [{"question": 1}] + [long] * 3 + [good])))
    with pytest.raises(ValueError, match="line 6 is no object with a question and a context"):
        make_workload(arguments(data=path, folder=folders[0], batch_size=2, batches=2), 384)
    real = make_workload(arguments(data=path, folder=folders[0], batch_size=2, batches=2, skip_bad=True), 384)
    assert [len(batch) for batch in real.batches] == [2, 2]
    assert "bad questions skipped; the first: " in capsys.readouterr().err
    path.write_text(json.dumps(long))
    with pytest.raises(ValueError, match="holds no question that can be asked"):
        make_workload(arguments(data=path, folder=folders[0], skip_bad=True), 384)
    status, _, error = run(capsys, folders[0], "--skip-bad")
    assert status == 2 and "--skip-bad goes with --data" in error


def test_percentiles_are_over_the_calls() -> None:
    workload = Workload.fixed(1, 1, 2)
    timing = interleave({"a": lambda batch: None}, workload, workload.inputs(9, 0), rounds=3)["a"]
    assert len(timing.calls) == 6 and len(timing.seconds) == 3
    assert timing.seconds == tuple(sum(timing.calls[i : i + 2]) for i in (0, 2, 4))
    made = Timing(workload, (0.0,), tuple(i / 1000 for i in range(11)))
    assert made.call_ms(50) == pytest.approx(5) and made.call_ms(90) == pytest.approx(9)


def test_numbers_are_those_of_a_batch_and_of_a_second() -> None:
    timing = Timing(Workload.fixed(5, 4, 2), (0.6, 0.2, 0.4))
    assert [timing.ms(percentile) for percentile in (20, 50, 80)] == pytest.approx([140, 200, 260])
    assert timing.sequences_per_s == pytest.approx(8 / 0.4)


def test_runners_are_the_first_in_turn() -> None:
    """Each as often as the others: whoever comes first finds the caches as another one left them."""
    called: list[str] = []
    runners = {name: (lambda batch, name=name: called.append(name)) for name in "abc"}
    workload = Workload.fixed(1, 1, 2)
    interleave(runners, workload, workload.inputs(9, 0), rounds=3, warmup=0)
    turns = [called[first : first + 3] for first in range(0, len(called), 3)]
    assert [sorted(turn) for turn in turns] == [["a", "b", "c"]] * 6
    assert sorted(turn[0] for turn in turns) == ["a", "a", "b", "b", "c", "c"]


def timed(workload: Workload, *seconds: float) -> Timing:
    return Timing(workload, seconds)


@pytest.mark.parametrize(
    ("half", "twin", "holds"),
    [(0.95, 0.9, True), (0.5, 0.02, False), (0.95, 0.1, False), (0.5, 0.9, False), (0.74, 0.9, False)],
)
def test_launch_bound(half: float, twin: float, holds: bool) -> None:
    """Time that hardly falls with the work, by both tests; an outlier of one round decides nothing."""
    workload = Workload("two", ((8, 8), (8, 8)))
    rounds = (1.0, 2.0, 9.0)
    found = LaunchBound.of(
        stock_model(), workload, timed(workload, *rounds),
        timed(workload, half, 2 * half, 0.001), timed(workload, twin, 2 * twin, 99.0),
    )  # fmt: skip
    assert found.holds is holds and found.half_macs == 0.5
    assert found.half_time == pytest.approx(half) and found.twin_time == pytest.approx(twin)
    assert found.twin_macs < 0.1
    begins = "launch-bound" if holds else "not launch-bound"
    assert found.sentence.startswith(f"{begins} at this size: half of each batch (50% of the MACs) takes ")
    assert f"takes {100 * half:.0f}% of the time" in found.sentence


@pytest.mark.parametrize("lengths", [(6, 2, 5), (4, 4), (5,), (1,)])
def test_half_of_a_batch(lengths: tuple[int, ...]) -> None:
    (batch,) = Workload("one", (lengths,)).inputs(50, 0, pad_to=9)
    half = half_of(batch)
    assert half["attention_mask"].sum(1).tolist() == half_lengths(list(lengths))
    assert half["input_ids"].shape == half["attention_mask"].shape


@pytest.mark.parametrize("padding", [0, 5, 49])
def test_random_ids_are_all_but_the_paddings(padding: int) -> None:
    """Also where the padding has the last one."""
    (batch,) = Workload("one", ((400, 300),)).inputs(50, padding)
    real = batch["attention_mask"].bool()
    assert set(batch["input_ids"][real].tolist()) == set(range(50)) - {padding}
    assert set(batch["input_ids"][~real].tolist()) == {padding}


def test_the_twin_launches_what_the_model_does(model: Any) -> None:
    batch = Workload("one", ((6, 3),)).inputs(50, model.config.pad_token_id)[0]
    ran = []
    for one in (model, tiny_twin(model)):
        fast = pruned_ops.optimize(one)
        fast.base_model.packed.encoder.unpack()  # layer by layer: the ops are counted, not the one call
        with record() as counts, torch.inference_mode():
            fast(**batch)
        ran.append({op: each.total() for op, each in counts.items()})
    assert ran[0] == ran[1] and ran[0]["embed_layer_norm"] == 1
    assert all(p.numel() <= 3 * 16 * 16 for p in fast.base_model.packed.encoder.parameters())


def test_refusals(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save_checkpoint(MODELS["stock-roberta"](), tmp_path / "roberta")
    pruned, _ = folders
    capsys.readouterr()  # of the saving
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((tmp_path,), "holds no config.json"),
        ((pruned, "--dense", tmp_path), "holds no config.json"),
        ((pruned, "--dense", other, "--length", 4), "pad with different ids"),
        ((pruned, "--length", 81), "the sequences have 81 tokens; the model's position table allows 80"),
        ((pruned, "--length", 0), "a length of --lengths is 0"),
        ((pruned, "--batch-size", 0), "--batch-size is 0"),
        ((pruned, "--threads", 0), "--threads is 0"),
        ((pruned, "--rounds", -1), "--rounds is -1"),
        ((pruned, "--data", tmp_path / "none"), "No such file"),
        ((pruned, "--html", tmp_path), "cannot be written"),
        ((pruned, "--html", tmp_path / "none" / "page.html"), "in a folder that is there"),
    ]
    for argv, message in cases:
        status, screen, error = run(capsys, *argv)
        assert (status, screen) == (2, "") and message in error and error.count("\n") == 1
