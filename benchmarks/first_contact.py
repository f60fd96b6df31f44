"""What is learnt about a GPU in two calls, of 9 and of 4 minutes: `make gpu PART=first` and `PART=second`.

Usage: python benchmarks/first_contact.py first|second --out FOLDER [--device cpu]
The parts run one after another, each within its own time; what one does stops no other. Their lines are
printed as they come, and are in log.txt in FOLDER/first or FOLDER/second, with a summary, in which what was
wrong or failed comes first. A call leaves MOST_FILES files at most, because a machine that is lent may give
few back. --device cpu is a dry run on tiny sizes. Only the standard library is imported here: that torch does
not load is a finding, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TextIO

from option_types import above

ROOT = Path(__file__).resolve().parent.parent
# Seconds of a whole call.
TOTAL = {"first": 540, "second": 240}
# A dry run may take so many times as long: it shows that every part works, on whatever else the CPU does.
PATIENCE = 8
# Seconds that a test may take. Then its process ends, and another goes on with the next
# (tests/support/gpu_watch.py).
LONGEST_TEST = 45
# Seconds in which torch and the package are imported, on a machine that has just started.
IMPORT = 120
# Seconds in which a part that was interrupted may print what it has, before it is killed.
GRACE = 15
# The share of a part's time that its first command gets, where another runs behind it.
BEFORE_AFTER = 0.8
# pytest's exit status where no test was chosen.
NO_TESTS = 5
# Seconds in which a part's last lines are read. A process that it left behind may hold the pipe open.
SETTLE = 2
# Into a pipe, lines and tables would be cut after 80 columns: pytest's, before the reason of a failure.
COLUMNS = "200"
# What the parts import beside torch. The tests' environment imports hypothesis, bench_models accelerate.
PACKAGES = (
    "accelerate",
    "hypothesis",
    "jinja2",
    "numpy",
    "pytest",
    "rich",
    "safetensors",
    "tqdm",
    "transformers",
)
# Lines that begin so go into the summary.
FAULTS = ("WRONG", "FAILED", "ERROR")
FAILED_TESTS, LOG = "failed-tests.txt", "log.txt"
MOST_FILES = 8
# Faults that are printed at the end, where a machine that is lent may give back the last lines alone.
MOST_PRINTED = 40
# Files, and of one that is about much else its one test on a GPU.
GPU_TESTS = (
    *("tests/ops/test_triton.py", "tests/ops/test_triton_choices.py", "tests/ops/test_cuda.py"),
    *("tests/runtime/test_graph_inputs.py", "tests/runtime/test_engine_gpu.py"),
    "tests/runtime/test_optimize.py::test_packed_is_padded_on_a_gpu",
)
# Run by the second call where no list of failed tests is there.
MOST_TELLING_TESTS = ("tests/runtime/test_engine_gpu.py",)
SANITIZED_TEST = (
    *("tests/ops/test_cuda.py", "-k"),
    "attention_at_the_edges and 64 and float16 and not bfloat16",
)
# Of whole models, which take milliseconds; as many as fit into the time.
ROUNDS = "15"
DRY_TESTS = ("tests/benchmarks/test_op_report.py",)
# Prints the GPU's capability, if torch can use it, and then fails where the package has no kernels for it.
PROBE = (
    "import torch\n"
    "print('%d.%d' % torch.cuda.get_device_capability(), flush=True)\n"
    "import pruned_ops._C\n"
    "from pruned_ops.ops.registry import BACKENDS\n"
    "assert BACKENDS['cuda'].missing is None, BACKENDS['cuda'].missing\n"
)


class NoGpu(Exception):
    """torch cannot use a GPU here; the message says why."""


@dataclass(frozen=True)
class Part:
    """A command, and the seconds that it may take. after: a command that runs behind it in the same time."""

    name: str
    command: list[str]
    seconds: float
    after: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended, and its lines that are faults."""

    name: str
    status: str
    seconds: float
    faults: list[str]


def run_part(part: Part, folder: Path, seconds: float) -> Outcome:
    """Run a part, and print its lines as they come, each after its name, also to the end of FOLDER/log.txt.
    After `seconds` it is interrupted, and killed GRACE seconds later."""
    start = time.monotonic()
    faults: list[str] = []
    statuses: list[str] = []
    with (folder / LOG).open("a", encoding="utf-8") as log:
        for command in (part.command, *([part.after] if part.after else [])):
            seconds_left = seconds - (time.monotonic() - start)
            if part.after and command is part.command:
                seconds_left *= BEFORE_AFTER
            statuses.append(
                _run(command, part, seconds_left, log, faults) if seconds_left > 0 else "no time was left"
            )
    status = "ok" if set(statuses) == {"ok"} else next(status for status in statuses if status != "ok")
    return Outcome(part.name, status, time.monotonic() - start, faults)


def _run(command: list[str], part: Part, seconds: float, log: TextIO, faults: list[str]) -> str:
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment() | part.environment, text=True, errors="replace",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=_take_interrupts,
        )  # fmt: skip
    except OSError as error:
        return f"cannot be started: {error}"
    # A thread of its own: a process that waits for a broken driver cannot be killed, and holds the pipe.
    last_lines: deque[str] = deque(maxlen=1)
    reader = threading.Thread(
        target=_pass_on, args=(process, part.name, log, faults, last_lines), daemon=True
    )
    reader.start()
    if not _ends(process, max(seconds, 1)):
        process.send_signal(signal.SIGINT)
        _ends(process, GRACE)
    reader.join(SETTLE)
    _kill(process)
    reader.join(SETTLE)
    if time.monotonic() - start >= seconds:
        return f"interrupted after {seconds:.0f} s"
    code = process.wait()
    if code == 0 or (code == NO_TESTS and "pytest" in command):
        return "ok"
    return f'exit status {code} after "{last_lines[0]}"' if last_lines else f"exit status {code}"


def environment() -> dict[str, str]:
    """The parts' environment. Packages that were brought along are still found."""
    packages = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    added = {"PYTHONPATH": os.pathsep.join(packages), "PYTHONUNBUFFERED": "1", "COLUMNS": COLUMNS}
    return os.environ | added


def _pass_on(
    process: subprocess.Popen[str], name: str, log: TextIO, faults: list[str], last_lines: deque[str]
) -> None:
    """Print a part's lines, and keep those that are faults, and the last that says something."""
    assert process.stdout is not None
    for line in process.stdout:
        for file in (sys.stdout, log):
            print(f"[{name}] {line}", end="", file=file, flush=True)
        if line.startswith(FAULTS):
            faults.append(line.strip())
        if line.strip(" \n>"):
            last_lines.append(line.strip())


def _ends(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the process ends within so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _take_interrupts() -> None:
    """In a shell's background job interrupts are ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _kill(process: subprocess.Popen[str]) -> None:
    """End the part with all processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def probed(python: str) -> tuple[str, str | None]:
    """The GPU's capability, and why the package does not load with kernels for it, None where it does.

    Errors: NoGpu; subprocess.TimeoutExpired after IMPORT seconds."""
    completed = subprocess.run(
        [python, "-c", PROBE], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=IMPORT
    )
    reason = completed.stderr.strip().splitlines()[-1:] or [f"exit status {completed.returncode}"]
    if not completed.stdout.strip():
        raise NoGpu(reason[0])
    return completed.stdout.strip(), reason[0] if completed.returncode else None


def older_extension(root: Path = ROOT) -> str | None:
    """The sentence that the C++ extension, which may have been brought along, is older than its sources; None
    where it is not, or where there is none."""
    built = sorted(root.glob("pruned_ops/_C*.so"), key=lambda path: path.stat().st_mtime)
    sources = [path for path in (root / "csrc").rglob("*") if path.is_file()]
    newest = max(sources, key=lambda path: path.stat().st_mtime, default=None)
    if not built or newest is None or built[0].stat().st_mtime >= newest.stat().st_mtime:
        return None
    return (
        f"WARNING: {built[0].name} is older than {newest.relative_to(root)}: its kernels may not be those of "
        "these sources. Build it anew (python setup.py -q build_ext --inplace), or believe no result below"
    )


def lacking_packages() -> str | None:
    """The sentence that names the PACKAGES that this Python lacks; None where all are there."""
    lacking = [name for name in PACKAGES if find_spec(name) is None]
    if not lacking:
        return None
    return (
        f"WARNING: this Python lacks {', '.join(lacking)}: parts below end at their imports. Install them, "
        "or bring a folder that holds them, and name it in PYTHONPATH"
    )


def loading(python: str, dry: bool) -> list[Part]:
    """Shows what loads; before it, the build for this GPU alone, where no extension is there that loads.

    Errors: NoGpu."""
    info = Part("load", [python, "-m", "pruned_ops.cli", "info"], 60 * (PATIENCE if dry else 1))
    if dry:
        return [info]
    try:
        capability, reason = probed(python)
    except subprocess.TimeoutExpired as error:
        print(f"--- what loads is not known: {error}", flush=True)
        return [info]
    if reason is None:
        return [info]
    print(f"--- the extension is built, because none loads here: {reason}", flush=True)
    # Without CUDA's compiler it fails, where a build by itself would leave the kernels out.
    settings = {"PRUNED_OPS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": capability}
    build = [python, "setup.py", "-q", "build_ext", "--inplace"]
    return [Part("build", build, 120, environment=settings), info]


def tests(python: str, dry: bool, names: Sequence[str], seconds: float, out: Path) -> Part:
    """pytest on all cores, where pytest-xdist is there; tests with a time limit after that, alone. The few of
    a dry run are on one core. CUDA kernels that were not built are skipped."""
    pytest = [python, "-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider"]
    # A file that imports what this machine lacks stops those of the others no more than a failure does.
    pytest += ["--continue-on-collection-errors", *names]
    workers = 1 if dry else min(8, os.cpu_count() or 1)
    spread = ["-n", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    report = f"--junitxml={out / 'tests.xml'}"
    return Part(
        "tests",
        [*pytest, *spread, report, "-m", "not alone"],
        seconds,
        after=[*pytest, "-m", "alone"],
        environment={
            "PRUNED_OPS_TEST_SECONDS": str(LONGEST_TEST * (PATIENCE if dry else 1)),
            "PRUNED_OPS_TEST_EMULATOR": "0",  # what passes there says nothing of a GPU
        },
    )


def kernels(python: str, device: str, minutes: float, out: Path, *more: str) -> Part:
    command = [python, "benchmarks/bench_kernels.py", "--device", device, "--out", str(out)]
    # Triton's interpreter, where it is switched on, is as slow as a GPU is fast.
    return Part(
        "kernels", [*command, "--minutes", f"{minutes:.4g}", *more], 60 * minutes + 10,
        environment={"TRITON_INTERPRET": "0"},
    )  # fmt: skip


def models(
    python: str, dry: bool, minutes: float, out: Path, workloads: Sequence[str], rivals: Sequence[str]
) -> Part:
    command = [python, "benchmarks/bench_models.py", "--out", str(out / "models.csv")]
    if dry:
        command += ["--goals", "--random", "minilm", "--quick", "--rounds", "5", "--rivals", "none"]
        workloads = ["fixed128-b1"]
    else:
        command += ["--device", "cuda", "--random", "large", "--rounds", ROUNDS, "--rivals", *rivals]
    command += ["--minutes", f"{minutes:.4g}", "--workloads", *workloads]
    return Part("models", command, 60 * minutes + 30)


def sanitized(python: str) -> Part:
    """compute-sanitizer on one test, last: it is slow to start."""
    command = ["compute-sanitizer", "--error-exitcode", "1", "--tool", "memcheck"]
    pytest = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *SANITIZED_TEST]
    return Part("memcheck", [*command, *pytest], 60, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def first(python: str, dry: bool, out: Path, share: float = 1.0) -> list[Part]:
    """share: of the whole time, the part that is used."""
    device, times = ("cpu", PATIENCE * share) if dry else ("cuda", share)
    return [
        *loading(python, dry),
        tests(python, dry, DRY_TESTS if dry else GPU_TESTS, 130 * times, out),
        kernels(python, device, 3 * times, out),
        models(
            python, dry, 2 * times, out,
            ["fixed384-b32", "fixed384-b1", "fixed128-b1", "lengths48-384-b32", "fixed128-b8"],
            ["hf", "hf-graphed", "varlen"],
        ),
    ]  # fmt: skip


def second(python: str, dry: bool, out: Path, failed: Path | None, share: float = 1.0) -> list[Part]:
    """failed: a file with names of tests, one a line; by default the one that the first call wrote. share: as
    of `first`."""
    failed = failed or out.parent / "first" / FAILED_TESTS
    names = failed.read_text("utf-8").split("\n") if failed.exists() else []
    names = [name for name in names if name] or list(DRY_TESTS if dry else MOST_TELLING_TESTS)
    device, times = ("cpu", PATIENCE * share) if dry else ("cuda", share)
    parts = [
        *loading(python, dry),
        tests(python, dry, names, 60 * times, out),
        kernels(python, device, 1 * times, out, "--only-times"),
        models(
            python, dry, 0.8 * times, out,
            ["fixed384-b32", "offline-sorted-b32", "fixed384-b1", "lengths48-384-b32"], ["varlen"],
        ),
    ]  # fmt: skip
    return parts if dry or shutil.which("compute-sanitizer") is None else [*parts, sanitized(python)]


def summary(outcomes: Sequence[Outcome], most: int | None = None) -> str:
    """Faults first, at most so many of them, then how every part ended."""
    faults = [f"{fault}  [{outcome.name}]" for outcome in outcomes for fault in outcome.faults]
    faults.sort(key=lambda fault: not fault.startswith("WRONG"))
    lines = [f"--- summary: {len(faults)} lines say that something is wrong or failed", *faults[:most]]
    if most is not None and len(faults) > most:
        lines.append(f"{len(faults) - most} more are in summary.txt")
    lines += [f"{o.name}: {o.status}, {o.seconds:.0f} s, {len(o.faults)} faults" for o in outcomes]
    return "\n".join(lines)


def failed_tests(outcome: Outcome) -> list[str]:
    """The names of tests in lines like "FAILED tests/a.py::test_b[c] - AssertionError"."""
    lines = [fault.split(" - ")[0] for fault in outcome.faults]
    return [line.split(" ", 1)[1].strip() for line in lines if " tests/" in line]


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=tuple(TOTAL))
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--failed", type=Path, help="second: tests, one a line (default: what failed)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--minutes",
        type=above(0),
        help="of the whole call, shared among its parts (default: first 9, second 4)",
    )
    arguments = parser.parse_args(argv)
    if arguments.failed is not None and not arguments.failed.is_file():
        parser.error(f"--failed {arguments.failed}: there is no such file")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status is 1 where anything was wrong or failed."""
    arguments = parsed(argv)
    out, python, start = arguments.out.resolve() / arguments.part, sys.executable, time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).write_text("", "utf-8")
    dry = arguments.device == "cpu"
    whole = TOTAL[arguments.part]
    older, lacking = older_extension(), lacking_packages()
    for warning in filter(None, (older, lacking)):
        print(warning, flush=True)
    share = 1.0 if arguments.minutes is None else 60 * arguments.minutes / whole
    total = whole * share * (PATIENCE if dry else 1)
    try:
        parts = (
            first(python, dry, out, share)
            if arguments.part == "first"
            else second(python, dry, out, arguments.failed, share)
        )
    except NoGpu as error:
        print(f"FAILED: nothing is begun, because torch can use no GPU here: {error}", flush=True)
        return 1
    outcomes: list[Outcome] = []
    for part in parts:
        seconds_left = total - GRACE - (time.monotonic() - start)
        print(
            f"--- {part.name}: at most {min(part.seconds, seconds_left):.0f} s: {' '.join(part.command)}",
            flush=True,
        )
        if seconds_left > 0:
            outcomes.append(run_part(part, out, min(part.seconds, seconds_left)))
        else:
            outcomes.append(Outcome(part.name, "left out: no time was left", 0, []))
        if part.name == "tests":
            names = failed_tests(outcomes[-1])
            (out / FAILED_TESTS).write_text("".join(f"{name}\n" for name in names), "utf-8")
    text = summary(outcomes)
    if older_extension() is None:  # a part has built it
        older = None
    for warning in filter(None, (older, lacking)):
        print(warning, flush=True)  # once more: a machine that is lent may give back the last lines alone
    print(summary(outcomes, MOST_PRINTED), flush=True)
    (out / "summary.txt").write_text(text + "\n", "utf-8")
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"{time.monotonic() - start:.0f} s in all; files in {out}: {files}", flush=True)
    return int(any(outcome.faults or outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
