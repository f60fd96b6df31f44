"""The emulator that runs CUDA kernels without a GPU: each instruction against what the PTX manual says of it,
and what it finds, in small kernels made for that (cuda_on_host/planted.cu)."""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_host.build import KERNELS, CompileError, compiled, object_of
from torch import Tensor

from emulated import Emulated, missing
from inputs import generator, randn

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cuda_on_host: {missing()}")

ORDERS = ["ascending", "descending", "random"]
HALVES = [torch.float16, torch.bfloat16]


def planted(
    name: str, buffers: Mapping[str, Tensor], numbers: tuple[int, ...] = (), **settings: Any
) -> dict[str, Any]:
    """Runs a small kernel; it may write the first buffer. What was counted."""
    emulated = Emulated(**settings)
    addresses = [tensor.data_ptr() for tensor in buffers.values()]
    emulated.run("planted", buffers, set(list(buffers)[:1]), name, addresses, list(numbers), name=name)
    return emulated.statistics[0]


def words(*shape: int, seed: int = 0) -> Tensor:
    """Any 32-bit numbers, as int32."""
    return torch.randint(-(2**31), 2**31, shape, generator=generator(seed)).int()


def fails(match: str) -> Any:
    return pytest.raises(RuntimeError, match=match)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_all_16_bit_numbers_and_back(dtype: torch.dtype) -> None:
    patterns = torch.arange(2**16).to(torch.uint16)
    floats, back = torch.zeros(2**16), torch.zeros(2**16, dtype=torch.uint16)
    Emulated().run(
        "planted", {"floats": floats, "back": back}, {"floats", "back"}, "convert",
        [floats.data_ptr(), back.data_ptr()], [int(dtype == torch.bfloat16)],
    )  # fmt: skip
    expected = patterns.view(dtype).float()
    assert torch.equal(floats.isnan(), expected.isnan())
    assert torch.equal(floats.nan_to_num(0), expected.nan_to_num(0))
    number = ~expected.isnan()
    assert torch.equal(back[number], patterns[number])
    assert bool(back.view(dtype)[~number].isnan().all())


def gelu_of(x: Tensor) -> Tensor:
    """By the kernels' function, number by number."""
    whole = torch.cat([x, torch.zeros(-x.numel() % 1024)])
    out = torch.zeros_like(whole)
    planted("gelus", {"out": out, "x": whole}, (whole.numel(),))
    return out[: x.numel()]


def test_gelu_is_exact_to_rounding() -> None:
    """Two million numbers against erfc in fp64: between them evenly, about 0 densely, far out."""
    tiny = torch.logspace(-38, 1, 2**18)
    x = torch.cat([torch.linspace(-12, 12, 2**20), tiny, -tiny, randn(0, 2**19)])
    wide = x.double()
    truth = wide / 2 * torch.special.erfc(-wide * 0.5**0.5)
    error = (gelu_of(x).double() - truth).abs()
    assert x.numel() == 2**21 and float(error.max()) <= 3.5e-7
    small = x.abs() < 0.1  # relatively, too, where fp16 has many numbers
    assert float((error[small] / truth[small].abs().clamp(min=1e-30)).max()) <= 1e-6


def test_gelu_of_what_is_hardly_a_number() -> None:
    inf, nan = torch.inf, torch.nan
    found = gelu_of(torch.tensor([0.0, -0.0, inf, -inf, nan, 3e38, -3e38, 65504.0, -65504.0, 1e-45]))
    expected = torch.tensor([0.0, 0.0, inf, 0.0, nan, 3e38, 0.0, 65504.0, 0.0, 0.0])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-45, equal_nan=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_floats_round_to_nearest_even(dtype: torch.dtype) -> None:
    """Every 16-bit number, halfway to its neighbour, and the floats just beside, of both signs."""
    finite = torch.arange(0x7F80 if dtype == torch.bfloat16 else 0x7C00).to(torch.uint16).view(dtype).float()
    halfway = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    around = torch.cat([halfway, *(halfway.nextafter(torch.tensor(end)) for end in (0.0, torch.inf))])
    ends = [finite[-1].item(), 65519.0, 65520.0, 3.4e38, torch.inf, torch.nan, 1e-45, 1e-40]
    floats = torch.cat([finite, around, torch.tensor(ends)])
    floats = torch.cat([floats, -floats, words(99_999).view(torch.float32)])
    floats = floats[: floats.numel() // 2 * 2]
    out = torch.zeros(floats.numel() // 2, dtype=torch.int32)
    planted("round_pairs", {"out": out, "floats": floats}, (int(dtype == torch.bfloat16), out.numel()))
    expected, found = floats.to(dtype), out.view(dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(found[number].view(torch.uint16), expected[number].view(torch.uint16))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 31])
def test_shuffle_xor(bits: int) -> None:
    numbers, out = randn(0, 64), torch.zeros(64)
    assert planted("shuffle", {"out": out, "numbers": numbers}, (bits,))["shuffles"] == 2
    assert torch.equal(out, numbers[torch.arange(64) ^ bits])


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed: bool) -> None:
    rows = words(32, 4).view(torch.int16)  # 8 numbers each
    out = torch.zeros(32, 4, dtype=torch.int32)
    planted("matrices", {"out": out, "rows": rows}, (8, transposed))
    for lane in range(32):
        for matrix, pair in enumerate(out[lane].view(torch.int16).view(4, 2)):
            own = rows[8 * matrix : 8 * matrix + 8]
            own = own.T if transposed else own
            assert torch.equal(pair, own[lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2])


@pytest.mark.parametrize(("stride", "passes"), [(8, 1), (64, 8), (32, 4), (16, 2), (72, 1), (40, 1)])
def test_bank_conflicts(stride: int, passes: int) -> None:
    """Rows `stride` 16-bit numbers apart; 64 of them are all banks."""
    out, rows = torch.zeros(32, 4, dtype=torch.int32), words(32, 4)
    assert planted("matrices", {"out": out, "rows": rows}, (stride, 0))["bank_conflicts"] == 4 * (passes - 1)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma(dtype: torch.dtype) -> None:
    """Where the PTX manual puts each number of a, b and d; small integers, so that every sum is exact."""
    a, b, d = (torch.randint(-9, 10, size, generator=generator(3)) for size in ((16, 16), (16, 8), (16, 8)))
    lanes_a, lanes_b = torch.zeros(32, 8, dtype=dtype), torch.zeros(32, 4, dtype=dtype)
    lanes_d, expected = torch.zeros(32, 4), torch.zeros(32, 4)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            lanes_a[lane, i] = a[row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)]
        for i in range(4):
            lanes_b[lane, i] = b[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]
            place = (group if i < 2 else group + 8, thread * 2 + (i & 1))
            lanes_d[lane, i], expected[lane, i] = d[place], (a @ b + d)[place]
    counted = planted("multiply", {"d": lanes_d, "a": lanes_a, "b": lanes_b}, (int(dtype == torch.bfloat16),))
    assert counted["multiplications"] == 1
    assert torch.equal(lanes_d, expected)


def test_copies_are_there_after_their_wait_alone() -> None:
    source = torch.arange(64 * 8, dtype=torch.int16)
    seen = torch.zeros(32, 8, dtype=torch.int16)
    assert planted("async", {"seen": seen, "source": source})["async_copies"] == 4 * 32
    first, second = source.view(64, 8)[:32, 7], source.view(64, 8)[32:, 7]
    nan, zero = torch.full_like(first, -1), torch.zeros_like(first)  # 0xffff is NaN
    assert torch.equal(seen.T, torch.stack([nan, nan, first, nan, second, zero, nan, first]))


@pytest.mark.parametrize("count", [32, 96, 1024])
def test_a_missing_barrier_shows_in_every_order(count: int) -> None:
    source = randn(0, count)
    results = set()
    for order in ORDERS:
        out = torch.zeros(count)
        assert planted("reverse", {"out": out, "in": source}, (count, 1), order=order)["barriers"] == 1
        assert torch.equal(out, source.flip(0))
        planted("reverse", {"out": out, "in": source}, (count, 0), order=order)
        assert bool(out.isnan().any())  # what another thread has yet to write
        results.add(tuple(out.nan_to_num(0).tolist()))
    assert len(results) == len(ORDERS)


def test_a_seed_is_an_order() -> None:

    def result(seed: int) -> Tensor:
        out = torch.zeros(256)
        planted("reverse", {"out": out, "in": randn(0, 256)}, (256, 0), order="random", seed=seed)
        return out.nan_to_num(0)

    assert torch.equal(result(1), result(1))
    assert len({tuple(result(seed).tolist()) for seed in range(5)}) > 1


HERE = r"block \(0, 0, 0\)"
AT_BARRIER, AT_SHUFFLE = r"sync_threads at line \d+", r"shuffle_xor at line \d+"
PARTINGS = [
    (0, 40, rf"part, {HERE}, thread \d+: a barrier of two places: threads 0 to 39 wait for {AT_BARRIER}; "
            rf"threads 40 to 63 wait for {AT_BARRIER}"),
    (1, 40, f"thread 40: comes to {AT_SHUFFLE}, others of its warp wait for {AT_SHUFFLE}"),
    (2, 40, f"part: {HERE} waits for ever: threads 0 to 39 wait for {AT_BARRIER}; threads 40 to 63 wait for "
            f"{AT_SHUFFLE}"),
    (3, 63, f"waits for ever: threads 0 to 62 wait for {AT_BARRIER}; thread 63 left"),
]  # fmt: skip


@pytest.mark.parametrize("order", ["ascending", "random"])
@pytest.mark.parametrize(("how", "first", "message"), PARTINGS)
def test_threads_that_wait_for_ever_are_named(how: int, first: int, message: str, order: str) -> None:
    with fails(message if order == "ascending" else "wait for"):
        planted("part", {}, (first, how), order=order)
    planted("nothing", {}, (1, 1, 64, 0))  # and the emulator goes on


def test_accesses_outside_are_named() -> None:
    source, out = randn(0, 40), torch.zeros(80)
    where = r"copy, block \(1, 0, 0\), thread 8: "
    with fails(where + "reads 4 bytes at index 40 of source, which has 40"):
        planted("copy", {"out": out, "source": source}, (60, 0))
    with fails(where + "reads or writes 4 bytes at index 40 of out, which has 40"):
        planted("copy", {"out": out[:40], "source": randn(0, 60)}, (60, 0))
    with fails(r"block \(0, 0, 0\), thread 0: reads 4 bytes at index -3 of source, which has 40"):
        planted("copy", {"out": out, "source": source}, (32, -3))
    with fails("thread 7: reads or writes 4 bytes at index 32 of shared memory, which has 32"):
        planted("touch", {"out": out}, (32,))
    planted("touch", {"out": out}, (31,))
    assert bool(out[0].isnan())  # what nobody wrote


def test_accesses_that_are_not_aligned_or_not_allowed_are_named() -> None:
    source, out = torch.zeros(64).half(), torch.zeros(64).half()
    for shifts, what in (
        ((8, 4), "reads 16 bytes at index 4 of source"),
        ((1, 8), "writes 16 bytes at index 1 of out"),
    ):
        with fails(f"thread 5: {what}, which is not aligned to 16 bytes"):
            planted("copy_128", {"out": out, "source": source}, shifts)
    with fails("reads 16 bytes at index 60 of source, which has 64"):
        planted("copy_128", {"out": out, "source": source}, (0, 60))
    emulated, floats = Emulated(), [torch.zeros(32), torch.zeros(32)]
    call: Callable[..., None] = functools.partial(
        emulated.run, "planted", {"to": floats[0], "from": floats[1]}, set(), "copy"
    )
    with fails("reads or writes 4 bytes at index 0 of to, which is read-only"):
        call([x.data_ptr() for x in floats], [32, 0])
    with fails("reads 4 bytes through a null pointer"):
        call([floats[0].data_ptr(), 0], [32, 0])
    with fails("a pointer to memory that is none of the kernel's buffers"):
        call([floats[0].data_ptr(), torch.zeros(32).data_ptr()], [32, 0])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1, 1, 48, 0), "48 threads in a block"),
        ((1, 1, 1056, 0), "1056 threads in a block"),
        ((1, 1, 32, 200_000), "200000 bytes of shared memory"),
        ((0, 1, 32, 0), r"a grid of \(0, 1, 1\) blocks"),
        ((1, 70_000, 32, 0), r"a grid of \(1, 70000, 1\) blocks"),
    ],
)
def test_launches_that_a_gpu_refuses(numbers: tuple[int, ...], message: str) -> None:
    with fails(message):
        planted("nothing", {}, numbers)


def test_a_stack_overflow_is_named() -> None:
    planted("overflow", {}, (20,))
    with fails(r"overflow, block \(0, 0, 0\), thread 3: stack overflow"):
        planted("overflow", {}, (100_000,))
    planted("overflow", {}, (20,))


def test_faults_of_others_are_theirs() -> None:
    """The handler that names overflows is gone after a launch."""
    planted("overflow", {}, (20,))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        ctypes.string_at(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGSEGV


def test_what_changed_is_compiled_again_and_nothing_else(tmp_path: Path) -> None:
    shutil.copytree(KERNELS, tmp_path, dirs_exist_ok=True)
    sources = sorted(tmp_path.glob("*.cu"))
    before = [object_of(source, tmp_path) for source in sources]
    with (tmp_path / "tile.cuh").open("a") as file:
        file.write("// Another line.\n")
    after = [object_of(source, tmp_path) for source in sources]
    changed = {one.stem for one, old, new in zip(sources, before, after, strict=True) if old != new}
    assert changed == {"attention", "linear_gelu", "linear_add_layer_norm"}


def test_a_warning_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "unused.cpp"
    source.write_text("static int unused() { return 1; }\n")
    with pytest.raises(CompileError, match="unused"):
        compiled(source)
    assert not object_of(source).exists()
