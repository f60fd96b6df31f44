"""The CUDA kernels in the emulator against the reference: odd shapes, views, wrong values, three orders.

`make test` runs a part of the cases, `make test-all` all of them (PRUNED_OPS_TEST_ALL=1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from emulated import Emulated, missing
from inputs import LENGTHS, arguments_for, attention_arguments, constant_rows, cu_seqlens, generator, randn
from numerics import in_fp64, within_budget
from pruned_ops.ops.registry import OPS
from thorough import EVERYTHING

pytestmark = pytest.mark.skipif(missing() is not None, reason=f"cuda_on_host: {missing()}")

ORDERS = ["ascending", "descending", "random"]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = {
    "attention": HALVES,
    "linear_gelu": HALVES,
    "linear_add_layer_norm": HALVES,
    "add_layer_norm": [torch.float32, *HALVES],
    "embed_layer_norm": [torch.float32, *HALVES],
}
ON_EACH = [pytest.param(op, dtype, id=f"cuda-{op}-{dtype}") for op in DTYPES for dtype in DTYPES[op]]
# The large tile is chosen where it makes a block for each of them.
MULTIPROCESSORS = [1, 1000]


@dataclass(frozen=True)
class Case:
    """One op's arguments, made when they are needed."""

    label: str
    make: Callable[[], list[Any]]


def case(make: Callable[..., list[Any]], *sizes: Any) -> Case:
    return Case(f"{sizes}", partial(make, *sizes))


def attention_cases() -> Iterator[Case]:
    lengths = [*LENGTHS, (64,), (128, 64), (31, 32, 33, 1), (16,) * 5, (127, 129)]
    if EVERYTHING:
        lengths += [(n,) for n in (2, 3, 8, 61, 62, 66, 80, 81, 95, 96, 97, 112, 191, 192, 193, 256, 320)]
        lengths += [(300, 0, 5), tuple(range(40)), (1,) * 70]
    for some, heads, head_dim in itertools.product(lengths, (0, 1, 3, 12), (32, 64, 128)):
        if sum(some) * heads * head_dim < (100_000 if EVERYTHING else 30_000):
            yield case(attention_arguments, some, heads, head_dim)
    yield case(attention_arguments, (511, 130), 1, 64)


def row_cases(op: str) -> Iterator[Case]:
    """A warp a row, and a block; 16 bytes at once and number by number."""
    hidden = [1, 2, 7, 8, 16, 31, 33, 90, 255, 256, 257, 384, 768]
    hidden += [1000, 1023, 1024, 1025, 1032, 4096, 8191, 8192]
    tokens = [0, 1, 3, 4, 5, 37]
    if EVERYTHING:
        hidden += [3, 4, 5, 9, 24, 64, 72, 127, 128, 129, 511, 512, 513, 640, 1031, 1536, 2048, 2050, 6000]
        tokens += [2, 8, 64, 130]
    for some, count in itertools.product(hidden, tokens):
        if some * count <= 100_000:
            yield case(arguments_for, op, count, some)


def linear_cases(op: str) -> Iterator[Case]:
    """Inner sizes around the steps of 32, widths around tiles of 64 and 128, tokens too."""
    inner, outer, tokens = [1, 8, 16, 31, 90, 200], [1, 8, 56, 72, 130, 384], [0, 1, 37, 65]
    if EVERYTHING:
        inner = [0, 1, 7, 8, 24, 31, 32, 33, 64, 90, 104, 200]
        # LayerNorm of three numbers may blow up a rounding as far as it likes.
        outer = [1, 3 if op == "linear_gelu" else 7, 8, 56, 63, 64, 65, 72, 127, 128, 129, 200]
        tokens = [0, 1, 37, 64, 65, 128, 129]
    for ins, outs, count in itertools.product(inner, outer, tokens):
        sizes = (count, ins, outs) if op == "linear_gelu" else (count, outs, ins)
        yield case(arguments_for, op, *sizes)
    yield case(arguments_for, op, 150, 390, 264)
    yield case(arguments_for, op, 150, 392, 264)


def cases(op: str) -> list[Case]:
    if op == "attention":
        return list(attention_cases())
    return list(linear_cases(op) if "linear" in op else row_cases(op))


def chips(op: str, index: int) -> list[int]:
    """Numbers of multiprocessors that case `index` runs with."""
    every = MULTIPROCESSORS if "linear" in op else MULTIPROCESSORS[:1]
    return every if EVERYTHING else [every[index % len(every)]]


def converted(arguments: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def run(op: str, arguments: Sequence[Any], **settings: Any) -> Tensor:
    """The op in the emulator; no ldmatrix of it may meet a bank conflict."""
    emulated = Emulated(**settings)
    output: Tensor = getattr(emulated, op)(*arguments)
    assert not [launch for launch in emulated.statistics if launch["bank_conflicts"]]
    return output


@pytest.mark.parametrize(("op", "dtype"), ON_EACH)
def test_cuda_op(op: str, dtype: torch.dtype) -> None:
    """Within its budget in one order of threads, and the same bits in the others."""
    for index, one in enumerate(cases(op)):
        arguments = converted(one.make(), dtype)
        for multiprocessors in chips(op, index):
            try:
                first, *others = (
                    run(op, arguments, order=order, seed=index, multiprocessors=multiprocessors)
                    for order in ORDERS
                )
                within_budget(op, first, arguments)
                assert all(torch.equal(first, other) for other in others), "the order of threads shows"
            except Exception as error:
                error.add_note(f"{op} of {one.label}, {dtype}, {multiprocessors} multiprocessors")
                raise


def test_how_many_cuda_cases_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """A case: one op, shape, dtype, order of threads and size of tiles."""
    count = len(ORDERS) * sum(
        len(chips(op, index))
        for op, dtypes in DTYPES.items()
        for _ in dtypes
        for index, _ in enumerate(cases(op))
    )
    with capsys.disabled():
        print(f"\n{count} cases of the CUDA kernels in the emulator", end=" ")
    assert count >= (20_000 if EVERYTHING else 4_000)


SAME = [
    ("attention", partial(attention_arguments, (130, 1, 70), 2, 32)),
    ("attention", partial(attention_arguments, (200,), 1, 64)),
    ("attention", partial(attention_arguments, (65,), 1, 128)),
    ("linear_gelu", partial(arguments_for, "linear_gelu", 130, 200, 136)),
    ("linear_gelu", partial(arguments_for, "linear_gelu", 70, 90, 72)),
    ("add_layer_norm", partial(arguments_for, "add_layer_norm", 9, 384)),
    ("add_layer_norm", partial(arguments_for, "add_layer_norm", 9, 2048)),
    ("linear_add_layer_norm", partial(arguments_for, "linear_add_layer_norm", 70, 90, 72)),
    ("embed_layer_norm", partial(arguments_for, "embed_layer_norm", 9, 90)),
]


@pytest.mark.parametrize(("op", "make"), SAME, ids=[f"cuda-{i}-{op}" for i, (op, _) in enumerate(SAME)])
def test_the_order_of_threads_changes_no_bit(op: str, make: Callable[[], list[Any]]) -> None:
    for dtype, multiprocessors in itertools.product(DTYPES[op], MULTIPROCESSORS):
        arguments = converted(make(), dtype)
        settings = [{"order": order} for order in ORDERS] + [{"order": "random", "seed": n} for n in (1, 2)]
        outputs = [run(op, arguments, multiprocessors=multiprocessors, **each) for each in settings]
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def views(x: Tensor) -> Iterator[Tensor]:
    """The same numbers elsewhere: off by one, rows apart with NaN between, aligned too, and columns first."""
    yield torch.full((x.numel() + 1,), torch.nan, dtype=x.dtype)[1:].view(x.shape).copy_(x)
    if x.dim() == 2:
        for before, after in ((1, 2), (8, 8)):
            wide = torch.full((x.size(0), before + x.size(1) + after), torch.nan, dtype=x.dtype)
            yield wide[:, before:-after].copy_(x)
        yield x.t().contiguous().t()


@pytest.mark.parametrize(("op", "dtype"), ON_EACH)
def test_cuda_views(op: str, dtype: torch.dtype) -> None:
    makers = [partial(arguments_for, op, 37, hidden, 56) for hidden in (90, 96)]
    if op == "attention":
        makers = [partial(attention_arguments, (20, 17), 2, head_dim) for head_dim in (32, 64)]
    for make in makers:
        arguments = converted(make(), dtype)
        for place, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.is_floating_point():
                for view in views(argument):
                    changed = [*arguments[:place], view, *arguments[place + 1 :]]
                    within_budget(op, run(op, changed), arguments)


@pytest.mark.parametrize("dtype", DTYPES["add_layer_norm"], ids=str)
def test_cuda_add_layer_norm_without_bias(dtype: torch.dtype) -> None:
    for hidden in (1, 90, 384, 2048):
        arguments = converted(arguments_for("add_layer_norm", 9, hidden), dtype)
        arguments[1] = None
        within_budget("add_layer_norm", run("add_layer_norm", arguments), arguments)


@pytest.mark.parametrize("hidden", [1, 90, 384, 1032, 2047])
@pytest.mark.parametrize("op", ["add_layer_norm", "embed_layer_norm"])
def test_cuda_layer_norm_of_constant_rows(op: str, hidden: int) -> None:
    """The rounding of a large mean is no variance: a constant row becomes the LayerNorm's bias."""
    for value in (1e4 + 0.1, 123456789.0, -3.3e9):
        arguments = constant_rows(op, hidden, value)
        output = run(op, arguments)
        torch.testing.assert_close(output, arguments[-2].expand_as(output), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cuda_attention_survives_large_scores(dtype: torch.dtype) -> None:
    for scale in (12.0, 1e-3):  # scores of thousands, and all about the same
        arguments = converted(attention_arguments((70, 9), 2, 32), dtype)
        arguments[0][:, :128] *= scale
        output = run("attention", arguments)
        assert torch.isfinite(output).all()
        within_budget("attention", output, arguments)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cuda_attention_of_the_largest_scores(dtype: torch.dtype) -> None:
    """Their softmax is 1 for one key. In fp16 the reference overflows, so that there is no budget."""
    arguments = converted(attention_arguments((70, 9), 2, 32), dtype)
    arguments[0][:, :128] *= 1.2e4 if dtype == torch.float16 else 1e16
    truth = OPS["attention"].reference(*in_fp64(arguments))
    torch.testing.assert_close(run("attention", arguments).double(), truth, atol=0, rtol=0)


def test_what_the_cuda_kernels_refuse() -> None:
    with pytest.raises(ValueError, match="head_dim is none of 32, 64 and 128"):
        run("attention", converted(attention_arguments((5,), 1, 48), torch.float16))
    for op in ("attention", "linear_gelu", "linear_add_layer_norm"):
        arguments = attention_arguments((5,), 1, 64) if op == "attention" else arguments_for(op)
        with pytest.raises(ValueError, match="the dtype is neither float16 nor bfloat16"):
            run(op, arguments)


def test_a_sequence_alone_is_the_same_in_a_cuda_batch() -> None:
    qkv, _, _, head_dim = converted(attention_arguments((5, 70, 130), 3, 32), torch.float16)
    together = run("attention", [qkv, cu_seqlens((5, 70, 130)), 130, head_dim])
    alone = run("attention", [qkv[5:75], cu_seqlens((70,)), 70, head_dim])
    assert torch.equal(together[5:75], alone)


WRONG = [
    (0, 20, 920), (0, 20, 30), (-5, 20, 40), (40, 20, 0), (0, 30, 10, 40), (41, 41), (-(2**31), 2**31 - 1),
    (2**31 - 1, -(2**31)), (7,), (0, 0, 0), (39, 1_000_000, 3),
]  # fmt: skip


@pytest.mark.parametrize("head_dim", [32, 64, 128])
def test_wrong_cu_seqlens_lead_nowhere(head_dim: int) -> None:
    """The emulator refuses any access outside the tensors, and the output is watched."""
    qkv = randn(0, 40, 3 * 2 * head_dim).half()
    for bounds, longest in itertools.product(WRONG, (0, 1, 40, 64, 1000)):
        run("attention", [qkv, torch.tensor(bounds, dtype=torch.int32), longest, head_dim])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_cuda_embed_layer_norm_takes_any_ids(dtype: torch.dtype) -> None:
    """Of both widths; outside their table they are taken as the nearest inside."""
    for hidden in (90, 96, 2048):
        arguments = converted(arguments_for("embed_layer_norm", 9, hidden), torch.float16)
        for place in range(3):
            ids = torch.randint(-(2**31), 2**31 - 1, (9,), generator=generator(place))
            if dtype == torch.int64:
                ids *= 2**20
            wrong = [
                a.to(dtype) if isinstance(a, Tensor) and a.dtype == torch.int64 else a for a in arguments
            ]
            wrong[place] = ids.to(dtype)
            nearest = list(arguments)
            nearest[place] = ids.clamp(0, arguments[place + 3].size(0) - 1)
            within_budget("embed_layer_norm", run("embed_layer_norm", wrong), nearest)
