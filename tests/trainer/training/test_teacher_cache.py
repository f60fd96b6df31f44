"""The teacher cache: exact, kept, shared by processes, and refused where it belongs to something else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pruned_trainer.jobs.call_checks import digest_of_weights
from pruned_trainer.training.teacher_cache import CHECKSUMS, LOGITS, METADATA, TeacherCache, fingerprint

LENGTHS = [3, 0, 5, 1]


def batch(lengths: list[int], numbers: list[int], seed: int = 0, extra: int = 0) -> tuple[Tensor, ...]:
    """numbers, start, end, mask of these windows; values that differ for every seed, bits of every kind."""
    seqlen = max([lengths[n] for n in numbers], default=0) + extra
    bits = torch.Generator().manual_seed(seed)
    shape = (2, len(numbers), seqlen)
    start, end = torch.randint(-(2**31), 2**31, shape, generator=bits).int().view(torch.float32)
    mask = torch.arange(seqlen) < torch.tensor([lengths[n] for n in numbers]).reshape(-1, 1)
    return torch.tensor(numbers, dtype=torch.long), start, end, mask.long()


def same(found: tuple[Tensor, ...] | None, start: Tensor, end: Tensor, mask: Tensor) -> bool:
    """Bit for bit, NaN included, with 0 at the padding."""
    assert found is not None
    pairs = zip(found, (start, end), strict=True)
    return all(
        f.dtype == torch.float32 and torch.equal(f.view(torch.int32), w.view(torch.int32) * mask.int())
        for f, w in pairs
    )


def test_round_trip_and_reopening(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "cache"
    cache = TeacherCache(folder, LENGTHS, "abc")
    numbers, start, end, mask = batch(LENGTHS, [2, 0])
    assert (len(cache), cache.filled, cache.logits(numbers, 5)) == (4, 0, None)
    cache.store(numbers, start, end, mask)
    assert same(cache.logits(numbers, 5), start, end, mask) and cache.filled == 2
    assert cache.logits(torch.tensor([0, 3]), 5) is None
    for again in (cache, TeacherCache(folder, LENGTHS, "abc")):
        wide = again.logits(numbers.flip(0), 7)
        assert wide is not None and wide[0].shape == (2, 7) and not wide[1][:, 5:].any()
        assert same((wide[0][:, :5], wide[1][:, :5]), start.flip(0), end.flip(0), mask.flip(0))
    assert {path.name for path in folder.iterdir()} == {METADATA, CHECKSUMS, LOGITS}


def test_answer_types_are_kept(tmp_path: Path) -> None:
    """A window without tokens has them, too; where the cache has none, or others, they are refused."""
    cache = TeacherCache(tmp_path, LENGTHS, "abc", 5)
    numbers, start, end, mask = batch(LENGTHS, [2, 1, 0])
    types = torch.randn(3, 5)
    cache.store(numbers, start, end, mask, types)
    for again in (cache, TeacherCache(tmp_path, LENGTHS, "abc", 5)):
        found = again.logits(numbers, 5)
        assert found is not None and same(found[:2], start, end, mask) and torch.equal(found[2], types)
    assert cache.filled == 3 and cache.logits(torch.tensor([3]), 5) is None
    for wrong in (None, types[:, 1:]):
        with pytest.raises(ValueError, match="types has shape"):
            cache.store(numbers, start, end, mask, wrong)
    with pytest.raises(ValueError, match="its types is 5, this run's is 0"):
        TeacherCache(tmp_path, LENGTHS, "abc")


def test_the_first_values_stay(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    numbers, start, end, mask = batch(LENGTHS, [0])
    cache.store(numbers, start, end, mask)
    cache.store(*batch(LENGTHS, [0, 3], seed=1))
    assert same(cache.logits(numbers, 3), start, end, mask) and cache.filled == 2


def test_16_bits_are_exact_and_64_refused(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    for number, dtype in ((0, torch.bfloat16), (2, torch.float16)):
        mask = torch.ones(1, LENGTHS[number], dtype=torch.bool)
        start = torch.randn(mask.shape).to(dtype)
        cache.store(torch.tensor([number]), start, -start, mask)
        found = cache.logits(torch.tensor([number]), LENGTHS[number])
        assert found is not None and torch.equal(found[0], start.float())
    with pytest.raises(ValueError, match="start is torch.float64, which fp32 does not hold exactly"):
        cache.store(torch.tensor([3]), torch.ones(1, 1).double(), torch.ones(1, 1), torch.ones(1, 1))


def test_windows_without_tokens(tmp_path: Path) -> None:
    for number, lengths in enumerate(([0, 0], [])):
        for _ in range(2):
            cache = TeacherCache(tmp_path / str(number), lengths, "abc")
            cache.store(*batch(lengths, list(range(len(lengths))), extra=3))
            found = cache.logits(torch.arange(len(lengths)), 3)
            assert cache.filled == len(lengths) and found is not None
            assert found[0].shape == (len(lengths), 3) and not found[0].any()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_is_a_dictionary(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    known: dict[int, tuple[Tensor, Tensor]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = TeacherCache(Path(folder), lengths, "abc")
        for seed in range(data.draw(st.integers(1, 5))):
            chosen = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=5))
            numbers, start, end, mask = batch(lengths, chosen, seed, extra=data.draw(st.integers(0, 3)))
            assert (cache.logits(numbers, mask.size(1)) is None) == any(n not in known for n in chosen)
            cache.store(numbers, start, end, mask)
            for row, n in enumerate(chosen):
                known.setdefault(n, (start[row, : lengths[n]], end[row, : lengths[n]]))
            if data.draw(st.booleans()):
                cache = TeacherCache(Path(folder), lengths, "abc")
            for n, (one, other) in known.items():
                found = cache.logits(torch.tensor([n]), lengths[n])
                assert same(found, one[None], other[None], torch.ones(1, lengths[n]))
            assert cache.filled == len(known)


@pytest.mark.parametrize(
    ("lengths", "name", "message"),
    [
        (LENGTHS, "other", "its fingerprint is 'abc', this run's is 'other'"),
        ([3, 0, 5], "abc", "its windows is 4, this run's is 3"),
        ([3, 0, 5, 2], "abc", "its tokens is 9, this run's is 10"),
        ([0, 3, 5, 1], "abc", "its lengths_sha256 is "),
    ],
)
def test_another_runs_cache_is_refused(tmp_path: Path, lengths: list[int], name: str, message: str) -> None:
    TeacherCache(tmp_path, LENGTHS, "abc").store(*batch(LENGTHS, [0]))
    with pytest.raises(ValueError, match=f"{message}.*remove it, or choose another --cache-teacher folder"):
        TeacherCache(tmp_path, lengths, name)
    assert TeacherCache(tmp_path, LENGTHS, "abc").filled == 1
    with pytest.raises(ValueError, match="its dtype is 'float32', this run's is 'bfloat16'"):
        TeacherCache(tmp_path, LENGTHS, "abc", dtype="bfloat16")


def test_broken_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for name in (CHECKSUMS, LOGITS):
        TeacherCache(cache, LENGTHS, "abc")
        for size in (os.path.getsize(cache / name) - 1, 0):
            os.truncate(cache / name, size)
            with pytest.raises(ValueError, match=f"{name} has {size} bytes, not .* remove it"):
                TeacherCache(cache, LENGTHS, "abc")
        (cache / name).unlink()
        with pytest.raises(ValueError, match=f"{name} has 0 bytes"):
            TeacherCache(cache, LENGTHS, "abc")
        (cache / METADATA).unlink()  # what a process leaves that was killed while it made the folder
        assert TeacherCache(cache, LENGTHS, "abc").filled == 0
    for content, message in (
        ("{", "is no description of a cache: "),
        ("[]", "its format is None, this run's is 1"),
    ):
        (cache / METADATA).write_text(content)
        with pytest.raises(ValueError, match=message):
            TeacherCache(cache, LENGTHS, "abc")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"is no teacher cache and not empty \(it holds "):
        TeacherCache(tmp_path, LENGTHS, "abc")
    with pytest.raises(ValueError, match="a window has -1 tokens"):
        TeacherCache(tmp_path / "new", [-1], "abc")
    assert not (tmp_path / "new").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    numbers, start, end, mask = batch(LENGTHS, [0, 2])
    for bad in (torch.tensor([4]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=f"no window {bad.item()}: the cache is for 4"):
            cache.logits(bad, 9)
    with pytest.raises(ValueError, match="window 2 has 5 tokens, the batch only 4"):
        cache.logits(numbers, 4)
    with pytest.raises(ValueError, match="the mask is not that of right-padded windows"):
        cache.store(numbers, start, end, mask.flip(1))
    with pytest.raises(ValueError, match="the mask is not that of right-padded windows"):
        cache.store(numbers.flip(0), start, end, mask)
    with pytest.raises(ValueError, match=r"end has shape \(2, 4\), for 2 windows"):
        cache.store(numbers, start, end[:, 1:], mask)
    assert cache.filled == 0


@pytest.mark.parametrize("lost", [slice(0, 4), slice(20, 24), slice(0, 24)])
def test_values_that_a_power_cut_took_count_as_absent(tmp_path: Path, lost: slice) -> None:
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    numbers, start, end, mask = batch(LENGTHS, [0, 2])
    cache.store(numbers, start, end, mask)
    content = bytearray((tmp_path / LOGITS).read_bytes())
    content[lost] = bytes(len(content[lost]))  # the checksum reached the disk, the values' page did not
    with (tmp_path / LOGITS).open("r+b") as file:
        file.write(content)
    assert cache.logits(numbers, 5) is None  # also where another process has it open
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    assert cache.filled == 1 and cache.logits(numbers[1:], 5) is not None
    cache.store(numbers, start, end, mask)
    assert same(cache.logits(numbers, 5), start, end, mask) and cache.filled == 2


def test_a_killed_process_leaves_what_it_stored(tmp_path: Path) -> None:
    code = """
import os, sys, signal, torch
from pathlib import Path
from pruned_trainer.training.teacher_cache import TeacherCache
cache = TeacherCache(Path(sys.argv[1]), [3, 0, 5, 1], "abc")
ones = torch.ones(1, 3)
cache.store(torch.tensor([0]), ones, 2 * ones, ones)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment)
    assert run.returncode == -signal.SIGKILL
    cache = TeacherCache(tmp_path, LENGTHS, "abc")
    found = cache.logits(torch.tensor([0]), 3)
    assert found is not None and found[0].tolist() == [[1] * 3] and found[1].tolist() == [[2] * 3]


def test_many_may_create_and_fill_at_once(tmp_path: Path) -> None:
    lengths, ranks = [50] * 64, 8
    together = Barrier(ranks)

    def work(rank: int) -> TeacherCache:
        together.wait()
        cache = TeacherCache(tmp_path / "cache", lengths, "abc")
        for number in range(rank, 64, ranks):
            cache.store(*batch(lengths, [number], seed=number))
        return cache

    with ThreadPoolExecutor(ranks) as pool:
        caches = list(pool.map(work, range(ranks)))
    assert [cache.filled for cache in caches] == [64] * ranks  # each sees what the others stored
    for number in range(64):
        numbers, start, end, mask = batch(lengths, [number], seed=number)
        assert same(caches[0].logits(numbers, 50), start, end, mask)
    assert len(list((tmp_path / "cache").iterdir())) == 3


class Teacher(nn.Module):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3).bfloat16()
        self.register_buffer("scale", torch.tensor(1.5))
        self.config = type("Config", (), {"to_dict": lambda self: config})()


def test_fingerprint_is_of_teacher_and_windows() -> None:
    torch.manual_seed(0)
    teacher = Teacher(_name_or_path="here", transformers_version="5", layers=2)
    windows = [{"input_ids": np.array(ids, np.int32), "start_positions": 0} for ids in ([1, 2], [3])]
    first = fingerprint(teacher, windows)
    assert len(bytes.fromhex(first)) == 32
    moved = Teacher(_name_or_path="there", transformers_version="6", layers=2)
    moved.load_state_dict(teacher.state_dict())
    lists = [{"input_ids": w["input_ids"].tolist(), "start_positions": 1} for w in windows]
    assert fingerprint(moved, lists) == first
    deeper = Teacher(layers=3)
    deeper.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        moved.linear.bias[0] += 1
    split = [{"input_ids": [1]}, {"input_ids": [2, 3]}]
    typed = [{**window, "token_type_ids": [0] * len(window["input_ids"])} for window in windows]
    others = [fingerprint(m, windows) for m in (deeper, moved)]
    others += [fingerprint(teacher, w) for w in (windows[::-1], windows[:1], split, typed)]
    assert len({first, *others}) == 7


def test_metadata_says_what_the_cache_is(tmp_path: Path) -> None:
    TeacherCache(tmp_path, LENGTHS, "abc")
    read = json.loads((tmp_path / METADATA).read_text())
    assert (read["fingerprint"], read["windows"], read["tokens"]) == ("abc", 4, 9)
    assert (tmp_path / LOGITS).stat().st_size == 2 * 4 * 9


def test_extra_state_of_a_module_is_no_weight() -> None:
    """A state dict may hold a module's own objects beside its tensors."""

    class WithState(Teacher):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 3}

    torch.manual_seed(0)
    plain = Teacher(layers=2)
    stateful = WithState(layers=2)
    stateful.load_state_dict(plain.state_dict(), strict=False)
    assert fingerprint(stateful, []) == fingerprint(plain, [])
    assert digest_of_weights(stateful) == digest_of_weights(plain)
    with torch.no_grad():
        stateful.linear.bias[0] += 1
    assert digest_of_weights(stateful) != digest_of_weights(plain)
