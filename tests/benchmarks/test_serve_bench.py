"""The clients of benchmarks/bench_serve.py: they count every request, and lose none."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest

for package in ("fastapi", "orjson", "prometheus_client"):
    pytest.importorskip(package, reason='the server is not installed: pip install "pruned_ops[serve]"')

import harness  # noqa: E402
from pruned_ops.serving.limits import Limits  # noqa: E402
from served import Slow, served  # noqa: E402
from serving.load import Load, Target, closed_loop, open_loop  # noqa: E402


def test_the_loops_count_what_is_answered_and_refused() -> None:
    slow = Slow()
    slow.may_answer.set()
    with served({"slow": slow}, Limits(requests=1)) as (url, *_):
        target = Target(url, "/embed")
        requests = [target.request(json.dumps({"inputs": [text]}).encode()) for text in ("w1", "w2")]
        one = closed_loop(target, requests, 1, 0.1)
        assert set(one.statuses) == {200} and one.statuses[200] == len(one.seconds) == len(slow.texts)
        assert set(slow.texts) == {"w1", "w2"} and 0 < one.ms(50) <= one.ms(99)
        many = open_loop(target, requests, 500.0, 0.2)
        assert set(many.statuses) <= {200, 429} and 50 < many.statuses.total() < 200
        wrong = closed_loop(target, [target.request(b"{}")], 1, 0.01)
        assert set(wrong.statuses) == {422} and wrong.requests_per_s == 0


def test_who_is_not_answered_is_lost() -> None:
    load = closed_loop(Target("http://127.0.0.1:9", "/embed"), [b""], 1, 0.01)
    assert set(load.statuses) == {0}


def test_a_connection_that_the_server_closed_loses_no_request() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()  # as after a time in which nobody asked

    async def asked() -> list[int]:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            target = Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", "/embed")
            statuses = []
            for _ in range(3):
                statuses.append(await target.ask(target.request(b"")))
                await asyncio.sleep(0.05)
            target.close()
            return statuses

    assert asyncio.run(asked()) == [200, 200, 200]


def test_a_rival_is_a_name_and_the_address_of_a_server() -> None:
    from bench_serve import rival

    name, target = rival("TEI on 2=http://localhost:81/embed,7")
    assert (name, target.host, target.port) == ("TEI on 2", "localhost", 81)
    assert (target.path, target.process) == ("/embed", 7)
    assert rival("a=http://localhost:81")[1].path == "/v1/embeddings"
    for wrong in ("a", "a=localhost:81/embed", "=http://localhost:81", "a=http://localhost:81,PID"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not NAME=http://HOST:PORT"):
            rival(wrong)


def test_a_rate_of_nothing_is_refused() -> None:
    from bench_serve import part

    assert part("0.5") == 0.5
    for wrong in ("0", "-1", "inf", "nan", "half"):
        with pytest.raises(argparse.ArgumentTypeError, match="a number above 0 is needed"):
            part(wrong)


def test_a_server_that_answered_nothing_is_asked_at_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has none to take a part of; the others are measured, and their rows are kept."""
    import bench_serve

    loads = {"answers": Load(seconds=[0.1], elapsed=0.5), "silent": Load(elapsed=0.5)}
    rates: list[tuple[str, float]] = []
    monkeypatch.setattr(bench_serve, "closed_loop", lambda target, *_: loads[target])
    monkeypatch.setattr(
        bench_serve, "open_loop", lambda target, _, rate, *__: rates.append((target, rate)) or loads[target]
    )
    bench = object.__new__(bench_serve.Bench)
    bench.arguments = argparse.Namespace(
        seconds=1, texts_per_request=1, clients=[1], open=[0.5], memory_seconds=0, overload_seconds=1
    )
    rows: list[harness.Row] = []
    bench.targets, bench.requests, bench.best = {name: name for name in loads}, dict.fromkeys(loads, []), {}
    monkeypatch.setattr(bench, "keep", rows.append)
    bench.measure()
    assert rates == [("answers", 1.0), ("answers", 8.0)]
    assert [row["server"] for row in rows if row["phase"] == "closed"] == ["answers", "silent"]


def test_a_server_that_does_not_answer_is_refused() -> None:
    from bench_serve import check_answer

    with pytest.raises(ValueError, match="127.0.0.1:9/embed .*: no server is there"):
        check_answer(Target("http://127.0.0.1:9", "/embed"), "")
    slow = Slow()
    slow.may_answer.set()
    with served({"slow": slow}, Limits()) as (url, *_):
        check_answer(Target(url, "/embed"), "")
        with pytest.raises(ValueError, match="status 404"):
            check_answer(Target(url, "/embedings"), "")


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    from bench_serve import texts_of

    for vocabulary in ({"[CLS]": 0}, [["\u2581the", -3.5]]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
        with pytest.raises(ValueError, match="no words to make texts of"):
            texts_of(tmp_path)


def test_a_rival_whose_process_is_not_known_has_its_line() -> None:
    """As the one in the benchmark's usage: its CPU time and its memory stay empty."""
    from bench_serve import row
    from serving.page import page

    load = Load(seconds=[0.1, 0.2], elapsed=2.0, memory=[0, 0])
    load.statuses[200] = 2
    about = {"texts_per_request": 1, "machine_threads": 2}
    rows = [row("infinity", phase, load, 1, clients=32) | about for phase in ("closed", "memory")]
    assert [rows[0][name] for name in ("cpu_ms", "mb_first", "mb_most", "mb_last")] == [""] * 4
    text = page(rows)
    assert "| 32 clients, texts/s (p50, p99 in ms; CPU ms a request) | 1 (200, 200) |" in text
    assert "| MB after the first second, and after the last (minutes) |  |" in text


def test_texts_and_rows(tmp_path: Path) -> None:
    from bench_serve import LONGEST, SHORTEST, TEXTS, requests_of, row, texts_of

    words = {f"{first}{second}": 0 for first in "abcde" for second in "fghij"} | {"##x": 0, "[CLS]": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    texts = texts_of(tmp_path)
    lengths = [len(text.split()) for text in texts]
    assert len(texts) == TEXTS and min(lengths) >= SHORTEST and max(lengths) <= LONGEST
    assert texts == texts_of(tmp_path) and set(" ".join(texts).split()) <= set(words)
    for path, field in (("/embed", "inputs"), ("/v1/embeddings", "input")):
        asked = requests_of(Target("http://127.0.0.1:9", path), texts, 4, "minilm")
        assert len(asked) == TEXTS // 4
        assert json.loads(asked[1].partition(b"\r\n\r\n")[2])[field] == texts[4:8]
    load = Load(seconds=[0.1, 0.2], elapsed=2.0, memory=[5_000_000, 7_000_000])
    load.statuses.update({200: 2, 429: 3, 0: 1})
    line = row("ours", "closed", load, 4)
    assert (line["answered"], line["refused"], line["lost"]) == (2, 3, 1)
    assert (line["requests_per_s"], line["texts_per_s"], line["mb_most"]) == (1.0, 4.0, 7.0)
