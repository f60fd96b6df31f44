"""Serving and streaming for minutes, under kills, forks, broken clients and full disks (`make soak`).

Five parts run side by side on one small model whose answers are known. Every answer is compared with the
known one; what is lost, doubled, wrong or late is a fault, and so is memory that grows, or an error of more
than a line. Each part says what it did; the exit status is 1 where there was a fault.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests" / "support")]

# Seconds after which an answer, a start or an end is late. On one busy core a process takes several to start.
LATE = 60.0
# Bytes by which a process may have grown in the second half of its life: allocators keep some.
GROWTH = 16 << 20
ASK = [sys.executable, "-m", "pruned_ops.cli", "ask"]
SERVE = [sys.executable, "-m", "pruned_ops.cli", "serve"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1"}
Record = dict[str, str]


def records() -> list[Record]:
    """Questions about texts of one to twenty windows."""
    choose = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{choose.randrange(400)}" for _ in range(count))

    return [
        {"question": words(choose.randint(1, 6)), "context": words(choose.choice([5, 40, 300]))}
        for _ in range(40)
    ]


class Part:
    """What one of the attacks did, and what went wrong in it."""

    def __init__(self, name: str, run: Callable[[Part], None]) -> None:
        self.name, self.done, self.faults = name, Counter[str](), list[str]()
        self._run = run

    def __call__(self) -> None:
        try:
            self._run(self)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")

    def check(self, is_right: bool, fault: str) -> None:
        if not is_right and len(self.faults) < 20:
            self.faults.append(fault)


def memory(process: int) -> int:
    """The resident bytes of a process, 0 where it is gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (FileNotFoundError, ProcessLookupError):
        return 0


class Growth:
    """Samples of a process's memory, once a second."""

    def __init__(self, process: int) -> None:
        self._process, self._samples, self._next = process, list[int](), 0.0

    def sample(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            self._samples.append(memory(self._process))

    def check(self, part: Part) -> None:
        """The first fifth, in which caches fill, does not count."""
        size = len(self._samples)
        earlier, later = self._samples[size // 5 : size // 2], self._samples[size // 2 :]
        if earlier and later:
            grown = max(later) - max(earlier)
            part.done["MB grown"] = max(0, grown) >> 20
            part.check(grown <= GROWTH, f"memory grew by {grown >> 20} MB to {max(later) >> 20} MB")


class Soak:
    """One model, its known answers, and the attacks on them."""

    def __init__(self, folder: Path, model: Path, seconds: float) -> None:
        from pruned_ops import QuestionAnswerer

        self.folder, self.model, self.end = folder, model, time.monotonic() + seconds
        self.records = records()
        self.answers = [
            vars_of(answer) for answer in QuestionAnswerer(model).stream(self.records, progress=False)
        ]

    def goes_on(self) -> bool:
        return time.monotonic() < self.end

    # Serving.

    def start_server(self) -> tuple[subprocess.Popen[bytes], int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A request of more than 100 kB is refused, so that an attack is one soon.
        command = [*SERVE, str(self.model), "--port", str(port), "--body-bytes", "100000", "--patience", "5"]
        server = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        late = time.monotonic() + LATE
        while time.monotonic() < late:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return server, port
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"the server does not listen after {LATE:g} seconds")

    def ask_server(self, part: Part, port: int, index: int, may_end: bool = False) -> None:
        """An answer, which must be the known one, or "the server ends" where it may. Errors: OSError and
        HTTPException where the server is gone before it answered."""
        record = self.records[index]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LATE)
        try:
            connection.request("POST", "/v1/qa", json.dumps(record), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        if may_end and response.status == 503:
            part.done["clients sent away"] += 1
            return
        part.check(response.status == 200, f"status {response.status}: {content[:200]!r}")
        if response.status == 200:
            answer = json.loads(content)["answer"]
            part.check(answer == self.answers[index]["answer"], f"question {index}: {answer!r}")
            part.done["answers"] += 1

    def break_request(self, part: Part, port: int, choose: random.Random) -> None:
        """A client that sends nonsense, or leaves in the middle."""
        head = b"POST /v1/qa HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        record = json.dumps(self.records[0]).encode()
        content = choose.choice(
            [
                head + b"Content-Length: 1000\r\n\r\n{",
                head + b"Content-Length: 99999999999\r\n\r\n",
                head + b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n" + b"a" * 100_000,
                head + b'Content-Length: 9\r\n\r\n{"a":NaN}',
                head + b"Content-Length: %d\r\n\r\n" % len(record) + record,  # and leaves before the answer
                head + b"Content-Length: 99999\r\n\r\n" + b"[" * 99_999,
                choose.randbytes(300),
            ]
        )
        with socket.create_connection(("127.0.0.1", port), LATE) as client:
            client.sendall(content)
            if choose.random() < 0.5:
                client.shutdown(socket.SHUT_WR)
        part.done["broken requests"] += 1

    def one_server(self, part: Part) -> None:
        """A server that lives on: three clients, of which one is hostile; its memory stays flat."""
        server, port = self.start_server()
        growth = Growth(server.pid)

        def client(seed: int) -> None:
            choose = random.Random(seed)
            try:
                while self.goes_on():
                    if seed == 0:
                        self.break_request(part, port, choose)
                        time.sleep(0.2)
                    else:
                        self.ask_server(part, port, choose.randrange(len(self.records)))
            except (OSError, http.client.HTTPException) as error:
                part.check(False, f"the server was lost: {error!r}")

        clients = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
        for thread in clients:
            thread.start()
        while any(thread.is_alive() for thread in clients):
            growth.sample()
            time.sleep(0.2)
        growth.check(part)
        self.interrupt(part, server)

    def interrupt(self, part: Part, server: subprocess.Popen[bytes]) -> None:
        """One Ctrl-C ends a server, without a traceback."""
        server.send_signal(signal.SIGINT)
        try:
            _, error = server.communicate(timeout=LATE)
            part.check(b"Traceback" not in error, f"at its end: {error.decode()[-300:]}")
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()
            part.check(False, f"one Ctrl-C did not end the server in {LATE:g} seconds")

    def killed_servers(self, part: Part) -> None:
        """Servers that are killed, or interrupted, while they answer: the next answers the same."""
        choose = random.Random(1)
        while self.goes_on():
            server, port = self.start_server()
            for _ in range(choose.randint(1, 10)):
                self.ask_server(part, port, choose.randrange(len(self.records)))
            waiting = threading.Thread(target=self._ask_in_vain, args=(part, port))
            waiting.start()
            time.sleep(choose.random() / 20)
            if choose.random() < 0.5:
                server.kill()
                server.communicate()
                part.done["kills"] += 1
            else:
                self.interrupt(part, server)
                part.done["interrupts"] += 1
            waiting.join(LATE)
            part.check(not waiting.is_alive(), "a client of a killed server waits for ever")

    def _ask_in_vain(self, part: Part, port: int) -> None:
        try:
            self.ask_server(part, port, 0, may_end=True)
        except (OSError, http.client.HTTPException):
            part.done["clients cut off"] += 1

    # Streaming.

    def check_lines(self, part: Part, output: bytes, asked: list[int], is_whole: bool) -> None:
        """Answers of the questions asked, in order, each once; all of them where the process ended itself."""
        lines = output.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            part.check(not is_whole, "the last line is not whole")
            lines.pop()
        for number, line in enumerate(lines):
            answer = json.loads(line)
            place = answer.pop("line")
            part.check(place == number + 1, f"line {place} stands at {number + 1}")
            part.check(answer == self.answers[asked[number]], f"line {place}: {answer}")
        part.check(
            len(lines) == len(asked) or not is_whole, f"{len(lines)} answers to {len(asked)} questions"
        )
        part.done["answers"] += len(lines)

    def killed_streams(self, part: Part) -> None:
        """`ask --questions -`, every other time killed among its answers: what came is a right beginning."""
        choose = random.Random(2)
        questions, answers = self.folder / "asked.jsonl", self.folder / "answered.jsonl"
        while self.goes_on():
            asked = [choose.randrange(len(self.records)) for _ in range(choose.choice([1, 100, 1000]))]
            questions.write_text("".join(json.dumps(self.records[index]) + "\n" for index in asked))
            with questions.open("rb") as source, answers.open("wb") as out:
                stream = subprocess.Popen(
                    [*ASK, str(self.model), "--questions", "-"], env=ENVIRONMENT, stdin=source, stdout=out
                )
            kill_after = choose.choice([0, 100, 20_000, 100_000, 1 << 40])  # bytes of answers
            late = time.monotonic() + 3 * LATE
            while stream.poll() is None and answers.stat().st_size < kill_after and time.monotonic() < late:
                time.sleep(0.02)
            is_whole = stream.poll() == 0
            if stream.poll() is None:
                stream.kill()
                stream.wait()
                part.check(
                    kill_after < 1 << 40, f"{len(asked)} questions take more than {3 * LATE:g} seconds"
                )
            part.check(is_whole or stream.returncode == -signal.SIGKILL, f"status {stream.returncode}")
            self.check_lines(part, answers.read_bytes(), asked, is_whole)
            part.done["whole streams" if is_whole else "kills"] += 1

    def full_disks(self, part: Part) -> None:
        """Answers to a full device and a full file: one line says so, and what is in the file is right."""
        questions, out = self.folder / "questions.jsonl", self.folder / "answers.jsonl"
        asked = list(range(len(self.records))) * 3
        questions.write_text("".join(json.dumps(self.records[index]) + "\n" for index in asked))
        command = [*ASK, str(self.model), "--questions", str(questions)]
        while self.goes_on():
            with open("/dev/full", "wb") as full:
                self._refused(
                    part, subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE)
                )
            limited = ["prlimit", "--fsize=2000", *command, "--out", str(out), "--overwrite"]
            self._refused(part, subprocess.run(limited, env=ENVIRONMENT, stderr=subprocess.PIPE))
            self.check_lines(part, out.read_bytes(), asked, False)

    def _refused(self, part: Part, ended: subprocess.CompletedProcess[bytes]) -> None:
        lines = ended.stderr.decode().strip().splitlines()
        part.check(ended.returncode != 0 and len(lines) == 1, f"status {ended.returncode}: {lines[-3:]}")
        part.done["full disks"] += 1

    def in_process(self, part: Part) -> None:
        """One process that streams without end, while other threads ask and children are forked."""
        own = [
            sys.executable,
            __file__,
            "--child",
            str(self.model),
            "--minutes",
            str((self.end - time.monotonic()) / 60),
        ]
        child = subprocess.Popen(own, env=ENVIRONMENT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        threading.Timer(self.end - time.monotonic() + 2 * LATE, child.kill).start()
        growth = Growth(child.pid)
        for line in child.stdout:
            growth.sample()
            kind, _, text = line.decode().strip().partition(" ")
            if kind == "fault":
                part.check(False, text)
            else:
                part.done[kind.replace("-", " ")] += int(text)
        part.check(child.wait() == 0, f"ended with status {child.returncode}")
        growth.check(part)


def vars_of(answer: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(answer)


def child(model: Path, seconds: float) -> None:
    """The process of `Soak.in_process`: writes "KIND COUNT" and "fault TEXT" lines."""
    from pruned_ops import QuestionAnswerer

    answerer = QuestionAnswerer(model)
    bank = records()
    right = list(answerer.stream(bank, progress=False))
    end = time.monotonic() + seconds
    stop = threading.Event()

    def say(kind: str, what: object) -> None:
        os.write(1, f"{kind} {what}\n".encode())

    def ask() -> None:
        choose = random.Random(threading.get_ident())
        while not stop.is_set():
            index = choose.randrange(len(bank))
            if answerer.answer(bank[index]["question"], bank[index]["context"]) != right[index]:
                say("fault", f"a thread's answer to {index}")
            say("thread-answers", 1)

    def fork() -> None:
        while not stop.is_set():
            process = os.fork()
            if process == 0:
                is_right = answerer.answer(bank[0]["question"], bank[0]["context"]) == right[0]
                os._exit(0 if is_right else 1)
            late = time.monotonic() + LATE
            while os.waitpid(process, os.WNOHANG) == (0, 0):
                if time.monotonic() > late:
                    os.kill(process, signal.SIGKILL)
                    say("fault", "a forked child does not answer")
                time.sleep(0.01)
            say("forked-children", 1)
            stop.wait(0.3)

    def endless() -> Iterator[Record]:
        while time.monotonic() < end:
            yield from bank

    threads = [threading.Thread(target=work) for work in (ask, ask, fork)]
    for thread in threads:
        thread.start()
    count = 0
    for count, answer in enumerate(answerer.stream(endless(), progress=False), 1):
        if answer != right[(count - 1) % len(bank)]:
            say("fault", f"streamed answer {count}")
        if count % len(bank) == 0:
            say("streamed-answers", len(bank))
    stop.set()
    for thread in threads:
        thread.join()
    if count % len(bank):
        say("fault", f"{count} answers, no whole number of rounds")


def make_model(folder: Path) -> Path:
    from inputs import stock_model
    from matching import save_checkpoint

    return save_checkpoint(stock_model(vocab_size=410, max_position_embeddings=140), folder / "model")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, 60 * arguments.minutes)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        soak = Soak(folder, make_model(folder), 60 * arguments.minutes)
        attacks = (
            soak.one_server,
            soak.killed_servers,
            soak.killed_streams,
            soak.full_disks,
            soak.in_process,
        )
        parts = [Part(attack.__name__.replace("_", " "), attack) for attack in attacks]
        threads = [threading.Thread(target=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for part in parts:
        print(f"{part.name}: {', '.join(f'{count:,} {what}' for what, count in part.done.items())}")
        for fault in part.faults:
            print(f"  FAULT {fault}")
    return int(any(part.faults for part in parts))


if __name__ == "__main__":
    sys.exit(main())
