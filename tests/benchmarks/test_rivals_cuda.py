"""The GPU's benchmark without a GPU: its rivals compute Hugging Face's logits, its machinery runs on the CPU,
and what cannot run is left out by name."""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import bench_models
import harness
import pruned_ops
from inputs import MODELS, padded_batch, stock_model
from pruned_ops.measure.timing import Timing, Workload
from rivals import cuda
from rivals.rival import Batch, Logits, NotInstalled, Refused, Run, compare_logits, forward
from whole_models import cases, goals
from whole_models.report import spread

TINY = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 24}


class Again:
    """In place of CUDA graphs: runs the work anew, on the memory that it was recorded with."""

    def __init__(self) -> None:
        self.recorded = 0

    def record(self, work: Callable[[], Any]) -> Callable[[], Any]:
        self.recorded += 1
        return work

    def ordered(self) -> Any:
        return nullcontext()

    def wait(self) -> None:
        pass


def batch_of(*lengths: int, seed: int = 0) -> dict[str, Tensor]:
    return cuda.SizedBatch(padded_batch(lengths, seed=seed), lengths)


BATCHES = [batch_of(20, 3, 11), batch_of(9, 9), batch_of(20, 3, 11, seed=1), batch_of(7, 20, 8)]


def attention(qkv: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """In place of a GPU's kernel for packed sequences."""
    tokens, _, heads, head_dim = qkv.shape
    context = pruned_ops.ops.attention(qkv.reshape(tokens, -1), cu_seqlens, longest, head_dim)
    return context.view(tokens, heads, head_dim)


def packed(model: Any, recorder: Any) -> Run:
    return cuda.packed(attention, model, recorder)


def hf_graphed(model: Any, recorder: Any) -> Run:
    return cuda.hf_graphed(model, [], Path(), recorder)


@pytest.mark.parametrize("make", [packed, hf_graphed])
@pytest.mark.parametrize("kind", ["stock-bert", "pruned-bert"])
def test_graphed_rivals_give_hf_eagers_logits(make: Callable[..., Run], kind: str) -> None:
    """A graph a size, whose inputs are copied in; a layer without heads and one without FFN among them."""
    model, recorder = MODELS[kind](), Again()
    run = make(model, recorder)
    assert compare_logits(run, forward(model), BATCHES, "fp32")["max_error"] < 1e-4
    # The first and third are alike, for the padded the fourth too; a packed one's size is its tokens.
    assert recorder.recorded == (3 if make is packed else 2)


def test_the_padded_rivals_get_no_mask_where_nothing_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    plain = cuda.padded_logits
    monkeypatch.setattr(
        cuda, "padded_logits", lambda model, ids, mask: masks.append(mask) or plain(model, ids, mask)
    )
    run = hf_graphed(stock_model(), Again())
    for batch in (batch_of(9, 9), batch_of(9, 3), padded_batch((9, 9))):
        run(batch)
    assert [mask is None for mask in masks] == [True, False, False]


@pytest.mark.parametrize("name", [name for name in cuda.CUDA_RIVALS if name != "hf"])
def test_on_a_cpu_they_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=f"^{name} is measured on a GPU only: use --device cuda"):
        cuda.build_cuda_rival(name, stock_model(), [], tmp_path)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, module, remedy in (
        ("flash-attn", "flash_attn", "pip install flash-attn"),
        ("tensorrt", "torch_tensorrt", "pip install torch-tensorrt"),
        ("ort-cuda", "onnxruntime", "pip install onnxruntime-gpu"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(NotInstalled, match=f"{module} cannot be imported .*: {remedy}"):
            cuda.CUDA_RIVALS[name].make(stock_model(), [], tmp_path)


def test_an_onnxruntime_without_cuda_is_refused(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("this one has it")
    with pytest.raises(Refused, match="no CUDAExecutionProvider: pip install onnxruntime-gpu"):
        cuda.ort_cuda(stock_model(), [], tmp_path)


def test_torchs_varlen_takes_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fits the op's schema, and computes attention; the op itself is replaced, as it needs a GPU."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    seen: list[dict[str, Any]] = []

    def op(*arguments: Any) -> Any:
        seen.append(dict(zip(names, arguments, strict=False)))
        query, key, value, bounds = arguments[:4]
        return attention(torch.stack([query, key, value], 1), bounds, arguments[5]), None, None, None, None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    monkeypatch.setattr(cuda, "CudaGraphs", lambda device: Again())
    model = stock_model()
    run = cuda.torch_varlen(model, [], Path())
    errors = compare_logits(run, forward(model), BATCHES[:1], "fp32")
    assert errors["max_error"] < 1e-4 and len(seen) == model.config.num_hidden_layers
    first = seen[0]
    assert first["query"].shape == (34, 4, 16) and first["cum_seq_q"].tolist() == [0, 20, 23, 34]
    settings = ("max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask")
    assert [first[name] for name in settings] == [20, 20, 0.0, False, False]


@pytest.mark.parametrize("kind", ["stock-bert", "pruned-bert"])
def test_attention_gets_no_mask_where_nothing_is_padded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under capture and in torch.compile, transformers makes a mask of ones where it gets none, and the
    rivals would not run flash attention."""
    masking_utils = pytest.importorskip("transformers.masking_utils")
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True, raising=False)
    model, masks = MODELS[kind](), list[Any]()
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: Any, **named: Any) -> Tensor:
        masks.append(named.get("attn_mask", arguments[3] if len(arguments) > 3 else None))
        return plain(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    batch = batch_of(9, 9)
    logits = cuda.padded_logits(model, batch["input_ids"], None)
    assert masks and all(mask is None for mask in masks)
    for output, expected in zip(logits, forward(model)(batch), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, "minilm", TINY)
    monkeypatch.setattr(harness, "ceilings", lambda dtype, device: {"flops": 1e9, "bytes": 1e6})


def measured(tmp_path: Path, *more: str, status: int = 0) -> tuple[list[dict[str, str]], str]:
    out = tmp_path / "goals.csv"
    common = ["--goals", "--random", "minilm", "--quick", "--rounds", "5", "--out", str(out)]
    assert bench_models.main([*common, *more]) == status
    with out.open(encoding="utf-8") as file:
        table = out.with_suffix(".md")
        return list(csv.DictReader(file)), table.read_text("utf-8") if table.exists() else ""


def test_the_goals_run_end_to_end(tiny: None, tmp_path: Path) -> None:
    rows, table = measured(
        tmp_path, "--rivals", "all", "--workloads", "fixed128-b1", "lengths*", "offline*", "--minutes", "5"
    )
    timed = {(row["workload"], row["runner"]): row for row in rows if not row["refused"]}
    workloads = {"fixed128-b1", "lengths48-384-b8", "offline-sorted-b32"}
    assert {name for name, _ in timed} == workloads
    for workload in workloads:
        for model in ("dense", "pruned"):
            ours = timed[workload, f"ours {model}"]
            assert ours["best_rival"] == f"hf {model}" and float(ours["percent_of_copy"]) > 0
            assert float(ours["percent_of_peak"]) > 0 and float(ours["speedup_vs_own_dense"]) > 0
            assert "embed_layer_norm" in ours["backends"] and ours["rounds"] == "5"
    assert ("offline-sorted-b32", "ours-encode-many pruned") in timed
    refused = {row["runner"]: row["refused"] for row in rows if row["refused"]}
    assert len(refused) == 2 * (len(cuda.CUDA_RIVALS) - 1)
    assert all("is measured on a GPU only" in reason for reason in refused.values())
    assert "varlen pruned is left out: varlen is measured on a GPU only" in table
    assert "ours / best float32 rival" in table and "| lengths48-384-b8 | pruned |" in table
    assert (tmp_path / "goals.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["mpnet", "modernbert"])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_weights_of_every_family_are_counted(
    name: str, pruned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the layers, wherever the family's modules have them."""
    monkeypatch.setitem(cases.SIZES, name, cases.SIZES[name] | TINY)
    runner = goals.ours(cases.random_model(name, pruned), "dense")
    timing = Timing(Workload.fixed(4, 1, 1), (1.0,))
    rates = goals._rates(runner, timing, {"flops": 1e5, "bytes": 1e3})
    assert rates["percent_of_copy"] > 0 and rates["percent_of_peak"] > 0


def test_the_files_that_are_kept_are_of_one_model_each(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the folder of --cache, where the graph of an earlier run's model stood in for this run's."""
    source = cases.Source("none", "none", "minilm", ("dense",))

    def files(cached: bool) -> Path:
        _, rival = goals.all_runners(source, ["hf"], "cpu", torch.float32, tmp_path, cached)
        assert isinstance(rival.make, partial)
        return Path(rival.make.args[-1])

    first = files(cached=True)
    assert files(cached=True) == first and first.parent == tmp_path
    assert files(cached=False) == tmp_path / "dense"
    monkeypatch.setitem(cases.SIZES, "minilm", TINY | {"num_hidden_layers": 4})
    assert files(cached=True) != first


def test_what_no_time_is_left_for_is_left_out_by_name(tiny: None, tmp_path: Path) -> None:
    rows, _ = measured(tmp_path, "--rivals", "hf", "--workloads", "fixed128*", "--minutes", "1e-6")
    assert len(rows) == 8 and {row["refused"] for row in rows} == {"the 1e-06 minutes were used up"}
    deadline = goals.Deadline(1.0)
    assert deadline.refuse("hf") is None
    assert deadline.refuse("compile-max-autotune") == "the 1 minutes were used up; it takes 180 s"


def test_rounds_are_as_many_as_fit(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload.fixed(4, 1, 1)
    inputs = workload.inputs(9, 0)
    runner = goals.Runner("a", "dense", lambda: None, None, run=lambda batch: time.sleep(0.001))  # type: ignore[arg-type, return-value]
    for seconds, most, least in ((1e9, 9, 9), (0.0, 5, 5), (2.0, 200, 5)):
        deadline = goals.Deadline(seconds / 60)
        timing = goals.timed([runner], workload, inputs, 9 if seconds > 10 else 500, deadline, "cpu")[
            "a dense"
        ]
        assert least <= len(timing.seconds) <= most


def test_a_rival_that_fails_or_errs_is_left_out_with_the_reason() -> None:
    model = stock_model()
    hf = forward(model)

    def broken() -> Run:
        raise RuntimeError("no kernel image\nand more")

    def off(batch: Batch) -> Logits:
        return tuple(logits + 0.1 for logits in hf(batch))

    workload = Workload("one", ((20, 3, 11),))
    runners = [
        goals.Runner(name, "dense", make, model)
        for name, make in (("hf", lambda: hf), ("broken", broken), ("off", lambda: off))
    ]
    ready, refused = goals.prepared(runners, workload, [BATCHES[0]], goals.Deadline(None))
    assert [runner.runtime for runner in ready] == ["hf"]
    reasons = {row["runtime"]: row["refused"] for row in refused}
    assert reasons["broken"] == "RuntimeError: no kernel image"
    assert reasons["off"].startswith("its logits are off by 1.00e-01, more than")
    assert not any("fault" in row for row in refused)


def test_ours_that_fails_or_errs_is_a_fault_and_stops_no_rival(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever it is that fails, its optimisation too; and the benchmark's exit status is 1."""
    plain = pruned_ops.optimize

    def optimize(model: Any) -> Any:
        if model.config.model_type != "bert":
            raise RuntimeError("an illegal memory access")
        fast = plain(model)
        fast.qa_outputs.bias.data += 1
        return fast

    monkeypatch.setattr(pruned_ops, "optimize", optimize)
    rows, _ = measured(tmp_path, "--rivals", "hf", "--workloads", "fixed128-b1", status=1)
    assert {row["runner"] for row in rows if not row["refused"]} == {"hf dense", "hf pruned"}
    faults = {row["runner"]: row["fault"] for row in rows if row["refused"]}
    assert faults == {"ours dense": "WRONG", "ours pruned": "FAILED"}
    printed = capsys.readouterr().out.splitlines()
    assert "FAILED  fixed128-b1  ours pruned: RuntimeError: an illegal memory access" in printed
    assert any(line.startswith("WRONG  fixed128-b1  ours dense: its logits are off by") for line in printed)


def test_what_else_is_ours_is_reported_where_the_dense_model_or_encode_many_fails(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nothing that was timed is lost, nor are the workloads behind."""
    plain = pruned_ops.optimize

    def optimize(model: Any) -> Any:
        if model.config.model_type == "bert":
            raise RuntimeError("an illegal memory access")
        fast = plain(model)
        fast.encode_many = lambda *_: 1 / 0
        return fast

    monkeypatch.setattr(pruned_ops, "optimize", optimize)
    order = ("offline*", "fixed128-b1")
    rows, table = measured(tmp_path, "--rivals", "hf", "--workloads", *order, status=1)
    timed = {(row["workload"], row["runner"]) for row in rows if not row["refused"]}
    assert timed == {
        (workload, name)
        for workload in ("offline-sorted-b32", "fixed128-b1")
        for name in ("hf dense", "hf pruned", "ours pruned")
    }
    faults = {(row["runner"], row["refused"]) for row in rows if row["fault"]}
    assert faults == {
        ("ours dense", "RuntimeError: an illegal memory access"),
        ("ours-encode-many pruned", "ZeroDivisionError: division by zero"),
    }
    assert "| fixed128-b1 | pruned |" in table


def test_a_failure_while_a_workload_is_timed_leaves_the_next_one(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = goals.timed

    def timed(ready: Any, workload: Workload, *others: Any) -> Any:
        if workload.name == "fixed384-b1":
            raise RuntimeError("an illegal memory access\nand more")
        return plain(ready, workload, *others)

    monkeypatch.setattr(goals, "timed", timed)
    rows, _ = measured(tmp_path, "--rivals", "hf", "--workloads", "fixed384-b1", "fixed128-b1", status=1)
    assert {row["workload"] for row in rows if not row["refused"]} == {"fixed128-b1"}
    failed = {row["runner"]: row["refused"] for row in rows if row["refused"]}
    assert set(failed) == {f"{name} {model}" for name in ("hf", "ours") for model in ("dense", "pruned")}
    assert set(failed.values()) == {"RuntimeError: an illegal memory access"}


def test_batches_that_ran_without_a_graph_are_a_fault() -> None:
    """They are timed, but not as what they are to be."""
    row = {"workload": "one", "runner": "ours dense"}
    assert bench_models.why_left_out(row | {"without_graph": 0}) is None
    found = bench_models.why_left_out(row | {"without_graph": 3})
    assert found == "FAILED  one  ours dense: 3 batches ran without a graph"


def test_batches_without_a_graph_are_of_their_own_workload() -> None:
    """Not of those before, which their own rows tell."""
    model = stock_model()
    hf, stats = forward(model), SimpleNamespace(eager=0)
    optimised = SimpleNamespace(engine=SimpleNamespace(stats=stats))
    without: list[int] = []
    for misses in (1, 0):

        def run(batch: Batch, misses: int = misses) -> Logits:
            stats.eager += misses
            return hf(batch)

        runner = goals.Runner("ours", "dense", lambda run=run: run, model, optimised=optimised)
        goals.prepared([runner], Workload("one", ((20, 3, 11),)), [BATCHES[0]], goals.Deadline(None))
        without.append(runner.facts["without_graph"])
    assert without[0] > 0 and without[1] == 0


def test_a_gpus_milliseconds_are_shown_with_their_fractions() -> None:
    """Two runtimes that take 0.75 and 0.85 ms are not alike."""
    row = {"ms_p20": 0.747, "ms_p50": 0.751, "ms_p80": 0.8}
    assert spread(row | {"device": "cuda"}) == "0.751 (0.747-0.800)"
    assert spread(row | {"device": "cpu"}) == "0.8 (0.7-0.8)"


def test_the_goals_models_and_workloads() -> None:
    """BERT-large, 24 layers that differ, 8 of 16 heads and 45% of the FFN units on average."""
    shapes = cases.half_shapes(24, 16, 4096, cases.FFN_KEPT["large"])
    assert sum(shape.num_heads for shape in shapes) == 24 * 8 and len(set(shapes)) == 6
    assert abs(sum(shape.ffn_width for shape in shapes) / 24 / 4096 - 0.45) < 0.002
    known = {workload.name: workload for workload in cases.goal_workloads(None, False, ["*"])}
    names = ("fixed128-b1", "fixed384-b1", "fixed128-b8", "fixed384-b8", "fixed384-b32", "fixed384-b128")
    assert set(known) == {*names, "lengths48-384-b32", "offline-sorted-b32"}
    (mixed,) = known["lengths48-384-b32"].batches
    assert len(mixed) == 32 and (min(mixed), max(mixed)) == (48, 384) and list(mixed) != sorted(mixed)
    lengths = [length for batch in known["offline-sorted-b32"].batches for length in batch]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 512


def test_workloads_come_in_the_order_in_which_they_are_asked_for() -> None:
    """Time may run out before the last."""
    chosen = cases.goal_workloads(None, False, ["fixed384-b32", "fixed*-b1", "fixed384-*"])
    names = ["fixed384-b32", "fixed128-b1", "fixed384-b1", "fixed384-b8", "fixed384-b128"]
    assert [workload.name for workload in chosen] == names


def test_names_of_the_other_benchmark_are_refused(capsys: Any) -> None:
    for arguments, message in (
        (["--rivals", "varlen"], "--rivals varlen: here there are hf, hf-eager, hf-bfloat16, compile"),
        (["--goals", "--rivals", "ort"], "--rivals ort: here there are hf, hf-graphed, varlen"),
        (["--minutes", "3"], "--minutes goes with --device cuda or --goals"),
    ):
        with pytest.raises(SystemExit):
            bench_models.parsed(arguments)
        assert message in capsys.readouterr().err


def test_options_that_leave_nothing_to_do_or_to_write_are_refused(capsys: Any) -> None:
    for arguments, message in (
        (["--models", "pruned", "--pruned", "none"], "--pruned none leaves that model out"),
        (["--memory", "--out", "memory.csv"], "--memory prints what it measures, and writes no file"),
        (["--memory", "--rivals", "ort"], "--rivals: --memory counts the memory of ours and hf"),
        (["--memory", "--rounds", "2"], "--rounds: --memory counts the memory of ours and hf"),
    ):
        with pytest.raises(SystemExit):
            bench_models.parsed(arguments)
        assert message in capsys.readouterr().err
    random = ["--models", "pruned", "--pruned", "none", "--random", "minilm"]
    assert bench_models.parsed(random).models == ["pruned"]


def test_a_fused_graph_that_was_interrupted_is_not_taken_for_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fused = stock_model(), MagicMock()
    monkeypatch.setattr(cuda, "onnx_graph", lambda *_: "graph")
    monkeypatch.setattr(cuda, "package", lambda *_: MagicMock(optimize_model=lambda *_, **__: fused))
    fused.get_fused_operator_statistics.return_value = {"Attention": model.config.num_hidden_layers}
    fused.save_model_to_file.side_effect = (KeyboardInterrupt, None)
    with pytest.raises(KeyboardInterrupt):
        cuda._half_graph(model, tmp_path)
    assert not list(tmp_path.iterdir())
    assert cuda._half_graph(model, tmp_path) == cuda._half_graph(model, tmp_path)
    assert fused.save_model_to_file.call_count == 2  # the third call takes what the second one made
