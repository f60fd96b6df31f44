"""glibc's malloc keeps what a training step frees: in processes of their own, because it stays so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pruned_trainer.training import allocator, trainer
from pruned_trainer.training.distillation import Distillation

# Allocates and frees a tensor's worth of memory twice. Prints whether keep_freed_memory refused, whether the
# memory was a part of the heap, and how many bytes the process had in memory after the second free.
SCRIPT = f"""
import ctypes, importlib.util, re
spec = importlib.util.spec_from_file_location("allocator", {allocator.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, size, inside = [ctypes.c_void_p], 100 << 20, []
for _ in range(2):
    address = libc.malloc(size)
    ctypes.memset(address, 1, size)
    heap = re.search("(.*)-(.*) rw.*[[]heap", open("/proc/self/maps").read())
    inside.append(int(heap[1], 16) <= address < int(heap[2], 16))
    libc.free(address)
print(inside == [True, True])
print(int(open("/proc/self/statm").read().split()[1]) * 4096 > size)
"""

pytestmark = pytest.mark.skipif(allocator._glibc() is None, reason="the C library is not glibc")


def lines(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_freed_memory_is_kept() -> None:
    assert lines({}) == ["None", "True", "True"]


def test_the_switch_leaves_the_allocator_alone() -> None:
    assert lines({allocator.SWITCH: "0"}) == [f"{allocator.SWITCH} is 0", "False", "False"]


def test_another_allocator_is_left_alone(tmp_path: Path) -> None:
    """A library in front of the C library whose malloc is its own, as jemalloc's is."""
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(
        "#include <stddef.h>\nextern void *__libc_malloc(size_t);\n"
        "void *malloc(size_t size) { return __libc_malloc(size); }\n"
    )
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    except FileNotFoundError:
        pytest.skip("there is no C compiler")
    refusal = "malloc is another allocator's than glibc's"
    assert lines({"LD_PRELOAD": str(library)}) == [refusal, "False", "False"]


class Kept(Exception):
    pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_on_a_cpu_begins_with_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> None:
        raise Kept

    monkeypatch.setattr(trainer, "keep_freed_memory", kept)
    settings: Any = SimpleNamespace(
        n_gpu=0, device=torch.device(device), label_smoothing_factor=0.0, optim="adamw_torch"
    )
    # On a GPU it goes on, to where the stand-in for a model is missed.
    with pytest.raises(Kept if device == "cpu" else AttributeError):
        trainer.PruningTrainer(cast(Any, None), settings, Distillation.none())
