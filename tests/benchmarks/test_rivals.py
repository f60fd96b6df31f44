"""The benchmarks' rivals compute what Hugging Face's eager model does, and the harness runs end to end."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import bench_models
import harness
import pruned_ops
from inputs import MODELS, logits, padded_batch, stock_model
from pruned_ops.measure.timing import Timing, Workload
from pruned_ops.models.stock import model_shape
from rivals.cpu import CPU_RIVALS, build_cpu_rival
from rivals.rival import Batch, Logits, NotInstalled, Refused, compare_logits, forward, made_once, onnx_graph
from thorough import EVERYTHING
from whole_models import cases, memory

SAMPLES = [padded_batch((20, 3, 11, 7)), padded_batch((9,)), padded_batch((40, 64), seed=1)]
TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 24}
# All read the same exported graph, so RoBERTa's positions are tried on one; compiling takes seconds a model.
KINDS = ("stock-bert", "pruned-bert")
CASES = [(name, kind) for name in CPU_RIVALS for kind in KINDS if (name, kind) != ("compile", "stock-bert")]
CASES += [("ort", "stock-roberta"), ("ort", "pruned-roberta"), ("ctranslate2", "stock-roberta")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exported models are, once for all rivals of a model."""
    return tmp_path_factory.mktemp("exported")


def without_inductor(compile: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile that traces as always, and runs what it traced eagerly."""
    return lambda model, dynamic, **way: compile(model, dynamic=dynamic, backend="aot_eager")


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_rival_gives_hf_eagers_logits(
    name: str, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense and pruned, a layer without heads and one without FFN among them, at several sizes in turn."""
    if not EVERYTHING:  # Inductor takes its time in `make test-all`, and is checked in every benchmark
        monkeypatch.setattr(torch, "compile", without_inductor(torch.compile))
    model = MODELS[kind]()
    try:
        with torch.inference_mode():
            run = build_cpu_rival(name, model, SAMPLES, folder / kind)
    except NotInstalled as reason:
        pytest.skip(str(reason))
    except Refused as reason:
        is_stock = kind.startswith("stock")
        assert not is_stock if name == "hf-eager" else name.startswith("ctranslate2"), reason
        assert kind != "stock-bert", reason
        return
    precision = CPU_RIVALS[name].precision
    errors = compare_logits(run, forward(model), SAMPLES, precision)
    assert errors["cosine"] > (0.999999 if precision == "fp32" else 0.98), errors


def test_a_runner_with_other_logits_is_refused() -> None:
    hf = forward(stock_model())

    def other(batch: Batch) -> Logits:
        start, end = hf(batch)
        return start + 0.01, end

    with pytest.raises(ValueError, match="differ from Hugging Face's by 1.00e-02"):
        compare_logits(other, hf, SAMPLES, "fp32")


def test_what_a_rival_makes_is_kept_and_what_was_made_in_part_is_made_anew(tmp_path: Path) -> None:
    made: list[list[str]] = []

    def make(partial: Path) -> None:
        made.append([path.name for path in partial.iterdir()])
        (partial / "graph").touch()
        if len(made) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(tmp_path / "int8", make)
    assert not (tmp_path / "int8").exists()
    for _ in range(2):
        folder = made_once(tmp_path / "int8", make)
        assert [path.name for path in folder.iterdir()] == ["graph"]
    assert made == [[], []]


def test_a_missing_package_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    with pytest.raises(NotInstalled, match=r'ctranslate2 .*: pip install -e "\.\[bench\]"'):
        CPU_RIVALS["ctranslate2"].make(stock_model(), SAMPLES, Path())


def test_rivals_that_are_cpu_only_refuse_another_device() -> None:
    with pytest.raises(Refused, match="ort is measured on the CPU only: use --device cpu"):
        build_cpu_rival("ort", stock_model().to("meta"), SAMPLES, Path())


def test_padding_to_a_fixed_length_changes_no_logits() -> None:
    model = stock_model()
    run = cases.padded_to(forward(model), 80, 0)
    with torch.inference_mode():
        padded = torch.stack(run(SAMPLES[0]), -1)
    real = SAMPLES[0]["attention_mask"].bool()
    torch.testing.assert_close(padded[real], logits(model, SAMPLES[0])[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", cases.SIZES)
def test_the_random_twin_is_half_of_the_dense_model(name: str) -> None:
    sizes = cases.SIZES[name]
    layers, heads, ffn = (
        sizes[key] for key in ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    )
    shapes = cases.half_shapes(layers, heads, ffn)
    assert sum(shape.num_heads for shape in shapes) * 2 == layers * heads
    assert sum(shape.ffn_width for shape in shapes) * 2 == layers * ffn
    assert len(set(shapes)) == 6


@pytest.mark.parametrize("name", ["mpnet", "modernbert", "deberta-v2"])
def test_other_families_have_random_twins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, name, cases.SIZES[name] | TINY)
    source = cases.Source("", "none", name)
    dense, narrow = (model_shape(source.load(each, "cpu")) for each in source.names)
    assert [sum(layer.num_heads for layer in shape.layers) for shape in (dense, narrow)] == [12, 6]
    for each in source.names:
        model = source.load(each, "cpu")
        exact = [forward(model)(batch) for batch in SAMPLES]
        fast = forward(pruned_ops.optimize(model))
        for batch, wanted in zip(SAMPLES, exact, strict=True):
            real = batch["attention_mask"].bool()
            for logit, expected in zip(fast(batch), wanted, strict=True):
                torch.testing.assert_close(logit[real], expected[real], atol=1e-4, rtol=1e-4)


def test_a_rival_that_reads_graphs_refuses_what_is_not_exported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(cases.SIZES, "minilm", TINY)
    model = cases.Source("", "none", "minilm").load("dense", "cpu")
    model.bert.encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(Refused, match="BertForQuestionAnswering cannot be exported"):
        onnx_graph(model, tmp_path)


def test_the_best_rival_is_chosen_by_the_median_and_compared_round_by_round() -> None:
    workload = Workload.fixed(8, 1, 1)
    seconds = {"ours": (1.0, 2.0, 4.0), "a": (2.0, 3.0, 4.0), "b": (1.0, 9.0, 9.0)}
    timings = {name: Timing(workload, values) for name, values in seconds.items()}
    best = harness.best_rival(timings, "ours", ["a", "b"])
    assert best == {"best_rival": "a", "speedup_vs_best_rival": 1.5}
    assert harness.best_rival(timings, "ours", []) == {}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """--random minilm is a model of seconds, not minutes."""
    monkeypatch.setitem(cases.SIZES, "minilm", TINY)
    monkeypatch.setattr(harness, "ceilings", lambda dtype, device, clock=None: {"flops": 1e11})


def test_the_benchmark_of_models_runs_end_to_end(tiny: None, tmp_path: Path, capsys: Any) -> None:
    """Rivals that are not installed, or refuse, have a row with the reason; the others are timed."""
    out, names = tmp_path / "models.csv", ["hf", "hf-eager", "ort", "openvino-int8", "ctranslate2"]
    arguments = ["--random", "minilm", "--rivals", *names, "--workloads", "fixed*-b[18]", "--quick"]
    bench_models.main([*arguments, "--rounds", "2", "--out", str(out), "--cache", str(tmp_path / "cache")])
    with out.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    refused = {row["runner"]: row["refused"] for row in rows if row["refused"]}
    timed = {(row["workload"], row["runner"]): row for row in rows if not row["refused"]}
    assert (
        "takes stock BERT alone" in refused["ctranslate2 pruned"]
        or "[bench]" in refused["ctranslate2 pruned"]
    )
    assert "has one attention, that of hf" in refused["hf-eager pruned"]
    for workload in ("fixed128-b1", "fixed128-b8", "fixed384-b8"):
        for model in ("dense", "pruned"):
            for name in ["ours", "ours-int8", *names]:
                runner = f"{name} {model}"
                assert (runner in refused) != ((workload, runner) in timed)
            ours = timed[workload, f"ours {model}"]
            assert ours["best_rival"].endswith(model) and "int8" not in ours["best_rival"]
            assert float(ours["speedup_vs_best_rival"]) > 0 < float(ours["percent_of_peak"])
            assert "attention" in ours["backends"] or "encoder" in ours["backends"]
    table = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "| fixed384-b8 | pruned |" in table and "ctranslate2 pruned is left out" in table
    assert "arrival order is left out" in capsys.readouterr().out


def test_memory_is_watched_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tiny: None, capsys: Any
) -> None:
    """In this process here, where the sizes are replaced."""
    if not memory.STATUS.exists():
        pytest.skip(f"no {memory.STATUS} on this system")
    monkeypatch.setattr(memory, "BATCHES", 20)
    monkeypatch.setattr(memory, "EARLY", 10)
    source = cases.Source("", "none", "minilm")
    mib = memory.watch(source, "pruned", "ours", Workload.fixed(16, 2, 2), "cpu", torch.get_num_threads())
    assert 0 < mib["loaded"] <= mib["peak"] and mib["end"] <= mib["peak"]


def test_what_was_measured_is_kept_where_the_rest_is_not(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interleaved = harness.interleaved

    def until_the_second(runners: Any, workload: Workload, *others: Any, **more: Any) -> Any:
        if workload.name == "fixed128-b8":
            raise KeyboardInterrupt
        return interleaved(runners, workload, *others, **more)

    monkeypatch.setattr(harness, "interleaved", until_the_second)
    out = tmp_path / "models.csv"
    arguments = ["--random", "minilm", "--rivals", "hf", "--workloads", "fixed128-*", "--rounds", "1"]
    arguments += ["--models", "pruned"]
    with pytest.raises(KeyboardInterrupt):
        bench_models.main([*arguments, "--out", str(out)])
    rows = [row for row in harness.read_rows(out) if "refused" not in row]
    assert {(row["workload"], row["model"], row["rival"]) for row in rows} == {
        ("fixed128-b1", "pruned", "hf pruned")
    }


def test_long_texts_are_for_models_that_take_them() -> None:
    names = [[one.name for one in cases.workloads(None, True, ["*"], longest)] for longest in (512, 8192)]
    assert names[1] == [*names[0], "fixed4096-b1"]


def test_names_that_are_not_there_are_refused(capsys: Any) -> None:
    with pytest.raises(ValueError, match="there is no workload 'arrival-b8'; there are: fixed128-b1"):
        cases.workloads(None, False, ["arrival-b8"], 512)
    with pytest.raises(SystemExit):
        bench_models.parsed(["--rivals", "all", "hf"])
    assert "names, or all, or none" in capsys.readouterr().err


def test_a_gguf_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's file has its name when it is whole."""
    gguf, size = MagicMock(), {"hidden_size": 12, "num_hidden_layers": 1}
    for name, module in (("gguf", gguf), ("llama_cpp", MagicMock())):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "rivals.llama_cpp_worker", raising=False)
    worker = importlib.import_module("rivals.llama_cpp_worker")
    monkeypatch.delitem(sys.modules, "rivals.llama_cpp_worker")  # it is bound to the stand-ins
    monkeypatch.setattr(worker, "_add_vocabulary", lambda *_: None)
    monkeypatch.setattr(worker, "_tensors", lambda folder: [])
    sizes = ("max_position_embeddings", "intermediate_size", "num_attention_heads", "layer_norm_eps")
    (tmp_path / "config.json").write_text(json.dumps(size | dict.fromkeys(sizes, 1)))
    gguf.GGUFWriter.side_effect = lambda path, kind: (Path(path).touch(), gguf.writer)[1]
    gguf.writer.write_tensors_to_file.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        worker.written(tmp_path, "f16")
    assert not list(tmp_path.glob("*.gguf"))
    gguf.writer.write_tensors_to_file.side_effect = None
    assert worker.written(tmp_path, "f16") == tmp_path / "model-f16.gguf"
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model-f16.gguf"}
