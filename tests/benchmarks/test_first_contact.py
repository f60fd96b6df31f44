"""The two calls on a GPU: dry runs on the CPU, and what happens to parts that fail, hang or cannot start."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import first_contact
from first_contact import Outcome, Part, failed_tests, run_part, summary
from pruned_ops.ops.registry import BACKENDS, OPS
from thorough import only_in_test_all

PYTHON = sys.executable
ROOT = first_contact.ROOT


def python(code: str, seconds: float = 30, name: str = "part") -> Part:
    return Part(name, [PYTHON, "-c", code], seconds)


def test_the_first_dry_run_goes_through_all_parts(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert first_contact.main(["first", "--device", "cpu", "--out", str(tmp_path)]) == 0
    first = tmp_path / "first"
    names = {path.name for path in first.iterdir()}
    files = {"log.txt", "tests.xml", "kernels.jsonl", "models.csv", "models.md"}
    files |= {"models.png", "summary.txt", "failed-tests.txt"}
    assert names | {"models.png"} == files and len(files) <= first_contact.MOST_FILES
    text = (first / "summary.txt").read_text("utf-8")
    assert [line.split(":")[0] for line in text.splitlines()[1:]] == ["load", "tests", "kernels", "models"]
    printed = capfd.readouterr().out
    assert "[kernels] right" in printed and "[load] " in printed and "files in" in printed
    log = (first / "log.txt").read_text("utf-8").splitlines()
    assert log == [line for line in printed.splitlines() if line.startswith("[")]

    stamp, *rows = [json.loads(line) for line in (first / "kernels.jsonl").read_text("utf-8").splitlines()]
    assert stamp["verdict"] == "stamp" and {"command", "machine_processor", "version_torch"} <= stamp.keys()
    assert {row["op"] for row in rows if row["verdict"] == "right"} == {*OPS} - {"encoder"}
    timed = {row["problem"].split()[0] for row in rows if row["verdict"] == "timed"}
    ops = {"attention", "linear_gelu", "add_layer_norm", "linear_add_layer_norm"}
    assert timed == {"ceiling", "linear"} | ops
    assert printed.count("[kernels] ") == len(rows)


@only_in_test_all
def test_the_second_dry_run_repeats_what_failed(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    failed = "tests/benchmarks/test_op_report.py::test_shares_and_ratios\n"
    (tmp_path / "first" / "failed-tests.txt").write_text(failed)
    assert first_contact.main(["second", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "[tests] 1 passed" in (tmp_path / "second" / "log.txt").read_text("utf-8")
    assert "right" not in (tmp_path / "second" / "kernels.jsonl").read_text("utf-8")  # times alone


def test_an_extension_that_is_older_than_its_sources_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who brings an old build along would believe that today's kernels were tested."""
    source, built = tmp_path / "csrc/cuda/attention.cu", tmp_path / "pruned_ops/_C.cpython-311.so"
    for path, seconds in ((source, 2000), (built, 1000)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (seconds, seconds))
    older = first_contact.older_extension(tmp_path)
    assert older is not None and older.startswith(
        "WARNING: _C.cpython-311.so is older than csrc/cuda/attention"
    )
    os.utime(built, (2000, 2000))
    assert first_contact.older_extension(tmp_path) is None
    built.unlink()
    assert first_contact.older_extension(tmp_path) is None

    monkeypatch.setattr(first_contact, "older_extension", lambda: older)
    monkeypatch.setattr(first_contact, "first", lambda *_: [python("print('begun')")])
    assert first_contact.main(["first", "--device", "cpu", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == older and lines.index("[part] begun") < lines.index(older, 1)


IMPORTED = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import bench_kernels, bench_models, environment
print(*sorted({name.split(".")[0] for name, module in sys.modules.items() if module}))
"""


def brought(names: Iterable[str]) -> set[str]:
    """The distributions that come with these, and they themselves, by their normalised names."""
    known, to_read = set[str](), [canonicalize_name(name) for name in names]
    while to_read:
        name = to_read.pop()
        if name not in known:
            known.add(name)
            with suppress(metadata.PackageNotFoundError):
                requirements = map(Requirement, metadata.requires(name) or ())
                needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
                to_read += [canonicalize_name(requirement.name) for requirement in needed]
    return known


def test_what_this_python_lacks_is_named_first_and_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Minutes of a GPU would be spent on parts that end at their imports."""
    assert first_contact.lacking_packages() is None
    monkeypatch.setattr(first_contact, "older_extension", lambda: None)
    monkeypatch.setattr(first_contact, "PACKAGES", ("pytest", "no_such_package", "nor_this"))
    monkeypatch.setattr(first_contact, "first", lambda *_: [python("import no_such_package")])
    assert first_contact.main(["first", "--device", "cpu", "--out", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("WARNING: this Python lacks no_such_package, nor_this: parts")
    assert lines.count(lines[0]) == 2
    reason = "exit status 1 after \"ModuleNotFoundError: No module named 'no_such_package'\""
    assert f"part: {reason}, " in (tmp_path / "first" / "summary.txt").read_text("utf-8")


def test_the_packages_that_are_looked_for_are_those_that_the_parts_import() -> None:
    """No other than these and what comes with them, and each of these."""
    folders = [str(ROOT / name) for name in (".", "python", "benchmarks", "tests/support")]
    there = brought((*first_contact.PACKAGES, "torch", "triton"))
    others = [
        name
        for name, owners in metadata.packages_distributions().items()
        if not any(canonicalize_name(owner) in there for owner in owners) and not name.startswith("pruned_")
    ]
    command = [PYTHON, "-c", IMPORTED, *others]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    imported = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert set(first_contact.PACKAGES) <= set(imported.stdout.split())


def test_a_part_that_hangs_is_interrupted_and_keeps_what_it_said(tmp_path: Path) -> None:
    code = (
        "import time\nprint('begun', flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('WRONG  so far', flush=True)"
    )
    start = time.monotonic()
    outcome = run_part(python(code), tmp_path, 3)
    assert time.monotonic() - start < 12 and outcome.status.startswith("interrupted after")
    assert outcome.faults == ["WRONG  so far"] and "[part] begun" in (tmp_path / "log.txt").read_text("utf-8")


def test_a_part_that_takes_no_interrupt_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_contact, "GRACE", 1)
    code = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "subprocess.Popen(child)\ntime.sleep(60)"
    )
    start = time.monotonic()
    assert run_part(python(code), tmp_path, 2).status.startswith("interrupted")
    assert time.monotonic() - start < 12  # the child holds the pipe, and would keep it for a minute


def test_a_process_that_cannot_be_killed_stops_no_other_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that waits for a driver: it keeps the pipe open for as long as it is there."""
    left: list[Any] = []
    for name in ("GRACE", "SETTLE"):
        monkeypatch.setattr(first_contact, name, 1)
    monkeypatch.setattr(first_contact, "_kill", left.append)
    code = "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)"
    start = time.monotonic()
    assert run_part(python(code), tmp_path, 2).status == "interrupted after 2 s"
    assert time.monotonic() - start < 12
    left[0].kill()


GPU = "print('9.0', flush=True)\n"


def test_what_does_not_load_is_built_and_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(first_contact, "PROBE", GPU)
    assert [part.name for part in first_contact.loading(PYTHON, False)] == ["load"]
    monkeypatch.setattr(first_contact, "PROBE", GPU + "raise ImportError('GLIBCXX_3.4.32 not found')")
    build, load = first_contact.loading(PYTHON, False)
    assert (build.name, build.environment["TORCH_CUDA_ARCH_LIST"], load.name) == ("build", "9.0", "load")
    assert "none loads here: ImportError: GLIBCXX_3.4.32 not found" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take the whole call, on the CPU."""
    monkeypatch.setattr(first_contact, "PROBE", "raise RuntimeError('no NVIDIA driver')")
    assert first_contact.main(["first", "--out", str(tmp_path)]) == 1
    assert "torch can use no GPU here: RuntimeError: no NVIDIA driver" in capsys.readouterr().out


def test_a_probe_that_hangs_takes_its_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_contact, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(first_contact, "IMPORT", 1)
    assert [part.name for part in first_contact.loading(PYTHON, False)] == ["load"]


def test_kernels_that_were_not_built_are_skipped(tmp_path: Path) -> None:
    """In the emulator they would pass."""
    if BACKENDS["cuda"].missing is None:
        pytest.skip("there is a GPU")
    names = ["tests/ops/test_cuda.py::test_cuda_starts_nothing_for_nothing"]
    part = first_contact.tests(PYTHON, True, names, 200, tmp_path)
    run_part(replace(part, after=None), tmp_path, 200)
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert "emulated: it is switched off" in log and " 2 skipped" in log


def test_a_file_that_imports_what_is_lacking_stops_no_other(tmp_path: Path) -> None:
    (tmp_path / "test_lacking.py").write_text("import no_such_package")
    (tmp_path / "test_whole.py").write_text("import pytest\n@pytest.mark.alone\ndef test_it(): pass")
    names = [str(tmp_path / name) for name in ("test_lacking.py", "test_whole.py")]
    part = first_contact.tests(PYTHON, True, names, 200, tmp_path)
    assert part.after is not None  # it is in one process, as all are where pytest-xdist is not there
    outcome = run_part(replace(part, command=part.after, after=None), tmp_path, 200)
    log = (tmp_path / "log.txt").read_text("utf-8")
    assert " 1 passed, " in log and " 1 error" in log and outcome.faults[-1].startswith("ERROR ")


def test_packages_that_were_brought_along_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brought_along.py").write_text("print('found')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_part(python("import brought_along, pruned_cli"), tmp_path, 30).status == "ok"
    assert "[part] found" in (tmp_path / "log.txt").read_text("utf-8")


def test_lines_are_not_cut_at_a_terminals_width(tmp_path: Path) -> None:
    """pytest's last lines name a test and the reason of its failure."""
    test = tmp_path / "test_it.py"
    test.write_text(f"def test_{'a' * 20}():\n    assert 1 == 2, 'because of a reason'\n")
    command = [PYTHON, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider", "-c", "/dev/null", str(test)]
    outcome = run_part(Part("part", command, 60), tmp_path, 60)
    assert len(outcome.faults) == 1 and "because of a reason" in outcome.faults[0]


def test_a_list_of_failed_tests_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Else other tests would run in their place."""
    with pytest.raises(SystemExit):
        first_contact.main(["second", "--out", str(tmp_path), "--failed", str(tmp_path / "none")])
    assert not (tmp_path / "second").exists()


def test_parts_that_fail_or_cannot_start_say_so(tmp_path: Path) -> None:
    assert run_part(python("raise SystemExit(3)"), tmp_path, 30).status == "exit status 3"
    nothing = run_part(Part("none", ["no-such-program"], 5), tmp_path, 5)
    assert nothing.status.startswith("cannot be started")


def test_the_tests_that_are_named_are_there() -> None:
    """pytest runs nothing at all where one of the names is wrong."""
    root = Path(first_contact.__file__).parents[1]
    makefile = (root / "Makefile").read_text("utf-8")
    names = (*first_contact.GPU_TESTS, *first_contact.MOST_TELLING_TESTS, first_contact.SANITIZED_TEST[0])
    for name in names:
        path, _, function = name.partition("::")
        assert f"def {function}(" in (root / path).read_text("utf-8") if function else (root / path).exists()
        assert name.removeprefix("tests/") in makefile


def planned(target: str, python: str = "true") -> str:
    """What make would run for a target, with this for its Python."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    command = ["make", "-n", target, f"PYTHON={python}"]
    root, environment = Path(first_contact.__file__).parents[1], os.environ | {"MAKEFLAGS": ""}
    make = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    return " ".join(make.stdout.split())


def test_make_spreads_the_tests_where_xdist_is_there() -> None:
    """A word too few, and pytest would look for a file of the name 8, and run nothing."""
    tests = "tests/ops/test_triton.py tests/ops/test_triton_choices.py"
    assert f'-m "not alone" -n 8 --dist worksteal {tests}' in planned("gpu-tests")
    assert f'-m "not alone" {tests}' in planned("gpu-tests", python="false")  # nothing can be imported


def test_everything_of_make_gpu_goes_to_its_folder() -> None:
    """A machine that is lent gives back that one alone."""
    for part in ("first", "second", "ops", "models", "train", "study"):
        plan = planned(f"gpu-{part}")
        assert " --out build/gpu" in plan or " --results build/gpu" in plan, part


def test_what_was_wrong_comes_first() -> None:
    outcomes = [
        Outcome("tests", "exit status 1", 97.0, ["FAILED tests/a.py::test_b[c] - AssertionError: 1 - 2"]),
        Outcome("kernels", "exit status 1", 180.0, ["WRONG  attention  16x64", "FAILED  linear_gelu"]),
    ]
    lines = summary(outcomes).splitlines()
    assert lines[0].startswith("--- summary: 3 lines")
    assert lines[1] == "WRONG  attention  16x64  [kernels]" and lines[2].startswith("FAILED tests/a.py")
    assert lines[-1] == "kernels: exit status 1, 180 s, 2 faults"
    shown = summary(outcomes, most=1).splitlines()
    assert shown[:3] == [*lines[:2], "2 more are in summary.txt"] and shown[3:] == lines[4:]
    assert failed_tests(outcomes[0]) == ["tests/a.py::test_b[c]"]


def test_what_a_gpu_machine_may_lack_is_not_imported_at_once() -> None:
    """By what the calls run: torch and transformers are there, and nothing is downloaded."""
    lacking = {"ctranslate2", "datasets", "onnx", "onnxruntime", "openvino", "triton"}
    root = Path(first_contact.__file__).parent
    folders = [root / name for name in ("single_kernels", "rivals", "whole_models")]
    paths = [root / "bench_kernels.py", root / "bench_models.py", root / "harness.py"]
    assert all(folder.is_dir() for folder in folders)
    paths += [path for folder in folders for path in folder.glob("*.py") if not path.match("*_worker.py")]
    assert len(paths) > 15
    for path in paths:
        for line in ast.parse(path.read_text("utf-8")).body:
            if isinstance(line, ast.Import | ast.ImportFrom):
                module = getattr(line, "module", None)
                names = [f"{module}.{alias.name}" if module else alias.name for alias in line.names]
                assert not lacking & {name.split(".")[0] for name in names}, path
                assert "pruned_ops.checkpoints.onnx_graph" not in names, path  # which needs onnx


def test_both_calls_fit_into_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a build, and with memcheck."""
    monkeypatch.setattr(first_contact, "probed", lambda python: ("9.0", "none is there"))
    monkeypatch.setattr(first_contact.shutil, "which", lambda name: name)
    parts = first_contact.first(PYTHON, False, tmp_path)
    assert [part.name for part in parts] == ["build", "load", "tests", "kernels", "models"]
    expected = {"build": 45, "load": 10, "tests": 130, "kernels": 190, "models": 150}
    assert sum(min(part.seconds, expected[part.name]) for part in parts) <= first_contact.TOTAL["first"]
    parts = first_contact.second(PYTHON, False, tmp_path / "second", None)
    assert [part.name for part in parts] == ["build", "load", "tests", "kernels", "models", "memcheck"]
    monkeypatch.setattr(first_contact, "probed", lambda python: ("9.0", None))
    parts = first_contact.second(PYTHON, False, tmp_path / "second", None)
    expected |= {"tests": 30, "kernels": 70, "models": 78}
    assert sum(expected.get(part.name, 45) for part in parts) <= first_contact.TOTAL["second"]


def test_a_call_of_fewer_minutes_has_shorter_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, instead of the first ones alone."""
    monkeypatch.setattr(first_contact, "probed", lambda python: ("9.0", None))
    monkeypatch.setattr(first_contact.shutil, "which", lambda name: None)
    for call, make in (("first", first_contact.first), ("second", first_contact.second)):
        more = (None,) if call == "second" else ()
        parts = make(PYTHON, False, tmp_path / call, *more, share=0.6)  # type: ignore[operator]
        assert [part.name for part in parts] == ["load", "tests", "kernels", "models"]
        expected = {"load": 10, **{part.name: part.seconds for part in parts[1:]}}
        expected["models"] -= 30  # in which a workload that was begun comes to its end
        assert sum(expected.values()) <= 0.6 * first_contact.TOTAL[call]
    assert first_contact.parsed(["second", "--out", "x", "--minutes", "2.5"]).minutes == 2.5
