"""How many requests `pruned-ops serve` answers, beside the same server with the plain model, and overloaded.

Each server is a process of its own, and all of them are asked in turn, over loopback, by one process that has
as many clients as the phase says: closed loops of 1 to 64 clients, open loops at fractions of the rate that
the closed ones reached, and an overload at 4 times that rate. Clients and server share the machine's cores.
The row `bare` is the model alone in its own process, on the same texts in the same batches, tokenising
included.
Usage: python benchmarks/bench_serve.py MODEL (the folder of an embedder)
       python benchmarks/bench_serve.py MODEL --rival infinity=http://127.0.0.1:7997/embeddings
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import harness
from option_types import above, at_least, no_less_than
from pruned_ops.files import write_whole
from serving.load import Load, Target, closed_loop, open_loop
from serving.page import page

# The ways to serve the model: what follows `pruned-ops serve MODEL`.
SERVERS = {"pruned_ops": (), "pruned_ops int8": ("--dtype", "int8"), "plain": ("--plain",)}
# Texts that the clients take turns with.
TEXTS = 1024
# Tokens of a text: the logarithm is normal, so that most are short and some are long.
MEDIAN, SPREAD, SHORTEST, LONGEST = 40, 1.0, 3, 250
OVERLOAD = 4.0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of an embedder")
    parser.add_argument("--servers", nargs="*", choices=SERVERS, default=list(SERVERS), help="default: all")
    parser.add_argument(
        "--rival",
        type=rival,
        action="append",
        default=[],
        metavar="NAME=URL[,PID]",
        help="a server that runs already, and its process; .../embed is asked as TEI, others as OpenAI's API",
    )
    parser.add_argument("--rival-model", default="", help="what the rivals call the model")
    parser.add_argument("--clients", type=at_least(1), nargs="+", default=[1, 4, 16, 32, 64])
    parser.add_argument(
        "--open", type=part, nargs="*", default=[0.5, 0.8], metavar="PART",
        help="rates of the open loops, as parts of the best rate (default: 0.5 0.8)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=above(0), default=10, help="of each phase (default: %(default)s)")
    parser.add_argument(
        "--overload-seconds",
        type=no_less_than(0),
        default=60,
        help="of the overload (default: %(default)s; 0: none)",
    )
    parser.add_argument(
        "--memory-seconds",
        type=no_less_than(0),
        default=0,
        help="of a closed loop of 32 clients, for memory",
    )
    parser.add_argument("--texts-per-request", type=at_least(1), default=1, metavar="N")
    parser.add_argument("--threads", type=at_least(1), help="threads of each model (default: all cores)")
    parser.add_argument("--add", action="store_true", help="keep the rows that the CSV has")
    parser.add_argument("--out", type=Path, help="the CSV (default: in benchmarks/results, by the machine)")
    return parser.parse_args()


def part(text: str) -> float:
    """The part of a rate that --open names: with a rate of 0 no request would ever come."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a rate: a number above 0 is needed")
    return value


def rival(text: str) -> tuple[str, Target]:
    """The name and the server of one --rival."""
    name, _, place = text.partition("=")
    url, _, process = place.partition(",")
    if not name or urlsplit(url).scheme != "http" or not (process or "0").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=http://HOST:PORT/PATH[,PID]")
    return name, Target(url, urlsplit(url).path or "/v1/embeddings", int(process) if process else None)


def texts_of(model: Path) -> list[str]:
    """Texts of words that the model's tokenizer has whole, of many lengths; always the same. ValueError where
    its vocabulary is no mapping with such words."""
    choose = random.Random(0)
    listed = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = listed if isinstance(listed, dict) else {}
    vocabulary = sorted(word for word in words if re.fullmatch("[a-z]{2,}", word))
    if not vocabulary:
        raise ValueError(f"the vocabulary of {model} has no words to make texts of")
    lengths = (math.exp(choose.gauss(math.log(MEDIAN), SPREAD)) for _ in range(TEXTS))
    sizes = [min(LONGEST, max(SHORTEST, round(length))) for length in lengths]
    return [" ".join(choose.choices(vocabulary, k=size)) for size in sizes]


@contextmanager
def started(model: Path, options: Sequence[str]) -> Iterator[tuple[str, int, float]]:
    """A server of the model: its address, its process, and the seconds from its start to its first answer."""
    command = [sys.executable, "-m", "pruned_ops.cli", "serve", f"model={model}", "--port", "0", *options]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = next((line.split()[0] for line in process.stdout if line.startswith("http")), None)
            if url is None:
                raise ValueError(f"the server did not start: {' '.join(command)}")
            check_answer(Target(url, "/embed"), "")
            yield url, process.pid, time.perf_counter() - start
        finally:
            process.terminate()
            process.wait()


def requests_of(target: Target, texts: Sequence[str], each: int, model: str) -> list[bytes]:
    """Requests for the embeddings of the texts, so many of them each, as TEI's or OpenAI's clients ask."""
    groups = [texts[first : first + each] for first in range(0, len(texts) - each + 1, each)]
    if target.path.endswith("/embed"):
        return [target.request(json.dumps({"inputs": group, "truncate": True}).encode()) for group in groups]
    bodies = [{"model": model, "input": group, "encoding_format": "base64"} for group in groups]
    return [target.request(json.dumps(body).encode()) for body in bodies]


def check_answer(target: Target, model: str) -> None:
    """ValueError where a server does not answer a request for one text."""
    answer = closed_loop(target, requests_of(target, ["first"], 1, model), 1, 0.001)
    if not answer.statuses[200]:
        raise ValueError(
            f"http://{target.host}:{target.port}{target.path} does not answer a request for an embedding: "
            + (f"status {max(answer.statuses)}" if any(answer.statuses) else "no server is there")
        )


def bare(model: Path, options: Sequence[str], texts: Sequence[str], seconds: float) -> float:
    """Texts a second of the model alone, in a process of its own."""
    command = [sys.executable, __file__, "--alone", str(model), str(seconds), *options]
    completed = subprocess.run(
        command, input=json.dumps(texts), stdout=subprocess.PIPE, text=True, check=True
    )
    return float(completed.stdout.split()[-1])


def alone(model: str, seconds: str, *options: str) -> None:
    """The process of `bare`: prints texts a second."""
    import torch

    from pruned_ops.runtime.batch_runner import TOKENS_ON_A_CPU, token_batches
    from pruned_ops.serving.models import Loading, load

    texts = json.load(sys.stdin)
    dtype = "int8" if "int8" in options else None
    if "--threads" in options:
        torch.set_num_threads(int(options[options.index("--threads") + 1]))
    served = load(model, "model", Loading(device="cpu", dtype=dtype, plain="--plain" in options))

    def run() -> None:
        sequences = served.encoder.encode(texts, cut=True)
        for places in token_batches(sequences, TOKENS_ON_A_CPU):
            served.compute([sequences[place] for place in places])

    run()
    start, rounds = time.perf_counter(), 0
    while time.perf_counter() < start + float(seconds):
        run()
        rounds += 1
    print(rounds * len(texts) / (time.perf_counter() - start))


def row(server: str, phase: str, load: Load, each: int, **more: Any) -> harness.Row:
    """A line of the result file."""
    answered = load.statuses[200]
    refused = load.statuses[429] + load.statuses[503]
    memory = [size / 1e6 for size in load.memory if size]  # 0: not known
    return {
        "server": server,
        "phase": phase,
        **more,
        "seconds": round(load.elapsed, 2),
        "requests": sum(load.statuses.values()),
        "answered": answered,
        "refused": refused,
        "lost": sum(load.statuses.values()) - answered - refused,
        "requests_per_s": round(load.requests_per_s, 2),
        "texts_per_s": round(load.requests_per_s * each, 2),
        "ms_p50": round(load.ms(50), 2),
        "ms_p99": round(load.ms(99), 2),
        "cpu_ms": round(load.cpu_ms, 3) if load.cpu else "",
        "mb_first": round(memory[0], 1) if memory else "",
        "mb_most": round(max(memory), 1) if memory else "",
        "mb_last": round(memory[-1], 1) if memory else "",
    }


def _version(package: str) -> str:
    """The version of a package; nothing where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


class Bench:
    """The servers, and what was measured of them. The files are written after each measurement, so that a
    run which is ended early leaves what it has."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, harness.out_path(arguments.out, "serve", "cpu")
        self.rows = harness.read_rows(self.out) if arguments.add and self.out.exists() else []
        self.origin = {
            "texts_per_request": arguments.texts_per_request,
            "model": arguments.model.name,
            **harness.stamp(),
            **{
                f"version_{package}": _version(package)
                for package in ("fastapi", "uvicorn", "httptools", "orjson")
            },
        }
        self.texts = texts_of(arguments.model)
        self.targets: dict[str, Target] = {}
        self.requests: dict[str, list[bytes]] = {}
        self.best: dict[str, float] = {}  # requests a second

    def add(self, name: str, target: Target, model: str) -> None:
        self.targets[name] = target
        self.requests[name] = requests_of(target, self.texts, self.arguments.texts_per_request, model)

    def keep(self, line: harness.Row) -> None:
        self.rows.append(line | self.origin)
        harness.write_rows(self.out, self.rows)
        write_whole(self.out.with_suffix(".md"), page(self.rows))
        shown = {key: value for key, value in line.items() if value not in ("", 0)}
        print(", ".join(f"{key} {value}" for key, value in shown.items()), flush=True)

    def answering(self) -> list[tuple[str, Target]]:
        """The servers that answered the closed loops: the others have no rate to take a part of."""
        return [(name, target) for name, target in self.targets.items() if self.best[name] > 0]

    def measure(self) -> None:
        """Every phase, with the servers one after another in each."""
        seconds, texts_per_request = self.arguments.seconds, self.arguments.texts_per_request
        for name, target in self.targets.items():
            closed_loop(target, self.requests[name], 8, min(seconds, 3))
        for clients in self.arguments.clients:
            for name, target in self.targets.items():
                load = closed_loop(target, self.requests[name], clients, seconds)
                self.best[name] = max(self.best.get(name, 0.0), load.requests_per_s)
                self.keep(row(name, "closed", load, texts_per_request, clients=clients, offered_per_s=""))
        for share in self.arguments.open:
            for name, target in self.answering():
                rate = share * self.best[name]
                load = open_loop(target, self.requests[name], rate, seconds)
                self.keep(
                    row(
                        name,
                        f"open at {share}",
                        load,
                        texts_per_request,
                        clients="",
                        offered_per_s=round(rate, 1),
                    )
                )
        for name, target in self.targets.items() if self.arguments.memory_seconds else ():
            load = closed_loop(target, self.requests[name], 32, self.arguments.memory_seconds)
            self.keep(row(name, "memory", load, texts_per_request, clients=32, offered_per_s=""))
        for name, target in self.answering() if self.arguments.overload_seconds else ():
            rate = OVERLOAD * self.best[name]
            load = open_loop(target, self.requests[name], rate, self.arguments.overload_seconds)
            self.keep(
                row(name, "overload", load, texts_per_request, clients="", offered_per_s=round(rate, 1))
            )


def main() -> None:
    arguments = parsed()
    bench = Bench(arguments)
    for _, target in arguments.rival:
        check_answer(target, arguments.rival_model)
    threads = ["--threads", str(arguments.threads)] if arguments.threads else []
    for name in arguments.servers:
        rate = bare(arguments.model, [*SERVERS[name], *threads], bench.texts, arguments.seconds)
        bench.keep({"server": name, "phase": "bare", "texts_per_s": round(rate, 2)})
    with ExitStack() as stack:
        for name in arguments.servers:
            served = started(arguments.model, [*SERVERS[name], *threads])
            url, process, first = stack.enter_context(served)
            bench.keep({"server": name, "phase": "start", "seconds": round(first, 2)})
            bench.add(name, Target(url, "/embed", process), "model")
        for name, target in arguments.rival:
            bench.add(name, target, arguments.rival_model)
        bench.measure()
    print(bench.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:])
    else:
        harness.run(main)
